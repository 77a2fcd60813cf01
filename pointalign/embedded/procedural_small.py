"""Procedural small things: switches and sockets, tableware, electronics.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS
from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, disc, lathe, lean, prism, ring, rod, surface, tube,
)  # fmt: skip

METAL = PLAIN[:2]
FOOD = ((0.85, 0.3, 0.15), (0.9, 0.7, 0.2), (0.3, 0.5, 0.15), (0.75, 0.1, 0.12), (0.9, 0.5, 0.15))


def wall_plate(u: Draw) -> tuple[list[Part], list[float], float, tuple[float, float, float]]:
    """The plate of switches and sockets: its parts, the middles of its fields, their side and their colour."""
    plate, fields, side, t = u.colour(METAL, PLAIN, GLASS), u.pick(1, 1, 1, 2, 3), u(0.055, 0.075), u(0.008, 0.03)
    w, h = side * (fields + 0.3), side * u(1.2, 1.4)
    inner = plate if u.chance(0.5) else u.colour(PLAIN)
    parts = [box(w, h, t, 0, -h / 2, 0, plate)]
    if u.chance(0.5):
        parts.append(box(w * 0.93, h * 0.93, t, 0, -h * 0.465, t * 0.3, plate))
    middles = [side * (n + 0.5 - fields / 2) for n in range(fields)]
    return parts, middles, side, inner


def socket(u: Draw) -> list[Part]:
    parts, middles, side, inner = wall_plate(u)
    kind, hole, front = u.integer(0, 3), u.colour(PLAIN[2:]), parts[-1].at[2] + parts[-1].size[2] / 2
    for x in middles:
        if kind == 0:  # round, with two holes
            parts.append(disc(side * 0.7, side * 0.7, 0.004, x, 0, front, inner))
            parts += [disc(0.009, 0.009, 0.007, x + sign * side * 0.15, 0, front, hole) for sign in (-1, 1)]
        elif kind == 1:  # a round hollow
            parts.append(ring(side * 0.35, 0.006, (x, 0, front), inner))
            parts.append(disc(side * 0.65, side * 0.65, 0.002, x, 0, front, u.colour(PLAIN)))
            parts += [disc(0.009, 0.009, 0.005, x + sign * side * 0.15, 0, front, hole) for sign in (-1, 1)]
        elif kind == 2:  # a square field with upright or lying slots
            parts.append(box(side * 0.75, side * 0.75, 0.004, x, -side * 0.37, front, inner))
            for sign in (-1, 1):
                parts.append(box(0.005, 0.014, 0.008, x + sign * side * 0.16, -0.005, front, hole))
            parts.append(box(0.008, 0.008, 0.008, x, u.pick(-0.022, 0.014), front, hole))
        else:  # a plug for an aerial or a telephone
            parts.append(box(side * 0.75, side * 0.75, 0.004, x, -side * 0.37, front, inner))
            if u.chance(0.5):
                parts.append(box(0.014, 0.012, 0.008, x, -0.006, front, hole))
            else:
                parts += [
                    disc(0.014, 0.014, 0.01, x, y, front, hole) for y in ((-0.014, 0.014) if u.chance(0.6) else (0.0,))
                ]
    return parts


def switch(u: Draw) -> list[Part]:
    parts, middles, side, inner = wall_plate(u)
    kind, front = u.integer(0, 3), parts[-1].at[2] + parts[-1].size[2] / 2
    wide, tilt, accent = side * u(0.6, 0.85), u(-0.12, 0.12), u.colour(PLAIN, BRIGHT)
    for x in middles:
        if kind == 3:  # a knob
            r = side * u(0.3, 0.6)
            parts.append(disc(r, r, u(0.01, 0.025), x, 0, front, inner, u(0.7, 1)))
            parts.append(box(r * 0.12, r * 0.4, 0.03, x, r * 0.05, front, accent))
            continue
        halves = 2 if kind == 1 else 1
        for n in range(halves):
            at = x + wide * ((n + 0.5) / halves - 0.5)
            parts.append(box(wide / halves * 0.94, wide * u(0.95, 1.05), 0.012, at, -wide / 2, front, inner, tilt))
        if kind == 2:
            parts.append(box(wide * 0.2, wide * 0.35, 0.02, x, -wide * 0.17, front, accent, tilt * 2))
        elif u.chance(0.3):
            parts.append(box(0.006, 0.004, 0.016, x, wide * u(-0.3, 0.3), front, accent))
    return parts


def vase(u: Draw) -> list[Part]:
    clay, h = u.colour(BRIGHT, PLAIN, WOOD, GLASS), u(0.2, 0.45)
    kind, r = u.integer(0, 3), h * u(0.16, 0.4)
    if kind == 0:  # a belly and a neck
        share, neck, rim = u(0.3, 0.6), r * u(0.25, 0.6), r * u(0.4, 0.9)
        points = [(r * u(0.4, 0.7), 0), (r * 0.85, h * share * 0.5), (r, h * share), (r * 0.8, h * (share + 0.2))]
        points += [(neck, h * 0.88), (rim, h), (rim * 0.85, h)]
    elif kind == 1:  # straight or flaring
        low = r * u(0.6, 1)
        points = [(low, 0), ((low + r) / 2, h * 0.5), (r, h), (r * 0.92, h), (low * 0.9, h * 0.1), (0, h * 0.1)]
    elif kind == 2:  # a sphere
        points = [(r * math.sin(a), h * 0.5 - h * 0.5 * math.cos(a)) for a in np.linspace(0.4, 2.6, 10)]
        points += [(points[-1][0] * 0.85, h * 0.9)]
    else:  # a bottle's long neck
        neck = r * u(0.15, 0.35)
        points = [(r * 0.5, 0), (r, h * 0.2), (r * 0.9, h * 0.35), (neck, h * 0.55), (neck, h * 0.93), (neck * 1.5, h)]
    parts = [lathe([(0, 0), *points], clay, flat=1.0 if u.chance(0.85) else u(0.5, 0.8))]
    if u.chance(0.35):
        n = u.integer(1, 3)
        (r0, y0), (r1, y1) = points[n - 1], points[n]
        parts.append(lathe([(r0 * 1.02, y0), (r1 * 1.02, y1)], u.colour(BRIGHT, PLAIN)))
    if u.chance(0.15):
        for side in (-1, 1):
            path = arc(r * 0.5, -math.pi / 2, math.pi / 2, h * 0.2) * np.array([side, 1, 1])
            parts.append(tube(path, 0.015, clay, (side * r * 0.7, h * 0.65, 0)))
    return parts


def bowl(u: Draw) -> list[Part]:
    clay, r, h = u.colour(PLAIN[:1], BRIGHT, WOOD, GLASS, PLAIN), u(0.08, 0.2), u(0.3, 0.75)
    h, wall, curve = h * r * 1.2, r * u(0.05, 0.12), u(1.5, 3.5)
    outside = [(r * t, h * t**curve + 0.004) for t in np.linspace(0.3, 1, 7)]
    parts = [lathe([(0, 0), (r * 0.3, 0), *outside, *[(x - wall, y) for x, y in outside[::-1]], (0, 0.02)], clay)]
    if u.chance(0.4):
        parts.append(cone(r * 0.9, h * 0.12, r * 0.9, 0, -h * 0.12, 0, clay, 0.9))
    if u.chance(0.4):
        for _ in range(u.integer(5, 14)):
            size, angle, away = r * u(0.2, 0.5), u(0, 2 * math.pi), r * u(0, 0.6)
            food = u.colour(FOOD)
            parts.append(
                ball(
                    size, size * u(0.4, 1), size, away * math.cos(angle), h * u(0.5, 0.8), away * math.sin(angle), food
                )
            )
    return parts


def handle(u: Draw, r: float, low: float, high: float, colour) -> Part:
    path = arc(u(0.5, 0.8) * r, -math.pi / 2, math.pi / 2, (high - low) / 2)
    return tube(path, r * u(0.12, 0.25), colour, (r * 0.97, (low + high) / 2, 0))


def mug(u: Draw) -> list[Part]:
    clay, r = u.colour(PLAIN, BRIGHT, WOOD), u(0.035, 0.05)
    h = r * u(1.8, 2.8)
    low = r * u(0.8, 1)
    parts = [lathe([(0, 0), (low, 0), (r, h * 0.5), (r, h), (r * 0.9, h), (low * 0.9, 0.01), (0, 0.01)], clay)]
    if u.chance(0.85):
        parts.append(handle(u, r, h * 0.2, h * 0.85, clay))
    if u.chance(0.3):
        parts.append(cone(2.02 * r, h * 0.15, 2.02 * r, 0, h * u(0.5, 0.7), 0, u.colour(BRIGHT, PLAIN)))
    return parts


def cup(u: Draw) -> list[Part]:
    clay = u.colour(PLAIN[:1], PLAIN, BRIGHT)
    if u.chance(0.4):  # a paper cup
        r, h = u(0.03, 0.04), u(0.1, 0.15)
        parts = [cone(2 * r, h, 2 * r, 0, 0, 0, clay, u(1.2, 1.5))]
        if u.chance(0.6):
            parts.append(cone(3 * r, 0.01, 3 * r, 0, h, 0, u.colour(PLAIN)))
        if u.chance(0.5):
            parts.append(cone(2.5 * r, h * 0.4, 2.5 * r, 0, h * 0.3, 0, u.colour(WOOD, BRIGHT), 1.15))
        return parts
    r, h, low = u(0.04, 0.055), u(0.045, 0.08), u(0.4, 0.7)
    points = [(r * low, 0), (r * 0.85, h * 0.4), (r, h), (r * 0.93, h), (r * 0.8, h * 0.45)]
    parts = [lathe([(0, 0), *points, (0, h * 0.1)], clay), handle(u, r, h * 0.2, h * 0.85, clay)]
    if u.chance(0.7):
        wide = r * u(1.6, 2)
        parts.append(lathe([(0, -0.01), (wide * 0.5, -0.01), (wide, 0.008), (wide * 0.5, 0)], clay))
    if u.chance(0.6):
        parts.append(cone(r * 1.75, 0.002, r * 1.75, 0, h * 0.75, 0, u.colour(WOOD[1:2], PLAIN[3:])))
    return parts


def glass(u: Draw) -> list[Part]:
    colour, r = u.colour(GLASS, ((0.5, 0.65, 0.62),), PLAIN[:2]), u(0.03, 0.045)
    h, kind = r * u(1.8, 4), u.integer(0, 2)
    if kind:
        low = r * u(0.7, 1)
        parts = [lathe([(0, 0), (low, 0), (r, h), (r * 0.94, h), (low * 0.92, 0.01), (0, 0.01)], colour)]
    else:  # with a stem
        stem, round_, top = u(0.05, 0.1), h * u(0.7, 1), u(0.65, 1)
        profile = [(0, 0), (r * 0.9, 0), (0.005, 0.008), (0.004, stem), (r * 0.7, stem + round_ * 0.2)]
        profile += [(r, stem + round_ * 0.5), (r * top, stem + round_), (r * top * 0.95, stem + round_)]
        parts = [lathe(profile, colour)]
    if u.chance(0.3):
        y = 0.015 if kind else stem + round_ * 0.2
        parts.append(cone(r * 1.5, h * 0.4, r * 1.5, 0, y, 0, u.colour(FOOD, WOOD, GLASS), 1.1))
    return parts


def jar(u: Draw) -> list[Part]:
    clay, r = u.colour(GLASS, WOOD, PLAIN, BRIGHT), u(0.05, 0.1)
    h, bulge, neck = r * u(1.4, 2.6), u(0.95, 1.25), u(0.6, 0.95)
    points = [(r * 0.85, 0), (r * bulge, h * 0.3), (r * bulge, h * 0.65), (r * neck, h * 0.9), (r * neck, h)]
    parts = [lathe([(0, 0), *points], clay)]
    if u.chance(0.6):
        cap = u.colour(PLAIN, BRIGHT, WOOD)
        parts.append(cone(2.1 * r * neck, h * u(0.08, 0.2), 2.1 * r * neck, 0, h, 0, cap))
        parts += [ball(r * 0.4, r * 0.4, r * 0.4, 0, h * 1.1, 0, cap)] if u.chance(0.3) else []
    else:
        parts.append(lathe([(r * neck, h), (r * neck * 1.1, h), (r * neck * 0.9, h * 0.95), (0, h * 0.3)], clay))
    return parts


def pot(u: Draw) -> list[Part]:
    metal, r = u.colour(PLAIN, BRIGHT, METAL), u(0.09, 0.16)
    h, lid = r * u(0.8, 1.8), u.chance(0.7)
    points = [(0, 0), (r * 0.95, 0), (r, h * 0.1), (r * u(0.97, 1.1), h), (r * 0.95, h)]
    parts = [lathe(points if lid else [*points, (r * 0.93, h * 0.05), (0, h * 0.05)], metal)]
    grip = u.colour(PLAIN[1:]) if u.chance(0.6) else metal
    if lid:
        cover = u.colour(BRIGHT, PLAIN, GLASS) if u.chance(0.5) else metal
        parts.append(
            lathe([(r * 1.05, h), (r * 1.05, h + 0.008), (r * 0.6, h + r * 0.2), (0, h + r * u(0.22, 0.35))], cover)
        )
        parts.append(ball(r * 0.3, r * 0.25, r * 0.3, 0, h + r * 0.28, 0, grip))
    flat = lean(math.pi / 2)
    for side in (-1, 1):
        path = arc(r * 0.35, -math.pi / 2, math.pi / 2) * np.array([side, 1, 1])
        parts.append(tube(path, r * 0.14, grip, (side * r * 0.98, h * 0.8, 0), flat))
    return parts


def pan(u: Draw) -> list[Part]:
    if u.chance(0.25):
        return pot(u)
    metal, grip, r = u.colour(PLAIN[1:], METAL), u.colour(PLAIN[2:], WOOD), u(0.1, 0.16)
    h, long = r * u(0.25, 0.9), r * u(1, 1.8)
    points = [(0, 0), (r * 0.85, 0), (r, h), (r * 0.96, h), (r * 0.82, 0.008), (0, 0.008)]
    parts = [
        lathe(points, metal),
        rod((r * 0.95, h * 0.85, 0), (r + long, h * u(0.9, 1.6), 0), r * 0.16, grip, u(0.9, 1.3), flat=1.4),
    ]
    if u.chance(0.25):
        parts.append(lathe([(r, h), (r * 0.6, h + r * 0.15), (0, h + r * 0.2)], u.colour(GLASS, METAL)))
        parts.append(ball(r * 0.2, r * 0.2, r * 0.2, 0, h + r * 0.2, 0, grip))
    return parts


def kettle(u: Draw) -> list[Part]:
    metal, grip, r = u.colour(BRIGHT, METAL, PLAIN), u.colour(PLAIN[2:], WOOD), u(0.07, 0.11)
    tall = u.chance(0.4)
    h = r * (u(1.8, 2.4) if tall else u(1.1, 1.6))
    low, waist = u(0.85, 1), u(0.6, 0.95) if tall else 1.0
    points = [(r * low, 0), (r * waist, h * 0.5), (r * u(0.6, 0.9), h * 0.85), (r * 0.4, h)]
    parts = [lathe([(0, 0), *points, (0, h * 1.03)], metal), ball(r * 0.25, r * 0.25, r * 0.25, 0, h * 1.02, 0, grip)]
    parts.append(rod((r * 0.8, h * u(0.4, 0.6), 0), (r * 1.45, h * u(0.85, 1.05), 0), r * 0.3, metal, u(0.4, 0.8)))
    if tall or u.chance(0.3):
        path = arc(r * 0.7, math.pi / 2, 1.5 * math.pi, h * 0.38)
        parts.append(tube(path, r * 0.2, grip, (-r * 0.75, h * 0.5, 0)))
    else:
        parts.append(tube(arc(r * 0.8, 0, math.pi, r * u(0.8, 1.1)), r * 0.18, grip, (0, h * 0.75, 0)))
    return parts


def teapot(u: Draw) -> list[Part]:
    clay, r = u.colour(PLAIN[:1], BRIGHT, WOOD, PLAIN), u(0.07, 0.1)
    h = r * u(1.2, 1.8)
    points = [(r * 0.6, 0), (r, h * 0.4), (r * 0.85, h * 0.75), (r * 0.4, h), (r * 0.3, h * 1.08)]
    parts = [lathe([(0, 0), *points, (0, h * 1.1)], clay), ball(r * 0.25, r * 0.25, r * 0.25, 0, h * 1.1, 0, clay)]
    spout = np.array([(0.85, 0.3, 0), (1.15, 0.4, 0), (1.3, 0.65, 0), (1.4, 0.95, 0), (1.6, 1.0, 0)]) * (r, h, 1)
    parts.append(tube(spout, r * 0.28, clay))
    path = arc(r * 0.6, math.pi / 2, 1.5 * math.pi, h * 0.33)
    return [*parts, tube(path, r * 0.17, clay, (-r * 0.85, h * 0.5, 0))]


def plate(u: Draw) -> list[Part]:
    clay, r, h = u.colour(PLAIN[:1], PLAIN, BRIGHT, GLASS), u(0.08, 0.15), u(0.01, 0.03)
    flat = 1.0 if u.chance(0.85) else u(0.6, 0.8)
    ring_ = u(0.6, 0.8)
    profile = [
        (0, 0),
        (r * ring_ * 0.9, 0),
        (r * ring_, h * 0.5),
        (r, h),
        (r, h + 0.003),
        (r * ring_ * 0.9, 0.006),
        (0, 0.005),
    ]
    parts = [lathe(profile, clay, flat=flat)]
    if u.chance(0.3):
        parts.append(lathe([(r, h + 0.004), (r * 0.9, h * 0.85 + 0.004)], u.colour(BRIGHT, PLAIN), flat=flat))
    return parts


def tray(u: Draw) -> list[Part]:
    colour, w, d, h = u.colour(PLAIN, BRIGHT, WOOD, METAL), u(0.28, 0.5), u(0.2, 0.38), u(0.015, 0.08)
    kind = u.integer(0, 2)
    if kind == 0:
        parts = [box(w, 0.008, d, 0, 0, 0, colour)]
        parts += [box(0.01, h, d, side * w / 2, 0, 0, colour) for side in (-1, 1)]
        parts += [box(w, h, 0.01, 0, 0, side * d / 2, colour) for side in (-1, 1)]
        if u.chance(0.4):
            path = arc(d * 0.15, 0, math.pi, h * 0.8)[:, [2, 1, 0]]
            parts += [tube(path, 0.015, u.colour(PLAIN, WOOD), (side * w / 2, h, 0)) for side in (-1, 1)]
        return parts
    x, z = np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 9))
    if kind == 1:  # bent
        power = u.pick(2, 4, 6)
        y = h * np.maximum(np.abs(x), np.abs(z)) ** power
        return [surface(np.stack([x * w / 2, y + lift, z * d / 2], axis=2), colour) for lift in (0, 0.006)]
    r = w / 2
    return [
        lathe(
            [(0, 0), (r * 0.95, 0), (r, h), (r * 0.97, h), (r * 0.93, 0.006), (0, 0.006)],
            colour,
            flat=u.pick(1.0, d / w),
        )
    ]


def knife(u: Draw) -> list[Part]:
    metal, grip, long, wide = u.colour(METAL), u.colour(PLAIN, WOOD, METAL), u(0.1, 0.2), u(0.018, 0.045)
    if u.chance(0.3):
        grip = metal
    outline = [(0, 0), (long * 0.8, 0), (long, wide * u(0.3, 1)), (long * 0.7, wide), (0, wide)]
    flat = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=float)  # the blade lies: its outline is in z-x
    parts = [prism(outline, u(0.0015, 0.004), metal, (0, 0.008, 0), flat)]
    hold = long * u(0.5, 0.9)
    middle = wide * 0.5
    parts.append(
        rod((middle, 0.008, 0), (middle, 0.008, -hold), wide * u(0.5, 0.9), grip, u(0.8, 1.2), flat=u(0.4, 0.9))
    )
    return parts


def pencil(u: Draw) -> list[Part]:
    body, long, t, tip = u.colour(BRIGHT, PLAIN), u(0.1, 0.18), u(0.007, 0.011), u.colour(WOOD, PLAIN)
    parts = [rod((0, 0, 0), (0, 0, long), t, body), rod((0, 0, long), (0, 0, long + t * u(1.2, 3)), t, tip, 0.15)]
    if u.chance(0.6):
        parts.append(rod((0, 0, -t * u(1, 3)), (0, 0, 0), t * u(0.9, 1.1), u.colour(BRIGHT, PLAIN), 1.0))
    if u.chance(0.4):
        parts += [rod((0, t * 0.6, 0), (0, t * 0.6, long * 0.3), t * 0.3, u.colour(PLAIN))]
    return parts


SMALL: dict[str, Callable[[Draw], list[Part]]] = {
    "bowl": bowl, "cup": cup, "glass": glass, "jar": jar, "kettle": kettle, "knife": knife, "mug": mug, "pan": pan,
    "pencil": pencil, "plate": plate, "pot": pot, "socket": socket, "switch": switch, "teapot": teapot, "tray": tray,
    "vase": vase,
}  # fmt: skip

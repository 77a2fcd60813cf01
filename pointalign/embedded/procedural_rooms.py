"""Procedural fittings and machines of kitchens, bathrooms and living rooms.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import case
from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, arc, box, cone, disc, lathe, lean, moved, prism, ring, rod, surface,
    tube,
)  # fmt: skip

WHITE, METAL = PLAIN[:1], PLAIN[:2]
BLACK = PLAIN[3]


def tap(u: Draw, size: float, x: float, y: float, z: float) -> list[Part]:
    """A tap that bends to the front."""
    metal, thick = u.colour(PLAIN[1:2]), size * u(0.12, 0.25)
    bend = arc(size / 2, 0, math.pi) + np.array([-size / 2, size * u(0.4, 1), 0])
    path = np.concatenate([[[0.0, 0.0, 0.0]], bend])[:, ::-1] * np.array([1, 1, -1])
    parts = [tube(path, thick, metal, (x, y, z))]
    parts += [cone(thick, size * 0.4, thick, x + side * size * 0.7, y, z, metal) for side in (-1, 1)]
    return parts


def hollow(w: float, h: float, d: float, y: float, wall: float, colour, taper: float = 0.85) -> list[Part]:
    """An open basin with a rim, its sides and floor, round or square by the number of `corners`."""
    outline = []
    for level, scale in ((0, taper), (h, 1), (h, 1 - wall), (h * 0.2, taper * (1 - wall)), (h * 0.2, 0)):
        x, z = w / 2 * scale, d / 2 * scale
        outline.append([(sx * x, y + level, sz * z) for sx, sz in ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))])
    return [surface(np.array(outline), colour)]


def bathtub(u: Draw) -> list[Part]:
    enamel = u.colour(WHITE) if u.chance(0.8) else u.colour(PLAIN, BRIGHT)
    w, h, d = u(1.4, 1.9), u(0.45, 0.7), u(0.65, 0.95)
    kind, wall, parts = u.integer(0, 2), u(0.06, 0.15), []
    if kind == 0:
        parts += [*hollow(w, h, d, 0, wall, enamel, u(0.9, 1)), box(w * 0.9, 0.02, d * 0.9, 0, 0, 0, enamel)]
    elif kind == 1:  # oval
        foot, bulge = u(0.55, 0.85), u(0.85, 0.97)
        profile = [(0, 0), (w / 2 * foot, 0), (w / 2 * bulge, h * 0.5), (w / 2, h), (w / 2 * (1 - wall), h)]
        profile += [(w / 2 * bulge * (1 - wall), h * 0.5), (w / 2 * foot * 0.9, h * 0.15), (0, h * 0.12)]
        parts.append(lathe(profile, enamel, flat=d / w))
    else:  # a box around an oval
        d = d if u.chance(0.6) else w * u(0.8, 1)
        parts += [box(w, h * 0.9, 0.03, 0, 0, side * d / 2, enamel) for side in (-1, 1)]
        parts += [box(0.03, h * 0.9, d, side * w / 2, 0, 0, enamel) for side in (-1, 1)]
        profile = [(w * 0.42, h * 0.9), (w * 0.4, h * 0.4), (w * 0.3, h * 0.15), (0, h * 0.12)]
        parts.append(lathe(profile, enamel, flat=d / w))
        corners = np.array([[(-w / 2, h * 0.9, z), (w / 2, h * 0.9, z)] for z in (-d / 2, -d * 0.4)])
        parts += [surface(corners, enamel), surface(corners * np.array([1, 1, -1]), enamel)]
    if u.chance(0.6):
        parts += tap(u, u(0.1, 0.18), u.pick(-0.45, 0.0, 0.45) * w, h, -d * 0.45)
    return parts


def toilet(u: Draw) -> list[Part]:
    enamel, lid = u.colour(WHITE), u.colour(WHITE, PLAIN)
    if u.chance(0.6):
        lid = enamel
    w, h, d = u(0.34, 0.4), u(0.36, 0.44), u(0.42, 0.52)
    foot, waist = u(0.5, 0.85), u(0.4, 0.7)
    profile = [(0, 0), (w / 2 * foot, 0), (w / 2 * waist, h * 0.4), (w / 2, h * 0.85), (w / 2, h)]
    open_ = u.chance(0.4)
    profile += [(w * 0.38, h), (w * 0.3, h * 0.6), (0, h * 0.5)] if open_ else [(0, h)]
    parts = [lathe(profile, enamel, flat=d / w), box(w * 0.6, h * 0.95, d * 0.5, 0, 0, -d * 0.3, enamel)]
    parts.append(lathe([(w * 0.36, h), (w * 0.52, h), (w * 0.52, h + 0.03), (w * 0.36, h + 0.03)], lid, flat=d / w))
    back = -d * 0.5
    if open_:
        parts += moved([lathe([(0, 0), (w / 2, 0), (w / 2, 0.02), (0, 0.03)], lid, flat=d / w)], lean(-1.45),
                       (0, h + d * 0.5, back + 0.06))  # fmt: skip
    if u.chance(0.8):
        high, deep = u(0.3, 0.42), u(0.14, 0.2)
        parts.append(box(w * u(0.95, 1.2), high, deep, 0, h, back - deep / 2 + 0.04, enamel))
        parts.append(box(w * 1.2, 0.03, deep * 1.1, 0, h + high, back - deep / 2 + 0.04, enamel))
        parts.append(cone(0.05, 0.02, 0.05, 0, h + high + 0.03, back - deep / 2, u.colour(METAL)))
    return parts


def bidet(u: Draw) -> list[Part]:
    enamel = u.colour(WHITE)
    w, h, d = u(0.34, 0.4), u(0.36, 0.42), u(0.45, 0.56)
    foot = u(0.4, 0.8)
    profile = [(0, 0), (w / 2 * foot, 0), (w / 2 * foot, h * 0.4), (w / 2, h * 0.8), (w / 2, h), (w * 0.4, h)]
    profile += [(w * 0.3, h * 0.7), (0, h * 0.6)]
    parts = [lathe(profile, enamel, flat=d / w), box(w * 0.9, h * 0.3, d * 0.25, 0, h * 0.7, -d * 0.4, enamel)]
    return parts + tap(u, u(0.08, 0.13), 0, h, -d * 0.4)


def washbasin(u: Draw) -> list[Part]:
    enamel = u.colour(WHITE) if u.chance(0.8) else u.colour(PLAIN, BRIGHT)
    w, h, d = u(0.45, 0.75), u(0.12, 0.22), u(0.38, 0.5)
    kind, round_ = u.integer(0, 3), u.chance(0.5)
    y = u(0.6, 0.75) if kind else 0.0
    if round_:
        profile = [(0, y), (w * 0.2, y), (w * 0.42, y + h * 0.5), (w / 2, y + h), (w * 0.44, y + h)]
        parts = [lathe([*profile, (w * 0.36, y + h * 0.5), (0, y + h * 0.3)], enamel, flat=d / w)]
    else:
        parts = hollow(w, h, d, y, u(0.12, 0.3), enamel, u(0.8, 1))
    parts.append(box(w * 0.6, 0.05, d * 0.2, 0, y + h - 0.05, -d * 0.42, enamel))
    parts += tap(u, u(0.1, 0.16), 0, y + h, -d * 0.42)
    if kind == 1:  # on a pedestal
        parts.append(cone(0.22, y, 0.2, 0, 0, -d * 0.1, enamel, u(0.6, 1)))
        parts.append(cone(0.28, 0.05, 0.26, 0, 0, -d * 0.1, enamel))
    elif kind == 2:  # on a board, with pipes
        parts.append(box(w * u(1.1, 1.6), 0.04, d * 1.1, 0, y, 0, u.colour(PLAIN, WOOD)))
        parts.append(rod((0, y - 0.3, -0.1), (0, y, -0.1), 0.05, u.colour(PLAIN[1:2])))
        parts.append(rod((0, y - 0.3, -0.1), (0, y - 0.3, -d / 2), 0.04, u.colour(PLAIN[1:2])))
    elif kind == 3:  # on a cabinet
        parts = moved(case(u, w * u(0.9, 1.2), y, d, 2, 1, u.colour(WOOD, PLAIN)), np.eye(3)) + parts
    if u.chance(0.15):
        parts.append(box(w * 0.8, 0.6, 0.02, 0, y + h + 0.1, -d / 2, (0.72, 0.78, 0.86)))
    return parts


def sink(u: Draw) -> list[Part]:
    metal, w, h, d = u.colour(METAL), u(0.6, 1.2), u(0.15, 0.25), u(0.45, 0.6)
    bowls = u.integer(1, 2)
    wide, y = w / bowls * u(0.6, 0.95), u(0.65, 0.75) if u.chance(0.6) else 0.0
    parts = []
    for n in range(bowls):
        parts += moved(hollow(wide, h, d * 0.75, y, 0.08, metal), np.eye(3), (w / bowls * (n + 0.5) - w / 2, 0, 0.03))
    top, rim = y + h, u.colour(METAL, WOOD)
    parts += [box(w, 0.03, d * 0.12, 0, top - 0.02, side * d * 0.44, rim) for side in (-1, 1)]
    parts += [box(w * 0.05, 0.03, d, side * w * 0.48, top - 0.02, 0, rim) for side in (-1, 1)]
    parts += tap(u, u(0.14, 0.22), 0, top, -d * 0.43)
    if y:
        body = u.colour(PLAIN, WOOD)
        parts += [box(w, top - 0.03, 0.02, 0, 0, side * d / 2, body) for side in (-1, 1)]
        parts += [box(0.02, top - 0.03, d, side * w / 2, 0, 0, body) for side in (-1, 1)]
    return parts


def refrigerator(u: Draw) -> list[Part]:
    enamel, grip = u.colour(METAL, METAL, PLAIN), u.colour(PLAIN[1:])
    w, d = u(0.55, 0.95), u(0.55, 0.75)
    h = u(max(0.85, 1.4 * w), 2)
    parts = [box(w, h, d, 0, 0, 0, enamel if u.chance(0.6) else u.colour(PLAIN))]
    columns = 2 if w > 0.75 and u.chance(0.6) else 1
    split = u(0.25, 0.75) if columns == 1 or u.chance(0.4) else 1.0
    for n in range(columns):
        x = w * ((n + 0.5) / columns - 0.5)
        edge = w / columns * 0.42 * (1 if n == 0 else -1)
        for low, high in ((0.03, split), (split, 1)) if split < 1 else ((0.03, 1.0),):
            parts.append(box(w / columns * 0.97, h * (high - low) * 0.98, 0.06, x, h * low, d / 2 + 0.03, enamel))
            long = h * (high - low) * u(0.2, 0.6)
            parts.append(box(0.03, long, 0.04, x + edge, h * (low + high) / 2 - long / 2, d / 2 + 0.08, grip))
    if columns > 1 and u.chance(0.5):
        parts.append(box(0.2, 0.3, 0.02, -w / 4, h * 0.55, d / 2 + 0.07, BLACK))
    return parts


def freezer(u: Draw) -> list[Part]:
    if u.chance(0.3):
        return refrigerator(u)
    enamel, w, h, d = u.colour(METAL), u(0.7, 1.5), u(0.6, 0.9), u(0.5, 0.7)
    parts = [box(w, h, d, 0, 0, 0, enamel), box(w * 1.01, u(0.05, 0.12), d * 1.02, 0, h, 0, u.colour(METAL))]
    parts.append(box(u(0.1, 0.25), 0.03, 0.04, 0, h, d / 2 + 0.02, u.colour(PLAIN[1:])))
    parts += [box(w * 0.1, 0.05, 0.02, w * 0.4, h * 0.1, d / 2, BLACK)] if u.chance(0.6) else []
    return parts


def oven(u: Draw) -> list[Part]:
    enamel, dark = u.colour(PLAIN, METAL), u.colour(PLAIN[2:])
    w, h, d = u(0.55, 0.62), u(0.42, 0.62), u(0.45, 0.6)
    parts = []
    for y in (0.0, h) if u.chance(0.25) else (0.0,):
        parts += [box(w, h, d, 0, y, 0, enamel), box(w * 0.98, h * 0.78, 0.03, 0, y + h * 0.02, d / 2, enamel)]
        parts.append(box(w * 0.75, h * u(0.4, 0.6), 0.04, 0, y + h * 0.12, d / 2 + 0.01, dark))
        parts.append(rod((-w * 0.4, y + h * 0.77, d / 2 + 0.06), (w * 0.4, y + h * 0.77, d / 2 + 0.06), 0.025, enamel))
        for n in range(knobs := u.integer(2, 5)):
            parts.append(disc(0.05, 0.05, 0.03, w * 0.85 * ((n + 0.5) / knobs - 0.5), y + h * 0.9, d / 2, dark))
        parts += [box(0.14, 0.05, 0.02, 0, y + h * 0.87, d / 2 + 0.01, BLACK)] if u.chance(0.5) else []
    return parts


def microwave(u: Draw) -> list[Part]:
    enamel, dark = u.colour(PLAIN, METAL), u.colour(PLAIN[2:])
    w, h, d = u(0.42, 0.56), u(0.24, 0.32), u(0.3, 0.42)
    parts = [box(w, h, d, 0, 0.01, 0, enamel), box(w * 0.7, h * 0.9, 0.02, -w * 0.13, h * 0.05, d / 2, enamel)]
    parts.append(box(w * 0.5, h * 0.6, 0.03, -w * 0.15, h * 0.2, d / 2, dark))
    parts.append(box(w * 0.2, h * 0.15, 0.02, w * 0.36, h * 0.78, d / 2 + 0.005, BLACK))
    if u.chance(0.5):
        parts += [disc(0.05, 0.05, 0.02, w * 0.36, h * y, d / 2, u.colour(PLAIN)) for y in (0.25, 0.55)]
    else:
        for row in range(4):
            for x in (0.31, 0.36, 0.41):
                parts.append(box(0.018, 0.012, 0.02, w * x, h * (0.15 + 0.14 * row), d / 2 + 0.005, u.colour(PLAIN)))
    if u.chance(0.6):
        parts.append(rod((w * 0.2, h * 0.15, d / 2 + 0.03), (w * 0.2, h * 0.85, d / 2 + 0.03), 0.02, enamel))
    return parts


def hood(u: Draw) -> list[Part]:
    metal, w, d = u.colour(METAL, PLAIN), u(0.5, 1), u(0.35, 0.55)
    kind, rim = u.integer(0, 3), u(0.04, 0.1)
    if kind == 0:  # flat
        parts = [box(w, u(0.1, 0.18), d, 0, 0, 0, metal), box(w * 0.9, 0.02, d * 0.8, 0, -0.01, 0, u.colour(PLAIN[1:]))]
        return [*parts, box(w * 0.5, 0.04, 0.02, 0, 0.03, d / 2, u.colour(PLAIN))]
    if kind == 1:  # a leaning plate of glass
        parts = [box(w, u(0.4, 0.6), 0.05, 0, 0, d * 0.3, u.colour(PLAIN), u(0.2, 0.8))]
        return [*parts, box(w * 0.4, u(0.4, 0.6), d * 0.5, 0, 0.05, -d * 0.25, metal)]
    parts, high, shaft, deep = [box(w, rim, d, 0, 0, 0, metal)], u(0.1, 0.4), u(0.2, 0.35), u(0.2, 0.3)
    lower = [(-w / 2, -d / 2), (w / 2, -d / 2), (w / 2, d / 2), (-w / 2, d / 2), (-w / 2, -d / 2)]
    back = -d / 2 + deep / 2 if u.chance(0.6) else 0.0
    upper = [(x / w * shaft, z / d * deep + back) for x, z in lower]
    sides = [[(x, y, z) for x, z in outline] for y, outline in ((rim, lower), (rim + high, upper))]
    parts += [surface(np.array(sides), metal), box(shaft, u(0.2, 0.7), deep, 0, rim + high, back, metal)]
    return parts


def machine(u: Draw) -> list[Part]:
    """A washing machine, a dishwasher or a slot machine on legs."""
    enamel, dark = u.colour(METAL), u.colour(PLAIN[1:])
    w, h, d = u(0.5, 0.65), u(0.75, 0.9), u(0.45, 0.65)
    parts, kind = [box(w, h, d, 0, 0, 0, enamel)], u.integer(0, 3)
    if kind < 3:
        parts.append(box(w * 0.98, h * 0.14, 0.02, 0, h * 0.85, d / 2, u.colour(PLAIN)))
        parts.append(disc(0.07, 0.07, 0.04, u(-0.4, 0.4) * w, h * 0.92, d / 2, dark))
        parts.append(box(w * 0.25, h * 0.08, 0.02, -w * 0.3, h * 0.88, d / 2 + 0.01, dark))
    if kind < 2:
        r = w * u(0.5, 0.75)
        parts += [
            disc(r, r, 0.03, 0, h * 0.45, d / 2, u.colour(PLAIN)),
            disc(r * 0.7, r * 0.7, 0.06, 0, h * 0.45, d / 2, dark),
        ]
    elif kind == 2:
        parts += [
            box(w * 0.96, h * 0.72, 0.03, 0, h * 0.1, d / 2, enamel),
            box(w * 0.6, 0.03, 0.05, 0, h * 0.78, d / 2 + 0.02, dark),
        ]
    else:
        body, long, lift = u.colour(BRIGHT, PLAIN), u(1, 1.4), u(0.6, 0.8)
        parts = [
            box(w, 0.25, long, 0, lift, 0, body),
            box(w * 0.9, 0.01, long * 0.9, 0, lift + 0.25, 0, u.colour(BRIGHT, PLAIN)),
        ]
        parts.append(box(w * 1.1, u(0.5, 0.7), 0.2, 0, lift + 0.3, -long * 0.42, u.colour(BRIGHT, PLAIN)))
        parts += [
            box(0.05, lift, 0.05, sx * w * 0.45, 0, sz * long * 0.46, dark, leg=True)
            for sx in (-1, 1)
            for sz in (-1, 1)
        ]
    return parts


def heater(u: Draw) -> list[Part]:
    enamel, r = u.colour(METAL), u(0.35, 0.55)
    h = r * u(1.1, 2.4)
    if u.chance(0.65):
        parts = [lathe([(0, 0), (r * 0.4, 0.01), (r / 2, 0.06), (r / 2, h - 0.06), (r * 0.4, h), (0, h)], enamel)]
        if u.chance(0.4):
            parts.append(cone(r * 1.02, h * u(0.05, 0.2), r * 1.02, 0, h * u(0.05, 0.3), 0, u.colour(PLAIN)))
    else:
        parts = [box(r, h, r * u(0.5, 0.9), 0, 0, 0, enamel)]
    front = parts[0].size[2] / 2 if parts[0].kind == "box" else r / 2
    parts.append(disc(0.06, 0.06, 0.02, r * u(-0.2, 0.2), h * u(0.15, 0.6), front - 0.005, u.colour(PLAIN[1:], BRIGHT)))
    parts += [rod((x * r, -0.1, 0), (x * r, 0.02, 0), 0.03, u.colour(PLAIN, BRIGHT)) for x in (-0.2, 0.2)]
    if u.chance(0.4):
        parts += [rod((x * r, h - 0.02, 0), (x * r, h + u(0.05, 0.15), 0), 0.03, u.colour(PLAIN)) for x in (-0.2, 0.2)]
    return parts


def conditioner(u: Draw) -> list[Part]:
    enamel, dark = u.colour(METAL), u.colour(PLAIN[1:])
    if u.chance(0.5):  # the outdoor unit
        w, h, d = u(0.7, 0.9), u(0.5, 0.7), u(0.25, 0.35)
        r, x = h * u(0.75, 0.9), -w * u(0, 0.15)
        parts = [box(w, h, d, 0, 0.04, 0, enamel), disc(r, r, 0.02, x, h / 2 + 0.04, d / 2, dark)]
        parts += [ring(r * part / 2, 0.015, (x, h / 2 + 0.04, d / 2 + 0.03), enamel) for part in (1, 0.75, 0.5, 0.25)]
        return parts + [box(0.06, 0.04, d * 1.1, side * w * 0.35, 0, 0, dark) for side in (-1, 1)]
    w, h, d = u(0.75, 1.1), u(0.25, 0.35), u(0.18, 0.25)
    profile = [(-d / 2, 0), (d * 0.3, 0), (d / 2, h * 0.3), (d / 2, h * 0.8), (d * 0.35, h), (-d / 2, h)]
    parts = [prism(profile, w, enamel, turn=lean(0, -math.pi / 2))]
    return [*parts, box(w * 0.85, 0.015, 0.05, 0, h * 0.1, d * 0.42, dark)]


def television(u: Draw) -> list[Part]:
    frame, glass = u.colour(PLAIN[1:], PLAIN[3:], PLAIN[3:]), u.colour(PLAIN[3:])
    w, t = u(0.6, 1.3), u(0.03, 0.08)
    h, lift = w * u(0.55, 0.72), u(0.05, 0.15)
    if u.chance(0.2):  # an old set with a tube
        parts = [box(w * 0.7, h * 0.9, w * 0.4, 0, 0, 0, u.colour(PLAIN, WOOD))]
        return [
            *parts,
            box(w * 0.55, h * 0.7, 0.02, 0, h * 0.12, w * 0.2, glass),
            box(w * 0.4, h * 0.6, w * 0.2, 0, h * 0.1, -w * 0.28, frame),
        ]
    if u.chance(0.2):
        lift = 0.0
    parts = [box(w, h, t, 0, lift, 0, frame), box(w * 0.94, h * 0.9, 0.01, 0, lift + h * 0.06, t / 2 + 0.005, glass)]
    if lift:
        kind = u.integer(0, 2)
        if kind == 0:
            parts += [box(w * u(0.3, 0.6), 0.015, u(0.18, 0.3), 0, 0, 0, frame), box(0.08, lift, 0.04, 0, 0, 0, frame)]
        elif kind == 1:
            parts += [cone(w * 0.4, 0.02, 0.24, 0, 0, 0, frame), cone(0.07, lift, 0.05, 0, 0, 0, frame)]
        else:
            parts += [rod((x * w, lift, 0), (x * w, 0, z), 0.02, frame) for x in (-0.35, 0.35) for z in (-0.12, 0.12)]
    return parts


ROOMS: dict[str, Callable[[Draw], list[Part]]] = {
    "bathtub": bathtub, "bidet": bidet, "conditioner": conditioner, "freezer": freezer, "heater": heater, "hood": hood,
    "machine": machine, "microwave": microwave, "oven": oven, "refrigerator": refrigerator, "sink": sink,
    "television": television, "toilet": toilet, "washbasin": washbasin,
}  # fmt: skip

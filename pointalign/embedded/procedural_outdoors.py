"""Procedural objects of gardens, streets and the outside of houses.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS
from pointalign.embedded.procedural_parts import (
    BRIGHT, GREEN, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, lathe, lean, mesh, prism, ring, rod, surface,
    tube,
)  # fmt: skip


def column(u: Draw) -> list[Part]:
    stone = u.colour(PLAIN[:2], BRIGHT[4:])
    r, h, foot = u(0.1, 0.18), u(2, 3), u(0.1, 0.3)
    flutes = u.chance(0.3)
    parts = [cone(2 * r, h - 2 * foot, 2 * r, 0, foot, 0, stone, u(0.75, 1))]
    if flutes:
        for angle in np.arange(10) / 10 * 2 * math.pi:
            x, z = r * math.cos(angle), r * math.sin(angle)
            parts.append(rod((x, foot, z), (x * 0.85, h - foot, z * 0.85), r * 0.3, stone))
    for y, up in ((0, 1), (h, -1)):
        if u.chance(0.7):
            parts.append(box(r * 2.8, foot * 0.4, r * 2.8, 0, y - (up < 0) * foot * 0.4, 0, stone))
        bulge = r * u(1.1, 1.4)
        parts.append(
            lathe([(bulge, y + up * foot * 0.4), (bulge * 1.05, y + up * foot * 0.6), (r, y + up * foot)], stone)
        )
    return parts


def railing(u: Draw) -> list[Part]:
    metal, w, h, t = u.colour(PLAIN, WOOD), u(1, 3), u(0.8, 1.1), u(0.03, 0.06)
    rise = u(0.4, 0.8) * w if u.chance(0.3) else 0.0  # along a staircase
    bottom, posts = u(0.05, 0.2), u.integer(2, 4)
    parts = []
    for n in range(posts):
        x, y = w * (n / (posts - 1) - 0.5), rise * n / (posts - 1)
        parts.append(rod((x, y, 0), (x, y + h, 0), t * 1.3, metal))
        if u.chance(0.3):
            parts.append(ball(t * 2, t * 2, t * 2, x, y + h, 0, metal))
    for y in (h, bottom):
        parts.append(rod((-w / 2, y, 0), (w / 2, y + rise, 0), t, metal))
    kind, bars = u.integer(0, 2), u.integer(8, 22)
    if kind == 0:
        for n in range(bars):
            x, y = w * ((n + 0.5) / bars - 0.5), rise * (n + 0.5) / bars
            parts.append(rod((x, y + bottom, 0), (x, y + h, 0), t * 0.5, metal))
    elif kind == 1:
        for y in np.linspace(bottom, h, u.integer(3, 7)):
            parts.append(rod((-w / 2, y, 0), (w / 2, y + rise, 0), t * 0.5, metal))
    else:
        corners = [[(x, y + (rise if x > 0 else 0), 0) for x in (-w * 0.49, w * 0.49)] for y in (bottom, h * 0.95)]
        parts.append(surface(np.array(corners), u.colour(GLASS, PLAIN, WOOD)))
    return parts


def rock(u: Draw) -> list[Part]:
    stone, w = u.colour(WOOD[2:], PLAIN[1:3], BRIGHT[4:]), u(0.4, 0.8)
    h, d = w * u(0.4, 1), w * u(0.5, 1)
    polar, around = np.meshgrid(np.linspace(0, math.pi, 12), np.linspace(0, 2 * math.pi, 17), indexing="ij")
    radius = np.ones_like(polar)
    for _ in range(6):  # bumps
        waves, phase = u.integer(1, 4), u(0, 2 * math.pi)
        radius += u(0, 0.12) * np.sin(waves * around + phase) * np.sin(polar) * np.cos(u(1, 4) * polar)
    xyz = [radius * np.sin(polar) * np.cos(around), radius * np.cos(polar), radius * np.sin(polar) * np.sin(around)]
    return [surface(np.stack(xyz, axis=2) * (w / 2, h / 2, d / 2), stone, (0, h / 2, 0))]


def leaves(u: Draw, count: int, w: float, h: float, d: float, y: float, round_: bool) -> list[Part]:
    """Leaves in three greens that fill a box or an ellipsoid from height y up."""
    parts = []
    for _ in range(3):
        centre = u.rng.uniform(-0.5, 0.5, size=(count, 1, 3))
        if round_:
            centre *= 0.5 / np.maximum(np.linalg.norm(centre, axis=2, keepdims=True), 0.25)
        along, across = u.rng.normal(size=(2, count, 1, 3)) * u(0.02, 0.06) * w
        middle = centre * (w, h, d) + (0, y + h / 2, 0)
        parts.append(mesh(np.concatenate([middle - along, middle + along, middle + across], axis=1), u.colour(GREEN)))
    return parts


def hedge(u: Draw) -> list[Part]:
    w, h, d, body = u(0.8, 2.2), u(0.7, 1.8), u(0.4, 1), u.colour(GREEN)
    square = u.chance(0.6)
    parts = leaves(u, u.integer(30, 80), w, h, d, 0, not square)
    if u.chance(0.7):
        parts.append(box(w * 0.9, h * 0.95, d * 0.9, 0, 0, 0, body) if square else ball(w, h, d, 0, 0, 0, body))
    return parts


def bush(u: Draw) -> list[Part]:
    w, h, bark = u(0.8, 1.6), u(0.7, 1.5), u.colour(WOOD[:2])
    parts = leaves(u, u.integer(20, 60), w, h, w, h * u(0, 0.15), True)
    for _ in range(u.integer(3, 8)):
        tilt, about, long = u(0, 0.9), u(0, 6.3), h * u(0.5, 0.9)
        parts.append(Part("cone", (0.03, long, 0.03), (0, 0, 0), bark, 0.5, lean(tilt, about)))
    return parts


def arrow(u: Draw) -> list[Part]:
    """A mark on the road: straight on, to the left or right, or both."""
    paint, long, t, head = u.colour(PLAIN[:1], PLAIN[:1], BRIGHT), u(2, 5), u(0.003, 0.03), u(0.5, 1)
    stem = head * u(0.2, 0.4)
    flat = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=float)  # the outline's y becomes -z

    def tip(x: float, y: float, about: float) -> Part:
        return prism([(-head / 2, 0), (head / 2, 0), (0, head * u(1, 2))], t, paint, (x, 0, -y), flat @ lean(0, about))

    kind, parts = u.integer(0, 2), [box(stem, t, long, 0, -t / 2, -long / 2, paint)]
    if kind != 1:
        parts.append(tip(0, long, 0))
    if kind:
        side, up, reach = u.pick(-1, 1), long * (u(0.4, 0.8) if kind == 2 else 1.0), head * u(0.5, 1.2)
        parts.append(box(reach, t, stem, side * reach / 2, -t / 2, -up + stem / 2, paint))
        parts.append(tip(side * reach, up - stem / 2, -side * math.pi / 2))
    return parts


def umbrella(u: Draw) -> list[Part]:
    cloth, second, metal = u.colour(BRIGHT, PLAIN), u.colour(PLAIN, BRIGHT), u.colour(PLAIN, WOOD)
    r, h, deep = u(0.8, 1.5), u(1.9, 2.4), u(0.2, 0.6)
    if u.chance(0.3):  # for the hand
        r, h = u(0.4, 0.6), u(0.75, 0.95)
        deep = r * u(0.3, 0.6)
    ribs = u.integer(6, 10)
    angle = np.linspace(0, 2 * math.pi, 2 * ribs + 1)
    sag = np.where(np.arange(2 * ribs + 1) % 2 == 1, 0.97, 1.0)
    rows = []
    for away in (0.0, 0.4, 0.75, 1.0):
        x, z = r * away * sag * np.cos(angle), r * away * sag * np.sin(angle)
        rows.append(np.stack([x, np.full(len(angle), h - deep * away**1.7), z], axis=1))
    grid = np.array(rows)
    if u.chance(0.5):
        parts = [surface(grid[:, 2 * n : 2 * n + 3], cloth if n % 2 else second) for n in range(ribs)]
    else:
        parts = [surface(grid, cloth)]
    parts.append(rod((0, 0, 0), (0, h * 1.04, 0), r * 0.04, metal))
    if h > 1.5 and u.chance(0.7):
        parts.append(cone(r * 0.4, 0.08, r * 0.4, 0, 0, 0, u.colour(PLAIN), 0.8))
    elif h < 1.5:
        hook = arc(0.04, math.pi, 2 * math.pi)
        parts.append(tube(hook, 0.02, u.colour(WOOD, PLAIN), (0.04, 0, 0)))
    return parts


def tent(u: Draw) -> list[Part]:
    cloth, w, d = u.colour(BRIGHT, PLAIN, GREEN), u(1.5, 3.2), u(1.8, 3.2)
    kind, metal = u.integer(0, 2), u.colour(PLAIN)
    if kind == 0:  # a roof on poles
        low, high = u(1.8, 2.4), u(0.3, 1)
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)]
        rows = [
            [(sx * w / 2 * s, y, sz * d / 2 * s) for sx, sz in corners]
            for y, s in ((low - 0.2, 1), (low, 1), (low + high, 0))
        ]
        parts = [surface(np.array(rows), cloth)]
        return parts + [
            rod((sx * w * 0.49, 0, sz * d * 0.49), (sx * w * 0.49, low, sz * d * 0.49), 0.05, metal)
            for sx, sz in corners[:4]
        ]
    if kind == 1:  # a ridge
        h = w * u(0.5, 0.9)
        return [
            prism([(-w / 2, 0), (w / 2, 0), (0, h)], d, cloth),
            box(0.02, h * 0.8, 0.02, 0, 0, d / 2, u.colour(PLAIN)),
        ]
    h = w * u(0.4, 0.6)  # a dome
    parts = [
        lathe([(w / 2 * math.cos(a), h * math.sin(a)) for a in np.linspace(0, math.pi / 2, 7)], cloth, flat=u(0.8, 1.2))
    ]
    return [*parts, ball(w * 0.4, h * 0.7, w * 0.4, 0, 0, w * 0.32, u.colour(BRIGHT, PLAIN))]


def lamppost(u: Draw) -> list[Part]:
    metal, shade, h = u.colour(PLAIN[1:], GREEN[2:3]), u.colour(PLAIN[:1], BRIGHT[3:]), u(2, 3.5)
    r = u(0.1, 0.2)
    parts = [
        cone(0.12, h, 0.12, 0, 0, 0, metal, u(0.5, 0.9)),
        lathe([(r * 1.6, 0), (r * 1.4, 0.15), (r * 0.6, 0.3), (0.05, 0.6)], metal),
    ]
    kind = u.integer(0, 2)
    spots = [(0.0, h)]
    if kind == 0:  # arms
        reach, count = u(0.3, 0.6), u.integer(1, 2)
        spots = [((1, -1)[n] * reach, h - 0.05) for n in range(count)]
        parts += [rod((0, h - 0.15, 0), (x, y, 0), 0.05, metal) for x, y in spots]
    for x, y in spots:
        if kind == 1:
            parts.append(ball(3 * r, 3 * r, 3 * r, x, y, 0, shade))
        else:
            parts += [
                cone(1.4 * r, 2 * r, 1.4 * r, x, y, 0, shade, 1.5),
                cone(2.4 * r, r, 2.4 * r, x, y + 2 * r, 0, metal, 0.2),
            ]
    return parts


def lantern(u: Draw) -> list[Part]:
    metal, shade, kind = u.colour(PLAIN[1:], WOOD, BRIGHT), u.colour(BRIGHT[3:], PLAIN[:1], GLASS), u.integer(0, 2)
    w = u(0.12, 0.25)
    h = w * u(1, 2.2)
    if kind == 0:  # of paper or glass between two rims
        bulge = u(0.9, 1.3)
        parts = [lathe([(w * 0.45, h * 0.12), (w / 2 * bulge, h * 0.5), (w * 0.45, h * 0.88)], shade)]
        parts += [cone(w, h * 0.13, w, 0, y * h, 0, metal) for y in (0, 0.87)]
        return [*parts, tube(arc(w * 0.4, 0, math.pi), 0.012, metal, (0, h, 0))] if u.chance(0.6) else parts
    if kind == 1:  # a square case with a roof and a ring
        parts = [box(w, 0.02, w, 0, y, 0, metal) for y in (0.0, h)]
        parts += [box(0.02, h, 0.02, sx * w * 0.47, 0, sz * w * 0.47, metal) for sx in (-1, 1) for sz in (-1, 1)]
        parts += (
            [box(w * 0.9, h, w * 0.9, 0, 0, 0, shade)]
            if u.chance(0.6)
            else [cone(w * 0.3, h * 0.5, w * 0.3, 0, 0, 0, shade)]
        )
        parts.append(cone(1.3 * w, w * u(0.3, 0.7), 1.3 * w, 0, h + 0.02, 0, metal, 0.15))
        return [*parts, ring(w * 0.2, 0.012, (0, h + w * 0.75, 0), metal)]
    stone = u.colour(PLAIN[1:2], WOOD[2:], BRIGHT[4:])  # a garden lantern of stone
    foot = h * u(0.4, 1.4)
    parts = [
        box(w, foot * 0.2, w, 0, 0, 0, stone),
        cone(w * 0.5, foot, w * 0.5, 0, 0, 0, stone),
        box(w * 1.1, w * 0.2, w * 1.1, 0, foot, 0, stone),
    ]
    parts += [
        box(w * 0.15, h * 0.4, w * 0.15, sx * w * 0.4, foot, sz * w * 0.4, stone) for sx in (-1, 1) for sz in (-1, 1)
    ]
    roof = foot + h * 0.4
    return [
        *parts,
        cone(1.8 * w, w * u(0.3, 0.7), 1.8 * w, 0, roof, 0, stone, 0.2),
        ball(w * 0.3, w * 0.4, w * 0.3, 0, roof + w * 0.3, 0, stone),
    ]


def chimney(u: Draw) -> list[Part]:
    stone, w, h = u.colour(PLAIN, BRIGHT, WOOD), u(0.4, 0.8), u(0.8, 1.6)
    if u.chance(0.5):
        parts = [
            box(w, h, w * u(0.6, 1), 0, 0, 0, stone),
            box(w * 1.2, 0.08, w * 1.2, 0, h, 0, u.colour(PLAIN, BRIGHT)),
        ]
        pots = u.integer(0, 2)
        return parts + [
            cone(w * 0.3, 0.25, w * 0.3, w * 0.4 * (n - (pots - 1) / 2), h + 0.08, 0, u.colour(WOOD, PLAIN), 0.8)
            for n in range(pots)
        ]
    dark = u.colour(PLAIN)
    parts = [cone(w * 0.6, h, w * 0.6, 0, 0, 0, stone), cone(w * 0.9, h * 0.2, w * 0.9, 0, 0, 0, dark, 0.8)]
    parts += [rod((x * w, h, 0), (x * w, h + 0.12, 0), 0.02, dark) for x in (-0.25, 0.25)]
    return [*parts, cone(w * u(0.9, 1.3), u(0.1, 0.25), w, 0, h + 0.12, 0, dark, 0.15)]


OUTDOORS: dict[str, Callable[[Draw], list[Part]]] = {
    "arrow": arrow, "bush": bush, "chimney": chimney, "column": column, "hedge": hedge, "lamppost": lamppost,
    "lantern": lantern, "railing": railing, "rock": rock, "tent": tent, "umbrella": umbrella,
}  # fmt: skip

"""Procedural things to wear, to carry, to play with, to work with and to eat.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS
from pointalign.embedded.procedural_parts import (
    BRIGHT, GREEN, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, disc, lathe, lean, mesh, moved, prism, ring, rod,
    surface, tube,
)  # fmt: skip

CRUST = ((0.75, 0.5, 0.25), (0.62, 0.38, 0.16), (0.85, 0.65, 0.38))
PETAL = (*BRIGHT[:2], BRIGHT[3], PLAIN[0], (0.9, 0.55, 0.7), (0.6, 0.3, 0.6))


def toy_ball(u: Draw) -> list[Part]:
    r, first, second = u(0.05, 0.2), u.colour(PLAIN[:1], BRIGHT), u.colour(PLAIN, BRIGHT)
    parts = [ball(2 * r, 2 * r, 2 * r, 0, 0, 0, first)]
    kind = u.integer(0, 2)
    if kind == 0:  # spots
        for _ in range(u.integer(8, 14)):
            spot = u.rng.normal(size=3)
            spot *= r / np.linalg.norm(spot)
            foot, top = spot * 0.97 + (0, r, 0), spot * 1.01 + (0, r, 0)
            parts.append(rod(foot, top, r * 0.55, second))
    elif kind == 1:  # stripes
        for low in np.linspace(0.3, 2.3, u.integer(2, 4)):
            band = [(1.01 * r * math.sin(a), r - 1.01 * r * math.cos(a)) for a in np.linspace(low, low + 0.35, 5)]
            parts.append(lathe(band, second))
    return parts


def basketball(u: Draw) -> list[Part]:
    r, skin, seam = u(0.11, 0.13), u.colour(((0.75, 0.38, 0.12), (0.62, 0.3, 0.1))), PLAIN[3]
    turn = lean(u(0, 1.5), u(0, 3))
    parts = [
        ball(2 * r, 2 * r, 2 * r, 0, -r, 0, skin),
        ring(r, r * 0.06, (0, 0, 0), seam),
        ring(r, r * 0.06, (0, 0, 0), seam, lean(math.pi / 2)),
    ]
    for side in (-1, 1):
        parts.append(ring(r * 0.8, r * 0.06, (side * r * 0.6, 0, 0), seam, lean(0, math.pi / 2)))
    return moved(parts, turn, (0, r, 0))


def hat(u: Draw) -> list[Part]:
    cloth, band, r = u.colour(WOOD, PLAIN, BRIGHT), u.colour(PLAIN, BRIGHT), u(0.085, 0.1)
    h, wide, kind = r * u(0.9, 1.5), r * u(1.5, 2.3), u.integer(0, 2)
    curl = u(-0.1, 0.25) * r
    if kind == 0:  # a cap with a peak
        parts = [lathe([(r, 0), (r * 0.95, h * 0.5), (r * 0.6, h * 0.9), (0, h)], cloth)]
        return [
            *parts,
            prism(
                [(-r * 0.8, 0), (r * 0.8, 0), (r * 0.6, r * 0.8), (-r * 0.6, r * 0.8)],
                0.005,
                band,
                (0, 0, r * 0.75),
                lean(math.pi / 2) * np.array([1, 1, 1]) @ np.diag([1.0, 1.0, -1.0]),
            ),
        ]
    dent = h * u(0.7, 1)
    parts = [
        lathe(
            [(wide, curl), (r * 1.1, 0), (r, h * 0.2), (r * u(0.75, 1), h * 0.95), (r * 0.5, h), (0, dent)],
            cloth,
            flat=u(1, 1.2),
        )
    ]
    return [*parts, lathe([(r * 1.03, h * 0.04), (r * 1.02, h * 0.3)], band, flat=1.1)] if u.chance(0.7) else parts


def shoes(u: Draw, low: float, colour, sole, high: float) -> list[Part]:
    """A pair of shoes, or one of them."""
    long, parts = u(0.24, 0.3), []
    w, gap = long * u(0.34, 0.4), u(1.0, 1.4)
    z = np.linspace(-1, 1, 12)
    around = np.linspace(0, 2 * math.pi, 16)
    half = np.sqrt(np.maximum(1 - np.abs(z) ** 3, 0)) * (0.8 + 0.2 * z)
    height = np.where(z < 0, high, high + (low - high) * np.minimum(z * 1.6, 1)) * np.sqrt(
        np.maximum(1 - np.abs(z) ** 6, 0)
    )
    x = w / 2 * half[:, None] * np.cos(around)
    y = 0.015 + np.maximum(np.sin(around), 0) ** 0.6 * height[:, None]
    upper = np.stack([x, y, np.broadcast_to(z[:, None] * long / 2, x.shape)], axis=2)
    sides = (-1, 1) if u.chance(0.75) else (0,)
    for side in sides:
        about = lean(0, side * u(-0.1, 0.3))
        at = np.array([side * w * gap * 0.6, 0.0, 0.0])
        parts.append(surface(upper, colour, tuple(at), about))
        parts += moved([rod((0, 0, 0), (0, u(0.02, 0.035), 0), w * 1.02, sole, flat=long / w)], about, at)
        parts += moved([cone(w * 0.5, 0.005, w * 0.8, 0, high + 0.008, -long * 0.25, sole)], about, at)
    return parts


def shoe(u: Draw) -> list[Part]:
    return shoes(u, u(0.04, 0.06), u.colour(PLAIN, WOOD, BRIGHT), u.colour(PLAIN, WOOD), u(0.06, 0.12))


def slipper(u: Draw) -> list[Part]:
    return shoes(u, u(0.05, 0.07), u.colour(PLAIN, BRIGHT, WOOD), u.colour(PLAIN), u(0.03, 0.05))


def jacket(u: Draw) -> list[Part]:
    """A jacket as it hangs or lies."""
    cloth, w, h = u.colour(PLAIN[1:], BRIGHT, WOOD, ((0.08, 0.1, 0.2),)), u(0.4, 0.55), u(0.6, 0.85)
    deep, sleeve = u(0.08, 0.15), u(0.45, 0.65)
    profile = [(w * 0.5, 0), (w * u(0.42, 0.5), h * 0.4), (w * 0.5, h * 0.85), (w * 0.42, h * 0.93), (w * 0.15, h)]
    parts = [lathe(profile, cloth, flat=deep / w)]
    splay = u(0, 0.15)
    for side in (-1, 1):
        shoulder, hand = (side * w * 0.45, h * 0.88, 0), (side * w * (0.55 + splay), h * 0.88 - sleeve, 0.03)
        parts.append(rod(shoulder, hand, w * 0.24, cloth, 0.75, flat=0.7))
        parts.append(
            box(
                w * 0.1,
                h * 0.3,
                0.01,
                side * w * 0.09,
                h * 0.66,
                deep * 0.55,
                u.colour(PLAIN) if u.chance(0.4) else cloth,
                0.05,
            )
        )
    parts += [disc(0.015, 0.015, 0.005, 0.01, h * y, deep * 0.5, u.colour(PLAIN)) for y in (0.2, 0.35, 0.5)]
    return moved(parts, lean(-math.pi / 2)) if u.chance(0.35) else parts


def clothes(u: Draw) -> list[Part]:
    """Clothes on hangers, side by side."""
    count, gap, parts = u.integer(3, 7), u(0.05, 0.09), []
    for n in range(count):
        w, h, x, cloth = u(0.4, 0.55), u(0.7, 1.2), gap * n, u.colour(PLAIN, BRIGHT, WOOD)
        outline = [(-w / 2, 0), (w / 2, 0), (w * 0.45, h * 0.85), (w * 0.1, h), (-w * 0.1, h), (-w * 0.45, h * 0.85)]
        parts.append(
            prism(
                [(z, y - h) for z, y in outline],
                gap * u(0.4, 0.8),
                cloth,
                (x, 0, 0),
                lean(0, math.pi / 2 + u(-0.1, 0.1)),
            )
        )
        parts.append(box(0.01, 0.07, 0.04, x, 0, 0, u.colour(PLAIN)))
    if u.chance(0.5):
        parts.append(rod((-gap * 2, 0.08, 0), (gap * (count + 1), 0.08, 0), 0.03, u.colour(PLAIN, WOOD)))
    return parts


def brush(u: Draw) -> list[Part]:
    body, hair = u.colour(PLAIN, WOOD, BRIGHT), u.colour(PLAIN, WOOD)
    if u.chance(0.5):  # a toilet brush in its holder
        r, h = u(0.045, 0.06), u(0.1, 0.15)
        parts = [
            lathe([(0, 0), (r, 0), (r * u(0.9, 1.2), h), (r * 0.6, h)], body),
            rod((0, h * 0.5, 0), (0, u(0.35, 0.45), 0), 0.02, u.colour(PLAIN)),
        ]
        return (
            [*parts, cone(0.03, 0.1, 0.03, 0, 0.3, 0, body), ball(r * 1.8, r * 1.4, r * 1.8, r * 1.8, 0, 0, hair)]
            if u.chance(0.5)
            else parts
        )
    long, w = u(0.08, 0.13), u(0.04, 0.08)
    parts = [ball(w, 0.025, long, 0, 0, 0, body), ball(w * 0.85, 0.04, long * 0.9, 0, 0.015, 0, hair)]
    return [*parts, rod((0, 0.012, -long * 0.4), (0, 0.012, -long * u(1.2, 1.7)), 0.025, body, u(0.7, 1.1))]


def broom(u: Draw) -> list[Part]:
    stick, hair, h, w = u.colour(WOOD, PLAIN, BRIGHT), u.colour(WOOD, PLAIN[2:], BRIGHT), u(1.2, 1.6), u(0.25, 0.4)
    parts = [rod((0, 0.1, 0), (0, h, 0), 0.028, stick)]
    if u.chance(0.6):
        return [
            *parts,
            box(w, 0.04, 0.06, 0, 0.07, 0, stick if u.chance(0.5) else hair),
            box(w, 0.08, 0.07, 0, 0, 0, hair),
        ]
    return [*parts, cone(w, 0.3, 0.08, 0, 0, 0, hair, 0.2)]


def basin(u: Draw) -> list[Part]:
    colour, r = u.colour(BRIGHT, PLAIN), u(0.18, 0.4)
    h, low = r * u(0.5, 1), r * u(0.65, 0.9)
    profile = [
        (0, 0),
        (low, 0),
        (r, h),
        (r * 1.08, h),
        (r * 1.08, h - 0.02),
        (r * 0.97, h),
        (low * 0.95, 0.015),
        (0, 0.015),
    ]
    parts = [lathe(profile, colour, flat=u(0.7, 1))]
    if u.chance(0.5):
        parts += [
            tube(arc(r * 0.2, 0, math.pi)[:, [2, 1, 0]], 0.02, colour, (side * r * 1.05, h, 0), lean(0))
            for side in (-1, 1)
        ]
    return parts


def basket(u: Draw) -> list[Part]:
    straw, r = u.colour(WOOD, BRIGHT[4:], PLAIN), u(0.15, 0.3)
    h, low, flat = r * u(0.7, 1.8), r * u(0.7, 1), u(0.6, 1)
    parts = [lathe([(0, 0.01), (low, 0), (r, h), (r * 0.96, h), (low * 0.96, 0.02)], straw, flat=flat)]
    for n in range(rings := u.integer(2, 5)):
        level = (n + 1) / rings
        angle = np.linspace(0, 2 * math.pi, 24)
        wide = low + (r - low) * level
        path = np.stack([wide * np.cos(angle), np.full(24, h * level), wide * flat * np.sin(angle)], axis=1)
        parts.append(tube(path, r * 0.08, straw if n % 2 else u.colour(WOOD)))
    if u.chance(0.5):
        parts.append(tube(arc(r, 0, math.pi, r * u(0.9, 1.4)), 0.025, straw, (0, h, 0)))
    return parts


def apple(u: Draw) -> list[Part]:
    """Apples in a bowl, or one of them."""
    skin = u.colour(BRIGHT[:1], ((0.5, 0.65, 0.15), (0.9, 0.75, 0.25)))
    profile = [(0, 0.02), (0.02, 0), (0.035, 0.03), (0.038, 0.05), (0.03, 0.068), (0.012, 0.072), (0, 0.06)]
    count, parts = u.pick(1, 1, 4, 6, 8), []
    for n in range(count):
        angle, away = n * 2 * math.pi / max(count - 1, 1), 0.0 if n == count - 1 else 0.07
        at = (away * math.cos(angle), 0.06 if count > 1 and n == count - 1 else 0.0, away * math.sin(angle))
        parts.append(lathe(profile, skin if u.chance(0.5) else u.colour(BRIGHT[:1], BRIGHT[3:4]), at))
        parts.append(rod(np.add(at, (0, 0.06, 0)), np.add(at, (u(-0.01, 0.01), 0.085, 0)), 0.004, WOOD[1]))
    if count > 1:
        parts.append(
            lathe([(0, -0.05), (0.05, -0.05), (0.03, -0.03), (0.1, -0.01), (0.14, 0.04)], u.colour(PLAIN, BRIGHT, WOOD))
        )
    return parts


def flower(u: Draw) -> list[Part]:
    """Flowers in a vase, or by themselves."""
    parts, h, leaf, petal = [], u(0.2, 0.4), u.colour(GREEN), u.colour(PETAL)
    base = 0.0
    if u.chance(0.65):
        r, base = u(0.03, 0.06), u(0.12, 0.25)
        belly, neck = r * u(1, 1.6), r * u(0.6, 1.2)
        parts.append(
            lathe(
                [(0, 0), (r, 0), (belly, base * 0.4), (neck, base * 0.85), (neck * 1.2, base)],
                u.colour(PLAIN, GLASS, BRIGHT),
            )
        )
    for _ in range(u.integer(2, 6) if base else u.integer(1, 4)):
        tip = np.array([u(-0.12, 0.12), base + h * u(0.6, 1), u(-0.12, 0.12)])
        parts.append(rod((0, base * 0.5, 0), tip, 0.006, leaf))
        size, colour = u(0.025, 0.06), petal if u.chance(0.6) else u.colour(PETAL)
        count, out = u.integer(4, 7), u(0.3, 1.2)
        angle = np.arange(count) * 2 * math.pi / count
        away = np.stack([np.cos(angle), np.full(count, 1 / out - 0.8), np.sin(angle)], axis=1) * size
        across = np.stack([-np.sin(angle), np.zeros(count), np.cos(angle)], axis=1) * size * 0.5
        petals = np.stack([np.zeros_like(away), away + across, away - across], axis=1)
        parts += [
            mesh(petals, colour, tuple(tip)),
            ball(size * 0.4, size * 0.3, size * 0.4, *tip, u.colour(BRIGHT[3:4], GREEN)),
        ]
    spread = u.rng.uniform(-1, 1, size=(12, 1, 3)) * (0.1, 0, 0.1)
    foot = np.array([0, base * 0.9, 0])
    blades = np.concatenate(
        [np.zeros((12, 1, 3)), np.add(spread, (0.01, h * 0.4, 0)), np.add(spread * 1.3, (-0.01, h * 0.3, 0.02))], axis=1
    )
    return [*parts, mesh(blades, leaf, tuple(foot))]


def guitar(u: Draw) -> list[Part]:
    wood, neck, dark = u.colour(WOOD, BRIGHT, PLAIN), u.colour(WOOD[:2], PLAIN[3:]), PLAIN[3]
    w, t, long = u(0.32, 0.4), u(0.04, 0.11), u(0.45, 0.52)
    waist = u(0.6, 0.8)
    outline = [
        (0, 0),
        (w * 0.3, 0.01),
        (w * 0.5, long * 0.25),
        (w * 0.5 * waist, long * 0.6),
        (w * 0.4, long * 0.85),
        (w * 0.15, long),
    ]
    outline += [(-x, y) for x, y in outline[:0:-1]]
    top = long + u(0.4, 0.5)
    parts = [
        prism(outline, t, wood),
        box(0.055, top - long * 0.65, 0.02, 0, long * 0.65, t / 2, neck),
        box(0.08, 0.16, 0.015, 0, top, t / 2, neck),
    ]
    if t > 0.07:
        parts.append(disc(0.1, 0.1, 0.003, 0, long * 0.6, t / 2, dark))
    else:
        parts += [box(0.08, 0.025, 0.01, 0, long * y, t / 2, dark) for y in (0.4, 0.6)]
    parts.append(box(0.12, 0.02, 0.012, 0, long * 0.25, t / 2, dark))
    parts += [
        rod((x, long * 0.25, t / 2 + 0.015), (x, top + 0.1, t / 2 + 0.015), 0.003, PLAIN[1]) for x in (-0.015, 0, 0.015)
    ]
    parts += [box(0.12, 0.012, 0.01, 0, top + y, t / 2, PLAIN[1]) for y in (0.03, 0.08, 0.13)]
    return parts


def headphones(u: Draw) -> list[Part]:
    body, pad, r = u.colour(PLAIN, BRIGHT), u.colour(PLAIN[2:]), u(0.075, 0.09)
    parts = [tube(arc(r, 0, math.pi, r * u(1, 1.3)), u(0.01, 0.025), body, (0, 0.04, 0))]
    for side in (-1, 1):
        at, cup = (side * r, 0.03, 0), u(0.06, 0.08)
        parts += [
            rod(at, (side * (r - 0.025), 0.03, 0), cup, pad),
            rod(at, (side * (r + 0.02), 0.03, 0), cup * 0.9, body, 0.8),
        ]
    return parts


def bread(u: Draw) -> list[Part]:
    crust, w, long = u.colour(CRUST), u(0.08, 0.14), u(0.2, 0.4)
    kind = u.integer(0, 2)
    if kind == 0:  # a long loaf
        parts = [ball(w, w * 0.75, long, 0, 0, 0, crust)]
        return parts + [
            box(w * 0.6, 0.008, 0.012, 0, w * 0.72, long * z, u.colour(CRUST)) for z in (-0.25, -0.08, 0.08, 0.25)
        ]
    if kind == 1:  # a round loaf
        return [
            ball(long * 0.8, long * u(0.3, 0.45), long * 0.8, 0, 0, 0, crust),
            box(long * 0.4, 0.01, 0.02, 0, long * 0.36, 0, u.colour(CRUST)),
        ]
    outline = [
        (-w / 2, 0),
        (w / 2, 0),
        (w / 2, w * 0.7),
        (w * 0.6, w * 0.85),
        (w * 0.4, w * 1.1),
        (-w * 0.4, w * 1.1),
        (-w * 0.6, w * 0.85),
        (-w / 2, w * 0.7),
    ]
    return [
        prism(outline, long * 0.7, crust),
        prism([(x * 0.9, y * 0.93 + 0.003) for x, y in outline], long * 0.71, CRUST[2]),
    ]


def hamburger(u: Draw) -> list[Part]:
    bun, r, y = u.colour(CRUST), u(0.045, 0.06), 0.0
    parts = [lathe([(0, 0), (r * 0.9, 0), (r, 0.008), (r * 0.95, 0.018)], bun)]
    y = 0.018
    for _ in range(u.integer(3, 6)):
        thick, wide = u(0.004, 0.014), r * u(1, 1.12)
        layer = u.colour(GREEN, WOOD[:2], BRIGHT[:1], BRIGHT[3:4])
        square = u.chance(0.25)
        parts.append(
            box(1.8 * wide, 0.004, 1.8 * wide, 0, y, 0, BRIGHT[3])
            if square
            else cone(2 * wide, thick, 2 * wide, 0, y, 0, layer)
        )
        y += 0.004 if square else thick
    dome = [(r * math.cos(a), y + r * u(0.6, 0.8) * math.sin(a)) for a in np.linspace(0, math.pi / 2, 6)]
    return [*parts, lathe(dome, bun)]


def cupcake(u: Draw) -> list[Part]:
    paper, icing, r = u.colour(BRIGHT, PLAIN, WOOD), u.colour(PETAL, WOOD[:2]), u(0.03, 0.04)
    h, y = r * u(1, 1.4), 0.0
    parts = [cone(2 * r, h, 2 * r, 0, 0, 0, paper, u(1.2, 1.45))]
    wide, y = r * 2.6, h
    for _ in range(u.integer(2, 4)):
        parts.append(ball(wide, wide * 0.5, wide, 0, y - wide * 0.15, 0, icing))
        y, wide = y + wide * 0.25, wide * 0.72
    return [*parts, ball(r * 0.5, r * 0.5, r * 0.5, 0, y, 0, BRIGHT[0])] if u.chance(0.6) else parts


THINGS: dict[str, Callable[[Draw], list[Part]]] = {
    "apple": apple, "ball": toy_ball, "basin": basin, "basket": basket, "basketball": basketball, "bread": bread,
    "broom": broom, "brush": brush, "clothes": clothes, "cupcake": cupcake, "flower": flower, "guitar": guitar,
    "hamburger": hamburger, "hat": hat, "headphones": headphones, "jacket": jacket, "shoe": shoe, "slipper": slipper,
}  # fmt: skip

"""Procedural containers, counters and hand tools.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import case
from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, disc, lathe, lean, moved, prism, rod, tube,
)  # fmt: skip


def safe(u: Draw) -> list[Part]:
    metal, dark, w = u.colour(PLAIN), u.colour(PLAIN), u(0.3, 0.7)
    h, d = w * u(0.7, 1.5), w * u(0.7, 1)
    parts = [box(w, h, d, 0, 0, 0, metal), box(w * 0.86, h * 0.86, 0.02, 0, h * 0.07, d / 2, metal)]
    parts += [
        disc(w * 0.2, w * 0.2, 0.04, w * 0.1, h * 0.55, d / 2, dark),
        rod((-w * 0.2, h * 0.5, d / 2 + 0.03), (-w * 0.2, h * 0.65, d / 2 + 0.03), 0.025, dark),
    ]
    return parts + [rod((w * 0.45, h * y, d / 2), (w * 0.45, h * (y + 0.12), d / 2), 0.03, dark) for y in (0.15, 0.73)]


def locker(u: Draw) -> list[Part]:
    metal, dark, w, d, count = u.colour(PLAIN, BRIGHT), u.colour(PLAIN[1:]), u(0.3, 0.45), u(0.3, 0.5), u.integer(1, 3)
    h = u(0.5, 0.9) if count == 1 and u.chance(0.4) else u(1.6, 2)
    parts = [box(w * count, h, d, 0, 0, 0, metal)]
    for n in range(count):
        x = w * (n + 0.5 - count / 2)
        parts += [
            box(w * 0.92, h * 0.96, 0.02, x, h * 0.02, d / 2, metal),
            box(0.03, 0.12, 0.03, x - w * 0.35, h * 0.48, d / 2 + 0.02, dark),
        ]
        parts += [box(w * 0.5, 0.012, 0.025, x, h * y, d / 2, dark) for y in (0.12, 0.16, 0.84, 0.88)]
    return parts


def wooden_crate(u: Draw) -> list[Part]:
    wood, w, h, d = u.colour(WOOD, BRIGHT[:3]), u(0.4, 0.8), u(0.25, 0.8), u(0.35, 0.7)
    rows, post = u.integer(2, 6), 0.04
    parts = [box(w * 0.97, 0.02, d * 0.97, 0, 0, 0, u.colour(WOOD[:2]))]
    for n in range(rows):
        y, high = h * n / rows, h / rows * u(0.7, 0.95)
        parts += [box(w, high, 0.02, 0, y, side * d / 2, wood) for side in (-1, 1)]
        parts += [box(0.02, high, d, side * w / 2, y, 0, wood) for side in (-1, 1)]
    parts += [box(post, h, post, sx * w * 0.48, 0, sz * d * 0.48, u.colour(WOOD)) for sx in (-1, 1) for sz in (-1, 1)]
    return [*parts, box(w, 0.02, d, 0, h, 0, wood)] if u.chance(0.5) else parts


def trunk(u: Draw) -> list[Part]:
    body, trim, w = u.colour(WOOD, PLAIN[2:], BRIGHT), u.colour(WOOD, BRIGHT[3:], PLAIN), u(0.7, 1.1)
    h, d = w * u(0.3, 0.45), w * u(0.4, 0.6)
    parts = [box(w, h, d, 0, 0, 0, body)]
    if u.chance(0.5):
        lid = [(d / 2 * math.cos(a), d * 0.4 * math.sin(a)) for a in np.linspace(0, math.pi, 9)]
        parts.append(prism(lid, w, body, (0, h, 0), lean(0, math.pi / 2)))
    else:
        parts.append(box(w * 1.02, h * 0.25, d * 1.02, 0, h, 0, body))
    parts += [box(0.05, h, 0.02, x * w, 0, z * d / 2, trim) for x in (-0.47, -0.25, 0.25, 0.47) for z in (-1, 1)]
    return [*parts, box(0.08, 0.1, 0.03, 0, h * 0.85, d / 2 + 0.01, trim)]


def carton(u: Draw) -> list[Part]:
    """Of milk or juice."""
    card, label, w = u.colour(PLAIN[:1], BRIGHT), u.colour(BRIGHT, PLAIN), u(0.06, 0.1)
    h, d = w * u(1.8, 2.8), w * u(0.7, 1)
    parts = [box(w, h, d, 0, 0, 0, card), box(w * 1.01, h * u(0.2, 0.5), d * 1.01, 0, h * u(0.1, 0.4), 0, label)]
    if u.chance(0.7):
        roof = [(-d / 2, 0), (d / 2, 0), (0, w * 0.5)]
        parts += [
            prism(roof, w, card, (0, h, 0), lean(0, math.pi / 2)),
            box(w, w * 0.2, 0.006, 0, h + w * 0.48, 0, card),
        ]
        return [*parts, disc(0.03, 0.03, 0.015, 0, h + w * 0.25, d * 0.22, label)] if u.chance(0.6) else parts
    return [*parts, cone(0.03, 0.02, 0.03, w * 0.2, h, 0, label)]


def cooler(u: Draw) -> list[Part]:
    """A cool box, or a dispenser of water with a bottle on top."""
    body, lid = u.colour(BRIGHT, PLAIN), u.colour(PLAIN, BRIGHT)
    if u.chance(0.5):
        w, h, d = u(0.4, 0.6), u(0.3, 0.4), u(0.25, 0.35)
        parts = [box(w, h, d, 0, 0, 0, body), box(w * 1.04, 0.07, d * 1.05, 0, h, 0, lid)]
        return [*parts, tube(arc(w * 0.52, 0, math.pi, u(0.1, 0.2)), 0.025, lid, (0, h * 0.9, 0))]
    w, h = u(0.28, 0.36), u(0.85, 1.1)
    parts = [box(w, h, w, 0, 0, 0, u.colour(PLAIN)), box(w * 0.7, 0.2, 0.02, 0, h * 0.7, w / 2, PLAIN[2])]
    water = [(0.05, h), (0.05, h + 0.05), (w * 0.45, h + 0.1), (w * 0.45, h + 0.4), (0, h + 0.42)]
    parts.append(lathe(water, (0.55, 0.75, 0.9)))
    return parts + [box(0.03, 0.04, 0.05, x * w, h * 0.8, w / 2 + 0.03, u.colour(BRIGHT[:2])) for x in (-0.15, 0.15)]


def tub(u: Draw) -> list[Part]:
    """A hot tub, round or square."""
    side, water = u.colour(WOOD, PLAIN), (0.45, 0.7, 0.85)
    w, h = u(1.6, 2.3), u(0.75, 1)
    rim = u.colour(PLAIN, WOOD)
    parts = [
        lathe([(w / 2, 0), (w / 2, h), (w * 0.53, h), (w * 0.44, h + 0.03), (w * 0.42, h * 0.6), (0, h * 0.5)], rim)
    ]
    if u.chance(0.5):
        parts += [box(w, h, 0.04, 0, 0, s * w / 2, side) for s in (-1, 1)] + [
            box(0.04, h, w, s * w / 2, 0, 0, side) for s in (-1, 1)
        ]
    else:
        parts.append(lathe([(w * 0.51, 0), (w * 0.51, h * 0.97)], side))
    parts += [cone(w * 0.84, 0.01, w * 0.84, 0, h * 0.8, 0, water)] if u.chance(0.6) else []
    return [*parts, box(w * 0.4, h * 0.4, 0.35, 0, 0, w * 0.6, side)] if u.chance(0.5) else parts


def urinal(u: Draw) -> list[Part]:
    enamel, w, h = u.colour(PLAIN[:1]), u(0.3, 0.42), u(0.6, 0.9)
    d = w * u(0.7, 0.95)
    bowl = [(0, 0), (w * 0.25, 0.03), (w / 2, h * 0.3), (w / 2, h * 0.38), (w * 0.42, h * 0.38), (0, h * 0.15)]
    parts = [lathe(bowl, enamel, flat=d / w * 1.1), box(w * 0.85, h * 0.9, 0.04, 0, h * 0.1, -d * 0.45, enamel)]
    angle = np.linspace(0, math.pi, 12)
    shell = [(w / 2 * math.cos(a), -d * 0.45 * math.sin(a)) for a in angle]
    for a, b in zip(shell[::3], shell[3::3], strict=False):
        parts.append(rod((a[0], h * 0.3, a[1]), (a[0] * 0.9, h, a[1] * 0.9), 0.05, enamel))
        parts.append(rod((b[0], h * 0.3, b[1]), (b[0] * 0.9, h, b[1] * 0.9), 0.05, enamel))
    return [
        *parts,
        rod((0, h * 0.95, -d * 0.4), (0, h + u(0.05, 0.15), -d * 0.4), 0.03, PLAIN[1]),
        cone(0.08, 0.03, 0.08, 0, h, -d * 0.4, PLAIN[1]),
    ]


def counter(u: Draw) -> list[Part]:
    """A counter of a kitchen or a bar, with drawers or open at the back."""
    body, top, w, h, d = u.colour(WOOD, PLAIN), u.colour(PLAIN, WOOD), u(1, 2.4), u(0.8, 1.1), u(0.45, 0.7)
    over = u(1.02, 1.25)
    if u.chance(0.5):
        parts = case(u, w, h, d, u.integer(2, 4), u.integer(1, 3), body)
        return [*parts, box(w * 1.03, 0.05, d * over, 0, h + 0.12, 0, top)]
    parts = [box(w, h, 0.05, 0, 0, d * 0.35, body), box(w * over, 0.05, d * over, 0, h, 0, top)]
    parts += [box(0.05, h, d * 0.9, side * w * 0.47, 0, 0, body) for side in (-1, 1)]
    return parts + [box(w * 0.93, 0.03, d * 0.6, 0, h * y, 0, body) for y in (0.35, 0.7)[: u.integer(0, 2)]]


def stand(u: Draw) -> list[Part]:
    """For a television, or for knives."""
    wood = u.colour(WOOD, PLAIN)
    if u.chance(0.6):
        w, h, d, t = u(1, 1.8), u(0.35, 0.6), u(0.35, 0.5), u(0.02, 0.05)
        foot = u(0.0, 0.12)
        if u.chance(0.5):
            parts = moved(case(u, w, h - foot, d, u.integer(2, 4), u.integer(1, 2), wood), np.eye(3), (0, foot, 0))
        else:
            parts = [box(w, t, d, 0, y, 0, wood) for y in (foot, h * 0.5, h)]
            parts += [box(t, h - foot, d, x * w, foot, 0, wood) for x in (-0.49, u(-0.2, 0.2), 0.49)]
        if foot > 0.03:
            parts += [
                cone(0.05, foot, 0.05, sx * w * 0.45, 0, sz * d * 0.4, u.colour(PLAIN, WOOD))
                for sx in (-1, 1)
                for sz in (-1, 1)
            ]
        return parts
    grip, w = u.colour(PLAIN[2:], WOOD), u(0.08, 0.13)
    h, tilt = u(0.18, 0.26), u(0.2, 0.6)
    parts = [box(w, h, w * u(0.8, 1.4), 0, 0, 0, wood, tilt)]
    for row in range(u.integer(1, 3)):
        for n in range(count := u.integer(2, 3)):
            x, z = w * ((n + 0.5) / count - 0.5) * 0.85, w * (0.3 - 0.3 * row)
            foot = np.array([x, h, z]) @ lean(tilt)
            parts.append(rod(foot, foot + np.array([0, u(0.06, 0.12), 0]) @ lean(tilt), 0.02, grip, flat=1.4))
    return parts


def doormat(u: Draw) -> list[Part]:
    mat, edge, w = u.colour(WOOD, PLAIN[1:], BRIGHT[:3]), u.colour(PLAIN[2:], WOOD), u(0.5, 0.9)
    d, t = w * u(0.55, 0.75), u(0.01, 0.03)
    parts = [box(w, t, d, 0, 0, 0, edge), box(w * 0.9, t * 1.2, d * 0.85, 0, 0, 0, mat)]
    if u.chance(0.5):
        parts += [box(w * 0.06, t * 1.3, d * 0.2, w * 0.1 * n, 0, 0, u.colour(PLAIN)) for n in range(-3, 4)]
    return parts


def board(u: Draw) -> list[Part]:
    """For cutting."""
    wood, w = u.colour(WOOD, PLAIN), u(0.3, 0.45)
    d, t = w * u(0.55, 0.8), u(0.01, 0.03)
    parts = [box(w, t, d, 0, 0, 0, wood)]
    if u.chance(0.5):
        parts.append(box(w * 0.25, t, d * 0.3, w * 0.6, 0, 0, wood))
    return [*parts, cone(0.03, t * 1.05, 0.03, w * 0.45, 0, 0, u.colour(PLAIN[2:]))] if u.chance(0.4) else parts


def hanger(u: Draw) -> list[Part]:
    wood, w, h = u.colour(WOOD, PLAIN, BRIGHT), u(0.38, 0.46), u(0.08, 0.14)
    thick = u(0.008, 0.025)
    parts = [rod((0, h, 0), (side * w / 2, 0, 0), thick, wood, flat=u(0.5, 1)) for side in (-1, 1)]
    hook = arc(0.025, -math.pi / 2, math.pi * 0.9)
    parts += [rod((0, h, 0), (0, h + 0.05, 0), 0.008, PLAIN[1]), tube(hook, 0.006, PLAIN[1], (0, h + 0.075, 0))]
    return [*parts, rod((-w * 0.48, 0, 0), (w * 0.48, 0, 0), thick * 0.8, wood)] if u.chance(0.75) else parts


def scissors(u: Draw) -> list[Part]:
    metal, grip, long, spread = u.colour(PLAIN[:2]), u.colour(BRIGHT, PLAIN[2:], WOOD[:1]), u(0.08, 0.13), u(0.05, 0.35)
    parts, r = [], u(0.018, 0.028)
    for side in (-1, 1):
        a = side * spread
        parts.append(rod((0, 0, 0), (long * math.sin(a), 0, long * math.cos(a)), 0.016, metal, 0.2, flat=0.25))
        x, z = -0.05 * math.sin(a) - side * r, -0.05 * math.cos(a)
        parts.append(rod((0, 0, 0), (x * 0.8, 0, z), 0.014, grip))
        path = arc(r, 0, 2 * math.pi, r * u(1, 1.7))
        parts.append(tube(path, 0.01, grip, (x, 0, z - r), lean(math.pi / 2)))
    return parts


def saw(u: Draw) -> list[Part]:
    metal, grip, long, h = u.colour(PLAIN[:2]), u.colour(WOOD, BRIGHT, PLAIN[2:]), u(0.35, 0.55), u(0.09, 0.14)
    blade = [(0, 0), (0, h), (long, h * u(0.8, 1)), (long, h * 0.45)]
    parts = [
        prism(blade, 0.004, metal),
        prism([(-0.12, -0.02), (0.02, 0), (0.02, h * 1.05), (-0.1, h * 1.1), (-0.06, h * 0.5)], 0.025, grip),
    ]
    return moved(parts, lean(math.pi / 2)) if u.chance(0.5) else parts


def skateboard(u: Draw) -> list[Part]:
    deck, wheel, w, long = u.colour(PLAIN[2:], BRIGHT, WOOD), u.colour(PLAIN, BRIGHT), u(0.18, 0.22), u(0.7, 0.85)
    y = 0.09
    parts = [box(w, 0.012, long * 0.62, 0, y, 0, deck)]
    for end in (-1, 1):
        z = end * long * 0.31
        tip = prism([(-w / 2, 0), (w / 2, 0), (w * 0.3, long * 0.19), (-w * 0.3, long * 0.19)], 0.012, deck)
        parts += moved([tip], lean(-end * (math.pi / 2 - 0.25)), (0, y + 0.006, z))
        parts += [
            rod((-w / 2, 0.03, z * 0.9), (-w * 0.3, 0.03, z * 0.9), 0.06, wheel),
            rod((w * 0.3, 0.03, z * 0.9), (w / 2, 0.03, z * 0.9), 0.06, wheel),
        ]
        parts.append(box(w * 0.7, 0.05, 0.04, 0, 0.035, z * 0.9, PLAIN[1]))
    return parts


def shaker(u: Draw) -> list[Part]:
    body, cap, r = u.colour(PLAIN, BRIGHT, WOOD), u.colour(PLAIN[:2]), u(0.018, 0.03)
    h, waist = r * u(2.2, 4), u(0.6, 1)
    parts = [
        lathe([(0, 0), (r, 0), (r * waist, h * 0.6), (r * u(0.6, 0.9), h)], body),
        lathe([(r * 0.85, h), (r * 0.8, h + r * 0.5), (0, h + r * u(0.6, 1.1))], cap),
    ]
    return parts + [
        cone(0.004, 0.004, 0.004, r * 0.35 * math.cos(a), h + r * 0.62, r * 0.35 * math.sin(a), PLAIN[3])
        for a in (0, 2, 4)
    ]


def lipstick(u: Draw) -> list[Part]:
    case_, stick, r = (
        u.colour(PLAIN[2:], BRIGHT[3:], PLAIN),
        u.colour(BRIGHT[:1], ((0.85, 0.35, 0.4), (0.8, 0.5, 0.4))),
        u(0.008, 0.012),
    )
    h = r * u(3.5, 6)
    tip = Part("cone", (1.5 * r, r * 2.5, 1.5 * r), (0, h * 1.25, 0), stick, 0.7)
    return [
        cone(2 * r, h, 2 * r, 0, 0, 0, case_),
        cone(1.7 * r, h * 0.3, 1.7 * r, 0, h, 0, u.colour(BRIGHT[3:], PLAIN)),
        tip,
        ball(r * 1.05, r * 0.6, r * 1.05, 0, h * 1.25 + r * 2.2, 0, stick),
    ]


def handbag(u: Draw) -> list[Part]:
    skin, trim, w = u.colour(WOOD, BRIGHT, PLAIN), u.colour(BRIGHT[3:], PLAIN, WOOD), u(0.25, 0.4)
    h, d = w * u(0.55, 0.8), w * u(0.25, 0.4)
    profile = [(-d / 2, 0), (d / 2, 0), (d * u(0.15, 0.45), h), (-d * 0.2, h)]
    parts = [prism(profile, w, skin, turn=lean(0, math.pi / 2))]
    handles = (-1, 1) if u.chance(0.5) else (0,)
    parts += [
        tube(arc(w * u(0.25, 0.4), 0, math.pi, h * u(0.4, 0.9)), 0.014, skin, (0, h * 0.95, z * d * 0.15))
        for z in handles
    ]
    return [
        *parts,
        box(0.03, 0.03, 0.01, 0, h * 0.75, d * 0.3, trim),
        ball(w * 0.04, w * 0.04, w * 0.04, 0, h, 0, trim),
    ]


def briefcase(u: Draw) -> list[Part]:
    skin, metal, w = u.colour(PLAIN[2:], WOOD), u.colour(PLAIN[:2], BRIGHT[3:4]), u(0.38, 0.48)
    h, d = w * u(0.65, 0.8), u(0.07, 0.13)
    parts = [box(w, h, d, 0, 0, 0, skin), box(w * 1.01, 0.01, 0.012, 0, h, 0, metal)]
    parts += [box(0.01, h, 0.012, side * w / 2, 0, 0, metal) for side in (-1, 1)]
    parts += [box(0.035, 0.03, 0.01, x * w, h * 0.88, d / 2, metal) for x in (-0.3, 0.3)]
    return [*parts, tube(arc(w * 0.13, 0, math.pi, 0.05), 0.018, skin, (0, h, 0))]


CONTAINERS: dict[str, Callable[[Draw], list[Part]]] = {
    "board": board, "briefcase": briefcase, "carton": carton, "cooler": cooler, "counter": counter,
    "crate": wooden_crate, "doormat": doormat, "handbag": handbag, "hanger": hanger, "lipstick": lipstick,
    "locker": locker, "safe": safe, "saw": saw, "scissors": scissors, "shaker": shaker, "skateboard": skateboard,
    "stand": stand, "trunk": trunk, "tub": tub, "urinal": urinal,
}  # fmt: skip

"""Procedural devices: cameras, telephones, computers, small machines.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS
from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, disc, lathe, lean, moved, prism, ring, rod, tube,
)  # fmt: skip

SCREEN = (*PLAIN[3:], (0.1, 0.12, 0.2), (0.3, 0.55, 0.75))


def camera(u: Draw) -> list[Part]:
    body, dark, kind = u.colour(PLAIN), u.colour(PLAIN[2:]), u.integer(0, 3)
    if kind == 0:  # of surveillance, under the ceiling
        r = u(0.05, 0.08)
        parts = [
            cone(2 * r, r * u(0.5, 1), 2 * r, 0, 0, 0, body, u(1, 1.3)),
            ball(1.7 * r, 1.7 * r, 1.7 * r, 0, -0.8 * r, 0, dark),
        ]
        return [*parts, cone(2.6 * r, r * 0.3, 2.6 * r, 0, r, 0, body)] if u.chance(0.5) else parts
    if kind == 1:  # of surveillance, on an arm
        w, long, y = u(0.06, 0.1), u(0.15, 0.3), u(0.1, 0.15)
        case = (
            box(w, w, long, 0, y, 0, body)
            if u.chance(0.5)
            else rod((0, y + w / 2, -long / 2), (0, y + w / 2, long / 2), w, body)
        )
        parts = [
            case,
            box(w * 1.15, 0.01, long * 1.1, 0, y + w, 0.02, body),
            disc(w * 0.6, w * 0.6, 0.02, 0, y + w / 2, long / 2, dark),
        ]
        return [
            *parts,
            rod((0, y, -long * 0.2), (0, 0, -long * 0.6), 0.025, body),
            disc(w, w, 0.02, 0, 0, -long * 0.6 - 0.02, body),
        ]
    w, h, d = u(0.1, 0.15), u(0.06, 0.1), u(0.03, 0.06)
    trim = u.colour(PLAIN)
    parts = [
        box(w, h, d, 0, 0, 0, body),
        box(w * 1.01, h * u(0.2, 0.4), d * 1.02, 0, h * u(0.5, 0.65), 0, trim if u.chance(0.5) else body),
    ]
    r, x = h * u(0.55, 0.8), w * u(-0.1, 0.15)
    long = d * (u(1, 2.2) if kind == 2 else u(0.2, 0.6))
    parts += [
        disc(r, r, long, x, h * 0.45, d / 2, dark),
        disc(r * 0.7, r * 0.7, 0.005, x, h * 0.45, d / 2 + long, u.colour(SCREEN)),
    ]
    if kind == 2:
        parts += [box(w * 0.35, h * 0.3, d, x, h, 0, body), box(w * 0.2, h, d * 1.5, -w * 0.45, 0, d * 0.2, body)]
    parts += [
        cone(0.014, 0.012, 0.014, -w * 0.35, h, 0, trim),
        box(0.022, 0.012, 0.004, w * 0.32, h * 0.8, d / 2, PLAIN[0]),
    ]
    return [*parts, box(w * 0.65, h * 0.7, 0.004, 0, h * 0.12, -d / 2, u.colour(SCREEN))]


def intercom(u: Draw) -> list[Part]:
    body, dark, w, t = u.colour(PLAIN, GLASS), u.colour(PLAIN[2:]), u(0.08, 0.2), u(0.02, 0.05)
    h, kind = w * u(1.1, 2.4), u.integer(0, 2)
    parts = [box(w, h, t, 0, 0, 0, body)]
    if kind == 0:  # at the door
        parts += [box(w * 0.6, 0.004, 0.006, 0, h * (0.75 + 0.04 * n), t / 2, dark) for n in range(4)]
        rows = u.integer(1, 6)
        parts += [
            box(w * 0.7, h * 0.5 / rows, 0.01, 0, h * (0.08 + 0.6 / rows * n), t / 2, u.colour(PLAIN))
            for n in range(rows)
        ]
        return [*parts, disc(w * 0.3, w * 0.3, 0.01, 0, h * 0.8, t / 2, dark)] if u.chance(0.4) else parts
    side = -w * 0.28 if kind == 1 else 0.0
    parts += [
        box(w * 0.33, h * 0.95, t, side, h * 0.02, t * 0.9, body),
        ball(w * 0.38, h * 0.2, t * 2, side, h * 0.8, t, body),
        ball(w * 0.38, h * 0.2, t * 2, side, 0, t, body),
    ]
    if kind == 1:
        parts.append(box(w * 0.45, h * 0.3, 0.006, w * 0.22, h * 0.6, t / 2, u.colour(SCREEN)))
        parts += [
            disc(0.014, 0.014, 0.008, w * (0.08 + 0.14 * n), h * 0.3, t / 2, u.colour(PLAIN, BRIGHT)) for n in range(3)
        ]
    if u.chance(0.7):  # the cord
        angle = np.linspace(0, math.pi, 60)
        coil = w * 0.06
        cord = np.stack(
            [
                side + w * 0.3 * (1 - np.cos(angle)),
                -w * 0.9 * np.sin(angle) + coil * np.sin(20 * angle),
                coil * np.cos(20 * angle),
            ],
            axis=1,
        )
        parts.append(tube(cord, 0.012, body))
    return parts


def laptop(u: Draw) -> list[Part]:
    body, w = u.colour(PLAIN, PLAIN, BRIGHT[:2]), u(0.28, 0.4)
    d, t, tilt = w * u(0.62, 0.75), u(0.012, 0.025), u(0, 0.5)
    lid = [box(w, d, t * 0.5, 0, 0, 0, body), box(w * 0.92, d * 0.86, 0.002, 0, d * 0.07, t * 0.25, u.colour(SCREEN))]
    parts = [box(w, t, d, 0, 0, 0, body), *moved(lid, lean(tilt), (0, t, -d / 2))]
    parts.append(box(w * 0.9, 0.003, d * 0.45, 0, t, -d * 0.17, u.colour(PLAIN[1:])))
    return [*parts, box(w * 0.3, 0.002, d * 0.22, 0, t, d * 0.3, u.colour(PLAIN))]


def computer(u: Draw) -> list[Part]:
    body, w = u.colour(PLAIN[:2], PLAIN), u(0.4, 0.6)
    h, t, lift = w * u(0.6, 0.8), u(0.02, 0.06), u(0.08, 0.15)
    screen = u.colour(SCREEN)
    parts = [box(w, h, t, 0, lift, 0, body), box(w * 0.92, h * 0.86, 0.004, 0, lift + h * 0.08, t / 2, screen)]
    if u.chance(0.25):  # an old screen
        parts.append(box(w * 0.7, h * 0.8, w * 0.6, 0, lift + h * 0.05, -w * 0.3, body))
    parts += [box(0.06, lift + h * 0.3, 0.03, 0, 0, -t, body), box(w * 0.45, 0.015, 0.18, 0, 0, 0, body)]
    if u.chance(0.8):
        keys, z = u.colour(PLAIN), u(0.2, 0.3)
        parts += [box(w * 0.95, 0.015, 0.14, 0, 0, z, keys), box(w * 0.9, 0.02, 0.11, 0, 0, z, u.colour(PLAIN))]
        if u.chance(0.6):
            parts.append(ball(0.06, 0.035, 0.1, w * 0.62, 0, z, keys))
    if u.chance(0.4):
        parts.append(box(0.18, u(0.35, 0.45), 0.4, w * 0.85, 0, 0, body))
    return parts


def phone(u: Draw) -> list[Part]:
    body, dark = u.colour(PLAIN[2:], PLAIN, BRIGHT), u.colour(PLAIN)
    if u.chance(0.65):  # a mobile phone that lies
        w, h, t = u(0.045, 0.08), u(0.1, 0.16), u(0.007, 0.02)
        share = u(0.4, 0.95)
        parts = [
            box(w, t, h, 0, 0, 0, body),
            box(w * 0.88, 0.002, h * share * 0.92, 0, t, -h * (1 - share) * 0.45, u.colour(SCREEN)),
        ]
        if share < 0.75:
            for row in range(4):
                parts += [
                    box(w * 0.22, 0.003, h * 0.07, w * x, t, h * (0.46 - 0.09 * row), dark) for x in (-0.3, 0, 0.3)
                ]
        return parts
    w = u(0.16, 0.22)
    base = prism([(-w / 2, 0), (w / 2, 0), (w / 2, 0.03), (-w / 2, 0.08)], w * 0.9, body, turn=lean(0, -math.pi / 2))
    parts = [base, box(w * 0.35, 0.02, w * 0.5, w * 0.12, 0.05, w * 0.1, dark)]
    x = -w * 0.28 if u.chance(0.6) else 0.0
    along = np.eye(3) if x else np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=float)
    held = [
        box(0.03, 0.03, w, x, 0.1, 0, body),
        ball(0.055, 0.05, 0.06, x, 0.07, w * 0.45, body),
        ball(0.055, 0.05, 0.06, x, 0.07, -w * 0.45, body),
    ]
    return parts + moved(held, along)


def tablet(u: Draw) -> list[Part]:
    body, w, t = u.colour(PLAIN), u(0.16, 0.26), u(0.006, 0.012)
    h = w * u(1.25, 1.6)
    flat = [box(w, h, t, 0, 0, 0, body), box(w * 0.88, h * 0.86, 0.002, 0, h * 0.07, t / 2, u.colour(SCREEN))]
    return moved(flat, lean(u.pick(math.pi / 2, 0.4, 0.0)))


def printer(u: Draw) -> list[Part]:
    body, dark, w, h, d = u.colour(PLAIN), u.colour(PLAIN[1:]), u(0.38, 0.5), u(0.15, 0.4), u(0.3, 0.45)
    parts = [
        box(w, h, d, 0, 0, 0, body),
        box(w * 0.95, 0.03, d * 0.8, 0, h, -d * 0.05, dark if u.chance(0.5) else body),
    ]
    parts += [
        box(w * 0.7, 0.015, d * 0.35, 0, h * 0.2, d * 0.6, dark),
        box(w * 0.6, 0.005, d * 0.4, 0, h * 0.22, d * 0.6, PLAIN[0]),
    ]
    parts += [box(w * 0.65, d * 0.6, 0.015, 0, h, -d * 0.45, body, u(0.2, 0.6))] if u.chance(0.6) else []
    return [*parts, box(w * 0.25, 0.02, 0.06, w * 0.3, h + 0.01, d * 0.42, u.colour(SCREEN))]


def fan(u: Draw) -> list[Part]:
    body, blade, r = u.colour(PLAIN, BRIGHT), u.colour(BRIGHT, PLAIN, GLASS), u(0.13, 0.25)
    y = r + (u(0.08, 0.25) if u.chance(0.6) else u(0.7, 1.1))
    parts = [
        lathe([(0, 0.04), (r * 0.5, 0.03), (r * u(0.7, 0.9), 0), (0, 0)], body),
        rod((0, 0.02, 0), (0, y, 0), 0.04, body),
    ]
    parts += [ring(r * part, 0.01, (0, y, z), body) for part, z in ((1, 0), (0.6, 0.08), (0.95, -0.05))]
    count = u.integer(3, 5)
    for n in range(count):
        angle = n * 2 * math.pi / count
        parts.append(
            rod(
                (0, y, 0),
                (r * 0.85 * math.sin(angle), y + r * 0.85 * math.cos(angle), 0),
                r * 0.3,
                blade,
                1.7,
                flat=0.1,
            )
        )
    return [*parts, rod((0, y, -0.14), (0, y, -0.02), r * 0.5, body), disc(r * 0.35, r * 0.35, 0.02, 0, y, 0.07, body)]


def blender(u: Draw) -> list[Part]:
    body, jug, r = u.colour(PLAIN, BRIGHT), u.colour(GLASS, PLAIN), u(0.06, 0.09)
    low, high = r * u(1.5, 2.2), r * u(2.5, 3.5)
    parts = [
        cone(2.3 * r, low, 2.3 * r, 0, 0, 0, body, 0.75),
        cone(1.5 * r, high, 1.5 * r, 0, low, 0, jug, u(1.1, 1.5)),
    ]
    parts += [
        cone(2 * r, 0.03, 2 * r, 0, low + high, 0, u.colour(PLAIN[1:], PLAIN)),
        cone(0.04, 0.02, 0.04, 0, low + high + 0.03, 0, body),
    ]
    parts += [disc(0.04, 0.04, 0.02, 0, low * 0.4, r, u.colour(PLAIN))]
    if u.chance(0.6):
        parts.append(
            tube(arc(r * 0.6, -math.pi / 2, math.pi / 2, high * 0.35), r * 0.2, jug, (r * 0.85, low + high * 0.55, 0))
        )
    return parts


def toaster(u: Draw) -> list[Part]:
    body, dark, w, h, d = u.colour(PLAIN, BRIGHT), u.colour(PLAIN[2:]), u(0.26, 0.38), u(0.16, 0.22), u(0.14, 0.24)
    profile = [(-d / 2, 0), (d / 2, 0), (d / 2, h * 0.8), (d * 0.38, h), (-d * 0.38, h), (-d / 2, h * 0.8)]
    parts = [prism(profile, w, body, turn=lean(0, -math.pi / 2))]
    slots = u.integer(1, 2)
    for n in range(slots):
        z = d * 0.7 * ((n + 0.5) / slots - 0.5)
        parts.append(box(w * 0.7, 0.008, 0.03, 0, h, z, dark))
        if u.chance(0.4):
            parts.append(box(w * 0.35, 0.05, 0.02, -w * 0.12, h, z, WOOD[2]))
    return [
        *parts,
        box(0.02, 0.025, 0.05, w / 2, h * u(0.4, 0.8), 0, dark),
        disc(0.03, 0.03, 0.02, 0, h * 0.2, d / 2, dark),
    ]


def player(u: Draw) -> list[Part]:
    """A player of discs: a flat box with a display."""
    body, dark, w = u.colour(PLAIN[1:], PLAIN), u.colour(PLAIN[2:]), u(0.35, 0.45)
    h, d = u(0.04, 0.1), w * u(0.6, 0.9)
    parts = [box(w, h, d, 0, 0.01, 0, body), box(w * 0.3, h * 0.3, 0.004, -w * 0.2, h * 0.6, d / 2, dark)]
    parts += [
        box(w * 0.25, h * 0.3, 0.004, w * 0.15, h * 0.25, d / 2, u.colour(SCREEN)),
        disc(h * 0.5, h * 0.5, 0.01, w * 0.42, h * 0.6, d / 2, u.colour(PLAIN)),
    ]
    return parts + [cone(0.03, 0.01, 0.03, sx * w * 0.4, 0, sz * d * 0.4, dark) for sx in (-1, 1) for sz in (-1, 1)]


def maker(u: Draw) -> list[Part]:
    """A coffee maker with a jug, or a sandwich maker."""
    body, dark = u.colour(PLAIN, BRIGHT), u.colour(PLAIN[1:])
    if u.chance(0.35):
        w, d, h = u(0.22, 0.3), u(0.22, 0.3), u(0.035, 0.05)
        shell = [(w * 0.45, 0), (w / 2, h * 0.6), (w * 0.4, h), (0, h * 1.1)]
        parts = [lathe([(0, 0), *shell], body, (0, lift, 0), d / w) for lift in (0, h * 1.15)]
        return [
            *parts,
            box(w * 0.4, 0.03, d * 0.3, 0, h, d * 0.55, dark),
            cone(w * 0.5, 0.005, d * 0.4, 0, h * 2.25, 0, u.colour(PLAIN)),
        ]
    w, h, d, r = u(0.18, 0.24), u(0.28, 0.38), u(0.22, 0.3), u(0.06, 0.075)
    parts = [
        box(w, h, d * 0.4, 0, 0, -d * 0.3, body),
        box(w, h * 0.3, d, 0, h * 0.7, 0, body),
        box(w, 0.03, d, 0, 0, 0, body),
    ]
    jug = u.colour(GLASS, PLAIN[2:])
    parts.append(
        lathe(
            [(0, 0.035), (r, 0.04), (r * 1.1, h * 0.25), (r * 0.7, h * 0.5), (r * 0.75, h * 0.55)], jug, (0, 0, d * 0.2)
        )
    )
    bend = arc(r * 0.6, -math.pi / 2, math.pi / 2, h * 0.15)
    return [
        *parts,
        tube(bend, 0.02, dark, (r, h * 0.3, d * 0.2)),
        cone(r * 1.5, 0.02, r * 1.5, 0, h * 0.55, d * 0.2, dark),
        disc(0.03, 0.03, 0.01, 0, h * 0.85, d / 2, dark),
    ]


def shower_head(u: Draw) -> list[Part]:
    metal, r, reach, y = u.colour(PLAIN[:2], BRIGHT[3:]), u(0.04, 0.1), u(0.12, 0.4), u(0.3, 0.9)
    tilt = u(0.2, 1)
    head = cone(0.6 * r, r * u(0.4, 0.8), 0.6 * r, 0, 0, 0, metal, 0.4)
    parts = moved([head, cone(2 * r, r * 0.3, 2 * r, 0, -r * 0.3, 0, metal, u(0.5, 0.9))], lean(-tilt), (0, y, reach))
    path = np.array(
        [(0, y, 0), (0, y + reach * 0.3, reach * 0.3), (0, y + reach * 0.35, reach * 0.7), (0, y + r * 0.3, reach)]
    )
    parts += [tube(path, 0.025, metal), disc(0.08, 0.08, 0.02, 0, y, -0.02, metal)]
    if u.chance(0.7):  # the taps below
        spots = (-0.1, 0.1) if u.chance(0.6) else (0.0,)
        parts += [disc(u(0.06, 0.13), u(0.06, 0.13), 0.05, x, 0, 0, metal, 0.8) for x in spots]
        parts += [rod((x, 0, 0.03), (x, u(-0.03, 0.03), 0.09), 0.025, metal) for x in spots]
    if u.chance(0.5):
        parts += [rod((0, 0, 0), (0, y, 0), 0.02, metal)]
    return parts


def extinguisher(u: Draw) -> list[Part]:
    red, r, h = u.colour(BRIGHT[:1]), u(0.06, 0.1), u(0.3, 0.55)
    dark = u.colour(PLAIN[3:])
    parts = [
        lathe([(0, 0), (r, 0), (r, h), (r * 0.7, h + r * 0.5), (r * 0.3, h + r * 0.7)], red),
        cone(r * 0.5, 0.05, r * 0.5, 0, h + r * 0.7, 0, u.colour(PLAIN[1:])),
    ]
    parts += [
        rod((-r * 0.2, h + r + 0.04, 0), (r * 1.3, h + r + lift, 0), 0.02, u.colour(PLAIN[1:])) for lift in (0.04, 0.09)
    ]
    hose = np.array(
        [
            (-r * 0.2, h + r, 0),
            (-r * 0.9, h + r * 1.1, 0),
            (-r * 1.3, h * 0.9, 0),
            (-r * 1.25, h * 0.4, 0),
            (-r * 1.2, h * 0.25, 0),
        ]
    )
    parts += [tube(hose, 0.025, dark), cone(0.05, h * 0.2, 0.05, -r * 1.2, h * 0.12, 0, dark, 0.5)]
    return (
        [*parts, cone(2.03 * r, h * 0.35, 2.03 * r, 0, h * 0.4, 0, u.colour(PLAIN[:1], BRIGHT[3:]))]
        if u.chance(0.6)
        else parts
    )


DEVICES: dict[str, Callable[[Draw], list[Part]]] = {
    "blender": blender, "camera": camera, "computer": computer, "extinguisher": extinguisher, "fan": fan,
    "intercom": intercom, "laptop": laptop, "maker": maker, "phone": phone, "player": player, "printer": printer,
    "shower head": shower_head, "tablet": tablet, "toaster": toaster,
}  # fmt: skip

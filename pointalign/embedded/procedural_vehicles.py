"""Procedural vehicles.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_parts import (
    BRIGHT,
    PLAIN,
    WOOD,
    Draw,
    Part,
    ball,
    box,
    lean,
    prism,
    ring,
    rod,
)

PANE, TYRE = ((0.1, 0.12, 0.15), (0.25, 0.3, 0.35)), PLAIN[3]
PAINT = (*PLAIN, *BRIGHT[:4], (0.1, 0.15, 0.35))
SIDEWAYS = lean(0, math.pi / 2)  # an outline's x becomes -z or z, its depth the width


def outline(points: list[tuple[float, float]], w: float, colour, y: float = 0.0) -> Part:
    """The side view (z, y) of a body that is w wide."""
    return prism([(-z, height) for z, height in points], w, colour, (0, y, 0), SIDEWAYS)


def wheels(u: Draw, w: float, r: float, places: list[float], thick: float) -> list[Part]:
    hub, across = u.colour(PLAIN[:2], PLAIN), np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=float)
    parts = []
    for z in places:
        for side in (-1, 1):
            x = side * (w / 2 - thick) - (thick if side < 0 else 0)
            parts.append(Part("cone", (2 * r, thick, 2 * r), (x, r, z), TYRE, turn=across))
            parts.append(Part("cone", (1.2 * r, thick * 1.1, 1.2 * r), (x - thick * 0.05, r, z), hub, turn=across))
    return parts


def car(u: Draw) -> list[Part]:
    paint, pane = u.colour(PAINT), u.colour(PANE)
    long, w, h, r = u(3.6, 4.8), u(1.65, 2.05), u(1.25, 1.65), u(0.28, 0.36)
    low, belt, half = r * u(0.6, 0.9), h * u(0.5, 0.62), long / 2
    kind = u.integer(0, 2)  # saloon, hatchback or estate, sports car
    rear, tail = (0.3, 0.42) if kind == 0 else (u(0.38, 0.46), 0.48) if kind == 1 else (0.2, 0.46)
    nose, front = u(0.7, 0.95), u(0.02, 0.12)
    body = [(-half, low), (half, low), (half, belt * nose), (half * 0.9, belt * nose * 1.08), (half * 0.45, belt)]
    body += [(-half * 0.9, belt * 1.03), (-half, belt * u(0.8, 1))]
    cabin = [
        (half * 0.45, belt),
        (long * front, h),
        (-long * rear * 0.6, h),
        (-long * rear, h * 0.93),
        (-long * tail, belt),
    ]
    parts = [outline(body, w, paint), outline(cabin, w * 0.82, pane)]
    roof = [(long * front * 1.05, h * 0.985), (long * front, h), (-long * rear * 0.6, h), (-long * rear, h * 0.94)]
    parts.append(outline([*roof, (-long * rear * 0.5, h * 0.97)], w * 0.83, paint))
    for z in (long * (front + 0.17), -long * 0.03, -long * rear):
        top = long * front if z > long * front else z
        parts += [rod((side * w * 0.415, belt, z), (side * w * 0.415, h * 0.96, top), 0.07, paint) for side in (-1, 1)]
    parts += wheels(u, w, r, [long * 0.31, -long * 0.3], 0.22)
    for side in (-1, 1):
        parts.append(box(w * 0.18, 0.13, 0.04, side * w * 0.36, belt * nose * 0.8, half, PLAIN[0]))
        parts.append(box(w * 0.15, 0.13, 0.04, side * w * 0.38, belt * 0.75, -half, BRIGHT[0]))
        parts.append(box(0.15, 0.12, 0.1, side * w * 0.53, belt * 0.97, half * 0.42, paint))
    return [*parts, box(w * 0.5, 0.15, 0.03, 0, low * 1.2, half, PLAIN[3])]


def van(u: Draw) -> list[Part]:
    paint, pane = u.colour(PAINT), u.colour(PANE)
    long, w, h, r = u(4.3, 5.8), u(1.8, 2.1), u(1.8, 2.6), u(0.3, 0.38)
    low, half = r * 0.8, long / 2
    hood = u(0.45, 0.5)
    body = [
        (-half, low),
        (half, low),
        (half, h * 0.42),
        (half * 0.72, h * hood),
        (half * 0.45, h * 0.95),
        (half * 0.35, h),
        (-half, h),
    ]
    parts = [outline(body, w, paint), *wheels(u, w, r, [long * 0.33, -long * 0.28], 0.22)]
    screen = [(half * 0.72, h * hood), (half * 0.74, h * hood), (half * 0.48, h * 0.95), (half * 0.46, h * 0.93)]
    parts.append(outline(screen, w * 0.9, pane))
    windows = u.integer(1, 4)
    for n in range(windows):
        parts.append(box(w * 1.01, h * 0.26, long * 0.13, 0, h * 0.6, half * (0.4 - 0.36 * n), pane))
    return parts


def bus(u: Draw) -> list[Part]:
    paint, pane, second = u.colour(PAINT), u.colour(PANE), u.colour(PAINT)
    long, w, r = u(9, 14), u(2.4, 2.9), u(0.42, 0.5)
    h = u(2.9, 3.6)
    floors = [0.45, 0.72] if u.chance(0.15) else [0.5]
    parts = [box(w, h - r, long, 0, r * 0.7, 0, paint)]
    for level in floors:
        if u.chance(0.5):
            parts.append(box(w * 1.01, h * 0.25, long * 0.96, 0, h * level, 0, pane))
        else:
            count = u.integer(5, 9)
            parts += [
                box(w * 1.01, h * 0.25, long / count * 0.8, 0, h * level, long * ((n + 0.5) / count - 0.5) * 0.96, pane)
                for n in range(count)
            ]
    parts += [
        box(w * 0.92, h * 0.4, 0.04, 0, h * 0.42, long / 2, pane),
        box(w * 0.8, h * 0.22, 0.04, 0, h * 0.5, -long / 2, pane),
    ]
    if u.chance(0.6):
        parts.append(box(w * 1.01, h * u(0.08, 0.2), long * 1.002, 0, h * 0.25, 0, second))
    return parts + wheels(u, w * 1.02, r, [long * 0.33, -long * 0.25], 0.3)


def truck(u: Draw) -> list[Part]:
    paint, load, pane, dark = u.colour(PAINT), u.colour(PAINT, WOOD), u.colour(PANE), u.colour(PLAIN[2:])
    w, h, r, cab = u(2.3, 2.9), u(2.6, 3.6), u(0.45, 0.55), u(1.8, 2.4)
    kind, bonnet = u.integer(0, 3), (u(0.9, 1.6) if u.chance(0.4) else 0.0)
    bed = u(10, 13) if kind == 0 and u.chance(0.7) else u(3.5, 6)
    long = cab + bonnet + bed + 0.2
    half, deck = long / 2, r * 2
    parts = [
        box(w * 0.45, 0.3, long * 0.97, 0, r, 0, dark),
        box(w, h - deck * 0.6, cab, 0, deck * 0.6, half - bonnet - cab / 2, paint),
    ]
    parts.append(box(w * 0.9, h * 0.3, 0.05, 0, h * 0.6, half - bonnet, pane))
    parts.append(box(w * 1.01, h * 0.28, cab * 0.45, 0, h * 0.6, half - bonnet - cab * 0.4, pane))
    if bonnet:
        parts.append(box(w * 0.75, h * 0.5 - deck * 0.6, bonnet, 0, deck * 0.6, half - bonnet / 2, paint))
        parts.append(box(w * 0.5, h * 0.25, 0.05, 0, deck * 0.7, half, PLAIN[1]))
    middle = bed / 2 - half
    if kind == 0:
        parts.append(box(w, h * u(1, 1.2) - deck, bed, 0, deck, middle, load))
    elif kind == 1:  # a tank
        lying = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=float)
        parts.append(Part("cone", (w * 0.95, bed, w * 0.85), (0, deck + w * 0.43, -half), load, turn=lying))
    else:  # open or under a tarpaulin
        wall = u(0.4, 0.9) if kind == 2 else 0.4
        parts.append(box(w, 0.15, bed, 0, deck, middle, load))
        parts += [box(0.08, wall, bed, side * w / 2, deck, middle, load) for side in (-1, 1)]
        parts += [box(w, wall, 0.08, 0, deck, middle + side * bed / 2, load) for side in (-1, 1)]
        if kind == 3:
            parts.append(box(w * 0.98, h - deck - 0.3, bed * 0.97, 0, deck + 0.4, middle, u.colour(PAINT)))
    places = [half - max(bonnet * 0.5, cab * 0.4), -half + bed * 0.15, -half + bed * 0.15 + 2.4 * r]
    if bed > 8:
        places.append(half - bonnet - cab - 0.6)
    return parts + wheels(u, w, r, places, 0.35)


def bicycle(u: Draw) -> list[Part]:
    frame, tyre, seat = u.colour(PAINT), u.colour(PLAIN[2:], PLAIN[3:]), u.colour(PLAIN[2:], WOOD)
    small = u.chance(0.35)
    r, t = (u(0.2, 0.26), 0.04) if small else (u(0.3, 0.35), 0.035)
    base, turn_ = r * u(2.8, 3.3), lean(0, math.pi / 2)
    rear, front = np.array([0, r, -base / 2]), np.array([0, r, base / 2])
    crank, saddle = np.array([0, r * 0.85, -base * 0.05]), np.array([0, r * u(2.2, 2.7), -base * 0.2])
    head = np.array([0, r * u(2.3, 2.6), base * 0.33])
    low, top = crank + (saddle - crank) * u(0.6, 0.85), np.subtract(head, (0, r * u(0.1, 0.4), -0.02))
    parts = [ring(r, u(0.04, 0.07), tuple(at), tyre, turn_) for at in (rear, front)]
    for start, end in ((crank, saddle), (crank, top), (low, top), (low, rear), (crank, rear), (front, head)):
        parts.append(rod(start, end, t, frame))
    parts.append(box(0.14, 0.05, 0.24, 0, saddle[1], saddle[2], seat))
    parts.append(rod(head, np.add(head, (0, r * 0.3, 0.02)), t, PLAIN[1]))
    for side in (-1, 1):
        grip = np.add(head, (side * 0.28, r * u(0.2, 0.5), -0.06))
        parts += [
            rod(np.add(head, (0, r * 0.3, 0.02)), grip, t * 0.8, u.colour(PLAIN)),
            box(0.09, 0.02, 0.06, side * 0.1, crank[1] - side * r * 0.45, crank[2], TYRE),
        ]
    hub = u.colour(PLAIN[:2])
    for at in (rear, front):
        for angle in np.arange(3) * math.pi / 3:
            reach = np.array([0, r * math.sin(angle), r * math.cos(angle)])
            parts.append(rod(at - reach, at + reach, 0.012, hub))
    if not small and u.chance(0.4):
        parts.append(box(0.14, 0.015, 0.35, 0, 2.15 * r, rear[2] - 0.05, TYRE))
    return parts


def scooter(u: Draw) -> list[Part]:
    """A motor scooter or a kick scooter."""
    paint, metal, across = (
        u.colour(PAINT),
        u.colour(PLAIN[:2], PLAIN),
        np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]], dtype=float),
    )
    if u.chance(0.4):
        r, base, h = u(0.07, 0.11), u(0.7, 0.85), u(0.8, 1.1)
        parts = [Part("cone", (2 * r, 0.04, 2 * r), (-0.02, r, z * base / 2), TYRE, turn=across) for z in (-1, 1)]
        head = (0, h, base * 0.42)
        parts += [
            box(0.12, 0.03, base * 0.8, 0, r * 1.2, -base * 0.05, u.colour(PAINT)),
            rod((0, r, base / 2), head, 0.045, metal),
        ]
        parts += [
            rod((-0.22, h, base * 0.42), (0.22, h, base * 0.42), 0.035, metal),
            rod((0, r * 1.3, base * 0.33), (0, h * 0.4, base * 0.46), 0.04, paint),
        ]
        return parts + [rod((x * 0.12, h, base * 0.42), (x * 0.23, h, base * 0.42), 0.045, TYRE) for x in (-1, 1)]
    r, base, w = u(0.22, 0.27), u(1.15, 1.35), u(0.3, 0.4)
    parts = [Part("cone", (2 * r, 0.12, 2 * r), (-0.06, r, z * base / 2), TYRE, turn=across) for z in (-1, 1)]
    parts += [Part("cone", (1.1 * r, 0.13, 1.1 * r), (-0.065, r, z * base / 2), metal, turn=across) for z in (-1, 1)]
    body = [
        (-base * 0.62, r * 1.7),
        (-base * 0.25, r * 0.9),
        (0, r * 0.9),
        (-base * 0.05, r * 2.6),
        (-base * 0.6, r * 2.9),
    ]
    parts += [
        outline(body, w, paint),
        box(w * 0.7, 0.13, base * 0.62, 0, r * 2.8, -base * 0.3, u.colour(PLAIN[2:], WOOD)),
    ]
    parts.append(box(w * 0.8, 0.08, base * 0.35, 0, r * 0.9, base * 0.08, paint))
    top = (0, r * 4.2, base * 0.3)
    shield = [(base * 0.22, r), (base * 0.3, r), (base * 0.36, r * 3.6), (base * 0.26, r * 3.8)]
    parts += [outline(shield, w * u(0.8, 1.1), paint), rod((0, r, base / 2), top, 0.07, metal)]
    parts.append(Part("ball", (0.17, 2.1 * r, 2.6 * r), (0, r * 0.5, base / 2), paint, turn=lean(0)))
    parts += [rod(top, (side * 0.33, r * 4.1, base * 0.22), 0.04, TYRE) for side in (-1, 1)]
    parts.append(ball(0.17, 0.17, 0.15, 0, r * 3.7, base * 0.36, PLAIN[0]))
    if u.chance(0.5):
        parts += [
            rod((side * 0.3, r * 4.1, base * 0.25), (side * 0.36, r * 5, base * 0.25), 0.02, metal) for side in (-1, 1)
        ]
        parts += [box(0.1, 0.09, 0.02, side * 0.38, r * 5, base * 0.25, TYRE) for side in (-1, 1)]
    return parts


def wheelbarrow(u: Draw) -> list[Part]:
    metal, grip = u.colour(PLAIN, BRIGHT), u.colour(PLAIN[2:], WOOD)
    w, long, r, y = u(0.5, 0.7), u(0.7, 0.9), u(0.15, 0.2), u(0.3, 0.4)
    tray = [(-long * 0.35, y), (long * 0.25, y), (long * 0.55, y + 0.28), (-long * 0.5, y + 0.28)]
    parts = [outline(tray, w, metal), *wheels(u, 0.2, r, [long * 0.65], 0.1)[:2]]
    for side in (-1, 1):
        parts += [
            rod((0, r, long * 0.65), (side * w * 0.4, y, -long * 0.2), 0.04, grip),
            rod((side * w * 0.4, y, -long * 0.2), (side * w * 0.45, y + 0.2, -long), 0.04, grip),
        ]
        parts.append(rod((side * w * 0.35, 0, -long * 0.25), (side * w * 0.38, y, -long * 0.2), 0.04, grip, leg=True))
    return parts


VEHICLES: dict[str, Callable[[Draw], list[Part]]] = {
    "bicycle": bicycle, "bus": bus, "car": car, "scooter": scooter, "truck": truck, "van": van,
    "wheelbarrow": wheelbarrow,
}  # fmt: skip

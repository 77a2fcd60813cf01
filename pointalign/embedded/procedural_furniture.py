"""Procedural furniture, doors, lamps and plants.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

from pointalign.embedded.procedural_groups import LEAST_LEG, case, legs, round_legs, upholstered
from pointalign.embedded.procedural_parts import (
    BRIGHT, GREEN, PLAIN, WOOD, Draw, Part, ball, box, cone, lean,
)  # fmt: skip


def chair(u: Draw) -> list[Part]:
    frame, seat = u.colour(WOOD, PLAIN), u.colour(WOOD, PLAIN, BRIGHT)
    w, d, h, t = u(0.38, 0.55), u(0.38, 0.55), u(0.38, 0.5), u(0.02, 0.09)
    rise, tilt, thick = u(0.3, 0.65), u(0, 0.35), u(0.02, 0.07)
    parts = [*legs(u, w, d, h, frame, (0.02, 0.05)), box(w, t, d, 0, h, 0, seat)]
    kind, back, gap = u.integer(0, 3), h + t, thick / 2 - d / 2
    if kind == 0:
        lift = u(0, 0.2)
        parts.append(box(w * u(0.85, 1), rise - lift, thick, 0, back + lift, gap - lift * math.tan(tilt), seat, tilt))
    else:
        parts += [box(0.03, rise, 0.03, side * (w / 2 - 0.02), back, gap, frame, tilt) for side in (-1, 1)]
        if kind == 1:  # bars across
            for n in range(bars := u.integer(1, 4)):
                up = rise * (n + 1) / bars
                z = gap - up * math.sin(tilt)
                parts.append(box(w, min(0.1, 0.5 * rise / bars), 0.02, 0, back + 0.85 * up * math.cos(tilt), z, frame))
        else:  # bars upright, under a rail
            for n in range(bars := u.integer(2, 6)):
                x = w * ((n + 0.5) / bars - 0.5)
                parts.append(box(0.02, rise, 0.015, x, back, gap, frame, tilt))
            parts.append(box(w, 0.07, 0.03, 0, back + rise * math.cos(tilt), gap - rise * math.sin(tilt), frame, tilt))
    if u.chance(0.3):
        high = u(0.18, 0.26)
        for side in (-1, 1):
            parts.append(box(0.04, 0.03, d, side * w / 2, back + high, 0, frame))
            parts.append(box(0.03, high, 0.03, side * w / 2, back, d / 2 - 0.05, frame))
    return parts


def armchair(u: Draw) -> list[Part]:
    return upholstered(u, u(0.65, 1.05), 1)


def sofa(u: Draw) -> list[Part]:
    w = u(1.4, 2.4)
    parts = upholstered(u, w, u.integer(2, 4))
    if u.chance(0.2):  # a corner
        side, cloth, length = int(u.rng.choice([-1, 1])), parts[0].colour, u(0.5, 1)
        parts.append(box(u(0.6, 0.9), u(0.35, 0.5), length, side * w * 0.35, 0, 0.4 + length / 2, cloth))
    return parts


def bed(u: Draw) -> list[Part]:
    frame, sheet = u.colour(WOOD, PLAIN), u.colour(PLAIN[:1], BRIGHT, PLAIN)
    w, d, foot, side, soft = u(0.85, 1.9), u(1.85, 2.15), u(0, 0.3), u(0.1, 0.3), u(0.12, 0.3)
    end = d / 2
    floors = [0.0, u(0.9, 1.3)] if w < 1.2 and u.chance(0.3) else [0.0]
    parts = []
    for floor in floors:
        low = floor + foot
        parts += [box(w, side, d, 0, low, 0, frame), box(w * 0.96, soft, d * 0.97, 0, low + side, 0, sheet)]
        for n in range(pillows := 2 if w > 1.3 else 1):
            x = w * 0.9 * ((n + 0.5) / pillows - 0.5)
            parts.append(ball(w * 0.75 / pillows, 0.15, 0.4, x, low + side + soft - 0.03, 0.3 - end, PLAIN[0]))
    top = floors[-1] + foot + side + soft + u(0.05, 0.6)
    post = u(0.04, 0.1)
    if len(floors) > 1 or u.chance(0.4):
        for sx, sz in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
            high = top if sz < 0 or len(floors) > 1 else top * u(0.5, 0.8)
            parts.append(box(post, high, post, sx * w / 2, 0, sz * end, frame, leg=foot > LEAST_LEG))
    if u.chance(0.85):
        parts.append(box(w * u(1, 1.1), top - foot, u(0.03, 0.12), 0, foot, -end, frame))
    if u.chance(0.4):
        parts.append(box(w, (top - foot) * u(0.4, 0.8), 0.05, 0, foot, end, frame))
    return parts


def table(u: Draw) -> list[Part]:
    wood, top = u.colour(WOOD, PLAIN), u.colour(WOOD, PLAIN)
    w, h, t = u(0.5, 2.2), u(0.35, 0.8), u(0.015, 0.08)
    d = w * u(0.4, 1)
    inner = 1.0
    if u.chance(0.3):
        d = w if u.chance(0.7) else d
        plate, inner = cone(w, t, d, 0, h, 0, top), 0.7
    else:
        plate = box(w, t, d, 0, h, 0, top)
    if inner < 1 and u.chance(0.3):
        parts = [plate, *round_legs(u, 3, w * 0.35, h, wood, d / w)]
    else:
        parts = [plate, *legs(u, w * inner, d * inner, h, wood)]
    if u.chance(0.4):
        parts.append(box(w * inner * 0.9, u(0.05, 0.15), d * inner * 0.9, 0, h - 0.1, 0, wood))
    if u.chance(0.2):
        parts.append(box(w * inner * 0.85, 0.02, d * inner * 0.85, 0, h * u(0.2, 0.5), 0, wood))
    return parts


def desk(u: Draw) -> list[Part]:
    wood = u.colour(WOOD, PLAIN)
    w, d, h, t = u(1, 1.8), u(0.5, 0.85), u(0.68, 0.8), u(0.02, 0.05)
    parts = [box(w, t, d, 0, h, 0, wood)]
    drawers = [-1, 1] if u.chance(0.4) else [int(u.rng.choice([-1, 1]))]
    block = u(0.3, 0.5)
    for side in (-1, 1):
        x = side * (w - block) / 2
        if side in drawers:
            low = 0.0 if u.chance(0.7) else h * u(0.2, 0.5)
            parts.append(box(block, h - low, d * 0.95, x, low, 0, wood))
            for n in range(rows := u.integer(2, 4)):
                high = (h - low) / rows
                y = low + n * high
                parts.append(box(block * 0.92, high * 0.9, 0.02, x, y, d / 2, wood))
                parts.append(box(0.1, 0.02, 0.03, x, y + high / 2, d / 2 + 0.02, PLAIN[1]))
        elif u.chance(0.5):
            parts.append(box(0.03, h, d * 0.95, side * (w / 2 - 0.03), 0, 0, wood))
        else:
            parts += [box(0.05, h, 0.05, side * (w / 2 - 0.05), 0, sz * (d / 2 - 0.05), wood) for sz in (-1, 1)]
    if u.chance(0.6):
        parts.append(box(w * 0.95, h * u(0.3, 0.9), 0.02, 0, h * 0.1, -d * 0.4, wood))
    if u.chance(0.3):
        rise = u(0.25, 0.6)
        parts += [box(0.03, rise, d * 0.35, side * w * 0.48, h, -d * 0.3, wood) for side in (-1, 1)]
        parts += [
            box(w, 0.03, d * 0.35, 0, h + rise * part, -d * 0.3, wood) for part in ((0.5, 1) if rise > 0.4 else (1,))
        ]
    return parts


def bench(u: Draw) -> list[Part]:
    wood = u.colour(WOOD, PLAIN)
    w, d, h = u(0.9, 2), u(0.3, 0.5), u(0.38, 0.5)
    parts = legs(u, w, d, h, wood)
    planks = u.integer(1, 5)
    parts += [box(w, 0.04, d / planks * 0.85, 0, h, d * ((n + 0.5) / planks - 0.5), wood) for n in range(planks)]
    if u.chance(0.5):
        tilt, bars = u(0, 0.3), u.integer(1, 4)
        for n in range(bars):
            up = 0.1 + 0.35 * n / bars
            parts.append(box(w, 0.3 / bars, 0.025, 0, h + up, -d / 2 - up * math.tan(tilt), wood, tilt))
        parts += [box(0.05, 0.5, 0.05, side * w * 0.42, h, -d / 2, wood, tilt) for side in (-1, 1)]
        if u.chance(0.5):
            parts += [box(0.05, 0.05, d, side * w * 0.48, h + 0.22, 0, wood) for side in (-1, 1)]
            parts += [box(0.04, 0.22, 0.04, side * w * 0.48, h, d * 0.4, wood) for side in (-1, 1)]
    return parts


def cabinet(u: Draw) -> list[Part]:
    wood, w, h, d = u.colour(WOOD, PLAIN), u(0.4, 1.6), u(0.5, 1.3), u(0.3, 0.6)
    columns, rows = (u.integer(1, 3), 1) if u.chance(0.5) else (u.integer(1, 2), u.integer(2, 5))
    return case(u, w, h, d, columns, rows, wood)


def wardrobe(u: Draw) -> list[Part]:
    return case(u, u(0.8, 2), u(1.75, 2.3), u(0.45, 0.65), u.integer(2, 4), 1, u.colour(WOOD, PLAIN))


def bookcase(u: Draw) -> list[Part]:
    wood, w, h, d, t = u.colour(WOOD, PLAIN), u(0.5, 1.8), u(0.9, 2.2), u(0.22, 0.4), u(0.015, 0.04)
    columns, rows = (u.integer(1, 3) if w > 1 else 1), u.integer(3, 6)
    parts = [box(t, h, d, w * (n / columns - 0.5), 0, 0, wood) for n in range(columns + 1)]
    parts += [box(w, t, d, 0, h * n / rows, 0, wood) for n in range(rows + 1)]
    if u.chance(0.7):
        parts.append(box(w, h, 0.01, 0, 0, -d / 2, wood))
    if u.chance(0.6):
        for row in range(rows):
            x, end = -w / 2 + t, w * u(-0.5, 0.5)
            while x < end:
                thick = u(0.03, 0.12)
                high = min(h / rows * u(0.6, 0.9), 0.35)
                parts.append(
                    box(thick, high, d * u(0.6, 0.8), x + thick / 2, h * row / rows + t, 0, u.colour(BRIGHT, PLAIN))
                )
                x += thick
    return parts


def door(u: Draw) -> list[Part]:
    wood, metal = u.colour(WOOD, PLAIN, BRIGHT), u.colour(PLAIN)
    kind, h, t = u.rng.choice(["single", "double", "garage"], p=[0.6, 0.25, 0.15]), u(1.95, 2.3), u(0.03, 0.08)
    leaves = 2 if kind == "double" else 1
    leaf = u(2.2, 3.2) if kind == "garage" else u(0.65, 1)
    w, parts = leaf * leaves, []
    columns, rows = (u.integer(3, 6), u.integer(3, 5)) if kind == "garage" else (u.integer(1, 2), u.integer(1, 4))
    style, pane = u.rng.choice(["flat", "panels", "glass"]), u.colour(PLAIN, WOOD)
    for n in range(leaves):
        middle = leaf * (n + 0.5) - w / 2
        parts.append(box(leaf * 0.99, h, t, middle, 0, 0, wood))
        if style != "flat":
            wide, high = leaf * 0.85 / columns, h * 0.88 / rows
            for column in range(columns):
                for row in range(rows):
                    x, y = middle + wide * (column + 0.5) - leaf * 0.425, h * 0.06 + row * high
                    colour = pane if style == "glass" and row >= rows // 2 else wood
                    parts.append(box(wide * 0.8, high * 0.8, t + 0.02, x, y + high * 0.1, 0, colour))
        if kind != "garage":
            side = leaf * 0.42 * (1 if n == 0 else -1)
            parts += [box(0.1, 0.03, 0.03, middle + side, h * 0.47, z * (t / 2 + 0.04), metal) for z in (-1, 1)]
    if u.chance(0.6):
        post, deep = u(0.04, 0.12), t + u(0, 0.12)
        parts += [box(post, h + post, deep, side * (w + post) / 2, 0, 0, wood) for side in (-1, 1)]
        parts.append(box(w, post, deep, 0, h, 0, wood))
    return parts


def lamp(u: Draw) -> list[Part]:
    metal, shade = u.colour(PLAIN, WOOD, BRIGHT), u.colour(PLAIN[:1], BRIGHT)
    tall = u.chance(0.5)
    h, r = (u(1.2, 1.8), u(0.25, 0.5)) if tall else (u(0.25, 0.6), u(0.15, 0.4))
    foot = r * u(0.5, 0.9)
    parts = [cone(foot, u(0.02, 0.06), foot, 0, 0, 0, metal, u(0.5, 1))]
    if tall or u.chance(0.5):
        parts.append(cone(0.03, h, 0.03, 0, 0, 0, metal))
    else:  # a vase
        parts += [ball(foot * 1.2, h * 0.8, foot * 1.2, 0, 0, 0, metal), cone(0.03, h, 0.03, 0, 0, 0, metal)]
    kind = u.integer(0, 3)
    if kind < 2:
        parts.append(cone(r, r * u(0.5, 1), r, 0, h * u(0.85, 1), 0, shade, u(0.4, 1)))
    elif kind == 2:
        parts.append(ball(r * 0.8, r * 0.8, r * 0.8, 0, h, 0, shade))
    else:  # an arm to the front
        reach, rise = u(0.2, 0.5) * h, u(0.5, 1.2)
        parts.append(Part("cone", (0.025, reach, 0.025), (0, h, 0), metal, turn=lean(-rise)))
        z, y = reach * math.sin(rise), h + reach * math.cos(rise)
        parts.append(cone(r * 0.7, r * 0.5, r * 0.7, 0, y - r * 0.5, z, shade, u(0.3, 0.7)))
    return parts


def light(u: Draw) -> list[Part]:
    metal, shade = u.colour(PLAIN), u.colour(PLAIN[:1], BRIGHT, PLAIN)
    if u.chance(0.4):  # a tube, or spots on a rail
        w, d = u(0.6, 1.5), u(0.06, 0.2)
        parts = [box(w, u(0.03, 0.06), d, 0, 0.12, 0, metal)]
        if u.chance(0.5):
            parts += [box(w * 0.95, 0.04, 0.04, 0, 0.08, d * z, shade) for z in (-0.25, 0.25)]
        else:
            count = u.integer(2, 5)
            parts += [cone(0.08, 0.1, 0.08, w * ((n + 0.5) / count - 0.5), 0, 0, shade, 0.6) for n in range(count)]
        return parts
    r, cord = u(0.2, 0.5), u(0.3, 0.9)
    if u.chance(0.5):
        hung = cone(r, r * u(0.4, 0.9), r, 0, 0, 0, shade, u(0.15, 0.6))
    else:
        hung = ball(r, r * u(0.6, 1.1), r, 0, 0, 0, shade)
    top = hung.size[1]
    return [hung, cone(0.015, cord, 0.015, 0, top, 0, metal), cone(0.12, 0.04, 0.12, 0, top + cord, 0, metal, 0.6)]


def bottle(u: Draw) -> list[Part]:
    glass, cap = u.colour(GREEN, PLAIN, WOOD, BRIGHT), u.colour(PLAIN, BRIGHT)
    r, body, neck = u(0.06, 0.1), u(0.1, 0.2), u(0.03, 0.12)
    thin, shoulder = u(0.3, 0.6), u(0.02, 0.08)
    flat = 1.0 if u.chance(0.8) else u(0.5, 0.9)
    parts = [
        cone(r, body, r * flat, 0, 0, 0, glass, u(0.9, 1.05)),
        cone(r, shoulder, r * flat, 0, body, 0, glass, thin),
        cone(r * thin, neck, r * flat * thin, 0, body + shoulder, 0, glass),
    ]
    if u.chance(0.7):
        top = body + shoulder + neck
        parts.append(cone(r * thin * 1.15, u(0.015, 0.04), r * thin * 1.15, 0, top, 0, cap))
    if u.chance(0.5):
        parts.append(cone(r * 1.02, body * u(0.3, 0.6), r * flat * 1.02, 0, body * 0.25, 0, u.colour(PLAIN, BRIGHT)))
    return parts


def plant(u: Draw) -> list[Part]:
    leaf, parts, base = u.colour(GREEN), [], 0.0
    r = u(0.2, 0.4)
    if u.chance(0.75):
        pot, base = u.colour(WOOD, PLAIN, BRIGHT), u(0.2, 0.4)
        if u.chance(0.7):
            parts.append(cone(r * u(0.6, 1), base, r * u(0.6, 1), 0, 0, 0, pot, u(1, 1.5)))
        else:
            parts.append(box(r, base, r, 0, 0, 0, pot))
    stem = u(0.2, 0.8) if u.chance(0.4) else 0.0
    if stem:
        parts.append(cone(0.03, stem, 0.03, 0, base, 0, u.colour(WOOD, GREEN)))
    low, high = (0.0, 0.6) if u.chance(0.5) else (0.4, 1.5)
    for _ in range(u.integer(12, 40)):
        length, wide = r * u(0.8, 2.2), r * u(0.1, 0.4)
        turn, y = lean(u(low, high), u(0, 2 * math.pi)), base + stem * u(0.5, 1)
        parts.append(Part("ball", (wide, length, 0.02), (0, y, 0), leaf, turn=turn))
    return parts


def tree(u: Draw) -> list[Part]:
    bark, leaf = u.colour(WOOD[:2]), u.colour(GREEN)
    trunk, thick = u(0.8, 2.5), u(0.12, 0.3)
    parts = [cone(thick, trunk, thick, 0, 0, 0, bark, u(0.5, 1))]
    kind = u.integer(0, 3)
    if kind == 0:  # a conifer
        floors, w, y = u.integer(1, 4), u(1.2, 2), trunk * 0.3
        for _ in range(floors):
            high = u(0.8, 1.6) * (2 if floors == 1 else 1)
            parts.append(cone(w, high, w, 0, y, 0, leaf, 0.05))
            w, y = w * 0.75, y + high * 0.55
    elif kind == 1:  # a palm
        for _ in range(u.integer(8, 18)):
            turn = lean(u(0.7, 1.9), u(0, 2 * math.pi))
            parts.append(Part("ball", (0.25, u(0.8, 1.4), 0.03), (0, trunk, 0), leaf, turn=turn))
    else:
        for _ in range(u.integer(4, 14)):
            w, spread = u(0.6, 1.4), u(0.2, 0.7)
            x, z = u(-spread, spread), u(-spread, spread)
            parts.append(ball(w, w * u(0.6, 1.1), w, x, trunk * u(0.6, 1.2), z, leaf))
    return parts


def radiator(u: Draw) -> list[Part]:
    metal = u.colour(PLAIN[:2], PLAIN)
    fins, h, d, gap = u.integer(5, 20), u(0.4, 0.9), u(0.06, 0.2), u(0.05, 0.08)
    w, round_ = fins * gap, u.chance(0.4)
    fin = cone if round_ else box
    parts = [fin(gap * 0.7, h, d, gap * (n + 0.5) - w / 2, 0.08, 0, metal) for n in range(fins)]
    parts += [box(w, 0.04, d * 0.6, 0, y, 0, metal) for y in (0.1, 0.04 + h)]
    if u.chance(0.3):
        parts += [box(0.04, 0.1, d, side * w * 0.4, 0, 0, metal) for side in (-1, 1)]
    return parts


def rack(u: Draw) -> list[Part]:
    metal, w, h, d = u.colour(PLAIN, WOOD), u(0.5, 1.2), u(0.4, 1.6), u(0.15, 0.5)
    t = u(0.015, 0.04)
    parts = [box(t, t, d, side * w / 2, 0, 0, metal) for side in (-1, 1)]
    depths = (0.0,) if u.chance(0.5) else (-d / 2, d / 2)
    parts += [box(t, h, t, side * w / 2, 0, z, metal) for side in (-1, 1) for z in depths]
    for n in range(bars := u.integer(1, 6)):
        parts += [box(w, t, t, 0, h * (n + 1) / bars - t, z, metal) for z in depths]
    return parts


def crate(u: Draw) -> list[Part]:
    card, w, h, d, t = u.colour(WOOD, BRIGHT, PLAIN), u(0.3, 0.8), u(0.15, 0.6), u(0.25, 0.6), u(0.01, 0.03)
    if u.chance(0.5):
        parts = [box(w, h, d, 0, 0, 0, card)]
        if u.chance(0.5):
            parts.append(box(w * 1.04, h * 0.2, d * 1.04, 0, h * 0.85, 0, u.colour(WOOD, BRIGHT)))
        return parts
    parts = [box(w, t, d, 0, 0, 0, card)]
    parts += [box(t, h, d, side * w / 2, 0, 0, card) for side in (-1, 1)]
    parts += [box(w, h, t, 0, 0, side * d / 2, card) for side in (-1, 1)]
    if u.chance(0.5):
        open_ = u(-2.2, -0.5)
        for about, length, away in ((0, w, d), (math.pi, w, d), (math.pi / 2, d, w), (-math.pi / 2, d, w)):
            turn = lean(open_, about)
            at = (away / 2 * math.sin(about), h, away / 2 * math.cos(about))
            parts.append(Part("box", (length, away * 0.4, t), at, card, turn=turn))
    return parts


def stove(u: Draw) -> list[Part]:
    enamel, dark = u.colour(PLAIN), PLAIN[3]
    w, h, d = u(0.5, 0.9), u(0.8, 0.95), u(0.5, 0.7)
    parts = [box(w, h, d, 0, 0, 0, enamel), box(w * 0.8, h * 0.5, 0.03, 0, h * 0.15, d / 2, dark)]
    parts.append(box(w * 0.7, 0.03, 0.04, 0, h * 0.7, d / 2 + 0.03, enamel))
    for x in (-0.25, 0.25):
        for z in (-0.25, 0.25):
            size = u(0.15, 0.22)
            parts.append(cone(size, 0.03, size, x * w, h, z * d, dark))
    parts += [ball(0.05, 0.05, 0.05, w * ((n + 0.5) / 5 - 0.5), h * 0.85, d / 2 + 0.02, dark) for n in range(5)]
    if u.chance(0.5):
        parts.append(box(w, u(0.1, 0.3), 0.05, 0, h, -d / 2, enamel))
    return parts


FURNITURE: dict[str, Callable[[Draw], list[Part]]] = {
    "armchair": armchair, "bed": bed, "bench": bench, "bookcase": bookcase, "bottle": bottle, "cabinet": cabinet,
    "chair": chair, "box": crate, "desk": desk, "door": door, "lamp": lamp, "light": light, "plant": plant,
    "rack": rack, "radiator": radiator, "sofa": sofa, "stove": stove, "table": table, "tree": tree,
    "wardrobe": wardrobe,
}  # fmt: skip

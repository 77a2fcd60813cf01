"""Procedural household objects that are no seats, tables or machines: shelves, ladders, curtains, clocks, pianos.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS, case, legs, round_legs
from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, arc, ball, box, cone, disc, lathe, lean, prism, ring, rod, surface, tube,
)  # fmt: skip

FLAME = ((0.95, 0.6, 0.15), (0.9, 0.35, 0.1))


def stool(u: Draw) -> list[Part]:
    seat, frame = u.colour(WOOD, PLAIN, BRIGHT), u.colour(WOOD, PLAIN)
    w, h, t = u(0.28, 0.45), u(0.4, 0.8), u(0.02, 0.1)
    square = u.chance(0.3)
    if square:
        parts = [box(w, t, w * u(0.7, 1), 0, h, 0, seat)]
    else:
        parts = [lathe([(0, h), (w * 0.46, h), (w / 2, h + t / 2), (w * 0.46, h + t), (0, h + t * u(0.7, 1.2))], seat)]
    kind = u.integer(0, 3)
    if kind == 0:  # a bar stool on a pedestal
        foot = w * u(0.9, 1.2)
        parts += [cone(foot, 0.03, foot, 0, 0, 0, frame, 0.8), cone(0.05, h, 0.05, 0, 0, 0, frame)]
        parts += [ring(w * 0.4, 0.02, (0, h * 0.35, 0), frame, lean(math.pi / 2))] if u.chance(0.6) else []
        if u.chance(0.4):
            bend = [
                [(w / 2 * math.cos(a), h + t + y, -w / 2 * math.sin(a)) for a in np.linspace(0.3, 2.8, 8)]
                for y in (0, 0.2)
            ]
            parts.append(surface(np.array(bend), seat))
        return parts
    if square:
        return parts + legs(u, w, w * 0.8, h, frame, (0.025, 0.05))
    count = u.integer(3, 4)
    parts += round_legs(u, count, w * 0.36, h, frame)
    if u.chance(0.5):
        parts.append(ring(w * 0.42, 0.02, (0, h * u(0.2, 0.5), 0), frame, lean(math.pi / 2)))
    return parts


def shelf(u: Draw) -> list[Part]:
    wood, kind = u.colour(WOOD, PLAIN), u.integer(0, 3)
    if kind == 0:  # on the wall
        w, d, rows = u(0.5, 1.2), u(0.15, 0.3), u.integer(1, 3)
        parts = [box(w, 0.03, d, 0, 0.3 * n + 0.1, 0, wood) for n in range(rows)]
        for x in (-0.35, 0.35):
            parts += [box(0.03, 0.15, 0.02, x * w, 0.3 * n - 0.04, -d / 2, wood) for n in range(rows)]
            parts += [box(0.03, 0.02, d * 0.8, x * w, 0.3 * n + 0.08, 0, wood) for n in range(rows)]
        return parts
    w, h, d, t = u(0.4, 1), u(0.7, 2), u(0.25, 0.45), u(0.015, 0.04)
    rows = u.integer(2, 5)
    parts = [box(w, t, d, 0, h * (n + (kind == 1) * 0.3) / rows, 0, wood) for n in range(rows + (kind != 1))]
    if kind == 1:  # open, on four posts
        metal = u.colour(PLAIN, WOOD)
        return parts + [box(t, h, t, sx * w / 2, 0, sz * d / 2, metal, leg=True) for sx in (-1, 1) for sz in (-1, 1)]
    columns = u.integer(1, 3) if w > 0.6 else 1
    parts += [box(t, h, d, w * (n / columns - 0.5), 0, 0, wood) for n in range(columns + 1)]
    if u.chance(0.5):
        parts.append(box(w, h, 0.01, 0, 0, -d / 2, wood))
    front = u.colour(WOOD, PLAIN, BRIGHT)
    for _ in range(u.integer(0, 2)):
        column, row = u.integer(0, columns - 1), u.integer(0, rows - 1)
        x = w * ((column + 0.5) / columns - 0.5)
        parts.append(box(w / columns - t, h / rows - t, 0.02, x, h * row / rows + t, d / 2, front))
    return parts


def vanity(u: Draw) -> list[Part]:
    wood, top, w, h, d = u.colour(WOOD, PLAIN), u.colour(PLAIN, WOOD), u(0.7, 1.8), u(0.7, 0.9), u(0.45, 0.65)
    parts = [
        *case(u, w, h, d, u.integer(1, 4), u.integer(1, 2), wood),
        box(w * 1.04, 0.05, d * 1.04, 0, h + 0.1, 0, top),
    ]
    bowls = 2 if w > 1.3 and u.chance(0.5) else 1
    for n in range(bowls):
        x = w * ((n + 0.5) / bowls - 0.5)
        parts.append(
            lathe(
                [(0.1, h + 0.12), (0.22, h + 0.24), (0.2, h + 0.24), (0, h + 0.16)], u.colour(PLAIN[:1]), (x, 0, 0), 0.8
            )
        )
        bend = (arc(0.08, 0, math.pi) + np.array([-0.08, 0.12, 0]))[:, ::-1]
        parts.append(
            tube(
                np.concatenate([[(0, 0, 0)], bend * np.array([1, 1, -1])]),
                0.025,
                (0.7, 0.7, 0.72),
                (x, h + 0.15, -d * 0.42),
            )
        )
    if u.chance(0.5):
        high = u(0.7, 1)
        parts.append(box(w * 0.98, high, 0.03, 0, h + 0.35, -d / 2, wood))
        parts.append(box(w * 0.9, high * 0.9, 0.01, 0, h + 0.35 + high * 0.05, 0.02 - d / 2, u.colour(GLASS)))
    return parts


def ladder(u: Draw) -> list[Part]:
    frame, step = u.colour(PLAIN[:2], WOOD, PLAIN), u.colour(PLAIN, WOOD)
    step = frame if u.chance(0.6) else step
    w, h, t, steps = u(0.35, 0.55), u(0.8, 2.4), u(0.03, 0.06), u.integer(3, 7)
    kind = u.integer(0, 2)
    spread, narrow = (0.0 if kind == 0 else h * u(0.25, 0.45)), u(0.7, 1)
    parts = []
    for side in (-1, 1):
        ends = (side * w / 2, 0, spread / 2), (side * w / 2 * narrow, h, 0)
        parts.append(rod(*ends, t, frame, leg=kind > 0))
        if kind:
            parts.append(rod((side * w / 2, 0, -spread / 2), (side * w / 2 * narrow, h, 0), t * 0.8, frame, leg=True))
    for n in range(steps):
        up = (n + 0.7) / (steps + 0.2)
        wide, z = w * (1 - up * (1 - narrow)), spread / 2 * (1 - up)
        parts.append(box(wide, 0.03, 0.1 if kind else 0.03, 0, h * up, z, step))
        if kind == 2 and n % 2 == 0:
            parts.append(box(wide, 0.03, 0.03, 0, h * up, -z, frame))
    if kind:
        parts.append(box(w * narrow, 0.04, u(0.1, 0.3), 0, h, 0, step))
    return parts


def curtain(u: Draw) -> list[Part]:
    cloth, w, h = u.colour(BRIGHT, PLAIN, GLASS), u(0.8, 2.2), u(1.4, 2.4)
    halves = u.integer(1, 2)
    x = np.linspace(0, 1, 40)
    parts = []
    for n in range(halves):
        share, folds, deep = u(0.25, 1 / halves), u(4, 12), u(0.02, 0.07)
        at = x * share * w if n == 0 else w - x * share * w
        z = deep * np.sin(x * folds * 2 * math.pi)
        rows = [np.stack([at - w / 2, np.full(40, y), z * (1.3 - 0.6 * y / h)], axis=1) for y in (0.0, h / 2, h)]
        parts.append(surface(np.array(rows), cloth))
    if u.chance(0.7):
        metal = u.colour(PLAIN, WOOD)
        parts.append(rod((-w * 0.55, h, 0), (w * 0.55, h, 0), u(0.02, 0.05), metal))
        parts += [ball(0.07, 0.07, 0.07, side * w * 0.56, h - 0.035, 0, metal) for side in (-1, 1)]
    return parts


def towel(u: Draw) -> list[Part]:
    cloth, w, h = u.colour(BRIGHT, PLAIN, GLASS), u(0.15, 0.5), u(0.4, 0.8)
    x = np.linspace(-1, 1, 20)
    if u.chance(0.5):  # on a hook
        rows, waves, deep = [], u(1, 3), u(0.02, 0.05)
        for y, wide in ((0, 1), (h * 0.5, 0.75), (h * 0.9, 0.35), (h, 0.1)):
            rows.append(np.stack([x * wide * w / 2, np.full(20, y), deep * np.cos(x * waves * math.pi)], axis=1))
        parts = [surface(np.array(rows), cloth)]
        return [*parts, box(0.04, 0.06, 0.03, 0, h - 0.02, -0.02, u.colour(PLAIN))] if u.chance(0.6) else parts
    thick = u(0.02, 0.05)  # over a rail
    parts = [box(w, h, 0.012, 0, 0, thick, cloth), box(w, h * u(0.5, 1), 0.012, 0, h * 0.2, -thick, cloth)]
    parts.append(rod((-w * 0.7, h, 0), (w * 0.7, h, 0), 2 * thick, u.colour(PLAIN)))
    if u.chance(0.5):
        parts.append(box(w * 1.01, h * 0.08, 0.015, 0, h * 0.08, thick, u.colour(BRIGHT, PLAIN)))
    return parts


def fireplace(u: Draw) -> list[Part]:
    stone, dark = u.colour(PLAIN, WOOD, BRIGHT[4:]), u.colour(PLAIN[2:])
    w, h, d, post = u(1, 1.6), u(0.9, 1.3), u(0.3, 0.5), u(0.18, 0.35)
    parts = [box(post, h, d, side * (w - post) / 2, 0, 0, stone) for side in (-1, 1)]
    parts += [
        box(w - 2 * post, h * u(0.2, 0.35), d, 0, h * 0.68, 0, stone),
        box(w * 1.1, 0.06, d * 1.15, 0, h, 0.02, u.colour(WOOD, PLAIN)),
    ]
    parts += [
        box(w - 2 * post, h * 0.7, 0.02, 0, 0, -d * 0.45, dark),
        box(w * u(1, 1.2), 0.06, d * 1.5, 0, 0, d * 0.2, stone),
    ]
    for n in range(u.integer(2, 4)):
        parts.append(
            rod(
                (-w * 0.2, 0.08 + 0.05 * n, 0.05 * n - 0.1),
                (w * 0.2, 0.08 + 0.05 * n, u(-0.1, 0.1)),
                0.08,
                u.colour(WOOD),
            )
        )
    if u.chance(0.6):
        parts += [cone(0.12, u(0.15, 0.3), 0.05, u(-0.15, 0.15) * w, 0.15, 0, u.colour(FLAME), 0.05) for _ in range(3)]
    if u.chance(0.4):
        parts.append(box(w * u(0.5, 1), u(0.8, 1.4), d * 0.8, 0, h + 0.06, -d * 0.1, u.colour(PLAIN, BRIGHT)))
    return parts


def clock(u: Draw) -> list[Part]:
    frame, face, hand = u.colour(WOOD, PLAIN, BRIGHT), u.colour(PLAIN[:1], BRIGHT[4:]), u.colour(PLAIN[2:])
    r, kind = u(0.08, 0.18), u.integer(0, 3)
    front, y = u(0.03, 0.06), 0.0
    if kind == 0:
        parts = [disc(2 * r, 2 * r, front, 0, y, 0, frame), ring(r, r * 0.12, (0, y, front), frame)]
    elif kind == 1:
        parts = [box(2.2 * r, 2.2 * r, front, 0, -1.1 * r, front / 2, frame)]
    elif kind == 2:  # a grandfather's or cuckoo clock
        low, front = r * u(1.5, 9), r
        parts = [
            box(2.4 * r, 2.6 * r, front, 0, -1.2 * r, front / 2, frame),
            prism([(-1.5 * r, 1.4 * r), (1.5 * r, 1.4 * r), (0, 2.6 * r)], front, frame, (0, 0, front / 2)),
        ]
        if low > 4 * r:
            parts += [
                box(1.8 * r, low, front * 0.8, 0, -low - 1.2 * r, front / 2, frame),
                box(2.6 * r, r, front * 1.2, 0, -low - 1.8 * r, front / 2, frame),
            ]
        else:
            parts += [
                rod((0, -1.2 * r, front / 2), (0, -1.2 * r - low, front / 2), r * 0.08, u.colour(WOOD)),
                disc(r * 0.5, r * 0.5, 0.02, 0, -1.3 * r - low, front / 2, u.colour(BRIGHT)),
            ]
    else:  # an alarm clock
        front = r * u(0.6, 1)
        parts = [disc(2 * r, 2 * r, front, 0, 0, 0, frame)]
        parts += [ball(0.7 * r, 0.5 * r, 0.7 * r, side * 0.6 * r, 0.85 * r, front / 2, frame) for side in (-1, 1)]
        parts += [
            rod((side * 0.6 * r, -1.2 * r, front / 2), (side * 0.4 * r, -0.8 * r, front / 2), 0.15 * r, frame)
            for side in (-1, 1)
        ]
    parts.append(disc(1.85 * r, 1.85 * r, 0.006, 0, 0, front, face))
    for angle, long in ((u(0, 6.3), 0.5), (u(0, 6.3), 0.8)):
        parts.append(
            rod(
                (0, 0, front + 0.01),
                (r * long * math.sin(angle), r * long * math.cos(angle), front + 0.01),
                r * 0.1,
                hand,
            )
        )
    for n in range(12):
        parts.append(
            box(
                0.1 * r,
                0.1 * r,
                0.008,
                0.8 * r * math.sin(n * math.pi / 6),
                0.8 * r * math.cos(n * math.pi / 6) - 0.05 * r,
                front + 0.005,
                hand,
            )
        )
    return parts


def trash_can(u: Draw) -> list[Part]:
    body, lid = u.colour(PLAIN, BRIGHT, ((0.1, 0.5, 0.2),)), u.colour(PLAIN, BRIGHT)
    r, kind = u(0.2, 0.35), u.integer(0, 3)
    h = r * u(1.6, 2.8)
    if kind == 0:  # open
        top = r * u(1, 1.35)
        return [
            lathe(
                [(0, 0), (r, 0), (top, h), (top * 1.05, h), (top * 1.05, h - 0.03), (r * 0.95, 0.03), (0, 0.03)], body
            )
        ]
    if kind == 1:  # a round lid, perhaps with a pedal
        parts = [
            cone(2 * r, h, 2 * r, 0, 0, 0, body, u(0.9, 1.1)),
            lathe([(r * 1.03, h), (r * 0.9, h + r * 0.4), (0, h + r * u(0.5, 1))], lid),
        ]
        return [*parts, box(0.08, 0.02, 0.1, 0, 0.01, r, u.colour(PLAIN))] if u.chance(0.6) else parts
    w, d, tall, small = 2 * r, r * u(1.5, 2.3), h * 1.3, u(0.75, 0.95)
    corners = ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1))
    sides = [[(sx * w / 2 * s, y, sz * d / 2 * s) for sx, sz in corners] for y, s in ((0, 0), (0, small), (tall, 1))]
    parts = [surface(np.array(sides), body), box(w * 1.06, u(0.03, 0.1), d * 1.1, 0, tall, 0, lid)]
    if kind == 3:  # on wheels
        parts += [
            Part("cone", (0.2, 0.06, 0.2), (x * w, 0.1, -d / 2), PLAIN[3], turn=np.eye(3)[[1, 0, 2]])
            for x in (-0.5, 0.4)
        ]
        parts.append(rod((-w * 0.4, tall, -d * 0.6), (w * 0.4, tall, -d * 0.6), 0.03, lid))
    return parts


def piano(u: Draw) -> list[Part]:
    body, white, dark = u.colour(PLAIN[3:], PLAIN[3:], WOOD, PLAIN), PLAIN[0], PLAIN[3]
    w = u(1.3, 1.5)
    if u.chance(0.5):  # upright
        h, d, key = u(1, 1.4), u(0.3, 0.45), u(0.55, 0.7)
        parts = [
            box(w, h, d, 0, 0, 0, body),
            box(w * 1.02, 0.04, d * 1.1, 0, h, 0, body),
            box(w, 0.12, 0.28, 0, key, d / 2 + 0.14, body),
        ]
        parts += [box(0.08, key, 0.08, side * w * 0.47, 0, d / 2 + 0.22, body, leg=True) for side in (-1, 1)]
        front = d / 2 + 0.18
    else:  # a grand piano
        long, key = u(1.3, 2.1), u(0.6, 0.7)
        outline = [
            (-w / 2, 0.4),
            (w / 2, 0.4),
            (w / 2, -0.1),
            (w * 0.25, -long * 0.45),
            (w * 0.05, -long * 0.7),
            (-w * 0.2, -long * 0.75),
            (-w / 2, -long * 0.65),
        ]
        flat = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # the outline's y becomes z
        parts = [prism(outline, 0.28, body, (0, key + 0.1, 0), flat)]
        if u.chance(0.7):
            parts.append(
                prism(
                    [(x + w / 2, y) for x, y in outline],
                    0.02,
                    body,
                    (-w / 2, key + 0.25, 0),
                    flat @ np.array([[0.7, 0.7, 0], [-0.7, 0.7, 0], [0, 0, 1]]),
                )
            )
        for x, z in ((-0.42, 0.25), (0.42, 0.25), (-0.2, -long * 0.6)):
            parts.append(cone(0.07, key, 0.07, x * w, 0, z, body, 1.6, leg=True))
        front, key = 0.42, key + 0.08
        parts.append(box(w, 0.06, 0.2, 0, key - 0.1, front, body))
    parts.append(box(w * 0.9, 0.03, 0.16, 0, key + 0.1, front, white))
    parts += [
        box(0.02, 0.02, 0.09, w * 0.88 * ((n + 0.5) / 14 - 0.5), key + 0.13, front - 0.03, dark) for n in range(14)
    ]
    return parts


def speaker(u: Draw) -> list[Part]:
    body, w = u.colour(PLAIN[3:], PLAIN[2:], WOOD, PLAIN), u(0.18, 0.35)
    h, d = w * u(1.3, 3.2), w * u(0.8, 1.3)
    parts, y = [box(w, h, d, 0, 0, 0, body)], h * 0.05
    for n in range(u.integer(1, 3)):
        r = min(w * 0.85 * (0.7 if n else 1), h * 0.9 - y)
        if r < w * 0.2:
            break
        parts += [
            disc(r, r, 0.01, 0, y + r / 2, d / 2, u.colour(PLAIN[2:])),
            disc(r * 0.7, r * 0.7, 0.025, 0, y + r / 2, d / 2, u.colour(PLAIN[1:]), 0.4),
        ]
        y += r * 1.08
    if u.chance(0.2):
        parts.append(box(w * 0.95, h * 0.95, 0.03, 0, h * 0.02, d / 2, u.colour(PLAIN[2:])))
    return parts


def rug(u: Draw) -> list[Part]:
    ground, edge, w, d, t = (
        u.colour(BRIGHT, PLAIN, WOOD),
        u.colour(BRIGHT, PLAIN, WOOD),
        u(0.9, 2.2),
        u(1.2, 2.8),
        u(0.01, 0.03),
    )
    if u.chance(0.2):
        return [cone(w, t, w, 0, 0, 0, ground), cone(w * 0.7, t * 1.1, w * 0.7, 0, 0, 0, edge)]
    parts = [box(w, t, d, 0, 0, 0, ground)]
    if u.chance(0.6):
        parts += [
            box(w * part, t * (1.2 + n * 0.1), d * part, 0, 0, 0, colour)
            for n, (part, colour) in enumerate(((0.85, edge), (0.6, ground)))
        ]
    if u.chance(0.4):
        parts += [
            box(0.02, t * 0.6, 0.08, w * ((n + 0.5) / 12 - 0.5), 0, side * (d / 2 + 0.04), edge)
            for n in range(12)
            for side in (-1, 1)
        ]
    return parts


def mat(u: Draw) -> list[Part]:
    ground, edge, w, d, t = (
        u.colour(WOOD, BRIGHT, PLAIN),
        u.colour(PLAIN[2:], BRIGHT),
        u(0.6, 1),
        u(1.2, 2),
        u(0.03, 0.1),
    )
    parts = [box(w, t, d, 0, 0, 0, ground)]
    return (
        parts + [box(w * 0.06, t * 1.1, d, side * w * 0.48, 0, 0, edge) for side in (-1, 1)] if u.chance(0.7) else parts
    )


HOUSEHOLD: dict[str, Callable[[Draw], list[Part]]] = {
    "clock": clock, "curtain": curtain, "fireplace": fireplace, "ladder": ladder, "mat": mat,
    "piano": piano, "rug": rug, "shelf": shelf, "speaker": speaker, "stool": stool,
    "towel": towel, "trash can": trash_can, "vanity": vanity,
}  # fmt: skip

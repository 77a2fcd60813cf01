"""Procedural structures: goals, mailboxes, staircases, workbenches, boats.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS
from pointalign.embedded.procedural_parts import (
    BRIGHT, GREEN, PLAIN, WOOD, Draw, Part, ball, box, cone, lathe, lean, prism, ring, rod, surface, tube,
)  # fmt: skip


def goal(u: Draw) -> list[Part]:
    metal, net = u.colour(PLAIN[:1], BRIGHT), u.colour(PLAIN[:2])
    w, t = u(1.5, 7.3), u(0.05, 0.12)
    h, d = w * u(0.33, 0.8), w * u(0.25, 0.6)
    top = d * u(0, 0.5)
    parts = [rod((-w / 2, h, 0), (w / 2, h, 0), t, metal), rod((-w / 2, 0, -d), (w / 2, 0, -d), t * 0.7, metal)]
    for side in (-w / 2, w / 2):
        for start, end in (((0, 0), (h, 0)), ((0, 0), (0, -d)), ((h, 0), (h, -top)), ((h, -top), (0, -d))):
            if start != end:
                parts.append(rod((side, *start), (side, *end), t if end[0] == h and end[1] == 0 else t * 0.7, metal))
    for part in np.linspace(0, 1, 6):
        x = w * (part - 0.5)
        parts.append(rod((x, h, -top - 0.001), (x, 0, -d), t * 0.2, net))
        parts.append(
            rod((-w / 2, h * part, -d + (d - top) * part), (w / 2, h * part, -d + (d - top) * part), t * 0.2, net)
        )
    return parts


def hoop(u: Draw) -> list[Part]:
    board, red, r = u.colour(PLAIN[:1], GLASS), u.colour(BRIGHT[:1], WOOD[:1]), 0.23
    w, h = u(0.9, 1.6), u(0.6, 1.1)
    parts = [box(w, h, 0.04, 0, 0, 0, board), ring(r, 0.04, (0, h * 0.15, r + 0.1), red, lean(math.pi / 2))]
    for x, y in ((-0.25, 0.3), (0.25, 0.3)):
        parts.append(box(0.04, h * 0.4, 0.045, x, h * y, 0.005, red))
    parts += [box(0.5, 0.04, 0.045, 0, h * y, 0.005, red) for y in (0.3, 0.66)]
    parts.append(
        lathe(
            [(r, h * 0.15), (r * 0.7, h * 0.15 - 0.2), (r * 0.6, h * 0.15 - 0.4)], u.colour(PLAIN[:1]), (0, 0, r + 0.1)
        )
    )
    if u.chance(0.5):
        parts += [
            rod((0, -2, -0.6), (0, h * 0.5, -0.1), 0.12, u.colour(PLAIN)),
            box(0.7, 0.1, 0.9, 0, -2.05, -0.6, u.colour(PLAIN)),
        ]
    return parts


def mailbox(u: Draw) -> list[Part]:
    metal, w = u.colour(PLAIN, BRIGHT, WOOD), u(0.18, 0.4)
    if u.chance(0.5):  # on a post, with a round top
        h, long, post = w * u(0.9, 1.2), w * u(1.5, 2.5), u(0.8, 1.1)
        profile = [
            (-w / 2, 0),
            (w / 2, 0),
            *[(w / 2 * math.cos(a), h - w / 2 + w / 2 * math.sin(a)) for a in np.linspace(0, math.pi, 9)],
        ]
        parts = [prism(profile, long, metal, (0, post, 0)), box(0.1, post, 0.1, 0, 0, 0, u.colour(WOOD, PLAIN))]
        return [*parts, box(0.015, h, 0.08, w / 2 + 0.01, post + h * 0.3, 0, u.colour(BRIGHT[:1]))]
    h, d = w * u(0.9, 1.6), w * u(0.3, 0.5)
    parts = [box(w, h, d, 0, 0, 0, metal), box(w * 0.8, h * 0.07, 0.01, 0, h * 0.82, d / 2, u.colour(PLAIN[2:]))]
    parts.append(
        prism([(-d / 2, 0), (d * 0.7, 0), (-d / 2, h * 0.2)], w * 1.05, metal, (0, h, 0), lean(0, -math.pi / 2))
    )
    return [*parts, box(w * 0.6, h * 0.3, 0.01, 0, h * 0.25, d / 2, u.colour(PLAIN))]


def snowman(u: Draw) -> list[Part]:
    snow, y, r, parts = PLAIN[0], 0.0, u(0.5, 0.7), []
    for _ in range(u.integer(2, 3)):
        parts.append(ball(r, r * 0.95, r, 0, y, 0, snow))
        y, last, r = y + r * 0.8, r, r * u(0.65, 0.8)
    eye = y - last * 0.2
    parts += [ball(0.05, 0.05, 0.05, x * last, eye, last * 0.42, PLAIN[3]) for x in (-0.17, 0.17)]
    parts.append(
        rod((0, eye - 0.05, last * 0.45), (0, eye - 0.05, last * 0.45 + u(0.1, 0.25)), 0.06, (0.9, 0.45, 0.1), 0.1)
    )
    parts += [
        rod((side * last * 0.5, y - last, 0), (side * last * 1.4, y - last * u(0.6, 1.1), 0), 0.03, u.colour(WOOD[:2]))
        for side in (-1, 1)
    ]
    if u.chance(0.7):
        hat = u.colour(PLAIN[3:], BRIGHT)
        parts += [
            cone(last, 0.02, last, 0, y + last * 0.1, 0, hat),
            cone(last * 0.6, last * 0.5, last * 0.6, 0, y + last * 0.1, 0, hat),
        ]
    return parts


def pallet(u: Draw) -> list[Part]:
    wood, w, d, h = u.colour(WOOD), u(0.8, 1.2), u(0.8, 1.2), u(0.1, 0.15)
    planks = u.integer(5, 9)
    parts = [box(w, 0.02, d / planks * u(0.6, 0.95), 0, h, d * ((n + 0.5) / planks - 0.5), wood) for n in range(planks)]
    parts += [box(0.1, h, d, x * w, 0, 0, wood) for x in (-0.45, 0, 0.45)]
    return parts


def staircase(u: Draw) -> list[Part]:
    step, frame = u.colour(WOOD, PLAIN), u.colour(PLAIN, WOOD)
    count, w, rise = u.integer(8, 15), u(0.7, 1.1), u(0.16, 0.2)
    parts = []
    if u.chance(0.5):  # winding
        turn_ = u(0.35, 0.5)
        parts.append(rod((0, 0, 0), (0, rise * (count + 4), 0), 0.1, frame))
        rail = []
        for n in range(count):
            angle = n * turn_
            x, z = math.cos(angle), math.sin(angle)
            parts.append(
                Part("box", (w, 0.04, 0.3), (x * w / 2, rise * (n + 1), z * w / 2), step, turn=lean(0, -angle))
            )
            rail.append((x * w, rise * (n + 1) + 0.9, z * w))
            parts.append(rod((x * w, rise * (n + 1), z * w), rail[-1], 0.03, frame))
        return [*parts, tube(rail, 0.05, frame)]
    deep, closed = u(0.24, 0.3), u.chance(0.5)
    for n in range(count):
        high = rise * (n + 1) if closed else 0.04
        parts.append(box(w, high, deep, 0, rise * (n + 1) - high, -deep * n, step))
    end = (rise * count, -deep * (count - 1))
    for side in (-1, 1):
        x = side * w / 2
        if not closed:
            parts.append(rod((x, 0, deep / 2), (x, *end), 0.12, frame, flat=0.4))
        if u.chance(0.7):
            parts.append(rod((x, 1, 0), (x, end[0] + 0.9, end[1]), 0.05, frame))
            parts += [
                rod((x, rise * n, -deep * n), (x, rise * n + 1, -deep * n), 0.03, frame) for n in range(0, count, 3)
            ]
    return parts


def workbench(u: Draw) -> list[Part]:
    wood, frame, w, h, d = u.colour(WOOD), u.colour(WOOD, PLAIN), u(1, 1.8), u(0.75, 0.95), u(0.5, 0.75)
    parts = [box(w, u(0.03, 0.08), d, 0, h, 0, wood)]
    t = u(0.05, 0.1)
    parts += [box(t, h, t, sx * w * 0.46, 0, sz * d * 0.44, frame, leg=True) for sx in (-1, 1) for sz in (-1, 1)]
    if u.chance(0.7):
        parts.append(box(w * 0.95, 0.03, d * 0.9, 0, h * u(0.1, 0.3), 0, wood))
    if u.chance(0.6):
        rise = u(0.4, 0.8)
        parts += [box(w, rise, 0.02, 0, h, -d * 0.48, wood), box(w, 0.03, d * 0.3, 0, h + rise, -d * 0.35, wood)]
    if u.chance(0.5):  # a vice
        parts += [
            box(0.14, 0.1, 0.12, w * 0.35, h + 0.06, d * 0.45, frame),
            box(0.2, 0.02, 0.02, w * 0.35, h + 0.1, d * 0.6, frame),
        ]
    return parts


def rowboat(u: Draw) -> list[Part]:
    hull, inside, long = u.colour(WOOD, PLAIN, GREEN, BRIGHT), u.colour(WOOD, PLAIN), u(2.5, 4)
    w, h, stern = long * u(0.3, 0.42), long * u(0.12, 0.18), u(0.3, 0.7)
    z = np.linspace(-1, 1, 14)
    half = np.where(z > 0, np.sqrt(np.maximum(1 - np.maximum(z, 0) ** 2.2, 0)), 1 - (1 - stern) * np.abs(z) ** 2)
    across = np.linspace(-1, 1, 11)
    x = w / 2 * half[:, None] * across
    y = h * (np.abs(across) ** 2.5) * np.ones((14, 1)) + 0.25 * h * z[:, None] ** 2
    grid = np.stack([x, y, np.broadcast_to(z[:, None] * long / 2, x.shape)], axis=2)
    parts = [surface(grid, hull), surface(grid * (0.95, 1, 0.97) + (0, 0.02, 0), inside)]
    parts += [box(w * 0.9, 0.03, 0.22, 0, h * 0.7, long * at, inside) for at in (-0.3, 0.0, 0.2)[: u.integer(1, 3)]]
    end = grid[0]
    parts.append(surface(np.stack([end, np.stack([end[:, 0], np.full(11, end[:, 1].max()), end[:, 2]], axis=1)]), hull))
    if u.chance(0.5):
        parts += [
            rod((side * w * 0.1, h, 0), (side * w * 1.3, h * u(0.3, 1), -long * u(0, 0.3)), 0.05, u.colour(WOOD))
            for side in (-1, 1)
        ]
    return parts


def doghouse(u: Draw) -> list[Part]:
    wood, roof, w = u.colour(WOOD, BRIGHT, PLAIN), u.colour(BRIGHT, WOOD, PLAIN), u(0.6, 0.9)
    h, d, rise = w * u(0.6, 0.9), w * u(0.9, 1.4), w * u(0.3, 0.5)
    parts = [prism([(-w / 2, 0), (w / 2, 0), (w / 2, h), (0, h + rise), (-w / 2, h)], d, wood)]
    slope = math.atan2(rise, w / 2)
    for side in (-1, 1):
        over = w * 0.1
        corners = [
            [(side * (w / 2 + over), h - over * math.tan(slope) + 0.03, z), (0, h + rise + 0.03, z)]
            for z in (-d * 0.58, d * 0.58)
        ]
        parts.append(surface(np.array(corners), roof))
    high, wide = h * u(0.6, 0.8), w * u(0.35, 0.5)
    arch = [
        (-wide / 2, 0),
        (wide / 2, 0),
        *[(wide / 2 * math.cos(a), high - wide / 2 + wide / 2 * math.sin(a)) for a in np.linspace(0, math.pi, 7)],
    ]
    return [*parts, prism(arch, 0.01, PLAIN[3], (0, 0.03, d / 2 + 0.005))]


STRUCTURES: dict[str, Callable[[Draw], list[Part]]] = {
    "doghouse": doghouse, "goal": goal, "hoop": hoop, "mailbox": mailbox, "pallet": pallet, "rowboat": rowboat,
    "snowman": snowman, "staircase": staircase, "workbench": workbench,
}  # fmt: skip

"""Groups of parts that several procedural objects share: legs, upholstery, cases."""

import math

import numpy as np

from pointalign.embedded.procedural_parts import BRIGHT, PLAIN, WOOD, Draw, Part, ball, box, cone, rod

GLASS = ((0.72, 0.78, 0.86), (0.85, 0.9, 0.93))
LEAST_LEG = 0.07  # metres; shorter feet can hardly be seen in a cloud, so they are not counted


def legs(u: Draw, w: float, d: float, h: float, colour, thick: tuple[float, float] = (0.03, 0.08)) -> list[Part]:
    """The support of a plate of w x d at height h: four legs, with or without a frame, two sides or a pedestal."""
    t, kind = u(*thick), u.rng.choice(["square", "round", "sides", "pedestal", "frame"], p=[0.4, 0.25, 0.12, 0.13, 0.1])
    x, z = w / 2 - t * u(0.5, 1.5), d / 2 - t * u(0.5, 1.5)
    corners = [(sx * x, sz * z) for sx in (-1, 1) for sz in (-1, 1)]
    if kind == "sides":
        return [box(t, h, d * u(0.7, 1), sx * x, 0, 0, colour) for sx in (-1, 1)]
    if kind == "pedestal":
        foot = min(w, d) * u(0.5, 0.9)
        return [cone(t * 1.5, h, t * 1.5, 0, 0, 0, colour), cone(foot, 0.03, foot, 0, 0, 0, colour, u(0.6, 1))]
    if kind == "round":
        taper = u(1, 1.8)
        return [cone(t / taper, h, t / taper, a, 0, b, colour, taper, leg=True) for a, b in corners]
    parts = [box(t, h, t, a, 0, b, colour, leg=True) for a, b in corners]
    if kind == "frame":
        low = h * u(0.1, 0.4)
        parts += [box(t * 0.7, t * 0.7, 2 * z, sx * x, low, 0, colour) for sx in (-1, 1)]
        parts += [box(2 * x, t * 0.7, t * 0.7, 0, low, sz * z, colour) for sz in (-1, 1)]
    return parts


def round_legs(u: Draw, count: int, radius: float, h: float, colour, flat: float = 1.0) -> list[Part]:
    """That many legs on a circle, upright or splayed, under a plate at height h."""
    t, splay, first = u(0.02, 0.06), u(0.9, 1.4), u(0, 2 * math.pi)
    result = []
    for angle in np.arange(count) / count * 2 * math.pi + first:
        x, z = radius * math.cos(angle), radius * math.sin(angle) * flat
        result.append(rod((x * splay, 0, z * splay), (x, h, z), t, colour, leg=True))
    return result


def upholstered(u: Draw, w: float, seats: int) -> list[Part]:
    """An armchair or sofa of width w."""
    cloth = u.colour(PLAIN, BRIGHT, WOOD)
    d, foot, seat = u(0.7, 1), u(0, 0.15), u(0.2, 0.4)
    arm, rise, thick, tilt = u(0.08, 0.25), u(0.3, 0.6), u(0.12, 0.28), u(0, 0.25)
    inner = w - 2 * arm
    parts = [
        box(w, seat, d, 0, foot, 0, cloth),
        box(inner, rise, thick, 0, foot + seat, thick / 2 - d / 2, cloth, tilt),
    ]
    high = u(0.1, 0.35)
    for side in (-1, 1):
        x = side * (w - arm) / 2
        parts.append(box(arm, seat + high, d * u(0.85, 1), x, foot, 0, cloth))
        if u.chance(0.3):
            parts.append(ball(arm * 1.2, arm, d, x, foot + seat + high - arm / 2, 0, cloth))
    for n in range(seats):
        x, soft = inner * ((n + 0.5) / seats - 0.5), u(0.06, 0.16)
        parts.append(box(inner / seats * 0.97, soft, d - thick, x, foot + seat, thick / 2, cloth))
        if u.chance(0.6):
            z = thick - d / 2
            parts.append(ball(inner / seats * 0.95, rise * u(0.8, 1.1), 0.22, x, foot + seat + soft, z, cloth))
    if foot > 0.03:
        dark = u.colour(WOOD, PLAIN)
        corners = [(sx * w * 0.45, sz * d * 0.42) for sx in (-1, 1) for sz in (-1, 1)]
        parts += [cone(0.05, foot, 0.05, x, 0, z, dark, leg=foot > LEAST_LEG) for x, z in corners]
    return parts


def case(u: Draw, w: float, h: float, d: float, columns: int, rows: int, wood) -> list[Part]:
    """A closed body whose front is a grid of doors or drawers with handles."""
    foot, metal = u(0, 0.12), u.colour(PLAIN)
    parts = [box(w, h, d, 0, foot, 0, wood)]
    if foot > 0.03:
        parts.append(box(w * 0.9, foot, d * 0.85, 0, 0, 0, wood))
    front = u.colour(WOOD, PLAIN) if u.chance(0.3) else wood
    wide, high, knob = w / columns, h / rows, u.chance(0.5)
    for column in range(columns):
        for row in range(rows):
            x, y = wide * (column + 0.5) - w / 2, foot + row * high
            parts.append(box(wide * 0.95, high * 0.95, u(0.01, 0.03), x, y + 0.02 * high, d / 2 + 0.01, front))
            edge = 0.0 if rows > columns else wide * (0.38 if column % 2 == 0 else -0.38)
            size = (0.03, 0.03) if knob else (0.12, 0.02) if rows > columns else (0.02, 0.15)
            parts.append(box(*size, 0.04, x + edge, y + high / 2, d / 2 + 0.04, metal))
    if u.chance(0.4):
        parts.append(box(w * 1.04, 0.03, d * 1.05, 0, foot + h, 0, wood))
    return parts

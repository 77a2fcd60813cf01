"""Procedural objects of gardens, streets and the outside of houses.

The order of the random draws is fixed: the clouds of a seed, and with them the trained encoder, depend on it.
"""

import math  # noqa: I001  the long import below stays on one line
from collections.abc import Callable

import numpy as np

from pointalign.embedded.procedural_groups import GLASS
from pointalign.embedded.procedural_parts import (
    BRIGHT, PLAIN, WOOD, Draw, Part, ball, box, cone, lathe, rod, surface,
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


OUTDOORS: dict[str, Callable[[Draw], list[Part]]] = {
    "column": column, "railing": railing,
}  # fmt: skip

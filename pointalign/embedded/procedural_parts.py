"""Parts of procedural objects: boxes, cones and balls, their colours, and the groups that several objects share.

Shape legend: n points.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pointalign.data.point_cloud import turn

WOOD = ((0.55, 0.38, 0.22), (0.36, 0.22, 0.12), (0.72, 0.56, 0.36), (0.85, 0.74, 0.55))
PLAIN = ((0.94, 0.94, 0.92), (0.6, 0.6, 0.62), (0.3, 0.3, 0.32), (0.08, 0.08, 0.09))
BRIGHT = ((0.7, 0.14, 0.12), (0.16, 0.3, 0.62), (0.15, 0.42, 0.2), (0.88, 0.72, 0.2), (0.82, 0.76, 0.66))
GREEN = ((0.2, 0.42, 0.14), (0.3, 0.52, 0.2), (0.12, 0.3, 0.12), (0.42, 0.55, 0.22))


@dataclass(frozen=True)
class Part:
    """A box, an upright cone (cut off at the top) or a ball.

    Attributes:
        kind: "box", "cone" or "ball".
        size: width, height and depth before the turn.
        at: x, y, z of the middle of the foot; y up, z to the front.
        colour: red, green, blue in 0..1.
        taper: a cone's upper width over its lower.
        turn: `[3, 3]` matrix for rows xyz, about the middle of the foot.
    """

    kind: str
    size: tuple[float, float, float]
    at: tuple[float, float, float]
    colour: tuple[float, float, float]
    taper: float = 1.0
    turn: np.ndarray | None = None

    @cached_property
    def areas(self) -> np.ndarray:
        """Areas of a box's faces across x, y and z, of a cone's foot, top and side, or of a ball."""
        w, h, d = self.size
        if self.kind == "box":
            return np.array([2 * h * d, 2 * w * d, 2 * w * h])
        if self.kind == "cone":
            foot, around = math.pi * w * d / 4, math.pi * (w + d) / 2
            side = around * (1 + self.taper) / 2 * math.hypot(h, (1 - self.taper) * (w + d) / 4)
            return np.array([foot, foot * self.taper**2, side])
        p = 1.6  # Thomsen's approximation of an ellipsoid's surface
        a, b, c = w / 2, h / 2, d / 2
        return np.array([4 * math.pi * (((a * b) ** p + (a * c) ** p + (b * c) ** p) / 3) ** (1 / p)])

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """`[n, 3]` points of the surface; uniform on boxes and cones, nearly uniform on balls."""
        face = rng.choice(len(self.areas), size=n, p=self.areas / self.areas.sum())
        if self.kind == "box":
            xyz = rng.uniform(-0.5, 0.5, size=(n, 3))
            xyz[np.arange(n), face] = rng.choice([-0.5, 0.5], size=n)
        elif self.kind == "cone":
            angle, height = rng.uniform(0, 2 * math.pi, size=n), np.choose(face, [0.0, 1.0, rng.random(n)])
            width = 1 - (1 - self.taper) * height
            radius = 0.5 * width * np.where(face == 2, 1, np.sqrt(rng.random(n)))
            xyz = np.stack([radius * np.cos(angle), height - 0.5, radius * np.sin(angle)], axis=1)
        else:
            xyz = rng.normal(size=(n, 3))
            xyz *= 0.5 / np.linalg.norm(xyz, axis=1, keepdims=True)
        xyz = (xyz + np.array([0, 0.5, 0])) * self.size
        return (xyz if self.turn is None else xyz @ self.turn) + self.at


def box(w, h, d, x, y, z, colour, tilt: float = 0.0) -> Part:
    """A box whose foot's middle is at (x, y, z), leaning back by `tilt` radians."""
    return Part("box", (w, h, d), (x, y, z), colour, turn=lean(tilt) if tilt else None)


def cone(w, h, d, x, y, z, colour, taper: float = 1.0) -> Part:
    """An upright cone whose foot's middle is at (x, y, z)."""
    return Part("cone", (w, h, d), (x, y, z), colour, taper)


def ball(w, h, d, x, y, z, colour) -> Part:
    """A ball whose lowest point is at (x, y, z)."""
    return Part("ball", (w, h, d), (x, y, z), colour)


def lean(tilt: float, about: float = 0.0) -> np.ndarray:
    """Lean back by `tilt`, then turn about the vertical by `about`, in radians."""
    c, s = math.cos(tilt), math.sin(tilt)
    return turn(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), about)


class Draw:
    """The random choices of one object. Calling it draws a length, an angle or a share, uniformly."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def __call__(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def colour(self, *palettes: tuple) -> tuple[float, float, float]:
        colours = [colour for palette in palettes for colour in palette]
        red, green, blue = np.clip(colours[self.rng.integers(len(colours))] + self.rng.normal(0, 0.04, 3), 0, 1)
        return float(red), float(green), float(blue)


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
        return [cone(t / taper, h, t / taper, a, 0, b, colour, taper) for a, b in corners]
    parts = [box(t, h, t, a, 0, b, colour) for a, b in corners]
    if kind == "frame":
        low = h * u(0.1, 0.4)
        parts += [box(t * 0.7, t * 0.7, 2 * z, sx * x, low, 0, colour) for sx in (-1, 1)]
        parts += [box(2 * x, t * 0.7, t * 0.7, 0, low, sz * z, colour) for sz in (-1, 1)]
    return parts


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
        parts += [cone(0.05, foot, 0.05, sx * w * 0.45, 0, sz * d * 0.42, dark) for sx in (-1, 1) for sz in (-1, 1)]
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

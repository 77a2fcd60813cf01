"""Boxes, cones and balls: what procedural clouds are put together from.

Shape legend: n points.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pointalign.data.augment import turn


@dataclass(frozen=True)
class Part:
    """A box, a cone (the frustum of one, upright) or a ball, standing on a place.

    Attributes:
        kind: "box", "cone" or "ball".
        size: width, height and depth before it is turned.
        at: x, y, z of the middle of its foot, y up, z to the front.
        colour: red, green, blue in 0..1.
        taper: of a cone, its upper width over its lower.
        turn: `[3, 3]`, rows are what becomes of the axes, about the middle of the foot.
    """

    kind: str
    size: tuple[float, float, float]
    at: tuple[float, float, float]
    colour: tuple[float, float, float]
    taper: float = 1.0
    turn: np.ndarray | None = None

    @cached_property
    def areas(self) -> np.ndarray:
        """Of its faces: a box's across x, y, z; a cone's foot, top and side; a ball's whole."""
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
        """`[n, 3]` points of its surface; even on boxes and cones, nearly even on balls."""
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
    return Part("cone", (w, h, d), (x, y, z), colour, taper)


def ball(w, h, d, x, y, z, colour) -> Part:
    return Part("ball", (w, h, d), (x, y, z), colour)


def lean(tilt: float, about: float = 0.0) -> np.ndarray:
    """Lean back by `tilt`, then turn about the vertical by `about`, in radians."""
    c, s = math.cos(tilt), math.sin(tilt)
    return turn(np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), about)

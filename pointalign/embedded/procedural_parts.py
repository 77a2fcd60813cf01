"""Parts of procedural objects: boxes, cones, balls and meshes, and their colours.

Shape legend: n points, m triangles, k points of a path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pointalign.data.point_cloud import turn

WOOD = ((0.55, 0.38, 0.22), (0.36, 0.22, 0.12), (0.72, 0.56, 0.36), (0.85, 0.74, 0.55))
PLAIN = ((0.94, 0.94, 0.92), (0.6, 0.6, 0.62), (0.3, 0.3, 0.32), (0.08, 0.08, 0.09))
BRIGHT = ((0.7, 0.14, 0.12), (0.16, 0.3, 0.62), (0.15, 0.42, 0.2), (0.88, 0.72, 0.2), (0.82, 0.76, 0.66))
GREEN = ((0.2, 0.42, 0.14), (0.3, 0.52, 0.2), (0.12, 0.3, 0.12), (0.42, 0.55, 0.22))


@dataclass(frozen=True)
class Part:
    """A box, an upright cone (cut off at the top), a ball or a mesh.

    Attributes:
        kind: "box", "cone", "ball" or "mesh".
        size: width, height and depth before the turn; a mesh has none.
        at: x, y, z of the middle of the foot; y up, z to the front.
        colour: red, green, blue in 0..1.
        taper: a cone's upper width over its lower.
        turn: `[3, 3]` matrix for rows xyz, about the middle of the foot.
        leg: whether the part is a separate leg that stands on the floor and can be seen; these are counted.
        triangles: the corners of a mesh, `[m, 3, 3]`, relative to `at`.
    """

    kind: str
    size: tuple[float, float, float]
    at: tuple[float, float, float]
    colour: tuple[float, float, float]
    taper: float = 1.0
    turn: np.ndarray | None = None
    leg: bool = False
    triangles: np.ndarray | None = None

    @cached_property
    def areas(self) -> np.ndarray:
        """Areas of a box's faces across x, y and z, of a cone's foot, top and side, of a ball, or of triangles."""
        if self.triangles is not None:
            a, b, c = self.triangles.swapaxes(0, 1)
            (x, y, z), (p, q, r) = (b - a).T, (c - a).T
            return np.sqrt((y * r - z * q) ** 2 + (z * p - x * r) ** 2 + (x * q - y * p) ** 2) / 2
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
        """`[n, 3]` points of the surface; uniform on boxes, cones and meshes, nearly uniform on balls."""
        up_to = self.areas.cumsum()
        face = np.searchsorted(up_to / up_to[-1], rng.random(n), side="right")
        if self.triangles is not None:
            share = rng.random((n, 2, 1))
            share = np.where(share.sum(axis=1, keepdims=True) > 1, 1 - share, share)  # fold the square to the triangle
            a, b, c = self.triangles[face].swapaxes(0, 1)
            xyz = a + share[:, 0] * (b - a) + share[:, 1] * (c - a)
            return (xyz if self.turn is None else xyz @ self.turn) + self.at
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


def box(w, h, d, x, y, z, colour, tilt: float = 0.0, leg: bool = False) -> Part:
    """A box whose foot's middle is at (x, y, z), leaning back by `tilt` radians."""
    return Part("box", (w, h, d), (x, y, z), colour, turn=lean(tilt) if tilt else None, leg=leg)


def cone(w, h, d, x, y, z, colour, taper: float = 1.0, leg: bool = False) -> Part:
    """An upright cone whose foot's middle is at (x, y, z)."""
    return Part("cone", (w, h, d), (x, y, z), colour, taper, leg=leg)


def ball(w, h, d, x, y, z, colour) -> Part:
    """A ball whose lowest point is at (x, y, z)."""
    return Part("ball", (w, h, d), (x, y, z), colour)


def rod(start, end, thick: float, colour, taper: float = 1.0, leg: bool = False, flat: float = 1.0) -> Part:
    """A cone from one point to another; `flat` is its second thickness over its first."""
    x, y, z = (float(b - a) for a, b in zip(start, end, strict=True))
    length, level = math.sqrt(x * x + y * y + z * z), math.hypot(x, z)
    x, y, z, level = x / length, y / length, z / length, level / length
    across = (z / level, 0.0, -x / level) if level > 1e-6 else (1.0, 0.0, 0.0)
    third = (across[1] * z - across[2] * y, across[2] * x - across[0] * z, across[0] * y - across[1] * x)
    turn_matrix = np.array([across, (x, y, z), third])
    return Part("cone", (thick, length, thick * flat), tuple(start), colour, taper, turn_matrix, leg)


def disc(w: float, h: float, thick: float, x, y, z, colour, taper: float = 1.0) -> Part:
    """A round plate that stands upright and shows its face to the front; (x, y, z) is the middle of its back."""
    return Part("cone", (w, thick, h), (x, y, z), colour, taper, lean(-math.pi / 2))


def mesh(triangles: np.ndarray, colour, at=(0.0, 0.0, 0.0), turn=None) -> Part:
    return Part("mesh", (1.0, 1.0, 1.0), at, colour, turn=turn, triangles=triangles)


def surface(points: np.ndarray, colour, at=(0.0, 0.0, 0.0), turn=None) -> Part:
    """A bent sheet through a grid of points `[rows, columns, 3]`."""
    a, b, c, d = points[:-1, :-1], points[:-1, 1:], points[1:, :-1], points[1:, 1:]
    triangles = np.stack([np.stack([a, b, c], axis=2), np.stack([d, c, b], axis=2)])
    return mesh(triangles.reshape(-1, 3, 3), colour, at, turn)


def lathe(profile: Sequence[tuple[float, float]], colour, at=(0.0, 0.0, 0.0), flat: float = 1.0, turn=None) -> Part:
    """A profile of (radius, height), revolved about the vertical axis; `flat` is the depth over the width."""
    radius, height = np.asarray(profile, dtype=float).T
    angle = np.linspace(0, 2 * math.pi, 25)
    x, z = np.outer(radius, np.cos(angle)), np.outer(radius, np.sin(angle)) * flat
    return surface(np.stack([x, np.broadcast_to(height[:, None], x.shape), z], axis=2), colour, at, turn)


def tube(path, thick: float, colour, at=(0.0, 0.0, 0.0), turn=None) -> Part:
    """A tube of diameter `thick` along a path `[k, 3]`."""
    path = np.asarray(path, dtype=float)
    closed = np.abs(path[0] - path[-1]).max() < 1e-9
    before, after = (path[-2], path[1]) if closed else (path[0], path[-1])
    along = np.concatenate([path[1:], [after]]) - np.concatenate([[before], path[:-1]])
    along /= np.sqrt((along**2).sum(axis=1, keepdims=True))
    normal = np.linalg.svd(path - path.mean(axis=0))[2][2]  # of the plane that fits the path best
    side = along[:, [1, 2, 0]] * normal[[2, 0, 1]] - along[:, [2, 0, 1]] * normal[[1, 2, 0]]  # cross product
    side /= np.sqrt((side**2).sum(axis=1, keepdims=True)) + 1e-9
    third = side[:, [1, 2, 0]] * along[:, [2, 0, 1]] - side[:, [2, 0, 1]] * along[:, [1, 2, 0]]
    angle = np.linspace(0, 2 * math.pi, 9)[None, :, None]
    round_ = np.cos(angle) * side[:, None] + np.sin(angle) * third[:, None]
    return surface(path[:, None] + thick / 2 * round_, colour, at, turn)


def arc(radius: float, low: float = 0.0, high: float = 2 * math.pi, across: float | None = None) -> np.ndarray:
    """Path of 20 points on an arc in the x-y plane, `across` its radius along y."""
    angle = np.linspace(low, high, 20)
    across = radius if across is None else across
    return np.stack([radius * np.cos(angle), across * np.sin(angle), np.zeros(20)], axis=1)


def ring(radius: float, thick: float, at, colour, turn=None) -> Part:
    """A torus about `at`, upright across z unless turned."""
    return tube(arc(radius), thick, colour, at, turn)


def prism(outline: Sequence[tuple[float, float]], depth: float, colour, at=(0.0, 0.0, 0.0), turn=None) -> Part:
    """An outline of (x, y), which its centre sees in full, as a plate of that depth along z."""
    corners = np.asarray(outline, dtype=float)
    corners = np.column_stack([corners, np.full(len(corners), depth / 2)])
    back = corners * (1, 1, -1)
    following, back_following = np.roll(corners, -1, axis=0), np.roll(back, -1, axis=0)
    front_centre = np.broadcast_to(corners.mean(axis=0), corners.shape)
    triangles = [
        np.stack([corners, following, front_centre], axis=1),
        np.stack([back, back_following, front_centre * (1, 1, -1)], axis=1),
        np.stack([corners, following, back], axis=1),
        np.stack([back_following, back, following], axis=1),
    ]
    return mesh(np.concatenate(triangles), colour, at, turn)


def moved(parts: Sequence[Part], turn_matrix: np.ndarray, by=(0.0, 0.0, 0.0)) -> list[Part]:
    """Parts turned about the origin, then shifted."""
    result = []
    for part in parts:
        at = tuple((np.asarray(part.at) @ turn_matrix + by).tolist())
        result.append(replace(part, at=at, turn=turn_matrix if part.turn is None else part.turn @ turn_matrix))
    return result


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

    def pick(self, *options):
        return options[self.integer(0, len(options) - 1)]

    def colour(self, *palettes: tuple) -> tuple[float, float, float]:
        colours = [colour for palette in palettes for colour in palette]
        red, green, blue = np.clip(colours[self.rng.integers(len(colours))] + self.rng.normal(0, 0.04, 3), 0, 1)
        return float(red), float(green), float(blue)

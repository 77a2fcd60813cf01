"""Procedural things: small coloured clouds whose captions name some properties and never others.

Set A, shape and colour, is in every caption. Set B, height, bend, size of the knob and place of the band, is
independent of A and in no caption.
"""

from dataclasses import dataclass

import numpy as np

from pointalign.data.point_cloud import normalise

SHAPES = ("cone", "funnel", "hourglass", "spindle")
COLOURS = {
    "red": (0.80, 0.12, 0.10),
    "green": (0.15, 0.60, 0.20),
    "blue": (0.12, 0.25, 0.80),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.55, 0.18, 0.65),
    "white": (0.93, 0.93, 0.93),
}
FACTORS_A = ("shape", "colour")
FACTORS_B = ("height", "bend", "knob", "band")
POINTS = 256  # of a cloud
KNOB_SHARE = 0.15  # of the points, whatever the knob's size
GREY = (0.5, 0.5, 0.5)  # of every knob


@dataclass(frozen=True)
class Thing:
    """The factors of a thing: a body that stands on the ground, a dark band around it, a grey knob on top.

    Attributes:
        shape, colour: of the body; set A.
        height, bend, knob, band: 0 to 1, set B: of the body, of its axis, size of the knob, place of the band.
    """

    shape: str
    colour: str
    height: float
    bend: float
    knob: float
    band: float

    def caption(self) -> str:
        """Set A in words."""
        return f"{self.colour} {self.shape} ."


def draw(rng: np.random.Generator, shape: str | None = None, colour: str | None = None) -> Thing:
    """A thing with independent factors; `shape` and `colour` are drawn where they are None."""
    shape = shape or str(rng.choice(SHAPES))
    colour = colour or str(rng.choice(list(COLOURS)))
    return Thing(shape, colour, *(float(value) for value in rng.random(len(FACTORS_B))))


def sample(thing: Thing, rng: np.random.Generator) -> np.ndarray:
    """A cloud `[POINTS, 6]` float32 of a thing: y up, in the unit sphere, rgb in 0..1."""
    height = 0.8 + 1.4 * thing.height
    up, angle = rng.random(POINTS), rng.uniform(0, 2 * np.pi, POINTS)
    radius = _radius(thing.shape, up)
    axis = 0.7 * thing.bend * height * up**2  # the body's axis bends towards +x
    xyz = np.stack([axis + radius * np.cos(angle), height * up, radius * np.sin(angle)], axis=1)
    dark = np.abs(up - (0.15 + 0.7 * thing.band)) < 0.08
    rgb = np.where(dark[:, None], 0.25, 1.0) * np.array(COLOURS[thing.colour])
    count = round(KNOB_SHARE * POINTS)
    direction = rng.normal(size=(count, 3))
    size = 0.1 + 0.25 * thing.knob
    top = np.array([0.7 * thing.bend * height, height + size, 0.0])
    xyz[:count] = top + size * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    rgb[:count] = GREY
    rgb = np.clip(rgb * rng.uniform(0.9, 1.1), 0, 1)
    cloud = np.concatenate([xyz + rng.normal(0, 0.005, xyz.shape), rgb], axis=1)
    return normalise(cloud[rng.permutation(POINTS)])


def _radius(shape: str, up: np.ndarray) -> np.ndarray:
    """Distance of the body's surface from its axis, at heights `up [N]` (0 to 1)."""
    profiles = {
        "cone": 0.5 - 0.45 * up,
        "funnel": 0.05 + 0.45 * up,
        "hourglass": 0.5 - 0.45 * np.sin(np.pi * up),
        "spindle": 0.05 + 0.45 * np.sin(np.pi * up),
    }
    return profiles[shape]


def training_things(count: int, seed: int = 0) -> list[tuple[Thing, np.random.Generator]]:
    """`count` things, each with the generator that samples its cloud; thing n depends only on the seed and n."""
    rngs = [np.random.default_rng([seed, 0, number]) for number in range(count)]
    return [(draw(rng), rng) for rng in rngs]


def held_out_things(per_combination: int, seed: int = 0) -> list[tuple[Thing, np.random.Generator]]:
    """As many things of every combination of A, none of them among `training_things`."""
    things = []
    for shape in SHAPES:
        for colour in COLOURS:
            for _ in range(per_combination):
                rng = np.random.default_rng([seed, 1, len(things)])
                things.append((draw(rng, shape, colour), rng))
    return things

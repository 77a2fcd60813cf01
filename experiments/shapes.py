"""Procedural stools: coloured clouds with known properties, for tests of what a model retains of a cloud.

    python -m experiments.shapes --count 50000 --output FOLDER

writes `clouds/{object_id}.npy`, `annotations/{train,test}.json` in the PointLLM schema and `objects.json`, from a seed
alone. Captions state the factors of set A and never those of set B, so that the captions do not need B:

    A  colour of the top, shape of the top, number of legs
    B  taper of the legs, holes in the top, aspect (height over width), roughness of the surface, a lopsided leg

Some combinations of A never occur in training, although each value does.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pointalign.evaluation.tasks import PROMPTS, EncodedObjects, ObjectSet, encode_objects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

COLOURS = {
    "red": (0.78, 0.12, 0.10),
    "green": (0.15, 0.55, 0.20),
    "blue": (0.12, 0.25, 0.75),
    "yellow": (0.95, 0.85, 0.20),
    "purple": (0.50, 0.18, 0.62),
    "white": (0.93, 0.93, 0.93),
}
TOPS = {"triangular": 3, "square": 4, "hexagonal": 6, "round": 32}  # name -> corners
LEGS = (3, 4, 5, 6)
HOLES = (0, 1, 2, 3)
NUMBERS = {3: "three", 4: "four", 5: "five", 6: "six"}
FACTORS_A = ("colour", "top", "legs")
FACTORS_B = ("taper", "holes", "aspect", "roughness", "lopsided")
HELD_OUT = 4  # a combination of A in this many is held out of training


@dataclass(frozen=True)
class Shape:
    """The factors of a stool.

    Attributes:
        colour, top, legs: set A.
        taper: radius of a leg's foot over that of its upper end, 0.3 to 1.
        holes: round holes in the top.
        aspect: height over the top's diameter, 0.6 to 1.8.
        roughness: standard deviation of the surface noise over the top's diameter, 0 to 0.03.
        lopsided: a leg stands outside the circle of the others.
    """

    colour: str
    top: str
    legs: int
    taper: float
    holes: int
    aspect: float
    roughness: float
    lopsided: bool

    @property
    def held_out(self) -> bool:
        """Whether this combination of A never occurs in training."""
        place = list(COLOURS).index(self.colour) + list(TOPS).index(self.top) + LEGS.index(self.legs)
        return place % HELD_OUT == 0

    def caption(self) -> str:
        """Set A in words."""
        return f"This is a {self.colour} stool with a {self.top} top and {NUMBERS[self.legs]} legs."


def draw(rng: np.random.Generator, held_out: bool) -> Shape:
    """A shape with independent factors, of the training combinations of A or of the held-out ones."""
    while True:
        shape = Shape(
            colour=str(rng.choice(list(COLOURS))),
            top=str(rng.choice(list(TOPS))),
            legs=int(rng.choice(LEGS)),
            taper=float(rng.uniform(0.3, 1.0)),
            holes=int(rng.choice(HOLES)),
            aspect=float(rng.uniform(0.6, 1.8)),
            roughness=float(rng.uniform(0.0, 0.03)),
            lopsided=bool(rng.random() < 0.5),
        )
        if shape.held_out == held_out:
            return shape


def sample(shape: Shape, rng: np.random.Generator, points: int = 2048) -> np.ndarray:
    """A cloud `[points, 6]` float32 of a shape: area-weighted, y up, turned at random, in the unit sphere."""
    from pointalign.data.point_cloud import normalise, turn

    thickness, radius = 0.08, 0.055  # of the top and of a leg; the top's diameter is 1
    length = shape.aspect - thickness
    angles = 2 * np.pi * (np.arange(shape.legs) + 0.5) / shape.legs
    distance = np.full(shape.legs, 0.3)
    distance[0] += 0.14 * shape.lopsided
    leg_area = np.pi * radius * (1 + shape.taper) * length
    top_area = 2 * np.pi * 0.25 + np.pi * thickness
    counts = rng.multinomial(
        points, np.array([top_area, *[leg_area] * shape.legs]) / (top_area + shape.legs * leg_area)
    )
    parts = [_top(shape, counts[0], thickness, rng) + np.array([0, length, 0])]
    for angle, away, count in zip(angles, distance, counts[1:], strict=True):
        height = rng.random(count)
        around = rng.uniform(0, 2 * np.pi, count)
        width = radius * (shape.taper + (1 - shape.taper) * height)
        centre = np.array([away * np.cos(angle), 0, away * np.sin(angle)])
        parts.append(np.stack([width * np.cos(around), height * length, width * np.sin(around)], axis=1) + centre)
    xyz = np.concatenate(parts) + rng.normal(0, shape.roughness, (points, 3))
    wood = np.array([0.55, 0.38, 0.22])
    rgb = np.where(np.arange(points)[:, None] < counts[0], COLOURS[shape.colour], wood)
    rgb = np.clip(rgb * rng.uniform(0.9, 1.1), 0, 1)
    cloud = np.concatenate([turn(xyz, rng.uniform(0, 2 * np.pi)), rgb], axis=1).astype(np.float32)
    return normalise(cloud[rng.permutation(points)])


def _top(shape: Shape, count: int, thickness: float, rng: np.random.Generator) -> np.ndarray:
    """`[count, 3]` points of a regular prism with holes, its lower face at height 0."""
    corners = TOPS[shape.top]
    holes = [(0.22 * np.cos(a), 0.22 * np.sin(a)) for a in 2 * np.pi * np.arange(shape.holes) / max(shape.holes, 1)]
    points = np.empty((0, 3))
    while len(points) < count:
        x, z = rng.uniform(-0.5, 0.5, (2, 4 * count + 8))
        sector = np.pi / corners
        angle = np.mod(np.arctan2(z, x), 2 * sector) - sector
        inside = np.hypot(x, z) * np.cos(angle) <= 0.5 * np.cos(sector)
        for hole_x, hole_z in holes:
            inside &= np.hypot(x - hole_x, z - hole_z) > 0.12
        face = np.stack([x, rng.integers(0, 2, len(x)) * thickness, z], axis=1)[inside]
        points = np.concatenate([points, face])
    points = points[:count]
    side = rng.random(count) < thickness / (thickness + 0.5)  # side over faces, by area
    place = rng.random(int(side.sum())) * corners
    first, share = place.astype(int), place % 1
    ends = [
        0.5 * np.stack([np.cos(2 * np.pi * n / corners), np.sin(2 * np.pi * n / corners)], 1)
        for n in (first, first + 1)
    ]
    border = ends[0] * (1 - share[:, None]) + ends[1] * share[:, None]
    points[side] = np.stack([border[:, 0], rng.random(len(border)) * thickness, border[:, 1]], axis=1)
    return points


def generate(
    count: int, seed: int = 0, held_out: bool = False, points: int = 2048
) -> Iterator[tuple[str, Shape, np.ndarray]]:
    """`count` triples (id, factors, cloud); object n depends only on the seed and n."""
    split = "test" if held_out else "train"
    for number in range(count):
        rng = np.random.default_rng([seed, int(held_out), number])
        shape = draw(rng, held_out)
        yield f"{split}-{number:06d}", shape, sample(shape, rng, points)


def objects(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    split: str,
    limit: int | None,
) -> EncodedObjects:
    """Stools with the training combinations of set A, or with those held out; at most `limit` (2000)."""
    triples = list(generate(limit or 2000, held_out=split != "train"))
    drawn = [shape for _, shape, _ in triples]
    names = [*FACTORS_A, *FACTORS_B]
    properties = {
        f"{'A' if name in FACTORS_A else 'B'}: {name}": [getattr(shape, name) for shape in drawn] for name in names
    }
    for name in ("A: legs", "B: holes"):
        properties[name] = [str(value) for value in properties[name]]
    captions = sorted(
        {
            Shape(colour, top, legs, 1.0, 0, 1.0, 0.0, False).caption()
            for colour in COLOURS
            for top in TOPS
            for legs in LEGS
        }
    )
    true_captions = [shape.caption() for shape in drawn]
    shapes = ObjectSet(
        [name for name, _, _ in triples],
        {name: cloud for name, _, cloud in triples}.__getitem__,
        true_captions,
        true_captions,
        candidates={caption: caption for caption in captions},
    )
    conversations = [[(PROMPTS[0], caption)] for caption in true_captions]
    return encode_objects(model, processor, shapes, conversations, properties)


def main(arguments: list[str] | None = None) -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="python -m experiments.shapes", description="Procedural stools with known factors"
    )
    parser.add_argument("--count", type=int, default=50_000, help="training objects; a tenth as many are held out")
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    (options.output / "clouds").mkdir(parents=True, exist_ok=True)
    (options.output / "annotations").mkdir(exist_ok=True)
    records = []
    for split, count in (("train", options.count), ("test", max(1, options.count // 10))):
        triples = generate(count, options.seed, split == "test", options.points)
        annotations = []
        for name, shape, cloud in tqdm(triples, total=count, desc=split, unit="object", disable=None):
            np.save(options.output / "clouds" / f"{name}.npy", cloud)
            records.append({"object_id": name, "split": split} | asdict(shape))
            turns = [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": shape.caption()}]
            annotations.append({"object_id": name, "conversation_type": "simple_description", "conversations": turns})
        (options.output / "annotations" / f"{split}.json").write_text(json.dumps(annotations))
    (options.output / "objects.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main()

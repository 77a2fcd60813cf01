"""Training views of the embedded objects: random poses, and the facts that hold for a view.

Everything about a batch follows from a seed and the number of the step, so a training that was stopped goes on with the
same batches.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from pointalign.data.point_cloud import augment, random_pose, turn
from pointalign.embedded.facts import MARGIN, PROPORTIONS, facts, longest_side, proportion
from pointalign.embedded.procedural import MAKERS, procedural_object
from pointalign.models import PointAlignFeatureExtractor

STRETCH = 0.4  # of the views: a table half as wide is still a table, and its sides are measured again
ALIGNED = 0.3  # share of the views whose sides lie along the axes, as in the catalogue, where sides are asked about
PROCEDURAL_POOL = 12_000  # different procedural objects; each takes 3 ms
PROCEDURAL_SHARE = 0.4  # share of procedural objects in every batch
LEGS = {3: "three", 4: "four", 5: "five", 6: "six"}


class Batch(NamedTuple):
    """B views.

    Attributes:
        points: `[B, N, 6]` float32, as the model reads them.
        facts: kind of facts -> the fact of each view, None where it is not clear.
        names: object id of each view; "" for procedural objects.
    """

    points: np.ndarray
    facts: dict[str, list[str | None]]
    names: list[str]


def view_facts(record: dict, sides: Sequence[float]) -> dict[str, str | None]:
    """The facts that stage 1 teaches, by kind; None where not clear.

    Args:
        record: of the object, what `facts.facts` reads.
        sides: width, height and depth of the view, along its own axes.
    """
    width, height, depth = sides
    known = facts(record)
    measured = {"width": width, "height": height, "depth": depth}
    return {
        "noun": known["noun"],
        "colour": known["colour"],
        "place": known["place"],
        "longest side": longest_side(measured),
        "height and width": _longer(height, width, "taller", "wider"),
        "width and depth": _longer(width, depth, "wider", "deeper"),
        "proportion": proportion(width, height),
        "legs": LEGS.get(record.get("legs", 0)),
    }


def _longer(first: float, second: float, word: str, other: str) -> str | None:
    """The word for the longer of two sides; None if they are about equal."""
    if max(first, second) < MARGIN * min(first, second):
        return None
    return word if first > second else other


def view_pose(rng: np.random.Generator) -> np.ndarray:
    """A random pose `[3, 3]`, see `random_pose`; in a share of the views the yaw is a multiple of a right angle."""
    if rng.random() >= ALIGNED:
        return random_pose(rng, STRETCH)
    pose = np.eye(3, dtype=np.float32)
    pose[0] *= rng.choice([-1, 1])
    pose = turn(pose, rng.integers(4) * np.pi / 2)
    return pose * np.exp(rng.uniform(-STRETCH, STRETCH, size=3)).astype(np.float32)


class TrainingViews:
    """Batches of views, some of procedural objects whose nouns occur in `records`.

    Args:
        clouds: arrays `[N, 6]`, y up.
        records: of each cloud, what `facts.facts` reads.
        batch_size: B.
        extractor: of the model that reads the views.
        seed: of all batches.
    """

    def __init__(
        self,
        clouds: Sequence[np.ndarray],
        records: Sequence[dict],
        batch_size: int,
        extractor: PointAlignFeatureExtractor,
        seed: int,
    ):
        self.clouds, self.records, self.extractor, self.seed = clouds, records, extractor, seed
        counts = Counter(record["head_noun"] for record in records)
        self.nouns = [noun for noun in MAKERS if noun in counts]
        # frequent nouns have more variety, and are asked about more often
        frequency = np.sqrt([counts[noun] for noun in self.nouns])
        self.noun_shares = frequency / frequency.sum()
        self.batch_size = batch_size
        self.num_real = batch_size - round(PROCEDURAL_SHARE * batch_size) if self.nouns else batch_size
        self.procedural = cache(self._procedural)

    def _procedural(self, number: int) -> tuple[dict, np.ndarray]:
        rng = np.random.default_rng([self.seed, 1, number])
        return procedural_object(self.nouns[rng.choice(len(self.nouns), p=self.noun_shares)], rng)

    def _real(self, place: int) -> tuple[dict, np.ndarray]:
        """The object at a place of the endless sequence in which every object occurs once per round."""
        round_number, position = divmod(place, len(self.clouds))
        index = _order(self.seed, round_number, len(self.clouds))[position]
        return self.records[index], self.clouds[index]

    def batch(self, step: int) -> Batch:
        """The batch of a step, always the same."""
        rng = np.random.default_rng([self.seed, 0, step])
        objects = [self._real(step * self.num_real + i) for i in range(self.num_real)]
        objects += [self.procedural(int(rng.integers(PROCEDURAL_POOL))) for _ in range(self.batch_size - self.num_real)]
        num_points = self.extractor.num_points
        views, seen = [], []
        for record, cloud in objects:
            # no more points than the model reads: the rest would be augmented in vain
            sample, pose = cloud[rng.permutation(len(cloud))[:num_points]], view_pose(rng)
            seen.append(view_facts(record, np.ptp(sample[:, :3] @ pose, axis=0)))
            views.append(augment(sample, rng, fewest=num_points, pose=pose))
        # one random density for the batch, so that it needs no padding
        most = min(len(view) for view in views)
        size = max(self.extractor.min_points, int(most * rng.uniform(0.5, 1.0))) if rng.random() < 0.5 else most
        points = np.stack([self.extractor.prepare(view[:size]) for view in views])
        facts_by_kind = {kind: [view[kind] for view in seen] for kind in seen[0]}
        return Batch(points, facts_by_kind, [record.get("object_id", "") for record, _ in objects])

    def known_facts(self) -> dict[str, list[str | None]]:
        """Kind of facts -> all that a view can show."""
        sides = {
            "longest side": ["width", "height", "depth"],
            "height and width": ["taller", "wider"],
            "width and depth": ["wider", "deeper"],
            "proportion": list(PROPORTIONS),
            "legs": list(LEGS.values()) if self.nouns else [],
        }
        known = [facts(record) for record in self.records]
        return {kind: [fact[kind] for fact in known] for kind in ("noun", "colour", "place")} | sides


@cache
def _order(seed: int, round_number: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, 2, round_number]).permutation(count)

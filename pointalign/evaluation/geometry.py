"""Questions about shape and colour whose answers are facts of the cloud, also with two clouds in one prompt."""

import numpy as np

from pointalign.data.captions import MARGIN, PALETTE, longest_side, main_colour
from pointalign.evaluation.tasks import Question

YES_NO = ("yes", "no")
SIDES = ("height", "width", "depth")
BUCKETS = {
    "wider": 0.0,
    "about equal": 1 / MARGIN,
    "taller": MARGIN,
    "twice as tall": 2.0,
}  # lower ends of height / width
PER_KIND = 48  # the most questions of one kind
PAIR_MARGIN = 1.5  # ratio of the two aspects below which no pair is asked about


def geometry_questions(records: list[dict], seed: int = 0) -> list[Question]:
    """Questions that the facts of the objects answer clearly, in a fixed order; pairs are drawn with `seed`.

    Of a kind with more than PER_KIND questions, so many are taken, spread evenly over the objects.

    Args:
        records: of the embedded objects, see `pointalign.data.furniture.describe_object`.
    """
    by_kind: dict[str, list[Question]] = {}
    for question in [one for record in records for one in _single(record)] + _pairs(records, seed):
        by_kind.setdefault(question.kind, []).append(question)
    return [one for found in by_kind.values() for one in _spread(found, PER_KIND)]


def _spread(questions: list[Question], most: int) -> list[Question]:
    if len(questions) <= most:
        return questions
    return [questions[i] for i in np.linspace(0, len(questions) - 1, most).round().astype(int)]


def _single(record: dict) -> list[Question]:
    width, height, depth = record["width"], record["height"], record["depth"]
    found: list[tuple[str, str, str, tuple[str, ...]]] = []  # kind, question, label, choices
    if max(height, width) > MARGIN * min(height, width):
        found.append(("taller than wide", "Is it taller than it is wide?", _yes(height > width), YES_NO))
    if max(width, depth) > MARGIN * min(width, depth):
        found.append(("wider than deep", "Is it wider than it is deep?", _yes(width > depth), YES_NO))
    if side := longest_side(record):
        found.append(("longest side", "Which side is longest: height, width or depth?", side, SIDES))
    bucket = max((lower, name) for name, lower in BUCKETS.items() if height / width >= lower)[1]
    asked = "How do height and width compare: wider, about equal, taller or twice as tall?"
    found.append(("aspect bucket", asked, bucket, tuple(sorted(BUCKETS, key=len, reverse=True))))
    if colour := main_colour(record):
        found.append(("colour", "What color is it mostly?", colour, tuple(PALETTE)))
    if (mirror := record["mirror_left_right"]) is not None:
        found.append(("symmetric", "Is it symmetric from left to right?", _yes(mirror), YES_NO))
    name = record["object_id"]
    return [
        Question(f"{name}/{kind}", (name,), text, label, label, record["family"], kind, choices)
        for kind, text, label, choices in found
    ]


def _pairs(records: list[dict], seed: int) -> list[Question]:
    """Each object beside another, drawn at random, of clearly different height over width; the answers are balanced."""
    rng = np.random.default_rng(seed)
    aspects = np.array([record["height"] / record["width"] for record in records])
    pairs = []
    for index, record in enumerate(records):
        ratio = aspects / aspects[index]
        possible = np.flatnonzero((ratio > PAIR_MARGIN) | (ratio < 1 / PAIR_MARGIN))
        if not len(possible):
            continue
        other = int(rng.choice(possible))
        first, second = (index, other) if rng.random() < 0.5 else (other, index)
        label = "first" if aspects[first] > aspects[second] else "second"
        ids = (records[first]["object_id"], records[second]["object_id"])
        text = "Which object is taller for its width, the first or the second?"
        name = f"{record['object_id']}/two clouds"
        pairs.append(Question(name, ids, text, label, label, record["family"], "two clouds", ("first", "second")))
    return pairs


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def chosen(answer: str, choices: tuple[str, ...]) -> str | None:
    """The choice that stands first in an answer, whole words only; of several in one place the longest; else None."""
    words = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in answer.lower()).split())} "
    places = [(words.find(f" {choice} "), -len(choice), choice) for choice in choices if f" {choice} " in words]
    return min(places)[2] if places else None

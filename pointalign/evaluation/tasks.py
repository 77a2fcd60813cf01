"""What a model is asked: tasks of questions about objects, with true answers and closed sets of answers.

Prompts and tasks follow PointLLM (Xu et al., ECCV 2024): classification asks prompts 0 and 1, captioning prompt 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pointalign.embedded.facts import MARGIN, PALETTE, longest_side, main_colour
from pointalign.evaluation.objects import ObjectSet, evenly

PROMPTS = ("What is this?", "This is an object of ", "Caption this 3D model in detail.")
TASKS = ("classification", "captioning", "modelnet40", "geometry")
MAX_NEW_TOKENS = {"classification": 32, "captioning": 96, "modelnet40": 32, "geometry": 16}


@dataclass(frozen=True)
class Question:
    """One question about one object or several, whose clouds stand before the text in this order.

    Attributes:
        id: unique within its task.
        truth: the reference answer or caption.
        label: noun, class or word of a right answer.
        family: objects of one family count as one observation in intervals.
        kind: the kind of geometry question, a row of its table.
        choices: the words of which an answer must hold one, for geometry.
    """

    id: str
    object_ids: tuple[str, ...]
    text: str
    truth: str
    label: str = ""
    family: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()


@dataclass
class Task:
    """Questions of one kind under one prompt.

    Attributes:
        name: such as `classification-prompt0`, also the name of its output file.
        kind: of `TASKS`; decides which metrics apply.
        candidates: label -> answer, the closed set whose likelihoods are compared; empty where there is none.
    """

    name: str
    kind: str
    prompt: str
    questions: list[Question]
    candidates: dict[str, str] = field(default_factory=dict)


def build_tasks(kind: str, objects: ObjectSet, prompts: Sequence[int] = (0, 1)) -> list[Task]:
    """The tasks of one kind: one per prompt for naming, one for captions or geometry.

    Raises:
        ValueError: geometry is asked about objects without facts.
    """
    if kind == "geometry":
        if not objects.records:
            raise ValueError("--task geometry needs objects with known facts: the embedded ones (--data furniture)")
        return [Task("geometry", kind, "", geometry_questions(objects.records))]
    if kind == "captioning":
        return [Task("captioning-prompt2", kind, PROMPTS[2], _ask_all(objects, PROMPTS[2]))]
    return [
        Task(f"{kind}-prompt{number}", kind, PROMPTS[number], _ask_all(objects, PROMPTS[number]), objects.candidates)
        for number in prompts
    ]


def _ask_all(objects: ObjectSet, prompt: str) -> list[Question]:
    rows = zip(objects.ids, objects.truths, objects.labels, objects.families, strict=True)
    return [Question(name, (name,), prompt, truth, label, family) for name, truth, label, family in rows]


YES_NO = ("yes", "no")
SIDES = ("height", "width", "depth")
BUCKETS = {
    "wider": 0.0,
    "about equal": 1 / MARGIN,
    "taller": MARGIN,
    "twice as tall": 2.0,
}  # lower ends of height / width
PER_KIND = 48  # most questions of one kind
PAIR_MARGIN = 1.5  # ratio of the two aspects below which no pair is asked about


def geometry_questions(records: list[dict], seed: int = 0) -> list[Question]:
    """Questions that the facts of the objects answer clearly, in a fixed order; pairs are drawn with `seed`.

    A kind with more than PER_KIND questions is cut to that number, evenly over the objects.

    Args:
        records: of the embedded objects, see `pointalign.embedded.catalogue.describe_object`.
    """
    by_kind: dict[str, list[Question]] = {}
    for question in [question for record in records for question in _single(record)] + _pairs(records, seed):
        by_kind.setdefault(question.kind, []).append(question)
    return [questions[i] for questions in by_kind.values() for i in evenly(len(questions), PER_KIND)]


def _single(record: dict) -> list[Question]:
    width, height, depth = record["width"], record["height"], record["depth"]
    questions: list[tuple[str, str, str, tuple[str, ...]]] = []  # kind, question, label, choices
    if max(height, width) > MARGIN * min(height, width):
        questions.append(("taller than wide", "Is it taller than it is wide?", _yes(height > width), YES_NO))
    if max(width, depth) > MARGIN * min(width, depth):
        questions.append(("wider than deep", "Is it wider than it is deep?", _yes(width > depth), YES_NO))
    if side := longest_side(record):
        questions.append(("longest side", "Which side is longest: height, width or depth?", side, SIDES))
    bucket = max((lower, name) for name, lower in BUCKETS.items() if height / width >= lower)[1]
    text = "How do height and width compare: wider, about equal, taller or twice as tall?"
    questions.append(("aspect bucket", text, bucket, tuple(sorted(BUCKETS, key=len, reverse=True))))
    if colour := main_colour(record):
        questions.append(("colour", "What color is it mostly?", colour, tuple(PALETTE)))
    if (mirror := record["mirror_left_right"]) is not None:
        questions.append(("symmetric", "Is it symmetric from left to right?", _yes(mirror), YES_NO))
    name = record["object_id"]
    return [
        Question(f"{name}/{kind}", (name,), text, label, label, record["family"], kind, choices)
        for kind, text, label, choices in questions
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

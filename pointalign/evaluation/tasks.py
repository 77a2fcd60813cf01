"""What a model is asked: tasks of questions about objects, with truths and the set of answers they are scored in.

Prompts and tasks follow PointLLM (Xu et al., ECCV 2024): classification asks prompts 0 and 1, captioning prompt 2.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pointalign.data.conversations import load_conversations
from pointalign.data.dataset import find_cloud
from pointalign.data.point_cloud import load_point_cloud
from pointalign.embedded.facts import MARGIN, PALETTE, describe, longest_side, main_colour, read_name

PROMPTS = ("What is this?", "This is an object of ", "Caption this 3D model in detail.")
TASKS = ("classification", "captioning", "modelnet40", "geometry")
MAX_NEW_TOKENS = {"classification": 32, "captioning": 96, "modelnet40": 32, "geometry": 16}


@dataclass(frozen=True)
class Question:
    """One question about one object or several, whose clouds stand before the text in this order.

    Attributes:
        id: unique within its task.
        truth: the reference answer or caption.
        label: the noun, class or word that makes an answer right.
        family: objects of one family count as one observation in intervals.
        kind: group of a table's row, for geometry.
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
        name: e.g. `classification-prompt0`: also the name of its output file.
        kind: of `TASKS`; says which metrics apply.
        candidates: label -> the answer whose likelihood is compared, in the closed set; empty where there is none.
    """

    name: str
    kind: str
    prompt: str
    questions: list[Question]
    candidates: dict[str, str] = field(default_factory=dict)


@dataclass
class ObjectSet:
    """Objects to ask about: `cloud(id)` gives `[N, 6]`; `records` are facts known of embedded objects."""

    ids: list[str]
    cloud: Callable[[str], np.ndarray]
    truths: dict[str, str]
    labels: dict[str, str] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict] = field(default_factory=dict)
    candidates: dict[str, str] = field(default_factory=dict)

    def first(self, count: int | None) -> "ObjectSet":
        """The set cut to `count` ids, taken evenly over the whole."""
        if count is None or count >= len(self.ids):
            return self
        chosen = np.linspace(0, len(self.ids) - 1, count).round().astype(int)
        return ObjectSet(
            [self.ids[i] for i in chosen],
            self.cloud, self.truths, self.labels, self.families, self.records, self.candidates,
        )  # fmt: skip


def furniture_objects(folder: Path, split: str) -> ObjectSet:
    """A split of the embedded objects; the closed set is the nouns that occur in it and in training."""
    everything = json.loads((folder / "objects.json").read_text())
    records = {one["object_id"]: one for one in everything if one["split"] == split}
    trained = {one["head_noun"] for one in everything if one["split"] == "train"}
    nouns = sorted({one["head_noun"] for one in records.values()} & trained)
    return ObjectSet(
        list(records),
        lambda name: np.load(folder / "clouds" / f"{name}_8192.npy"),
        {name: describe(one) for name, one in records.items()},
        {name: one["head_noun"] for name, one in records.items()},
        {name: one["family"] for name, one in records.items()},
        records,
        {noun: _naming(noun) for noun in nouns},
    )


def _naming(noun: str) -> str:
    name = read_name(noun)
    return f"{'These are' if name.plural else 'This is'} {name.phrase}."


def annotated_objects(annotations: Path, clouds: Path, up_axis: str = "y") -> ObjectSet:
    """Objects of a file in the PointLLM schema (such as Objaverse's val_200_GT): the first answer is the truth."""
    truths = {}
    for conversation in load_conversations(annotations):
        if len(conversation.object_ids) == 1:
            truths.setdefault(conversation.object_ids[0], conversation.turns[1][1])
    return ObjectSet(list(truths), lambda name: load_point_cloud(find_cloud(clouds, name), up_axis), truths)


def modelnet_objects(path: Path) -> ObjectSet:
    """The ModelNet40 test file of PointLLM; labels are class names, which are also the closed set."""
    from pointalign.data.modelnet import CLASSES, load_modelnet40

    clouds, labels = load_modelnet40(path)
    names = [CLASSES[label] for label in labels]
    ids = [str(number) for number in range(len(clouds))]
    return ObjectSet(
        ids,
        lambda name: clouds[int(name)],
        dict(zip(ids, names, strict=True)),
        dict(zip(ids, names, strict=True)),
        candidates={name: _naming(name) for name in CLASSES},
    )


def build_tasks(kind: str, objects: ObjectSet, prompts: Sequence[int] = (0, 1)) -> list[Task]:
    """The tasks of one kind: one per prompt for naming, one for captions or geometry.

    Raises:
        ValueError: geometry is asked about objects without facts.
    """
    if kind == "geometry":
        from pointalign.evaluation.tasks import geometry_questions

        if not objects.records:
            raise ValueError("--task geometry needs objects with known facts: the embedded ones (--data furniture)")
        records = [objects.records[name] for name in objects.ids]
        return [Task("geometry", kind, "", geometry_questions(records))]
    if kind == "captioning":
        return [Task("captioning-prompt2", kind, PROMPTS[2], _ask_all(objects, PROMPTS[2]))]
    return [
        Task(f"{kind}-prompt{number}", kind, PROMPTS[number], _ask_all(objects, PROMPTS[number]), objects.candidates)
        for number in prompts
    ]


def _ask_all(objects: ObjectSet, prompt: str) -> list[Question]:
    return [
        Question(
            name, (name,), prompt, objects.truths[name], objects.labels.get(name, ""), objects.families.get(name, name)
        )
        for name in objects.ids
    ]


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
        records: of the embedded objects, see `pointalign.embedded.catalogue.describe_object`.
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

"""What a model is asked: tasks of questions about objects, with truths and the set of answers they are scored in.

Prompts and tasks follow PointLLM (Xu et al., ECCV 2024): classification asks prompts 0 and 1, captioning prompt 2.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pointalign.data.captions import describe, read_name
from pointalign.data.conversations import load_conversations
from pointalign.data.dataset import find_cloud
from pointalign.data.point_cloud import load_point_cloud

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
        from pointalign.evaluation.geometry import geometry_questions

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

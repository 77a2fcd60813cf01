"""What a model is asked: sets of objects, and tasks of questions about them with true answers and closed sets.

Prompts and tasks follow PointLLM (Xu et al., ECCV 2024): classification asks prompts 0 and 1, captioning prompt 2.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pointalign import assets
from pointalign.alignment import pool_tokens
from pointalign.data.conversations import load_conversations
from pointalign.data.dataset import CLASSES, find_cloud, load_modelnet40
from pointalign.data.point_cloud import load_point_cloud
from pointalign.embedded.descriptions import describe
from pointalign.embedded.facts import main_colour, name_sentence, read_name
from pointalign.embedded.questions import NAME
from pointalign.evaluation.choices import Question, evenly, geometry_questions, yes_no_questions
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

HELD_OUT = "test"


@dataclass
class ObjectSet:
    """Objects to ask about. The lists run parallel.

    Attributes:
        ids: each unique.
        cloud: object id -> `[N, 6]`, xyz + rgb; reads the file.
        truths: reference answers or captions.
        labels: nouns or class names; "" where unknown.
        families: objects of one family count as one observation in intervals; by default each id is a family.
        candidates: label -> answer, the closed set whose likelihoods are compared; empty where there is none.
        records: the facts of embedded objects, see `pointalign.embedded.catalogue.describe_object`; else empty.
    """

    ids: list[str]
    cloud: Callable[[str], np.ndarray]
    truths: list[str]
    labels: list[str] = field(default_factory=list)
    families: list[str] = field(default_factory=list)
    candidates: dict[str, str] = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.labels = self.labels or [""] * len(self.ids)
        self.families = self.families or self.ids

    @cached_property
    def clouds(self) -> list[np.ndarray]:
        """All clouds, in memory."""
        return [self.cloud(name) for name in self.ids]

    def subset(self, rows: Iterable[int]) -> "ObjectSet":
        """The objects of these rows, with the same closed set."""
        rows = list(rows)
        lists = ("ids", "truths", "labels", "families", "records")
        return replace(self, **{name: [values[i] for i in rows] for name in lists if (values := getattr(self, name))})

    def first(self, limit: int | None) -> "ObjectSet":
        """At most `limit` objects, taken evenly over all of them."""
        return self if limit is None or limit >= len(self.ids) else self.subset(evenly(len(self.ids), limit))


def embedded_objects(folder: Path, split: str) -> ObjectSet:
    """A split of the embedded objects; the closed set is the nouns of the training part, whichever nouns the split has.

    Args:
        folder: as `pointalign.assets.embedded_objects` returns it.
    """
    catalogue = json.loads((folder / "objects.json").read_text(encoding="utf-8"))
    records = [record for record in catalogue if record["split"] == split]
    trained = {record["head_noun"] for record in catalogue if record["split"] == "train"}
    nouns = [record["head_noun"] for record in records]
    return ObjectSet(
        [record["object_id"] for record in records],
        lambda name: np.load(folder / "clouds" / f"{name}_8192.npy"),
        [describe(record) for record in records],
        nouns,
        [record["family"] for record in records],
        closed_set(sorted(trained)),
        records,
    )


def closed_set(names: Iterable[str]) -> dict[str, str]:
    """Name -> the sentence that names it, for nouns in the singular or plural."""
    read = {name: read_name(name) for name in names}
    return {name: name_sentence(parts.phrase, parts.plural) for name, parts in read.items()}


def reader(clouds: Path, up_axis: str = "y", **reading: Any) -> Callable[[str], np.ndarray]:
    """Reads the cloud `[N, 6]` of an object's id, with the further options of `load_point_cloud`."""
    return lambda name: load_point_cloud(find_cloud(clouds, name), up_axis, **reading)


def annotated_objects(annotations: Path, clouds: Path, up_axis: str = "y") -> ObjectSet:
    """Objects of a file in the PointLLM schema (such as Objaverse's val_200_GT): the first answer is the truth."""
    truths: dict[str, str] = {}
    for conversation in load_conversations(annotations):
        if len(conversation.object_ids) == 1:
            truths.setdefault(conversation.object_ids[0], conversation.turns[1][1])
    return ObjectSet(list(truths), reader(clouds, up_axis), list(truths.values()))


def modelnet_objects(path: Path) -> ObjectSet:
    """The ModelNet40 test file of PointLLM; labels are class names, which are also the closed set."""
    clouds, labels = load_modelnet40(path)
    names = [CLASSES[label] for label in labels]
    ids = [str(number) for number in range(len(clouds))]
    return ObjectSet(ids, lambda name: clouds[int(name)], names, names, candidates=closed_set(CLASSES))


# -- with frozen features ----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class EncodedObjects(ObjectSet):
    """Objects with the frozen point branch's features; `labels` are "" outside the closed set.

    Attributes:
        features: `[C, Q, D]` Q-Former tokens.
        encoder: `[C, Q, D']` encoder tokens, pooled to one per query.
        conversations: per object, its (question, answer) pairs.
        properties: name -> value per object, None where unknown; strings and booleans are categories.
    """

    features: Tensor
    encoder: Tensor
    conversations: list[list[tuple[str, str]]]
    properties: dict[str, list]

    def subset(self, rows: Iterable[int]) -> "EncodedObjects":
        rows = list(rows)
        return replace(
            super().subset(rows),
            features=self.features[rows],
            encoder=self.encoder[rows],
            conversations=[self.conversations[i] for i in rows],
            properties={name: [values[i] for i in rows] for name, values in self.properties.items()},
        )


def encode_objects(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    objects: ObjectSet,
    conversations: list[list[tuple[str, str]]],
    properties: dict[str, list],
    batch_size: int = 16,
) -> EncodedObjects:
    """Run the point branch over all clouds. The features stay in float32: probes and ablations compare small effects,
    and the float16 shards of `pointalign.feature_cache` would change their figures.
    """
    model.eval()
    qformer, encoder = [], []
    with torch.inference_mode():
        for start in tqdm(range(0, len(objects.ids), batch_size), desc="frozen features", unit="batch", leave=False):
            points = processor.feature_extractor([objects.cloud(i) for i in objects.ids[start : start + batch_size]])
            encoded = model.encode_point_clouds(
                points["point_values"].to(model.device), points["point_lengths"].to(model.device)
            )
            assert encoded.encoder is not None
            qformer.append(encoded.qformer.float().cpu())
            encoder.append(pool_tokens(encoded.encoder.float(), model.config.num_query_tokens).cpu())
    return EncodedObjects(
        **{item.name: getattr(objects, item.name) for item in fields(objects)},
        features=torch.cat(qformer),
        encoder=torch.cat(encoder),
        conversations=conversations,
        properties=properties,
    )


def load(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    train: int | None = None,
    held_out: int | None = None,
    fold: int | None = None,
) -> tuple[EncodedObjects, EncodedObjects]:
    """Training and held-out embedded objects, at most `train` and `held_out` of them.

    The closed set of both is the nouns of the training part. With `fold`, that fold of the families is held out.
    """
    folder = assets.embedded_objects(fold)
    training, tested = (embedded_objects(folder, split) for split in ("train", HELD_OUT))
    parts = []
    for split, objects in (("train", training.first(train)), (HELD_OUT, tested.first(held_out))):
        properties = {
            "noun": [noun if noun in training.candidates else None for noun in objects.labels],
            "main colour": [main_colour(record) for record in objects.records],
            "height over width": [float(np.log(record["height"] / record["width"])) for record in objects.records],
            "depth over width": [float(np.log(record["depth"] / record["width"])) for record in objects.records],
        }
        objects = replace(objects, labels=[noun if noun in objects.candidates else "" for noun in objects.labels])
        questions = _short_questions(folder / "annotations" / f"{split}.json")
        conversations = [questions[name] for name in objects.ids]
        parts.append(encode_objects(model, processor, objects, conversations, properties))
    return parts[0], parts[1]


def _short_questions(annotations: Path) -> dict[str, list[tuple[str, str]]]:
    """Object id -> its (question, answer) pairs of one round, without the long descriptions."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for entry in json.loads(annotations.read_text(encoding="utf-8")):
        if entry["conversation_type"] in ("simple_description", "single_round"):
            question, answer = (turn["value"] for turn in entry["conversations"])
            pairs.setdefault(entry["object_id"], []).append((question.removeprefix("<point>\n"), answer))
    return pairs


PROMPTS = (NAME, "This is an object of ", "Caption this 3D model in detail.")
CHOICE_TASKS = ("geometry", "yesno")  # every question offers the words of which the answer must hold one
TASKS = ("classification", "captioning", "modelnet40", *CHOICE_TASKS)


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
    """The tasks of one kind: one per prompt for naming, one for captions, geometry or yes-no naming.

    Raises:
        ValueError: geometry or yes-no naming is asked about objects without facts, or about too few of them.
    """
    if kind in CHOICE_TASKS:
        if not objects.records:
            raise ValueError(f"--task {kind} needs objects with known facts: the embedded ones (--data furniture)")
        if kind == "geometry":
            return [Task(kind, kind, "", geometry_questions(objects.records))]
        if not (asked := yes_no_questions(objects.records, objects.candidates)):
            raise ValueError(f"--task yesno needs objects of different nouns or colours; {len(objects.ids)} have none")
        return [Task(kind, kind, "", asked)]
    if kind == "captioning":
        return [Task("captioning-prompt2", kind, PROMPTS[2], _ask_all(objects, PROMPTS[2]))]
    return [
        Task(f"{kind}-prompt{number}", kind, PROMPTS[number], _ask_all(objects, PROMPTS[number]), objects.candidates)
        for number in prompts
    ]


def _ask_all(objects: ObjectSet, prompt: str) -> list[Question]:
    rows = zip(objects.ids, objects.truths, objects.labels, objects.families, strict=True)
    return [Question(name, (name,), prompt, truth, label, family) for name, truth, label, family in rows]

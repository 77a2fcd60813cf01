"""Questions of an ablation that trains on names and geometry: what is trained on, and what held-out objects are asked.

Conversations come from the annotations of the embedded objects, in the words of the evaluation. The evaluation asks
`geometry_questions` and counts as `pointalign.evaluate` does.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointalign.data.conversations import POINT_MARKER, load_conversations
from pointalign.evaluation.answering import Features, prompt_batch
from pointalign.evaluation.choices import YES_NO, chosen, geometry_questions
from pointalign.evaluation.protocol import PROTOCOLS
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

BATCH = 32  # questions answered together


@dataclass(frozen=True)
class Sample:
    """A training conversation.

    Attributes:
        rows: of the training objects whose clouds stand before the first question, in this order.
        turns: (question, answer) pairs.
    """

    rows: tuple[int, ...]
    turns: tuple[tuple[str, str], ...]


class TrainingQuestions:
    """Conversations about the training objects, by kind.

    Args:
        annotations: the file of the training part, see `pointalign.assets.embedded_objects`.
        train: the objects that may be asked about.
        shares: kind of conversation -> its share of the batches, in any unit.

    Raises:
        AnnotationError: the file has no conversation of a kind.
        ValueError: no conversation of a kind is about these objects alone.
    """

    def __init__(self, annotations: Path, train: EncodedObjects, shares: dict[str, float]):
        rows = {name: row for row, name in enumerate(train.ids)}
        self.samples: dict[str, list[Sample]] = {}
        for kind in shares:
            about_these = [
                conversation
                for conversation in load_conversations(annotations, (kind,))
                if all(name in rows for name in conversation.object_ids)
            ]
            if not about_these:
                raise ValueError(f"{annotations}: no conversation of kind {kind!r} is about the training objects")
            self.samples[kind] = [
                Sample(tuple(rows[name] for name in conversation.object_ids), _pairs(conversation.turns))
                for conversation in about_these
            ]
        self.probabilities = np.array([*shares.values()]) / sum(shares.values())

    def draw(self, rng: np.random.Generator, size: int, used: Collection[int]) -> list[Sample]:
        """A batch of one kind, in which every object occurs once.

        Args:
            used: rows of the objects that may be asked about.

        Raises:
            ValueError: the kind has too few conversations about different objects.
        """
        kind = list(self.samples)[int(rng.choice(len(self.samples), p=self.probabilities))]
        batch: list[Sample] = []
        free = set(used)
        for place in rng.permutation(len(self.samples[kind])):
            sample = self.samples[kind][place]
            if free.issuperset(sample.rows):
                batch.append(sample)
                free.difference_update(sample.rows)
            if len(batch) == size:
                return batch
        raise ValueError(f"kind {kind!r}: expected {size} conversations about different objects, got {len(batch)}")


def _pairs(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    texts = [text.replace(f"{POINT_MARKER}\n", "") for _, text in turns]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def ask_geometry(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, held_out: EncodedObjects, blind: bool
) -> dict[str, list[Any]]:
    """Answers to the geometry questions about the held-out objects, generated and read as `pointalign.evaluate` does.

    Args:
        blind: answer with zeros in place of the Q-Former tokens.

    Returns:
        For each of N questions its `kinds`, `families` and `labels` (the right word), the word that was `said` (None
        where the answer holds no choice), and `right`, 1 or 0.
    """
    model.eval()
    features = Features(model, processor)
    for name, tokens in zip(held_out.ids, held_out.features, strict=True):
        features.known[name] = torch.zeros_like(tokens) if blind else tokens
    questions = geometry_questions(held_out.records)
    protocol = PROTOCOLS["greedy"]
    said: list[str | None] = []
    for start in range(0, len(questions), BATCH):
        asked = questions[start : start + BATCH]
        batch = prompt_batch(processor, features, asked)
        with torch.inference_mode():
            generated = model.generate(**batch, **protocol.arguments("geometry"))  # type: ignore[operator]
        texts = processor.answers(generated, batch["input_ids"].shape[1])
        said += [chosen(protocol.process(text), q.choices) for text, q in zip(texts, asked, strict=True)]
    return {
        "kinds": [question.kind for question in questions],
        "families": [question.family for question in questions],
        "labels": [question.label for question in questions],
        "said": said,
        "right": [float(word == question.label) for word, question in zip(said, questions, strict=True)],
    }


def by_kind(runs: list[dict[str, list[Any]]]) -> dict[str, dict[str, float]]:
    """Figures of each kind of question over runs that were asked the same, see `ask_geometry`.

    Returns:
        kind -> `accuracy`, `count` of questions, `majority` (accuracy of the most frequent right word) and, for yes/no
        questions, `yes_rate`.
    """
    figures: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(runs[0]["kinds"]):
        places = [place for place, other in enumerate(runs[0]["kinds"]) if other == kind]
        labels = [runs[0]["labels"][place] for place in places]
        figures[kind] = {
            "accuracy": float(np.mean([[run["right"][place] for place in places] for run in runs])),
            "count": len(places),
            "majority": max(labels.count(label) for label in set(labels)) / len(labels),
        }
        if set(labels) <= set(YES_NO):
            said = [[run["said"][place] == "yes" for place in places] for run in runs]
            figures[kind]["yes_rate"] = float(np.mean(said))
    return figures

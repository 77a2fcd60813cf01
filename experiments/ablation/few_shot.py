"""How many examples make a trained model speak of what its captions never mentioned (set B of the shapes)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from experiments.ablation.arms import Arm, Schedule, train_arm
from experiments.ablation.measure import measure
from pointalign.evaluation.objects import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

QUESTIONS = {
    "B: taper": "Are its legs nearly as thick below as above?",
    "B: holes": "How many holes are in its top?",
    "B: aspect": "Is it tall for its width?",
    "B: roughness": "Is its surface rough?",
    "B: lopsided": "Is it lopsided?",
}
STEPS = 40


def about(material: EncodedObjects, name: str, middle: float | None) -> EncodedObjects:
    """The same objects with one question about property `name`; numbers are asked as above `middle` or not."""
    values = material.properties[name]
    if isinstance(values[0], str):
        answers = [f"{value}." for value in values]
    else:
        answers = ["Yes." if (value if middle is None else value > middle) else "No." for value in values]
    candidates = {answer: answer for answer in sorted(set(answers))}
    return replace(
        material,
        conversations=[[(QUESTIONS[name], answer)] for answer in answers],
        labels=answers,
        candidates=candidates,
    )


def few_shot(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    train: EncodedObjects,
    held_out: EncodedObjects,
    counts: Sequence[int],
    schedule: Schedule,
    seed: int,
    blind: bool = False,
) -> dict[str, dict[str, float]]:
    """Closed-set accuracy on held-out objects after fine-tuning on `counts` examples, next tokens alone.

    The trainable parts are put back afterwards. The chance level is the majority's share, in `probes`' `majority`.

    Returns:
        property -> {count: accuracy}.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    start = {name: one.detach().clone() for name, one in trained.items()}

    def restore() -> None:
        with torch.no_grad():
            for name, one in trained.items():
                one.copy_(start[name])

    order = np.random.default_rng(seed).permutation(len(train.labels))
    found: dict[str, dict[str, float]] = {}
    for name in [name for name in QUESTIONS if name in train.properties]:
        values = train.properties[name]
        middle = float(np.median(values)) if isinstance(values[0], float) else None
        asked, wanted = about(train, name, middle), about(held_out, name, middle)
        for count in counts:
            rows = [int(row) for row in order[:count]]
            steps = replace(schedule, steps=STEPS, batch_size=min(schedule.batch_size, count))
            train_arm(
                model, processor, Arm(weight=0.0, blind=blind), 0.0, asked.subset(rows), steps, seed, f"{name}, {count}"
            )
            scores = measure(model, processor, wanted, blind, QUESTIONS[name])
            found.setdefault(name, {})[str(count)] = float(np.mean(scores["closed-set accuracy"]))
            restore()
    return found

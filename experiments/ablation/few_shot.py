"""How many examples a trained model needs to answer questions about what its captions never mentioned (set B)."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from experiments.ablation.measure import measure
from experiments.ablation.train_arm import Arm, Schedule, restore, train_arm, trainable_state
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

QUESTIONS = {
    "B: taper": "Are its legs nearly as thick below as above?",
    "B: holes": "How many holes are in its top?",
    "B: aspect": "Is it tall for its width?",
    "B: roughness": "Is its surface rough?",
    "B: lopsided": "Is it lopsided?",
}
STEPS = 40


def with_question(
    objects: EncodedObjects, name: str, threshold: float | None, candidates: dict[str, str] | None = None
) -> EncodedObjects:
    """The same objects with a question about property `name`; for numbers, whether it is above `threshold`.

    Args:
        candidates: the closed set; by default the answers about these objects. Held-out objects take that of training
            objects, and count only where their answer is in it.
    """
    values = objects.properties[name]
    if isinstance(values[0], str):
        answers = [f"{value}." for value in values]
    else:
        answers = ["Yes." if (value if threshold is None else value > threshold) else "No." for value in values]
    candidates = candidates or {answer: answer for answer in sorted(set(answers))}
    return replace(
        objects,
        conversations=[[(QUESTIONS[name], answer)] for answer in answers],
        labels=[answer if answer in candidates else "" for answer in answers],
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
    """Closed-set accuracy on held-out objects after fine-tuning on `counts` examples with the next-token loss alone.

    The parameters that train are restored afterwards. The chance level is the share of the most frequent answer,
    `majority` in what `probe_layers` returns.

    Returns:
        property -> {count: accuracy}.
    """
    start = trainable_state(model)
    order = np.random.default_rng(seed).permutation(len(train.labels))
    arm = Arm(weight=0.0, blind=blind)
    accuracies: dict[str, dict[str, float]] = {}
    for name in [name for name in QUESTIONS if name in train.properties]:
        values = train.properties[name]
        threshold = float(np.median(values)) if isinstance(values[0], float) else None
        examples = with_question(train, name, threshold)
        questions = with_question(held_out, name, threshold, examples.candidates)
        for count in counts:
            shots = examples.subset([int(row) for row in order[:count]])
            short = replace(schedule, steps=STEPS, batch_size=min(schedule.batch_size, count))
            train_arm(model, processor, arm, 0.0, shots, short, seed, f"{name}, {count}")
            scores = measure(model, processor, questions, blind, QUESTIONS[name])
            accuracies.setdefault(name, {})[str(count)] = float(np.mean(scores["closed-set accuracy"]))
            restore(model, start)
    return accuracies

"""Measurements of a trained arm on held-out objects."""

import numpy as np
import torch

from pointalign.evaluation.answering import AnswerTree, Features, answer_likelihoods, margins, prompt_batch
from pointalign.evaluation.metrics import naming_scores
from pointalign.evaluation.protocol import PROTOCOLS
from pointalign.evaluation.tasks import PROMPTS, EncodedObjects, Question
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

PRIMARY, SECOND, GEOMETRY = "likelihood margin", "generated accuracy", "geometry accuracy"
MEASURES = (PRIMARY, SECOND, GEOMETRY)  # geometry: only where a recipe names `questions`


def measure(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    held_out: EncodedObjects,
    blind: bool,
    question: str = PROMPTS[0],
) -> dict[str, list[float]]:
    """Margin, closed-set accuracy and generated accuracy of each held-out object whose label is a candidate.

    Args:
        blind: answer with zeros in place of the Q-Former tokens.
    """
    known = [row for row, label in enumerate(held_out.labels) if label]
    candidates = list(held_out.candidates)
    tree = AnswerTree(
        [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in held_out.candidates.values()]
    )
    features = Features(model, processor)
    for row in known:
        features.known[str(row)] = torch.zeros_like(held_out.features[row]) if blind else held_out.features[row]
    questions = [Question(str(row), (str(row),), question, held_out.labels[row]) for row in known]
    likelihoods, texts = [], []
    for start in range(0, len(known), 8):
        batch = prompt_batch(processor, features, questions[start : start + 8])
        likelihoods.append(answer_likelihoods(model, batch, tree))
    for start in range(0, len(known), 32):
        batch = prompt_batch(processor, features, questions[start : start + 32])
        with torch.inference_mode():
            options = PROTOCOLS["greedy"].arguments("classification", 20)
            generated = model.generate(**batch, **options)  # type: ignore[operator]
        texts += processor.answers(generated, batch["input_ids"].shape[1])
    labels = [held_out.labels[row] for row in known]
    margin = margins(np.concatenate(likelihoods), [candidates.index(label) for label in labels])
    if held_out.candidates[labels[0]] == labels[0]:  # the label is the complete answer, not a noun in it
        accuracy = [float(text == label) for text, label in zip(texts, labels, strict=True)]
    else:
        accuracy = [float(value or 0) for value in naming_scores(texts, labels)["head noun"]]
    return {PRIMARY: margin.tolist(), "closed-set accuracy": (margin > 0).astype(float).tolist(), SECOND: accuracy}

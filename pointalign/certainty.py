"""Answers with their probability; an uncertain name says what the object resembles: "It looks like a door.".

A model names an object that it has never seen anything like with the same words as a chair. The probability of the
generated answer tells the two apart to some degree. The threshold is part of the model (`config.name_threshold`) and is
chosen on validation objects, by `calibrated_threshold`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

HEDGES = {"This is ": "It looks like ", "These are ": "They look like "}  # opening of a name -> opening when uncertain
LONGEST_NAME = 6  # words of "This is a trash can."; a longer text is a description and is not hedged


@dataclass(frozen=True)
class Answer:
    """A generated text.

    Attributes:
        probability: under the model, the product over its tokens; NaN where it was sampled.
        tokens: ids as they were generated, with the end mark and the padding behind it.
    """

    text: str
    probability: float
    tokens: tuple[int, ...] = field(default=(), repr=False, compare=False)


def generate_answers(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, batch: dict[str, Tensor], **options: Any
) -> list[Answer]:
    """Generate, and hedge names whose probability is below the model's threshold.

    Args:
        batch: the processor's tensors, padded on the left.
        options: of `generate`.
    """
    with torch.inference_mode():
        if options.get("do_sample") or (options.get("num_beams") or model.generation_config.num_beams or 1) > 1:
            generated = model.generate(**batch, **options)
            prompt_length = batch["input_ids"].shape[1]
            texts, rows = processor.answers(generated, prompt_length), generated[:, prompt_length:].tolist()
            return [Answer(text, float("nan"), tuple(row)) for text, row in zip(texts, rows, strict=True)]
        output = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
        scores = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    new_tokens = output.sequences[:, -scores.shape[1] :]
    ended = (new_tokens == processor.tokenizer.pad_token_id) & ((new_tokens == new_tokens[:, -1:]).cumsum(1) > 1)
    logs = torch.where(ended | ~torch.isfinite(scores), 0.0, scores.float()).sum(dim=1)
    texts = processor.answers(output.sequences, batch["input_ids"].shape[1])
    threshold = model.config.name_threshold
    answers = []
    for text, probability, row in zip(texts, logs.exp().tolist(), new_tokens.tolist(), strict=True):
        answers.append(Answer(hedge(text) if probability < threshold else text, probability, tuple(row)))
    return answers


def hedge(text: str) -> str:
    """ "This is a door." -> "It looks like a door."; other texts, and descriptions, stay."""
    for opening, hedged in HEDGES.items():
        if text.startswith(opening) and text.count(".") == 1 and len(text.split()) <= LONGEST_NAME:
            return hedged + text.removeprefix(opening)
    return text


def may_be_hedged(text: str) -> bool:
    """Whether an answer that goes on growing may become a text that `hedge` changes."""
    begins = any(text.startswith(opening) or opening.startswith(text) for opening in HEDGES)
    return begins and text.count(".") <= 1 and len(text.split()) <= LONGEST_NAME


def is_hedged(text: str) -> bool:
    return text.startswith(tuple(HEDGES.values()))


def calibrated_threshold(probabilities: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> float:
    """The probability below which names are hedged: the one that best separates right from wrong answers.

    Best is the highest mean of the share of right answers that are not hedged and of wrong ones that are. 0, which
    hedges nothing, where there is nothing to separate.
    """
    values, truth = np.asarray(probabilities, dtype=float), np.asarray(right, dtype=bool)
    if not truth.any() or truth.all():
        return 0.0
    candidates = np.unique(np.concatenate([[0.0], (np.sort(values)[1:] + np.sort(values)[:-1]) / 2]))
    balanced = [((values[truth] >= c).mean() + (values[~truth] < c).mean()) / 2 for c in candidates]
    return float(candidates[int(np.argmax(balanced))])

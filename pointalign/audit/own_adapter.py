"""The adapter of our models: a run's folder, an exported folder, a stage file, or the name of a shipped checkpoint."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointalign import build
from pointalign.certainty import generate_answers
from pointalign.evaluation.answering import AnswerTree, answer_likelihoods, encode
from pointalign.evaluation.naming import LONGEST_ANSWER
from pointalign.evaluation.probe import QFORMER, point_states, spaced
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

LAYERS = 7  # that are probed, from the input to the last


@dataclass
class Loaded:
    """A model, and the Q-Former tokens `[Q, Dq]` of the clouds that it has read, by a hash of the cloud.

    Attributes:
        weights: a hash of the files that the weights were read from.
    """

    model: PointAlignForConditionalGeneration
    processor: PointAlignProcessor
    weights: str
    features: dict[str, Tensor] = field(default_factory=dict)


def load(model: str) -> Loaded:
    return Loaded(*build.load(model))


def prompt(_loaded: Loaded, question: str, cloud: np.ndarray | None) -> tuple[str, np.ndarray | None]:
    return question, cloud


def answer(
    loaded: Loaded, prompts: Sequence[tuple[str, np.ndarray | None]], candidates: Sequence[list[str]]
) -> list[dict[str, Any]]:
    model, processor = loaded.model, loaded.processor
    answers = generate_answers(
        model, processor, _batch(loaded, prompts), max_new_tokens=LONGEST_ANSWER, do_sample=False
    )
    scores: list[list[float] | None] = [None] * len(prompts)
    for texts in dict.fromkeys(tuple(texts) for texts in candidates if texts):  # each closed set once
        rows = [row for row, own in enumerate(candidates) if tuple(own) == texts]
        tree = AnswerTree([processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
        likelihoods = answer_likelihoods(model, _batch(loaded, [prompts[row] for row in rows]), tree)
        for row, values in zip(rows, likelihoods.tolist(), strict=True):
            scores[row] = values
    return [
        {"text": given.text, "probability": given.probability, "scores": values}
        for given, values in zip(answers, scores, strict=True)
    ]


def states(loaded: Loaded, clouds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Means over the Q-Former's tokens, and over the point tokens after each of `LAYERS` layers."""
    features = _features(loaded, clouds)
    layers = spaced(LAYERS, loaded.model.config.get_text_config().num_hidden_layers)
    means, _ = point_states(loaded.model, loaded.processor, features, layers)
    return {QFORMER: features.mean(dim=1).numpy()} | {str(layer): means[layer].numpy() for layer in layers}


def _batch(loaded: Loaded, prompts: Sequence[tuple[str, np.ndarray | None]]) -> dict[str, Tensor]:
    messages = [
        [{"role": "user", "content": [
            *([] if cloud is None else [{"type": "point", "point": None}]), {"type": "text", "text": question},
        ]}]
        for question, cloud in prompts
    ]  # fmt: skip
    shown = [cloud for _, cloud in prompts if cloud is not None]
    batch = encode(loaded.processor, messages, _features(loaded, shown) if shown else None)
    return {name: tensor.to(loaded.model.device) for name, tensor in batch.items()}


def _features(loaded: Loaded, clouds: Sequence[np.ndarray]) -> Tensor:
    """Q-Former tokens `[C, Q, Dq]`; zeros for a cloud of zeros."""
    model, known = loaded.model, loaded.features
    keys = [hashlib.sha256(np.ascontiguousarray(cloud)).hexdigest() for cloud in clouds]
    for key, cloud in zip(keys, clouds, strict=True):
        if key not in known and not cloud.any():
            known[key] = torch.zeros(model.config.num_query_tokens, model.config.qformer_config.hidden_size)
    missing = {key: cloud for key, cloud in zip(keys, clouds, strict=True) if key not in known}
    if missing:
        points = loaded.processor.feature_extractor(list(missing.values()))
        with torch.inference_mode():
            tokens = model.get_qformer_features(
                points["point_values"].to(model.device), points["point_lengths"].to(model.device)
            )
        known |= dict(zip(missing, tokens.float().cpu(), strict=True))
    return torch.stack([known[key] for key in keys])

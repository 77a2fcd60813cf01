"""Warm-up of a new point branch: encoder and Q-Former learn to say, as a sentence embedding, what they see.

A few hundred objects are too few to teach an encoder through a language model alone. Encoder tokens and Q-Former tokens
are each pooled, mapped to the space of a sentence encoder, and compared with the embeddings of all nouns in the data.
The encoder is asked by itself as well, because a gradient through the Q-Former alone reaches it only once the Q-Former
has learned to look.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from pointalign.data.augment import augment
from pointalign.evaluation.sentences import embed
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

TEMPERATURE = 0.05  # of the comparison with the nouns
SMOOTHING = 0.1  # of the targets
SMALLEST, LARGEST = 1024, 8192  # points of a cloud: what is seen must not depend on how densely it is sampled


@dataclass
class NamedClouds:
    """Clouds and what they are called: `names[i]` belongs to `clouds[i]`, an array `[N, 6]`."""

    clouds: Sequence[np.ndarray]
    names: Sequence[str]


def warm_up(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    data: NamedClouds,
    sentence_encoder: Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Train encoder, point MLP and Q-Former in place; the heads that map to sentences are discarded.

    Returns:
        The loss of every step, summed over both heads.
    """
    names = sorted(set(data.names))
    sentences = embed(sentence_encoder, names).to(device)  # [S, D]
    wanted = torch.tensor([names.index(name) for name in data.names], device=device)
    branch = model.model
    of_encoder = nn.Linear(2 * model.config.point_config.hidden_size, sentences.shape[1]).to(device)
    of_qformer = nn.Linear(model.config.qformer_config.hidden_size, sentences.shape[1]).to(device)
    modules = [branch.point_encoder, branch.point_mlp, branch.qformer, of_encoder, of_qformer]
    if branch.query_tokens is None:
        raise ValueError("the contrastive warm-up is of a new point branch: query experts come in a later stage")
    parameters = [branch.query_tokens, *(p for module in modules for p in module.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
    half = branch.language_model.dtype == torch.bfloat16

    def mismatch(features: Tensor, head: nn.Linear, target: Tensor) -> Tensor:
        said = functional.normalize(head(features.float()), dim=-1)
        return functional.cross_entropy(said @ sentences.T / TEMPERATURE, target, label_smoothing=SMOOTHING)

    losses: list[float] = []
    model.train()
    order = np.array([], dtype=int)
    progress = tqdm(range(steps), desc="contrastive warm-up", unit="step", mininterval=1.0)
    for _ in progress:
        if len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(data.clouds))])
        chosen, order = order[:batch_size], order[batch_size:]
        points = torch.from_numpy(_views([data.clouds[i] for i in chosen], processor, rng)).to(device)
        with torch.autocast(points.device.type, torch.bfloat16, enabled=half):
            tokens = branch.get_encoder_tokens(points)  # [B, 1 + G, D]
            queries = branch.query(tokens)  # [B, Q, D]
        pooled = torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1)
        target = wanted[chosen]
        loss = mismatch(pooled, of_encoder, target) + mismatch(queries.mean(dim=1), of_qformer, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def _views(clouds: Sequence[np.ndarray], processor: PointAlignProcessor, rng: np.random.Generator) -> np.ndarray:
    """Augmented clouds `[B, N, 6]` of one random density, so that they need no padding."""
    assert processor.feature_extractor is not None
    fewest = processor.feature_extractor.min_points
    views = [augment(cloud, rng, fewest=fewest) for cloud in clouds]
    size = min(int(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))), *(len(view) for view in views))
    return np.stack([processor.feature_extractor.prepare(view[:size]) for view in views])

"""Warm-up of a new point branch: encoder and Q-Former learn to say, in a sentence embedding, what they see.

A few hundred objects are too few to teach an encoder through a language model alone. The mean Q-Former token of a cloud
is compared with sentence embeddings of all names in the data; names that mean nearly the same count as nearly right.
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
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

TEMPERATURE = 0.05  # of the comparison with the names
NEARNESS = 0.1  # of the soft targets among the names
MOMENTUM = 0.99  # of the weight average that is kept


@dataclass
class NamedClouds:
    """Clouds and what they are called: `names[i]` belongs to `clouds[i]`, an array `[N, 6]`."""

    clouds: Sequence[np.ndarray]
    names: Sequence[str]


def embed_sentences(folder: Path, sentences: Sequence[str]) -> Tensor:
    """Unit embeddings `[S, D]` of sentences: mean-pooled tokens of the encoder in `folder`."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = []
    with torch.inference_mode():
        for start in range(0, len(sentences), 64):
            batch = tokenizer(list(sentences[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
            tokens = encoder(**batch).last_hidden_state  # [S, T, D]
            mask = batch["attention_mask"][..., None].to(tokens)
            embeddings.append((tokens * mask).sum(dim=1) / mask.sum(dim=1))
    return functional.normalize(torch.cat(embeddings).float(), dim=-1).clone()


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
    """Train encoder, point MLP and Q-Former in place; the head that maps to sentences is discarded.

    Returns:
        The loss of every step.
    """
    names = sorted(set(data.names))
    sentences = embed_sentences(sentence_encoder, names).to(device)  # [S, D]
    soft = (sentences @ sentences.T / NEARNESS).softmax(dim=-1)  # [S, S]
    wanted = torch.tensor([names.index(name) for name in data.names], device=device)
    parts = [model.model.point_encoder, model.model.point_mlp, model.model.qformer]
    head = nn.Linear(model.config.qformer_config.hidden_size, sentences.shape[1]).to(device)
    parameters = [p for part in parts for p in part.parameters()] + [model.model.query_tokens]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW([*parameters, *head.parameters()], lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
    half = model.model.language_model.dtype == torch.bfloat16
    losses: list[float] = []
    model.train()
    order = np.array([], dtype=int)
    progress = tqdm(range(steps), desc="contrastive warm-up", unit="step")
    for step in progress:
        if len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(data.clouds))])
        chosen, order = order[:batch_size], order[batch_size:]
        size = int(rng.integers(2048, 4097))  # one size a batch, so that clouds need no padding
        clouds = [augment(data.clouds[i], rng, fewest=processor.feature_extractor.min_points)[:size] for i in chosen]
        smallest = min(len(cloud) for cloud in clouds)
        points = np.stack([processor.feature_extractor.prepare(cloud[:smallest]) for cloud in clouds])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            tokens = model.get_qformer_features(torch.from_numpy(points).to(device))  # [B, Q, D]
        seen = functional.normalize(head(tokens.float().mean(dim=1)), dim=-1)
        loss = functional.cross_entropy(seen @ sentences.T / TEMPERATURE, soft[wanted[chosen]])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*parameters, *head.parameters()], 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter, 1 - min(MOMENTUM, step / (step + 10)))
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            parameter.copy_(mean)
    return losses

"""Warm-up of a new point branch: encoder, Q-Former and modality projector learn to say in words what they see.

A few hundred objects are too few to teach an encoder through a language model alone. Every object comes with facts,
such as its noun and its main colour, and a fact is told from the others of its kind by the language model's own input
embeddings: a token of the modality projector that lies near the embedding of "chair" says chair, and that is where the
language model will look for it. The queries share out the kinds of facts, so that they do not all learn the same. The
encoder is asked by itself as well, because a gradient through the Q-Former alone reaches it only once the Q-Former has
learned to look; and it learns which clouds are alike, because names alone it would learn by heart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pointalign.data.augment import augment
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.neighbours import neighbour_loss

TEMPERATURE = 0.05  # of the comparison with the words
SMOOTHING = 0.1  # of the targets
DROPOUT = 0.3  # in front of the encoder's own head
WEIGHT_DECAY = 0.2
QFORMER_RATE = 0.3  # of the encoder's learning rate: at the whole of it, all queries become the same
WORDS_TO_ENCODER = 0.3  # weight of the words that the encoder's own head says
METRIC_WIDTH = 256  # of the embedding that says which clouds are alike
UNKNOWN = -100  # target where a fact is not clear


class Kind:
    """One kind of facts: the words that occur, as the language model embeds them, and which of them each object has.

    Args:
        facts: one word per object, or None.
        embedding: `[V, H]`, the language model's input embeddings.
    """

    def __init__(self, facts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, embedding: Tensor):
        self.words = sorted({word for word in facts if word is not None})
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in self.words]
        means = torch.stack([embedding[one].float().mean(dim=0) for one in ids])
        self.embeddings = functional.normalize(means, dim=-1)  # [W, H]
        index = [UNKNOWN if word is None else self.words.index(word) for word in facts]
        self.target = torch.tensor(index, device=embedding.device)  # [objects]

    def logits(self, tokens: Tensor) -> Tensor:
        """`[..., W]` of tokens `[..., H]`."""
        return functional.normalize(tokens.float(), dim=-1) @ self.embeddings.T / TEMPERATURE

    def loss(self, tokens: Tensor, objects: Tensor) -> Tensor:
        """Mean cross-entropy of tokens `[B, T, H]` that say this fact of `objects [B]`; 0 where none has it."""
        target = self.target[objects][:, None].expand(tokens.shape[:2]).flatten()
        logits = self.logits(tokens).flatten(0, 1)
        summed = functional.cross_entropy(
            logits, target, ignore_index=UNKNOWN, label_smoothing=SMOOTHING, reduction="sum"
        )
        return summed / (target != UNKNOWN).sum().clamp(min=1)


def warm_up(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[np.ndarray],
    facts: Sequence[Mapping[str, str | None]],
    steps: int,
    batch_size: int,
    learning_rate: float,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Train the whole point branch in place, whichever of its parts train afterwards, with heads that are discarded.

    Args:
        clouds: arrays `[N, 6]`.
        facts: of each cloud, by kind; every cloud has the same kinds, None where its fact is not clear.

    Returns:
        The loss of every step: of the words, by encoder and queries, and of the neighbours.
    """
    branch, tokenizer = model.model, processor.tokenizer
    if branch.query_tokens is None:
        raise ValueError("the contrastive warm-up is of a new point branch: query experts come in a later stage")
    embedding = model.get_input_embeddings().weight.detach()
    told = [kind for kind in facts[0] if any(one[kind] is not None for one in facts)]
    if not told:
        raise ValueError("the contrastive warm-up needs a fact of at least one object")
    kinds = [Kind([one[kind] for one in facts], tokenizer, embedding) for kind in told]
    width = 2 * model.config.point_config.hidden_size
    word_head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(width, len(kinds) * embedding.shape[1])).to(device)
    metric_head = nn.Linear(width, METRIC_WIDTH).to(device)
    encoder = [*branch.point_encoder.parameters(), *word_head.parameters(), *metric_head.parameters()]
    qformer = [branch.query_tokens]
    for part in (branch.point_mlp, branch.qformer, branch.modality_projector):
        qformer += part.parameters()
    frozen = [parameter for parameter in (*encoder, *qformer) if not parameter.requires_grad]
    groups = [{"params": encoder}, {"params": qformer}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=WEIGHT_DECAY)
    rates = [learning_rate, QFORMER_RATE * learning_rate]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
    half = branch.language_model.dtype == torch.bfloat16

    losses: list[float] = []
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.train()
    order = np.array([], dtype=int)
    progress = tqdm(range(steps), desc="contrastive warm-up", unit="step", mininterval=1.0)
    for _ in progress:
        if len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(clouds))])
        chosen, order = order[:batch_size], order[batch_size:]
        points = torch.from_numpy(_views([clouds[i] for i in chosen], processor, rng)).to(device)
        with torch.autocast(points.device.type, torch.bfloat16, enabled=half):
            features = model.encode_point_clouds(points)
        assert features.encoder is not None
        pooled = torch.cat([features.encoder[:, 0], features.encoder[:, 1:].amax(dim=1)], dim=-1).float()
        by_encoder = word_head(pooled).unflatten(-1, (len(kinds), -1))  # [B, kinds, H]
        objects = torch.from_numpy(chosen).to(device)
        loss = neighbour_loss(metric_head(pooled), points[..., :3])
        for number, kind in enumerate(kinds):
            by_queries = features.projected[:, number :: len(kinds)]
            loss = loss + WORDS_TO_ENCODER * kind.loss(by_encoder[:, number : number + 1], objects)
            loss = loss + kind.loss(by_queries, objects)
        optimizer.zero_grad()
        loss.backward()
        for parameters in (encoder, qformer):
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    for parameter in frozen:
        parameter.requires_grad_(False)
    _scale_like_words(branch.modality_projector[-1], features.projected, embedding)
    return losses


@torch.no_grad()
def _scale_like_words(last: nn.Linear, tokens: Tensor, embedding: Tensor) -> None:
    """Directions were learned; give the tokens `[..., H]` of a projector's last map the length that words have."""
    ratio = embedding.float().norm(dim=-1).mean() / tokens.float().norm(dim=-1).mean()
    last.weight *= ratio
    last.bias *= ratio


def _views(clouds: Sequence[np.ndarray], processor: PointAlignProcessor, rng: np.random.Generator) -> np.ndarray:
    """Augmented clouds `[B, N, 6]` of one random density, so that they need no padding."""
    extractor = processor.feature_extractor
    assert extractor is not None
    views = [augment(cloud, rng, fewest=extractor.min_points) for cloud in clouds]
    most = min(extractor.num_points, *(len(view) for view in views))
    size = max(extractor.min_points, int(most * rng.uniform(0.5, 1.0))) if rng.random() < 0.5 else most
    return np.stack([extractor.prepare(view[:size]) for view in views])

"""One arm of an ablation: the same start, steps, data order and dropout as its siblings, another alignment loss."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pointalign.alignment import Alignment, AlignmentConfig, LayerTap
from pointalign.evaluation.answering import encode
from pointalign.evaluation.objects import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

SPANS = ("points", "release")
STATES = ("attached", "detached")
SOURCES = ("own", "other", "mean", "random")


@dataclass
class Arm:
    """What sets one arm apart.

    Attributes:
        weight: lambda; None is the recipe's, 0 trains on next tokens alone.
        layer: aligned layers; empty is the default layer.
        target: `qformer`, `encoder` or `llm:<layer>`, as in `AlignmentConfig`.
        span: whose hidden states are aligned: the `points`, or the last Q places of the padded text, as the published
            code takes them (`release`).
        states: `detached` trains the projector while the language model does not feel the loss.
        source: whose target: the cloud's `own`, an`other` cloud's of the batch, the per-query `mean` of the training
            clouds, or `random` vectors, fixed per cloud.
        blind: train and evaluate with zeros in place of the clouds.
        captions: share of the training objects whose conversations are used.
        seeds: number of paired seeds; None is the recipe's.
    """

    weight: float | None = None
    layer: list[int] = field(default_factory=list)
    target: str = "qformer"
    span: str = "points"
    states: str = "attached"
    source: str = "own"
    blind: bool = False
    captions: float = 1.0
    seeds: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("span", SPANS), ("states", STATES), ("source", SOURCES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"arm: {name}={getattr(self, name)!r}, expected of {', '.join(allowed)}")
        if self.source != "own" and self.target != "qformer":
            raise ValueError(f"arm: source={self.source!r} is defined for the qformer target, not for {self.target!r}")
        if not 0 < self.captions <= 1:
            raise ValueError(f"arm: captions={self.captions}, expected a share above 0, up to 1")

    @property
    def is_control(self) -> bool:
        """Whether it trains on an alignment that should not help: of wrong places, wrong targets, or unfelt."""
        return self.span == "release" or self.states == "detached" or self.source != "own"


@dataclass
class Schedule:
    """Training of every arm alike: AdamW, linear warm-up over a tenth, then a cosine to zero."""

    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 1e-4
    max_length: int = 160


class ArmLoss:
    """Both losses of an arm.

    Args:
        model: with adapters in place.
        weight: lambda, resolved.
        train: for the mean target and the random ones.
    """

    def __init__(
        self, model: PointAlignForConditionalGeneration, arm: Arm, weight: float, train: EncodedObjects, seed: int
    ):
        self.model, self.arm, self.weight = model, arm, weight
        self.alignment: Alignment | None = None
        if weight == 0:
            return
        text = model.config.get_text_config()
        self.config = AlignmentConfig(weight=weight, layer=arm.layer, target=arm.target, seed=seed)
        layers = self.config.layers(text.num_hidden_layers)
        widths = {"qformer": train.features.shape[-1], "encoder": train.encoder.shape[-1]}
        width = widths.get(arm.target, text.hidden_size)
        self.alignment = Alignment(self.config, layers, text.hidden_size, width).to(model.device)
        target_layer = self.config.target_layer()
        indices = [*layers, *([target_layer] if target_layer else [])]
        self.tap = LayerTap(model.get_decoder().layers, indices)  # type: ignore[arg-type]
        self.mean = train.features.mean(dim=0)
        generator = torch.Generator().manual_seed(seed)
        self.random = torch.randn(train.features.shape, generator=generator) if arm.source == "random" else None
        self.train = train

    def parameters(self) -> list[torch.nn.Parameter]:
        return [] if self.alignment is None else list(self.alignment.parameters())

    def target(self, rows: Tensor) -> Tensor:
        """`[C * Q, D]` for the training clouds `rows [C]`."""
        known = self.train.encoder if self.arm.target == "encoder" else self.train.features
        if self.arm.source == "other":
            rows = rows.roll(1)
        if self.arm.source == "mean":
            return self.mean.expand(len(rows), -1, -1).flatten(0, 1)
        if self.random is not None:
            return self.random[rows].flatten(0, 1)
        return known[rows].flatten(0, 1)

    def __call__(self, batch: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, float, float]:
        """Total loss, and the two parts as numbers."""
        if self.alignment is None:
            loss = self.model(**batch, use_cache=False).loss
            return loss, loss.item(), 0.0
        mask = batch["point_mask"].bool()
        if self.arm.span == "release":
            queries = self.model.config.num_query_tokens
            mask = torch.zeros_like(mask)
            mask[:, -queries:] = True
        with self.tap.capture(mask) as hidden:
            ntp = self.model(**batch, use_cache=False).loss
        target_layer = self.config.target_layer()
        target = hidden[target_layer].detach() if target_layer else self.target(rows).to(ntp.device)
        if self.arm.states == "detached":
            hidden = {layer: one.detach() for layer, one in hidden.items()}
        alignment = self.alignment(hidden, target)
        return ntp + self.weight * alignment, ntp.item(), alignment.item()


def train_arm(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    arm: Arm,
    weight: float,
    train: EncodedObjects,
    schedule: Schedule,
    seed: int,
    description: str,
) -> dict[str, Any]:
    """Train the parts that require gradients, in place.

    The order of the data and the dropout depend on the seed alone, so that arms of one seed are paired.

    Returns:
        `ntp` and `alignment`, the losses of every step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    known = rng.permutation(len(train.labels))[: max(schedule.batch_size, round(arm.captions * len(train.labels)))]
    losses = ArmLoss(model, arm, weight, train, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = [*trained, *losses.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    history: dict[str, list[float]] = {"ntp": [], "alignment": []}
    order = np.array([], dtype=int)
    for _ in tqdm(range(schedule.steps), desc=description, unit="step", leave=False):
        while len(order) < schedule.batch_size:
            order = np.concatenate([order, rng.permutation(known)])
        rows, order = order[: schedule.batch_size], order[schedule.batch_size :]
        batch = training_batch(processor, train, rows, rng, schedule.max_length, arm.blind)
        batch = {name: one.to(model.device) for name, one in batch.items()}
        dtype = model.model.language_model.dtype
        with torch.autocast(model.device.type, dtype, enabled=dtype == torch.bfloat16):
            loss, ntp, alignment = losses(batch, torch.from_numpy(rows))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{description}: the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        # each part by itself: the projector's gradient must not shrink the language model's
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        history["ntp"].append(ntp)
        history["alignment"].append(alignment)
    return history


def training_batch(
    processor: PointAlignProcessor,
    train: EncodedObjects,
    rows: np.ndarray,
    rng: np.random.Generator,
    max_length: int,
    blind: bool,
) -> dict[str, Tensor]:
    """One conversation, drawn at random, of each object in `rows`, with labels on the answer."""
    conversations = []
    for row in rows:
        said = train.conversations[row]
        question, answer = said[int(rng.integers(len(said)))]
        content = [{"type": "point", "point": None}, {"type": "text", "text": question}]
        assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        conversations.append([{"role": "user", "content": content}, assistant])
    features = train.features[rows]
    return encode(
        processor,
        conversations,
        torch.zeros_like(features) if blind else features,
        add_generation_prompt=False,
        return_labels=True,
        truncation=True,
        max_length=max_length,
    )

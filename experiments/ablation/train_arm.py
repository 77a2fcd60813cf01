"""Training of one arm of an ablation, with the losses of `pointalign.trainer.AlignedModel`.

All arms of a seed have the same start, steps, data order and dropout; they differ in the alignment loss alone.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments.ablation.questions import Sample, TrainingQuestions
from pointalign.alignment import AlignmentConfig, LayerTap
from pointalign.evaluation.answering import encode
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.models.modeling import PointFeatures
from pointalign.trainer import AlignedModel

SPANS = ("points", "release")
STATES = ("attached", "detached")
SOURCES = ("own", "other", "mean", "random")


@dataclass
class Arm:
    """What distinguishes an arm from the others.

    Attributes:
        weight: lambda; None is the recipe's, 0 trains with the next-token loss alone.
        layer: aligned layers; empty is the default layer.
        target: `qformer`, `encoder` or `llm:<layer>`, as in `AlignmentConfig`.
        span: places whose hidden states are aligned: the `points`, or as in the published code (`release`) the last
            places of the longest question, whatever stands there.
        states: with `detached`, the loss trains the alignment projector but not the language model.
        source: the target tokens: those of the cloud (`own`), of an`other` cloud of the batch, the `mean` of each query
            over the training clouds, or `random` vectors, fixed for each cloud.
        blind: train and evaluate with zeros in place of the Q-Former tokens.
        captions: share of the training objects that are used.
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
                raise ValueError(f"arm: {name}={getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.source != "own" and self.target != "qformer":
            raise ValueError(f"arm: source={self.source!r} is defined for the qformer target, not for {self.target!r}")
        if self.blind and self.weight != 0:
            raise ValueError(f"arm: blind needs weight 0, got {self.weight}: without clouds there is nothing to align")
        if not 0 < self.captions <= 1:
            raise ValueError(f"arm: captions={self.captions}, expected a share above 0 and up to 1")

    @property
    def is_control(self) -> bool:
        """Whether this arm aligns with wrong places or targets, or without effect, so that it should not help."""
        return self.span == "release" or self.states == "detached" or self.source != "own"


@dataclass
class Schedule:
    """Training of every arm: AdamW, linear warm-up over a tenth of the steps, then a cosine to zero."""

    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 1e-4
    max_length: int = 160


class TargetFromBatch(AlignedModel):
    """An `AlignedModel` whose batches bring their target tokens: for controls, and for cached encoder tokens."""

    target_tokens: Tensor

    def forward(self, point_mask: Tensor, target_tokens: Tensor, **inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """As `AlignedModel.forward`, with targets `[C, Q, D]`."""
        self.target_tokens = target_tokens
        return super().forward(point_mask, **inputs)

    def target(self, features: PointFeatures, hidden: dict[int, Tensor]) -> Tensor:
        return self.target_tokens.flatten(0, 1)


class ReleaseTap(LayerTap):
    """A tap at `places` of each batch instead of its point tokens."""

    places: Tensor

    def capture(self, mask: Tensor) -> AbstractContextManager[dict[int, Tensor]]:
        return super().capture(self.places)


def release_span(labels: Tensor, num_query_tokens: int) -> Tensor:
    """The places `[B, T]` that the released code takes for point tokens, one cloud a row, rows padded at the right.

    It slices the last Q places before the longest question's end, in every row alike, whatever stands there.
    """
    answer = labels != -100
    if not bool(answer.any(dim=1).all()):
        raise ValueError("span=release needs an answer in every row")
    end = int(answer.int().argmax(dim=1).max())
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, max(0, end - num_query_tokens) : end] = True
    return mask


def aligned_model(
    model: PointAlignForConditionalGeneration, arm: Arm, weight: float, seed: int, layer_weights: str = "uniform"
) -> AlignedModel:
    """The training form of an arm; `weight` is lambda, `layer_weights` those of several layers (`AlignmentConfig`).

    The arm that is the paper's method is an `AlignedModel`.
    """
    config = AlignmentConfig(weight=weight, layer=arm.layer, target=arm.target, layer_weights=layer_weights, seed=seed)
    brings_targets = weight > 0 and (arm.source != "own" or arm.target == "encoder")
    aligned = (TargetFromBatch if brings_targets else AlignedModel)(model, config)
    if aligned.alignment is not None:
        aligned.alignment.to(model.device)
        if arm.span == "release":
            aligned.tap = ReleaseTap(aligned.tap.layers, aligned.tap.indices)
            aligned.register_forward_pre_hook(_find_places, with_kwargs=True)
        if arm.states == "detached":
            aligned.alignment.register_forward_pre_hook(_detach_states)
    return aligned


def _find_places(aligned: AlignedModel, _arguments: tuple, inputs: dict[str, Any]) -> None:
    aligned.tap.places = release_span(inputs["labels"], aligned.config.num_query_tokens)


def _detach_states(_module: nn.Module, inputs: tuple) -> tuple:
    hidden, *others = inputs
    return {layer: states.detach() for layer, states in hidden.items()}, *others


def target_table(arm: Arm, train: EncodedObjects, seed: int) -> Tensor:
    """Target tokens `[C, Q, D]` of all training clouds, for an arm whose model is a `TargetFromBatch`."""
    if arm.target == "encoder":
        return train.encoder
    if arm.source == "mean":
        return train.features.mean(dim=0).expand_as(train.features)
    if arm.source == "random":
        return torch.randn(train.features.shape, generator=torch.Generator().manual_seed(seed))
    return train.features


def train_arm(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    arm: Arm,
    weight: float,
    train: EncodedObjects,
    schedule: Schedule,
    seed: int,
    description: str,
    questions: TrainingQuestions | None = None,
) -> dict[str, list[float]]:
    """Train the parts that require gradients, in place.

    The order of the data and the dropout depend on the seed alone, so that arms of one seed are paired.

    Args:
        questions: what batches are drawn from; by default a conversation of each object, in `train.conversations`.

    Returns:
        `ntp` and `alignment`, the losses of every step.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    used = rng.permutation(len(train.labels))[: max(schedule.batch_size, round(arm.captions * len(train.labels)))]
    aligned = aligned_model(model, arm, weight, seed)
    targets = target_table(arm, train, seed) if isinstance(aligned, TargetFromBatch) else None

    def batches() -> Iterator[dict[str, Tensor]]:
        order = np.array([], dtype=int)
        for _ in range(schedule.steps):
            if questions is not None:
                samples = questions.draw(rng, schedule.batch_size, used.tolist())
                rows = np.concatenate([sample.rows for sample in samples])
                batch = conversation_batch(processor, train, samples, schedule.max_length, arm.blind)
            else:
                while len(order) < schedule.batch_size:
                    order = np.concatenate([order, rng.permutation(used)])
                rows, order = order[: schedule.batch_size], order[schedule.batch_size :]
                batch = training_batch(processor, train, rows, rng, schedule.max_length, arm.blind)
            if targets is not None:
                batch["target_tokens"] = targets[np.roll(rows, 1) if arm.source == "other" else rows]
            yield batch

    return optimise(aligned, batches(), schedule, description)


def optimise(
    aligned: AlignedModel, batches: Iterable[dict[str, Tensor]], schedule: Schedule, description: str
) -> dict[str, list[float]]:
    """Train the parameters of the model that require gradients, and the alignment projector, a step for each batch.

    Args:
        batches: `schedule.steps` of them, with the inputs of `aligned`.

    Returns, raises: as `train_arm`.
    """
    model = aligned.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    projector = [] if aligned.alignment is None else list(aligned.alignment.parameters())
    optimizer = torch.optim.AdamW([*trained, *projector], lr=schedule.learning_rate, weight_decay=0.0, fused=True)
    warm_up = 0.2 if schedule.steps == 10 else 0.1  # PyTorch divides by zero where a warm-up takes exactly one step
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.steps, pct_start=warm_up, cycle_momentum=False
    )
    aligned.train()
    history: dict[str, list[float]] = {"ntp": [], "alignment": []}
    for batch in tqdm(batches, total=schedule.steps, desc=description, unit="step", leave=False, disable=None):
        losses = aligned(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError(f"{description}: the loss is {losses['loss'].item()}")
        optimizer.zero_grad()
        losses["loss"].backward()
        # The projector is not clipped, and its gradient must not shrink that of the language model.
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
        history["ntp"].append(losses["ntp_loss"].item())
        history["alignment"].append(losses["alignment_loss"].item())
    return history


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that train."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Undo what training changed since `trainable_state`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(state[name])


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits of the SHA-256 of all parameters and buffers, whether they train or not."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def training_batch(
    processor: PointAlignProcessor,
    train: EncodedObjects,
    rows: np.ndarray,
    rng: np.random.Generator,
    max_length: int,
    blind: bool,
) -> dict[str, Tensor]:
    """Inputs of a conversation, drawn at random, of each object in `rows`, with labels on the answer."""
    samples = []
    for row in rows.tolist():
        pairs = train.conversations[row]
        samples.append(Sample((row,), (pairs[int(rng.integers(len(pairs)))],)))
    return conversation_batch(processor, train, samples, max_length, blind)


def conversation_batch(
    processor: PointAlignProcessor, train: EncodedObjects, samples: Sequence[Sample], max_length: int, blind: bool
) -> dict[str, Tensor]:
    """Inputs of these conversations, with labels on the answers; rows of `query_features` as in the samples."""
    conversations = []
    for sample in samples:
        messages = []
        for turn, (question, answer) in enumerate(sample.turns):
            clouds = [{"type": "point", "point": None} for _ in sample.rows] if turn == 0 else []
            messages.append({"role": "user", "content": [*clouds, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        conversations.append(messages)
    features = train.features[[row for sample in samples for row in sample.rows]]
    return encode(
        processor,
        conversations,
        torch.zeros_like(features) if blind else features,
        add_generation_prompt=False,
        return_labels=True,
        truncation=True,
        max_length=max_length,
    )

"""Both losses on held-out conversations while a model trains, by kind of question, always on the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from pointalign.data.collator import ConversationCollator
from pointalign.data.dataset import ConversationDataset
from pointalign.early_stopping import ALIGNMENT, HELD_OUT
from pointalign.efficient import frozen_parts

if TYPE_CHECKING:
    from pointalign.models import PointAlignProcessor
    from pointalign.options import Options
    from pointalign.trainer import AlignedModel, PointAlignTrainer

PER_KIND = 6  # samples of a batch
EMBEDDED_KINDS = {
    "name": ["name"],
    "yes or no": ["yes-no name", "yes-no colour", "yes-no side"],
    "colour": ["colour"],
    "side": ["side"],
    "two clouds": ["two clouds"],
}


class HeldOutLosses(TrainerCallback):
    """Logs `held_out/<kind>` before the first step and at every log: the mean next-token loss of each part of the
    mixture, on a fixed batch of its own, and `held_out/alignment_loss`, their mean.

    Args:
        batches: kind of question -> a collated batch.
    """

    def __init__(self, trainer: PointAlignTrainer, aligned: AlignedModel, batches: Mapping[str, dict[str, Any]]):
        self.trainer, self.aligned, self.batches = trainer, aligned, batches

    @classmethod
    def of(
        cls, trainer: PointAlignTrainer, aligned: AlignedModel, processor: PointAlignProcessor, options: Options
    ) -> HeldOutLosses | None:
        """For the conversations of `data.validation`, or of the embedded objects' validation part; else None."""
        paths = validation_paths(options)
        if paths is None or options.training.process_index != 0 or options.training.world_size > 1:
            return None
        annotations, clouds = paths
        # packed where training is: its attention then reads packed batches only
        collator = ConversationCollator(processor, options.data.max_length, packing=options.data.packing)
        batches = {}
        for label, types in kinds(options).items():
            dataset = ConversationDataset(annotations, clouds, types, options.data.up_axis)
            rows = sorted({i * len(dataset) // PER_KIND for i in range(PER_KIND)})  # evenly over the file
            batches[label] = without_clouds(aligned, collator([dataset[row] for row in rows]))
        return cls(trainer, aligned, batches)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.measure()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "ntp_loss" in logs:
            self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        self.aligned.eval()
        logs, alignment = {}, []
        for kind, batch in self.batches.items():
            inputs = {
                name: value.to(self.aligned.device) if isinstance(value, Tensor) else value
                for name, value in batch.items()
            }
            losses = self.aligned(**inputs)
            logs[f"{HELD_OUT}{kind}"] = losses["ntp_loss"].item()
            alignment.append(losses["alignment_loss"].item())
        if self.aligned.alignment is not None:
            logs[ALIGNMENT] = sum(alignment) / len(alignment)
        self.aligned.train()
        self.trainer.log(logs)


def validation_paths(options: Options) -> tuple[Path, Any] | None:
    """Annotation file and folders of clouds of the held-out conversations; None where there are none."""
    data = options.data
    if data.validation is not None:
        return Path(data.validation), data.clouds
    if data.annotations is not None or data.fold is not None:
        return None
    from pointalign import assets

    folder = assets.embedded_objects()
    return folder / "annotations" / "validation.json", folder / "clouds"


def kinds(options: Options) -> dict[str, list[str] | None]:
    """Label -> conversation types that share a held-out batch: kinds of question of the embedded objects, of other data
    the parts of the mixture, or all that is trained on.
    """
    if options.data.annotations is None and options.data.validation is None:
        return dict(EMBEDDED_KINDS)
    parts = [part.types for part in options.data.mixture] or [options.data.types]
    return {(types[0] if types else "all"): types for types in parts}


@torch.no_grad()
def without_clouds(aligned: AlignedModel, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the features of the point branch in place of clouds, where the branch is frozen.

    It is then not run again, and beside a feature cache it is not even part of the model in training.
    """
    branch = aligned.model.model
    parameters = [parameter for part in frozen_parts(branch) for parameter in getattr(branch, part).parameters()]
    parameters += [branch.query_tokens] if branch.query_tokens is not None else []
    if any(parameter.requires_grad for parameter in parameters) or "point_values" not in batch:
        return batch
    aligned.eval()
    clouds = {name: batch[name].to(aligned.device) for name in ("point_values", "point_lengths")}
    tokens = branch.get_encoder_tokens(**clouds)
    features = {"query_features": branch.query(tokens).float()}
    if aligned.alignment_config.target == "encoder":
        features["encoder_tokens"] = tokens.float()
    aligned.train()
    return {name: value for name, value in batch.items() if name not in clouds} | features

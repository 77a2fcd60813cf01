"""The two losses under `transformers.Trainer`: equally normalised, logged apart; checkpoints that resume exactly."""

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from pointalign import run_checkpoints, step_checks
from pointalign.alignment import Alignment, AlignmentConfig, LayerTap, pool_tokens
from pointalign.data.collator import TokenBudgetSampler
from pointalign.efficient.memory import device_used_bytes, peak_resident_bytes
from pointalign.models.modeling import PointAlignForConditionalGeneration, PointFeatures
from pointalign.options import published_rate
from pointalign.resumable_trainer import ResumableTrainer

# `point_learning_rate` is for these parameters.
POINT_PARTS = tuple(f"model.model.{part}" for part in ("point_encoder", "point_mlp", "qformer", "query_tokens"))


class AlignedModel(nn.Module):
    """A model and its alignment loss: what the Trainer trains. Only `model` is exported afterwards.

    Args:
        model: the vision-language model.
        config: options of the alignment; with weight 0 there is neither tap nor projector.
        impl: how the alignment loss runs, `reference` or `auto` (fused where it can).
    """

    def __init__(self, model: PointAlignForConditionalGeneration, config: AlignmentConfig, impl: str = "reference"):
        super().__init__()
        self.model = model
        self.config = model.config  # read by the Trainer
        self.alignment_config = config
        self.impl = impl
        self.alignment = None
        if config.weight > 0:
            text_config = model.config.text_config
            layers = config.layers(text_config.num_hidden_layers)
            widths = {
                "qformer": model.config.qformer_config.hidden_size,
                "encoder": model.config.point_config.hidden_size,
            }
            target_size = widths.get(config.target, text_config.hidden_size)
            self.alignment = Alignment(config, layers, text_config.hidden_size, target_size)
            target_layer = config.target_layer()
            self.tap = LayerTap(model.get_decoder().layers, [*layers, *([target_layer] if target_layer else [])])

    def target(self, features: PointFeatures, hidden: dict[int, Tensor]) -> Tensor:
        """Rows `[R, D]` that the hidden states are compared with, detached."""
        target_layer = self.alignment_config.target_layer()
        if target_layer is not None:
            return hidden[target_layer].detach()
        if self.alignment_config.target == "qformer":
            qformer = self.model.model.qformer
            if qformer.training and features.encoder is not None:  # it trains: a target without its dropout
                qformer.eval()
                with torch.no_grad():
                    rows = self.model.model.query(features.encoder)
                qformer.train()
                return rows.flatten(0, 1)
            return features.qformer.detach().flatten(0, 1)
        assert features.encoder is not None, "encoder targets need the clouds themselves, not cached Q-Former features"
        return pool_tokens(features.encoder.detach(), self.config.num_query_tokens).flatten(0, 1)

    def forward(self, point_mask: Tensor, num_point_rows: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            point_mask: `[B, T]`.
            num_point_rows: point tokens of the global batch, so that micro-batches and ranks weigh by theirs; by
                default those of this batch.
            inputs: those of the model.

        Returns:
            `loss`, and detached `ntp_loss` and `alignment_loss`, each this batch's share of the global mean.
        """
        # Mixed precision follows the language model: with 16-bit weights, the fp32 ones compute in that dtype too. With
        # fp32 weights the precision is the Trainer's, `training.fp16` or `training.bf16` included.
        dtype = self.model.model.language_model.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(point_mask.device.type, dtype) if half else nullcontext():
            return self._losses(point_mask, num_point_rows, inputs | {"use_cache": False})

    def _losses(self, point_mask: Tensor, num_point_rows: Tensor | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if self.alignment is None:
            ntp = self.model(point_mask=point_mask, **inputs).loss
            return {"loss": ntp, "ntp_loss": ntp.detach(), "alignment_loss": torch.zeros_like(ntp)}
        outputs, alignment, num_rows = self.alignment.beside(
            self.tap,
            point_mask,
            lambda: self.model(point_mask=point_mask, **inputs),
            lambda outputs, hidden: self.target(outputs.point_features, hidden),
            self.impl,
        )
        if num_point_rows is not None:
            alignment = alignment * (num_rows / num_point_rows)
        loss = outputs.loss + self.alignment_config.weight * alignment
        return {"loss": loss, "ntp_loss": outputs.loss.detach(), "alignment_loss": alignment.detach()}

    # The Trainer expects these of a transformers model.

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:  # its name up to transformers 5.17
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    @property
    def _no_split_modules(self) -> list[str] | set[str] | None:  # FSDP shards each of these as one unit: decoder blocks
        return self.model.model.language_model._no_split_modules

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device


class PointAlignTrainer(ResumableTrainer):
    """`transformers.Trainer` for an `AlignedModel`.

    Args:
        point_learning_rate: of the point branch where it trains; everything else has `args.learning_rate`.
        batch_sampler: this process's batches; by default `args.per_device_train_batch_size` samples each.
        options: those of `ResumableTrainer`.
    """

    def __init__(
        self,
        *,
        point_learning_rate: float | None = None,
        batch_sampler: TokenBudgetSampler | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.data_collator = step_checks.BatchWithObjects(self.data_collator)
        self.point_learning_rate = point_learning_rate
        self.batch_sampler = batch_sampler
        if batch_sampler is not None:
            self.add_callback(TellEpoch(batch_sampler))
        self.add_callback(CountSkippedSteps(self))
        self.add_callback(TellEpoch(self.train_dataset))
        self._parts = {"ntp_loss": 0.0, "alignment_loss": 0.0}
        self._tokens = 0
        self._step = Step()
        self._skipped_steps = 0  # by the gradient scaler of fp16
        self._steps_at_log: int | None = None
        self._time_at_log = time.perf_counter()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in transformers, but no vector decays, batch norms included: as in the published recipe."""
        dimensions = {name: parameter.ndim for name, parameter in model.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if dimensions.get(name, 0) > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self._create_optimizer(model)
            self.optimizer.register_step_pre_hook(self._check_step)
        return self.optimizer

    def _create_optimizer(self, model: nn.Module | None) -> None:
        if self.point_learning_rate is None:
            super().create_optimizer(model)
            return
        model = self.model if model is None else model
        decaying = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((name.startswith(POINT_PARTS), name in decaying), []).append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.point_learning_rate if of_point_branch else self.args.learning_rate,
                    "weight_decay": self.args.weight_decay if decays else 0.0,
                }
                for (of_point_branch, decays), parameters in groups.items()
            ],
            **options,
        )

    def get_train_dataloader(self) -> DataLoader:
        if self.batch_sampler is None:
            return super().get_train_dataloader()
        return DataLoader(  # each process has batches of its own already, so accelerate has nothing to share out
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        args = self.args
        if self.lr_scheduler is None and args.minimum_learning_rate is not None:
            warmup_steps = args.get_warmup_steps(num_training_steps)
            peak, minimum = args.learning_rate, args.minimum_learning_rate
            warmup = peak if args.warmup_learning_rate is None else args.warmup_learning_rate

            def factor(step: int) -> float:  # on each group's rate
                return published_rate(step, num_training_steps, warmup_steps, warmup, peak, minimum) / peak

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = Step([batch.pop("object_ids") for batch in batches], batches, num_items)
        if self._steps_at_log is None:
            self._steps_at_log, self._time_at_log = self.state.global_step, time.perf_counter()
        if batches:
            rows = torch.stack([batch["point_mask"].sum() for batch in batches]).sum().to(device)
            if self.args.world_size > 1:
                rows = self.accelerator.gather(rows).sum()
            for batch in batches:
                batch["num_point_rows"] = rows.clamp(min=1)
                self._tokens += batch["input_ids"].numel()
        return batches, num_items

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        # Both terms are normalised over the global batch, as the Trainer does for tokens. It averages gradients over
        # ranks afterwards, which the factor undoes.
        if self._step.losses is None:
            self._step.random = run_checkpoints.torch_random()
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        for name in self._parts:
            self._parts[name] = self._parts[name] + outputs[name]
        losses = torch.stack([outputs["loss"].detach(), outputs["ntp_loss"], outputs["alignment_loss"]])
        self._step.losses = losses if self._step.losses is None else self._step.losses + losses
        loss = outputs["loss"] * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _check_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Called by the optimizer before it changes a weight. Raises: FloatingPointError: a number is not finite."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.accelerator.scaler is not None:  # fp16: infinite gradients are usual, and its scaler skips the step
            gradients = []
        if self._step.losses is not None and not step_checks.all_finite(gradients, self._step.losses):
            raise self._failed_step(sum(not bool(torch.isfinite(gradient).all()) for gradient in gradients))

    def _failed_step(self, bad_gradients: int) -> FloatingPointError:
        number, step = self.state.global_step + 1, self._step
        assert step.losses is not None
        loss, ntp, alignment = step.losses.tolist()
        objects = [object_id for batch in step.object_ids for object_id in batch]
        path = Path(self.args.output_dir) / f"failed-step-{number}-process-{self.args.process_index}.safetensors"
        num_items = None if step.num_items is None else int(step.num_items)
        header = {"number": number, "object_ids": step.object_ids, "num_items": num_items}
        model = self.accelerator.unwrap_model(self.model)
        step_checks.write_failed_step(path, model, step.batches, step.random, header)
        return FloatingPointError(
            f"the loss is {loss} at step {number} (next-token {ntp}, alignment {alignment}), {bad_gradients} gradients "
            f"are not finite; nothing was updated. Objects of the step: {', '.join(objects[:20]) or 'unknown'}. "
            f"{path} holds weights, batches and random state: pointalign.step_checks.repeat_step runs the step again"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        steps = self.state.global_step - (self._steps_at_log or 0)
        counted = "loss" in logs and steps > 0
        if counted:
            elapsed = time.perf_counter() - self._time_at_log
            for name, value in self._parts.items():
                value = torch.as_tensor(value, device=self.args.device)
                if self.args.world_size > 1:
                    value = self.accelerator.gather(value).sum()
                logs[name] = value.item() / steps
            logs["tokens_per_second"] = round(self._tokens * self.args.world_size / elapsed, 1)
            if peak := peak_memory_bytes():
                logs["peak_memory_gb"] = round(peak / 1e9, 3)
            if self.args.device.type == "cuda":
                logs["device_memory_gb"] = round(device_used_bytes(self.args.device) / 1e9, 3)
            if self.accelerator.scaler is not None:
                logs["skipped_steps"] = self._skipped_steps
            if spike := step_checks.spike(self.state.log_history, logs["loss"]):
                print(f"step {self.state.global_step}: {spike}", flush=True)
            self._parts = dict.fromkeys(self._parts, 0.0)
            self._tokens = 0
        super().log(logs, start_time)
        step_checks.thin_out(self.state.log_history)
        if counted:  # only now: callbacks may have measured held-out losses, which is not training
            self._steps_at_log, self._time_at_log = self.state.global_step, time.perf_counter()


@dataclass
class Step:
    """A training step in the making: what it is computed from, for a report if its numbers are not finite."""

    object_ids: list[list[str]] = field(default_factory=list)  # of every batch
    batches: list[dict[str, Any]] = field(default_factory=list)
    num_items: Tensor | int | None = None  # supervised tokens of the global batch
    random: dict[str, Tensor] = field(default_factory=dict)  # PyTorch's generators before the first forward pass
    losses: Tensor | None = None  # `[3]`: loss, next-token and alignment, summed over batches


class CountSkippedSteps(TrainerCallback):
    """Counts the steps that fp16's gradient scaler skips, and stops if the loss itself is not finite."""

    def __init__(self, trainer: PointAlignTrainer):
        self.trainer = trainer
        self.scale = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        scaler = self.trainer.accelerator.scaler
        self.scale = scaler.get_scale() if scaler is not None else 0.0

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.accelerator.scaler is None:
            return
        scale = trainer.accelerator.scaler.get_scale()
        if scale < self.scale:  # it falls after a skipped step only
            trainer._skipped_steps += 1
            if not step_checks.all_finite([], trainer._step.losses):
                raise trainer._failed_step(0)
        self.scale = scale


class TellEpoch(TrainerCallback):
    """Tells a data set or a sampler which epoch it is in; after a resume the data loader alone would not."""

    def __init__(self, dataset: object):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))


def peak_memory_bytes() -> int | None:
    """Peak memory of this process: the allocator's on CUDA, resident set size elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()

"""The two losses under `transformers.Trainer`: equally normalised, logged apart; checkpoints that resume exactly."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pointalign import storage
from pointalign.alignment import Alignment, AlignmentConfig, LayerTap, pool_tokens
from pointalign.data.collator import TokenBudgetSampler
from pointalign.efficient.memory import device_used_bytes, peak_resident_bytes
from pointalign.models.modeling import PointAlignForConditionalGeneration, PointFeatures
from pointalign.options import published_rate

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
        # Mixed precision follows the language model: with bf16 weights, the fp32 ones compute in bf16 too.
        dtype = self.model.model.language_model.dtype
        with torch.autocast(point_mask.device.type, dtype, enabled=dtype == torch.bfloat16):
            return self._losses(point_mask, num_point_rows, inputs | {"use_cache": False})

    def _losses(self, point_mask: Tensor, num_point_rows: Tensor | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
        if self.alignment is None:
            ntp = self.model(point_mask=point_mask, **inputs).loss
            return {"loss": ntp, "ntp_loss": ntp.detach(), "alignment_loss": torch.zeros_like(ntp)}
        with self.tap.capture(point_mask) as hidden:
            outputs = self.model(point_mask=point_mask, **inputs)
        if outputs.point_features is None:  # a batch without clouds
            alignment = next(self.alignment.parameters()).sum() * 0
        else:
            target = self.target(outputs.point_features, hidden)
            share = 1.0 if num_point_rows is None else len(target) / num_point_rows
            alignment = self.alignment(hidden, target, self.impl) * share
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


class PointAlignTrainer(Trainer):
    """`transformers.Trainer` for an `AlignedModel`.

    Args:
        point_learning_rate: of the point branch where it trains; everything else has `args.learning_rate`.
        batch_sampler: this process's batches; by default `args.per_device_train_batch_size` samples each.
    """

    def __init__(
        self,
        *args: Any,
        point_learning_rate: float | None = None,
        batch_sampler: TokenBudgetSampler | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.point_learning_rate = point_learning_rate
        self.batch_sampler = batch_sampler
        if batch_sampler is not None:
            self.add_callback(TellEpoch(batch_sampler))
        self.stop = StopOnInterrupt()
        self.add_callback(self.stop)
        self.add_callback(TellEpoch(self.train_dataset))
        self.checkpoints: list[Path] = []  # that this run wrote or continues, oldest first; no other is ever deleted
        self._parts = {"ntp_loss": 0.0, "alignment_loss": 0.0}
        self._tokens = 0
        self._steps_at_log: int | None = None
        self._time_at_log = time.perf_counter()

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in transformers, but no vector decays, batch norms included: as in the published recipe."""
        dimensions = {name: parameter.ndim for name, parameter in model.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if dimensions.get(name, 0) > 1]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.point_learning_rate is None or self.optimizer is not None:
            return super().create_optimizer(model)
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
        return self.optimizer

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
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        for name in self._parts:
            self._parts[name] = self._parts[name] + outputs[name]
        loss = outputs["loss"] * self.args.world_size
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1} (next-token "
                f"{float(outputs['ntp_loss'])}, alignment {float(outputs['alignment_loss'])}); nothing was updated"
            )
        return (loss, outputs) if return_outputs else loss

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
            self._parts = dict.fromkeys(self._parts, 0.0)
            self._tokens = 0
        super().log(logs, start_time)
        if counted:  # only now: callbacks may have measured held-out losses, which is not training
            self._steps_at_log, self._time_at_log = self.state.global_step, time.perf_counter()

    def gathered_state(self) -> dict[str, Tensor] | None:
        """An FSDP model's full state, on the first process; None without FSDP. All processes must call it."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None

    # -- checkpoints: complete or absent, safetensors and JSON ---------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        run = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = run / ".incomplete"
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(run / name, ignore_errors=True)
                (unfinished / name).rename(run / name)
        except OSError as error:
            complete = ", ".join(map(str, checkpoints(run))) or "none"
            raise OSError(
                f"checkpoint {name} could not be written: {error}; complete checkpoints: {complete}"
            ) from error
        finally:
            self._unfinished = None
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
        self.checkpoints = [path for path in self.checkpoints if path != run / name] + [run / name]
        while self.args.save_total_limit and len(self.checkpoints) > self.args.save_total_limit:
            superseded = self.checkpoints.pop(0)
            if self.args.should_save:
                shutil.rmtree(superseded, ignore_errors=True)

    _unfinished: Path | None = None

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._unfinished or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        state = storage.training_state(self.accelerator.unwrap_model(self.model))
        if self.is_fsdp_enabled:  # this process holds shards; the first process received the full state
            if not self.args.should_save:
                return
            assert state_dict is not None
            state = {name: state_dict[name] for name in state}
        storage.write_tensors(folder / "model.safetensors", state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        earlier = checkpoints(Path(resume_from_checkpoint).parent)
        resumed = Path(resume_from_checkpoint)
        if resumed in earlier and resumed.parent == Path(self.args.output_dir):
            self.checkpoints = earlier[: earlier.index(resumed) + 1]  # later ones are of a run that went another way
        target = self.accelerator.unwrap_model(model or self.model)
        expected = set(storage.training_state(target))
        if self.is_fsdp_enabled:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            state = storage.read_tensors(Path(resume_from_checkpoint) / "model.safetensors", expected)
            set_model_state_dict(target, state, options=StateDictOptions(full_state_dict=True, strict=False))
            return
        storage.load_state(target, Path(resume_from_checkpoint) / "model.safetensors", expected)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            storage.save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            storage.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        storage.save_random(Path(output_dir) / f"random_{self.args.process_index}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            storage.load_random(Path(checkpoint) / f"random_{self.args.process_index}")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the current step, saves, and stops; a second one stops at once.

    Attributes:
        interrupted: this run was stopped so, in all its processes at the same step.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._pressed = False  # here; other processes may hear of it a step later, or not at all

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.getsignal(signal.SIGINT)

        def handle(_signal, _frame):
            if self._pressed:
                raise KeyboardInterrupt
            self._pressed = True
            print("\nstopping after this step; press Ctrl-C again to stop without saving", flush=True)

        try:
            signal.signal(signal.SIGINT, handle)
        except ValueError:  # not in the main thread, which alone can catch Ctrl-C
            self.previous = None

    def on_step_end(self, args, state, control, **kwargs):
        pressed = self._pressed
        if args.world_size > 1:  # in any process
            shared = torch.tensor(int(pressed), device=args.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            pressed = bool(shared)
        if pressed:
            self.interrupted = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)


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

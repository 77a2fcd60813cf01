"""An attached alignment under `transformers.Trainer`: its loss in the log, its projectors in the checkpoints."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback

from pointalign import storage

FILE = "alignment.safetensors"  # in a checkpoint of the Trainer


class Attached(Protocol):
    """What is used of a handle."""

    losses: dict[str, Tensor]
    joined: bool
    pending: Tensor | None
    weight: float

    def callback(self) -> TrainerCallback: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class LogAlignment(TrainerCallback):
    """Logs `alignment_loss`, the mean over the steps since the last log (of this process); saves and resumes."""

    def __init__(self, handle: Attached):
        self.handle = handle
        self._sum: Tensor | float = 0.0
        self._steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
            self.handle.load_state_dict(storage.load_tensors(path))

    def on_substep_end(self, args, state, control, **kwargs):
        self._sum = self._sum + self.handle.losses["alignment_loss"]

    def on_step_end(self, args, state, control, **kwargs):
        self._sum = self._sum + self.handle.losses["alignment_loss"]
        self._steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not self._steps:
            return
        logs["alignment_loss"] = state.log_history[-1]["alignment_loss"] = float(self._sum) / self._steps
        self._sum, self._steps = 0.0, 0

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            storage.write_tensors(folder / FILE, self.handle.state_dict())


def join_trainer(handle: Attached, trainer: Any) -> None:
    """Add the loss of the handle's last forward pass to every loss that the trainer computes, weighed as tokens are."""
    compute_loss = trainer.compute_loss

    def compute_both(model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")
        handle.pending = None
        result = compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if handle.pending is None:  # evaluation
            return result
        share: Tensor | float = 1.0
        if num_items_in_batch is not None and labels is not None:
            share = (labels[..., 1:] != -100).sum() / num_items_in_batch
        handle.losses["alignment_loss"] = handle.losses["alignment_loss"] * share
        if num_items_in_batch is not None and trainer.args.average_tokens_across_devices:
            share = share * trainer.accelerator.num_processes  # gradients are averaged over processes afterwards
        loss = result[0] if return_outputs else result
        loss = loss + handle.weight * share * handle.pending.to(loss.device)
        handle.pending = None
        return (loss, *result[1:]) if return_outputs else loss

    handle.joined = True
    trainer.compute_loss = compute_both
    trainer.add_callback(handle.callback())

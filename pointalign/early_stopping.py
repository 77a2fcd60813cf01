"""Early stopping: a run ends once its held-out loss no longer falls, with the weights of its best log.

The standing of a run is read from its log, which every checkpoint holds; the best weights lie beside those of the
checkpoint. So a resumed run stops where the uninterrupted one would.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from pointalign import storage
from pointalign.interruptions import StopOnSignal
from pointalign.run_checkpoints import CheckpointError

HELD_OUT = "held_out/"  # before the names of held-out losses in the log
ALIGNMENT = f"{HELD_OUT}alignment_loss"
BEST_FILE = "best.safetensors"  # in a checkpoint


class EarlyStopping(TrainerCallback):
    """Stops a run after `patience` logs without a lower held-out loss, the mean next-token loss of its parts.

    Args:
        stop: tells of a run that a signal ended, which goes on later: its weights stay as they are.

    Attributes:
        best: trained weights at the best log, on the CPU.
    """

    def __init__(self, trainer: Trainer, stop: StopOnSignal, patience: int):
        self.trainer, self.stop, self.patience = trainer, stop, patience
        self.best: dict[str, Tensor] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= self._exhausted(state.log_history)  # a stopped run that is resumed

    def on_log(self, args, state, control, logs=None, **kwargs):
        if held_out_loss(logs or {}) is None:
            return
        _, _, logs_since = standing(state.log_history)
        if logs_since == 0:
            self.best = {name: value.detach().to("cpu", copy=True) for name, value in self._trained().items()}
        elif self._exhausted(state.log_history):
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"

    def on_train_end(self, args, state, control, **kwargs):
        if self.best is None or self.stop.number:
            return
        step, loss, logs_since = standing(state.log_history)
        with torch.no_grad():
            for name, value in self._trained().items():
                value.copy_(self.best[name])
        reason = "stopped early" if self._exhausted(state.log_history) else "ended"
        print(
            f"{reason} at step {state.global_step}, {logs_since} logs after the lowest held-out loss: "
            f"the weights of step {step} are used (held-out loss {loss:.4f})"
        )

    def save(self, folder: Path) -> None:
        """Write the best weights into a checkpoint."""
        if self.best is not None:
            storage.write_tensors(folder / BEST_FILE, self.best)

    def load(self, folder: Path) -> None:
        """Take the best weights up from a checkpoint. Raises: CheckpointError: it has none."""
        if not (folder / BEST_FILE).exists():
            raise CheckpointError(
                f"{folder} has no {BEST_FILE}: its run went without training.early_stopping_patience; go on without it"
            )
        self.best = storage.read_tensors(folder / BEST_FILE, set(self._trained()))

    def _trained(self) -> dict[str, Tensor]:
        return storage.training_state(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def _exhausted(self, history: list[dict[str, Any]]) -> bool:
        return standing(history)[2] >= self.patience


def held_out_loss(entry: dict[str, Any]) -> float | None:
    """Mean next-token loss of the held-out parts in an entry of the log; None where it has none."""
    losses = [value for name, value in entry.items() if name.startswith(HELD_OUT) and name != ALIGNMENT]
    return sum(losses) / len(losses) if losses else None


def standing(history: list[dict[str, Any]]) -> tuple[int, float, int]:
    """Step of the lowest held-out loss, that loss, and the number of held-out logs after it."""
    best_step, best_loss, logs_since = 0, math.inf, 0
    for entry in history:
        loss = held_out_loss(entry)
        if loss is None:
            continue
        logs_since += 1
        if loss < best_loss:
            best_step, best_loss, logs_since = entry["step"], loss, 0
    return best_step, best_loss, logs_since

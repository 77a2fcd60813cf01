"""`transformers.Trainer` whose runs can be interrupted anywhere and go on to the bit."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from pointalign import run_checkpoints, step_checks, storage
from pointalign.early_stopping import EarlyStopping
from pointalign.interruptions import HangWatch, StopOnSignal


class ResumableTrainer(Trainer):
    """A Trainer with complete, verified checkpoints of safetensors and JSON, which stops when a signal asks it to.

    Args:
        depends_on: options and contents that a checkpoint may be resumed with only, see `run_checkpoints.differences`.
        budget: planned memory of a step, shown if the device runs out of it.
        options: those of `transformers.Trainer`.
    """

    def __init__(self, *, depends_on: dict[str, Any] | None = None, budget: object | None = None, **options: Any):
        super().__init__(**options)
        if self.args.dataloader_persistent_workers:
            self.args.dataloader_persistent_workers = False
            print("training.dataloader_persistent_workers has no effect: workers start anew to hear of a new epoch")
        self.depends_on = depends_on or {}
        self.budget = budget
        self.checkpoints: list[Path] = []  # that this run wrote or continues, oldest first; no other is ever deleted
        self._watch: HangWatch | None = None
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        self.early_stopping: EarlyStopping | None = None

    def stop_early(self, patience: int) -> None:
        """End the run, with its best weights, after so many logs without a lower held-out loss."""
        self.early_stopping = EarlyStopping(self, self.stop, patience)
        self.add_callback(self.early_stopping)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and a checkpoint is verified before anything of it is loaded.

        Raises:
            FileNotFoundError: there is no checkpoint to resume from.
            CheckpointError: the checkpoint is damaged or of other options.
            FloatingPointError: a loss or gradient is not finite; no weight was changed.
            OSError: a checkpoint could not be written, or a data worker died.
            MemoryError: the device has too little memory; says what to change.
        """
        run = Path(self.args.output_dir)
        if self.args.should_save:
            run_checkpoints.clean(run)
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint, skipped = run_checkpoints.find(resume_from_checkpoint, run)
            lines = [*skipped, *(self._verify(checkpoint) if checkpoint else [])]
            if self.args.process_index == 0:
                print("\n".join([*lines, f"going on from {checkpoint}" if checkpoint else "no checkpoint: a new run"]))
        if self.args.world_size > 1:
            self._watch = HangWatch(self.args.process_index, self.args.world_size, self.args.ddp_timeout)
        try:
            return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{error}\n{step_checks.memory_advice(self.args, self.budget)}") from error
        finally:
            self.stop.restore()
            if self._watch is not None:
                self._watch.end()

    def _verify(self, checkpoint: Path) -> list[str]:
        manifest = run_checkpoints.verify(checkpoint)
        return run_checkpoints.differences(manifest["run"], self.depends_on, checkpoint) if self.depends_on else []

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        trained = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # a resumed state has the intervals of logs and saves of then
        return trained

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self._watch is not None:
            self._watch.note(self.state.global_step, computing=False)
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            # a finished run that is resumed takes no further step
            return [], None
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except (RuntimeError, ConnectionError, EOFError) as error:
            # PyTorch notices a dead worker by its signal, or at the closed pipe of a tensor that was on its way
            at_pipe = not isinstance(error, RuntimeError) and self.args.dataloader_num_workers > 0
            if not at_pipe and "DataLoader worker" not in str(error):
                raise
            raise self._lost_worker(error) from error

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._watch is not None:
            self._watch.note(self.state.global_step, computing=True)
        return super().training_step(*args, **kwargs)

    def _lost_worker(self, error: Exception) -> ChildProcessError:
        """A data worker died between two steps: save, where this process alone can."""
        if self.args.world_size == 1 and 0 < self.state.global_step and self.args.should_save:
            self._save_checkpoint(self.model)
        saved = self.checkpoints[-1] if self.checkpoints else "none"
        return ChildProcessError(
            f"a data worker died after step {self.state.global_step}: {error}. Mostly the system has killed it for its "
            f"memory: try fewer --training.dataloader_num_workers. Last checkpoint: {saved}"
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        run = Path(self.args.output_dir)
        target = run / f"checkpoint-{self.state.global_step}"
        self._unfinished = run / run_checkpoints.UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                run_checkpoints.publish(self._unfinished / target.name, target, self.depends_on)
        except OSError as error:
            complete = ", ".join(map(str, run_checkpoints.checkpoints(run))) or "none"
            raise OSError(f"{target.name} could not be written: {error}; complete checkpoints: {complete}") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            self._unfinished = None
        self.checkpoints = [path for path in self.checkpoints if path != target] + [target]
        while self.args.save_total_limit and len(self.checkpoints) > self.args.save_total_limit:
            superseded = self.checkpoints.pop(0)
            if self.args.should_save and superseded.exists():
                run_checkpoints.delete(superseded)

    _unfinished: Path | None = None

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._unfinished or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # transformers calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        state = storage.training_state(self.accelerator.unwrap_model(self.model))
        if self.is_fsdp_enabled:  # this process holds shards; the first process received the full state
            assert state_dict is not None
            state = {name: state_dict[name] for name in state}
        storage.write_tensors(folder / "model.safetensors", state)
        if self.early_stopping is not None:
            self.early_stopping.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        earlier = run_checkpoints.checkpoints(Path(resume_from_checkpoint).parent)
        resumed = Path(resume_from_checkpoint)
        if resumed in earlier and resumed.parent == Path(self.args.output_dir):
            self.checkpoints = earlier[: earlier.index(resumed) + 1]  # later ones are of a run that went another way
        if self.early_stopping is not None:
            self.early_stopping.load(resumed)
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
            run_checkpoints.save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            run_checkpoints.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            storage.write_json(Path(output_dir) / "scaler.json", self.accelerator.scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(storage.read_json(Path(checkpoint) / "scaler.json"))

    def _save_rng_state(self, output_dir: str) -> None:
        run_checkpoints.save_random(Path(output_dir) / f"random_{self.args.process_index}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            run_checkpoints.load_random(Path(checkpoint) / f"random_{self.args.process_index}")

    def gathered_state(self) -> dict[str, Tensor] | None:
        """An FSDP model's full state, on the first process; None without FSDP. All processes must call it."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None

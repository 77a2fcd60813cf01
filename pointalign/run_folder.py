"""The folder of a training run: used by one process at a time, and never written into once the run is finished."""

import os
import shlex
from contextlib import ExitStack
from pathlib import Path

from pointalign import run_checkpoints, storage
from pointalign.command_line import program
from pointalign.options import Options
from pointalign.stage_file import STAGE_FILE
from pointalign.training_command import RUN_RECIPE

USER_LOG_FOLDER = os.environ.get("TENSORBOARD_LOGGING_DIR")
LOCK = ".lock"  # in a run's folder, held by the process that trains there
OPTIONS = "options.json"
# What a run may leave that ended before its first checkpoint; the next one begins again in the same folder.
LEFTOVERS = {LOCK, OPTIONS, RUN_RECIPE, "features", "tensorboard"}


class FinishedRun(ValueError):
    """A run that is to be resumed has nothing left to do."""


def run_folder(options: Options, held: ExitStack | None = None) -> Path:
    """The run's folder, the same in all processes; the checkpoint to resume from is looked up.

    A new run never writes into a folder that holds another: a free number is appended, which is printed. A resumed run
    goes on in the folder of its checkpoint, or in a new one if that run is finished and this one is longer. With
    `resume_from_checkpoint=auto` the folder is `output_dir` and has a checkpoint or does not.

    Args:
        held: keeps the folder locked until it closes.

    Raises:
        FileNotFoundError: there is no checkpoint to resume from.
        FinishedRun: the run to resume has taken all its steps.
        ValueError: another process trains in the folder.
    """
    training = options.training
    requested = Path(training.output_dir or "runs/align")
    chosen: list[str | None] = [None, None]  # folder and checkpoint
    if training.process_index == 0:
        held = held or ExitStack()  # without a stack of the caller's the lock ends here
        checkpoint = None
        if not training.resume_from_checkpoint:
            folder = free_folder(requested, held)
        else:
            checkpoint, skipped = run_checkpoints.find(training.resume_from_checkpoint, requested)
            print("\n".join(skipped), end="\n" if skipped else "")
            folder = checkpoint.parent if checkpoint else began_before(requested)
            if checkpoint and is_finished(folder):
                require_more_steps(options, folder)
                folder = free_folder(folder, held)
            elif not held.enter_context(storage.lock(folder / LOCK, wait=False)):
                raise ValueError(f"{folder} is in use: another process trains there")
        chosen = [str(folder), str(checkpoint) if checkpoint else None]
    if training.world_size > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(chosen)
    training.output_dir, training.resume_from_checkpoint = chosen
    os.environ["TENSORBOARD_LOGGING_DIR"] = USER_LOG_FOLDER or f"{training.output_dir}/tensorboard"
    return Path(str(training.output_dir))


def is_finished(folder: Path) -> bool:
    """Whether a run wrote its model there, and the accuracy if its options ask for it."""
    if not ((folder / "model" / "config.json").exists() and (folder / STAGE_FILE).exists()):
        return False
    evaluated = (folder / OPTIONS).exists() and storage.read_json(folder / OPTIONS)["data"]["evaluate"] != "none"
    return not evaluated or (folder / "accuracy.json").exists()


def require_more_steps(options: Options, folder: Path) -> None:
    """Raises: FinishedRun: the options ask for no more steps or patience than the run in `folder` had."""
    before = storage.read_json(folder / OPTIONS)["training"] if (folder / OPTIONS).exists() else {}
    defaults = {"max_steps": -1, "num_train_epochs": 3.0, "early_stopping_patience": 0}
    if all(getattr(options.training, name) == before.get(name, default) for name, default in defaults.items()):
        raise FinishedRun(
            f"the run in {folder} is finished, its model is in {folder / 'model'}; for a longer one add "
            f"--training.max_steps N, which goes on in another folder"
        )


def began_before(folder: Path) -> Path:
    """The folder of a run without checkpoints, which begins again there; it may also be empty or missing.

    Raises: ValueError: the folder holds something else, or results.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / LOCK).exists() or (folder / STAGE_FILE).exists():
            raise ValueError(f"{folder} has files but no checkpoint to go on from: choose another training.output_dir")
    return folder


def free_folder(requested: Path, held: ExitStack) -> Path:
    """`requested`, or with the first number appended that is free, locked by this process; says why it is another."""
    folder, number = requested, 2
    while not take(folder, held):
        folder = requested.with_name(f"{requested.name}-{number}")
        number += 1
    if folder != requested:
        print(f"{requested} {occupied_by(requested)}; this run goes to {folder}", flush=True)
    return folder


def take(folder: Path, held: ExitStack) -> bool:
    """Whether the folder was missing, empty or left by a run without checkpoints, and no other process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if names - LEFTOVERS or (names and LOCK not in names):
        return False
    return held.enter_context(storage.lock(folder / LOCK, wait=False))


def occupied_by(folder: Path) -> str:
    if is_finished(folder):
        return "holds a finished run"
    if checkpoints := run_checkpoints.checkpoints(folder):
        return f"holds a stopped run, which goes on with `{resume_command(checkpoints[-1])}`"
    return "is in use or has other files"


def resume_command(checkpoint: Path, processes: int = 1) -> str:
    """The command that goes on from a checkpoint, with the options that its run was started with."""
    launcher = f"{program()} train" if processes == 1 else f"torchrun --nproc_per_node {processes} -m pointalign.train"
    further = "" if (checkpoint.parent / RUN_RECIPE).exists() else " (and the options of that run)"
    return f"{launcher} --training.resume_from_checkpoint {shlex.quote(str(checkpoint))}{further}"


def what_is_saved(folder: Path) -> str:
    """What a user reads who stopped a run."""
    if is_finished(folder):
        return f"the model was complete: {folder / 'model'}"
    if checkpoints := run_checkpoints.checkpoints(folder):
        return f"saved is {checkpoints[-1]}; go on with: {resume_command(checkpoints[-1])}"
    encoded = f" Encoded clouds are kept in {folder / 'features'}." if (folder / "features").exists() else ""
    return f"no step was saved, as there was no checkpoint yet.{encoded} The same command starts again in {folder}"

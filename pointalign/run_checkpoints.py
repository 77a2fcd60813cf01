"""Checkpoints of a training run: complete or absent, verified before they are read, refused by a run of other options.

A checkpoint is a folder `checkpoint-<step>` of safetensors and JSON files. Its `manifest.json` holds the size and
SHA-256 of every other file, when it was written, and what the run depends on.
"""

import datetime
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pointalign import storage
from pointalign.precision import dtype_name, resolve_dtype

MANIFEST = "manifest.json"
FORMAT = 1
UNFINISHED = ".incomplete"  # folder of a run that a checkpoint is written in
SUPERSEDED = ".superseded-"  # before the name of a checkpoint that is being deleted
NEWEST = ("true", "latest", "auto")  # values of `training.resume_from_checkpoint` that stand for the newest checkpoint

# A run goes on only with these as they were; everything else may change and is reported.
FIXED = (
    "model.", "data.", "alignment.", "data_sha256", "language_model", "start_sha256", "processes", "samples_per_step",
    *(f"training.{name}" for name in (
        "learning_rate", "point_learning_rate", "warmup", "minimum_learning_rate", "lr_scheduler", "weight_decay",
        "optim", "adam_", "max_grad_norm", "label_smoothing_factor", "seed", "data_seed", "train_sampling_strategy",
        "fp16", "bf16", "fsdp",
    )),
)  # fmt: skip
# Files that may move, as what they hold is compared; options that only choose how to compute, or come after training.
MOVABLE = (
    "model.llm", "model.checkpoint", "model.point_branch", "model.attention", "data.annotations", "data.clouds",
    "data.feature_cache", "data.evaluate",
)  # fmt: skip
UNRELATED = ("training.output_dir", "training.resume_from_checkpoint", "training.logging_dir", "commit",
             "uncommitted_changes")  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of another run; the message names it and says what to do."""


# -- the folders of a run ----------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """Folders of a run's checkpoints, the fewest steps first; other folders, such as `checkpoint-best`, are not."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run.glob("checkpoint-*") if path.is_dir()}
    return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.name.split("-")[1]))


def publish(folder: Path, target: Path, run: dict[str, Any]) -> None:
    """Give the complete checkpoint in `folder` its name `target`, once a manifest lists it and all is on the disk.

    Args:
        run: what the run depends on, see `differences`.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": storage.file_hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    written = datetime.datetime.now(datetime.timezone.utc).isoformat()
    storage.write_json(folder / MANIFEST, {"format": FORMAT, "written": written, "files": files, "run": run})
    storage.move_into_place(folder, target)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that a half-deleted one is never taken for a complete one."""
    superseded = checkpoint.with_name(SUPERSEDED + checkpoint.name)
    shutil.rmtree(superseded, ignore_errors=True)
    checkpoint.rename(superseded)
    shutil.rmtree(superseded, ignore_errors=True)


def clean(run: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for pattern in (UNFINISHED, f"{SUPERSEDED}checkpoint-*", ".checkpoint-*.previous"):
        for leftover in run.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)


def verify(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: a file is missing or changed, or there is no manifest.
    """
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    try:
        manifest = storage.read_json(checkpoint / MANIFEST)
        files, run = manifest["files"], manifest["run"]
        if manifest["format"] != FORMAT or not (isinstance(files, dict) and isinstance(run, dict)):
            raise ValueError(f"expected a manifest of format {FORMAT}")
        datetime.datetime.fromisoformat(manifest["written"])
        recorded = {name: (file["bytes"], file["sha256"]) for name, file in files.items()}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint}: {MANIFEST} is missing: not a complete checkpoint, or of an earlier version of this program"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: {error}") from error
    for name, (size, sha256) in recorded.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != size or storage.file_hash(path) != sha256:
            raise CheckpointError(f"{path} is damaged: its bytes are not those that were written ({size} bytes)")
    return manifest


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The complete checkpoint of a run that was written last, and why others that are newer were skipped."""
    complete, skipped = {}, []
    for checkpoint in checkpoints(run):
        try:
            complete[checkpoint] = datetime.datetime.fromisoformat(verify(checkpoint)["written"])
        except (CheckpointError, OSError) as error:
            skipped.append(f"skipped {checkpoint.name}: {error}")
    return (max(complete, key=complete.__getitem__) if complete else None), skipped


def find(requested: str | bool, run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `training.resume_from_checkpoint` asks for, and what was skipped on the way.

    Args:
        requested: a checkpoint, a run's folder, or one of `NEWEST` for the newest checkpoint of `run`. Only for `auto`
            there need not be any.

    Raises: FileNotFoundError: there is no checkpoint.
    """
    name = str(requested).lower()
    if name not in NEWEST:
        path = Path(str(requested))
        if re.fullmatch(r"checkpoint-\d+", path.name) or (path / MANIFEST).exists():
            return path, []
        run = path
    checkpoint, skipped = newest(run)
    if checkpoint is None and name != "auto":
        raise FileNotFoundError("\n".join([f"no complete checkpoint in {run}", *skipped]))
    return checkpoint, skipped


# -- what a run depends on ---------------------------------------------------------------------------------------------


def differences(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> list[str]:
    """What changed since a checkpoint and takes effect from here on, a line each.

    Args:
        before: options and contents that the checkpoint's run depends on, as sections of names and values.
        now: those of the run that goes on from it.

    Raises: CheckpointError: something changed that the run cannot go on with.
    """
    old, new = _by_dotted_name(before), _by_dotted_name(now)
    if old.get("model.dtype") == "auto":  # written before runs recorded their dtype, which a rule then gave
        old["model.dtype"] = dtype_name(resolve_dtype("auto"))
    changed = {
        name: f"{name} was {old.get(name, 'the default')}, is {new.get(name, 'the default')}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name) and name not in UNRELATED
    }
    refused = [line for name, line in changed.items() if name.startswith(FIXED) and name not in MOVABLE]
    if refused:
        raise CheckpointError(
            f"{checkpoint} belongs to another run:\n  " + "\n  ".join(refused) + "\nGo on with the options it was "
            "written with, or start a new run without training.resume_from_checkpoint"
        )
    return list(changed.values())


def _by_dotted_name(sections: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in sections.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


# -- optimizer and random numbers --------------------------------------------------------------------------------------


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with the contents of a file is a `CheckpointError` that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or of another run: {type(error).__name__}: {error}") from error


class _Tensors:
    """Takes tensors out of nested dicts and lists, so that the rest is JSON, and puts them back."""

    def __init__(self, tensors: dict[str, Tensor] | None = None):
        self.tensors = {} if tensors is None else tensors
        self._names: dict[tuple, str] = {}  # a tensor that several places share is written once

    def taken_out(self, value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
            name = self._names.setdefault(place, name)
            self.tensors[name] = value
            return {"tensor": name}
        if isinstance(value, dict):
            return {key: self.taken_out(inner, f"{name}.{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.taken_out(inner, f"{name}.{place}") for place, inner in enumerate(value)]
        return value

    def put_back(self, value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"tensor"}:
                return self.tensors[value["tensor"]]
            return {key: self.put_back(inner) for key, inner in value.items()}
        return [self.put_back(inner) for inner in value] if isinstance(value, list) else value


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """`optimizer.safetensors` and `optimizer.json` under the folder `path`, the scheduler included."""
    state = optimizer.state_dict()
    schedule = {name: value for name, value in scheduler.state_dict().items() if not name.startswith("lr_lambdas")}
    holder = _Tensors()
    described = {
        "state": {str(index): holder.taken_out(values, str(index)) for index, values in state["state"].items()},
        "groups": holder.taken_out(state["param_groups"], "groups"),
        "scheduler": holder.taken_out(schedule, "scheduler"),
    }
    storage.write_tensors(path / "optimizer.safetensors", holder.tensors)
    storage.write_json(path / "optimizer.json", described)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """Put the state that `save_optimizer` wrote into an optimizer of the same parameters and its scheduler.

    Raises: CheckpointError: a file is damaged, or of other parameters.
    """
    with _reading(path / "optimizer.safetensors"):
        holder = _Tensors(storage.load_tensors(path / "optimizer.safetensors"))
    with _reading(path / "optimizer.json"):
        described = holder.put_back(storage.read_json(path / "optimizer.json"))
        states = {int(index): values for index, values in described["state"].items()}
        optimizer.load_state_dict({"state": states, "param_groups": described["groups"]})
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in states.items():
            _restore_dtypes(optimizer.state[parameters[index]], values)
        scheduler.load_state_dict(scheduler.state_dict() | described["scheduler"])


def _restore_dtypes(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    """Optimizers cast what they load to the dtype of the parameter; states of bf16 parameters may be fp32."""
    for name, value in saved.items():
        if isinstance(value, dict):  # bitsandbytes nests the states of 8-bit optimizers
            _restore_dtypes(loaded, value)
        elif isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
            loaded[name] = value.to(loaded[name].device)


def save_random(path: Path) -> None:
    """The states of Python's, NumPy's and PyTorch's generators, as `random.safetensors` and `random.json`."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = torch_random() | {"numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    storage.write_tensors(path.with_suffix(".safetensors"), tensors)
    described = {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
    storage.write_json(path.with_suffix(".json"), described)


def load_random(path: Path) -> None:
    """Raises: CheckpointError: a file is missing or damaged."""
    if not path.with_suffix(".json").exists():
        raise CheckpointError(f"{path.with_suffix('.json')} is missing: the run had fewer processes")
    with _reading(path.with_suffix(".safetensors")):
        tensors = storage.load_tensors(path.with_suffix(".safetensors"))
        set_torch_random(tensors)
        keys = tensors["numpy"].numpy().astype(np.uint32)
    with _reading(path.with_suffix(".json")):
        described = storage.read_json(path.with_suffix(".json"))
        version, words, gauss = described["python"]
        random.setstate((version, tuple(words), gauss))
        kind, position, has_gauss, cached = described["numpy"]
        np.random.set_state((kind, keys, position, has_gauss, cached))


def torch_random() -> dict[str, Tensor]:
    """The states of PyTorch's generators: `cpu`, and `cuda.<index>` of every card."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_torch_random(states: dict[str, Tensor]) -> None:
    """Put the states of `torch_random` into the generators."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        count = sum(name.startswith("cuda.") for name in states)
        torch.cuda.set_rng_state_all([states[f"cuda.{index}"] for index in range(count)])

"""Files of this project: safetensors and JSON only, complete or absent, and locks between processes."""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it when the block ends well and removed when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.incomplete")
    _remove(temporary)
    try:
        yield temporary
        if target.is_dir() and not target.is_symlink():
            previous = target.with_name(f".{target.name}.previous")  # a folder cannot be renamed over another
            _remove(previous)
            os.replace(target, previous)
            os.replace(temporary, target)
            _remove(previous)
        else:
            os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with replacing(path) as temporary:
        save_file({name: one.detach().contiguous() for name, one in tensors.items()}, temporary, metadata=metadata)


def commit() -> str | None:
    """The commit of the code that writes; where git or its folder is absent, what POINTALIGN_COMMIT says."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        said = ""
    return said or os.environ.get("POINTALIGN_COMMIT")


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the file `path`, made if missing, as long as the block runs.

    Args:
        wait: until another process lets go of it; else the block runs at once, without the lock.

    Yields:
        Whether it is held. Always true where the system has no flock: processes then are not kept apart.
    """
    if os.name != "posix":
        yield True
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


# -- weights -----------------------------------------------------------------------------------------------------------


def training_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and the buffers (batch statistics) that go with them."""
    state = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for prefix, module in model.named_modules():
        if any(one.requires_grad for one in module.parameters(recurse=False)):
            state |= {f"{prefix}.{name}".lstrip("."): one for name, one in module.named_buffers(recurse=False)}
    return state


def read_tensors(path: Path, expected: set[str], ignored: str | None = None) -> dict[str, Tensor]:
    """Exactly the `expected` keys of a safetensors file, less those that contain `ignored`.

    Raises:
        ValueError: a key is missing or unexpected, or the file is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = {key: one for key, one in load_file(path).items() if ignored is None or ignored not in key}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    problems = [f"missing {key}" for key in sorted(expected - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected)]
    _refuse(path, problems)
    return state


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{path} does not fit this model ({len(problems)} problems):\n  {shown}")


def load_state(model: nn.Module, path: Path, expected: set[str], ignored: str | None = None) -> None:
    """Load exactly the `expected` keys from a safetensors file, values cast to the model's dtypes.

    Keys of the file that contain `ignored` are left out.

    Raises:
        ValueError: a key is missing, unexpected, or of another shape: nothing is ever loaded in part.
    """
    state = read_tensors(path, expected, ignored)
    own = model.state_dict(keep_vars=True)
    _refuse(
        path,
        [
            f"{key} has shape {list(state[key].shape)}, the model's is {list(own[key].shape)}"
            for key in sorted(state)
            if state[key].shape != own[key].shape
        ],
    )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


# -- what else a run needs to go on where it stopped -------------------------------------------------------------------


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """`optimizer.safetensors` and `optimizer.json` under the folder `path`, the scheduler included."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            where = tensors if isinstance(value, Tensor) else scalars
            where[f"{index}.{name}"] = value
    schedule = {name: value for name, value in scheduler.state_dict().items() if not name.startswith("lr_lambdas")}
    write_tensors(path / "optimizer.safetensors", tensors)
    write_json(path / "optimizer.json", {"groups": state["param_groups"], "scalars": scalars, "scheduler": schedule})


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    described = json.loads((path / "optimizer.json").read_text())
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*load_file(path / "optimizer.safetensors").items(), *described["scalars"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": described["groups"]})
    scheduler.load_state_dict(scheduler.state_dict() | described["scheduler"])


def save_random(path: Path) -> None:
    """The states of Python's, NumPy's and PyTorch's generators, as `random.safetensors` and `random.json`."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"cpu": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": one for index, one in enumerate(torch.cuda.get_rng_state_all())}
    write_tensors(path.with_suffix(".safetensors"), tensors)
    described = {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
    write_json(path.with_suffix(".json"), described)


def load_random(path: Path) -> None:
    described = json.loads(path.with_suffix(".json").read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    version, words, gauss = described["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = described["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        states = [tensors[f"cuda.{index}"] for index in range(len([key for key in tensors if key.startswith("cuda.")]))]
        torch.cuda.set_rng_state_all(states)

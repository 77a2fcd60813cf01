"""Files of this project: safetensors and JSON only, complete or absent; locks, hashes and the origin of a result."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
ROOT = Path(__file__).parents[1]  # the checkout, where there is one
# Import names of what a result may depend on beside torch; absent ones are left out of the record.
PACKAGES = (
    "transformers", "peft", "accelerate", "bitsandbytes", "liger_kernel", "scipy", "fpsample", "torch_quickfps",
    "torch_fps",
)  # fmt: skip


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=metadata)


def file_hash(*paths: Path) -> str:
    """SHA-256 of the contents of files, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock on the file `path`, created if missing, while the block runs.

    Args:
        wait: wait until another process releases it; else the block runs at once, without the lock.

    Yields: Whether the lock is held. Always true where the system has no flock: nothing then separates processes.
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


# -- the origin of a result --------------------------------------------------------------------------------------------


def provenance(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat a result of `device`: versions, commit, date, load of the machine.

    Nothing here raises where git, lscpu, nvidia-smi or a package is missing: the field is None. POINTALIGN_COMMIT names
    the commit where git does not.
    """
    commit, changed = _commit()
    return {
        "device": device_name(device),
        "driver": _output(*DRIVER_QUERY) if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: version_of(name) for name in ("torch", "transformers", "triton", "numpy")},
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "python": platform.python_version(),
        "commit": commit,
        "uncommitted_changes": changed,
        "date": datetime.date.today().isoformat(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's with the number of threads that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"Model name:\s*(.+)", _output("lscpu") or "")
    return f"{model[1] if model else platform.machine()}, threads: {torch.get_num_threads()}"


def version_of(import_name: str) -> str | None:
    """The version of the package that is imported under this name; its wheel may be named otherwise.

    Returns: None where no such package is installed.
    """
    distributions = _distributions().get(import_name)
    return importlib.metadata.version(distributions[0]) if distributions else None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this code, and whether tracked files differ from it."""
    if _output("git", "ls-files", "--error-unmatch", __file__) is None:  # no git, or somebody else's repository
        return os.environ.get("POINTALIGN_COMMIT"), None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return _output("git", "rev-parse", "--short=12", "HEAD"), None if changed is None else bool(changed)


_distributions = functools.cache(importlib.metadata.packages_distributions)


def _output(*command: str) -> str | None:
    """Standard output of a program; None where it is missing, fails or hangs."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment, timeout=60
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


# -- weights -----------------------------------------------------------------------------------------------------------


def training_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and the buffers (batch statistics) that go with them."""
    state = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for prefix, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            state |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in module.named_buffers(recurse=False)}
    return state


def read_tensors(path: Path, expected: set[str], ignored: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without those whose names contain `ignored`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the names differ from `expected`, or the file is damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = {key: tensor for key, tensor in load_file(path).items() if ignored is None or ignored not in key}
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
    """Load the tensors that `read_tensors` returns into a model, cast to the model's dtypes.

    Raises: ValueError: a key is missing, unexpected, or of another shape: nothing is ever loaded in part.
    """
    state = read_tensors(path, expected, ignored)
    parameters = model.state_dict(keep_vars=True)
    problems = [
        f"{key} has shape {list(value.shape)}, the model's is {list(parameters[key].shape)}"
        for key, value in sorted(state.items())
        if value.shape != parameters[key].shape
    ]
    _refuse(path, problems)
    with torch.no_grad():
        for key, value in state.items():
            parameters[key].copy_(value)


# -- optimizer and random numbers, for a run that is resumed -----------------------------------------------------------


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
    """`optimizer.safetensors` and `optimizer.json` under the folder `path`, the scheduler included."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"{index}.{name}"] = value
    schedule = {name: value for name, value in scheduler.state_dict().items() if not name.startswith("lr_lambdas")}
    write_tensors(path / "optimizer.safetensors", tensors)
    write_json(path / "optimizer.json", {"groups": state["param_groups"], "scalars": scalars, "scheduler": schedule})


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> None:
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
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
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
        count = sum(key.startswith("cuda.") for key in tensors)
        torch.cuda.set_rng_state_all([tensors[f"cuda.{index}"] for index in range(count)])

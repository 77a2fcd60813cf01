"""Files of this project: safetensors and JSON only, complete or absent; locks, hashes and the origin of a result."""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
# What safetensors raises for a header that names types or shapes PyTorch does not know, beside its own error.
DAMAGED_TENSORS = (KeyError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError)
ROOT = Path(__file__).parents[1]  # the checkout, where there is one
# Import names of what a result may depend on beside torch; absent ones are left out of the record.
PACKAGES = (
    "transformers", "peft", "accelerate", "bitsandbytes", "liger_kernel", "scipy", "fpsample", "torch_quickfps",
    "torch_fps",
)  # fmt: skip


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`, renamed to it when the block ends well and removed when it does not.

    What the block wrote is on the disk before it takes the name, and has the mode of any new file of this user:
    safetensors alone would let nobody else read it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.incomplete")
    _remove(temporary)
    temporary.touch()
    mode = stat.S_IMODE(temporary.stat().st_mode)
    _remove(temporary)
    try:
        yield temporary
        files = [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]
        for path in files:
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
        move_into_place(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def move_into_place(complete: Path, target: Path) -> None:
    """Rename a file or folder to `target` once its bytes are on the disk; a `target` that exists is replaced.

    A folder cannot be renamed over another: the one that is replaced gets a name of its own and is then deleted.
    """
    flush(complete)
    if target.is_dir() and not target.is_symlink():
        previous = target.with_name(f".{target.name}.previous")
        _remove(previous)
        os.replace(target, previous)
        os.replace(complete, target)
        _flush_path(target.parent)
        _remove(previous)
    else:
        os.replace(complete, target)
        _flush_path(target.parent)


def flush(path: Path) -> None:
    """Return when a file, or a folder with all in it, is on the disk and outlives a power failure."""
    for inner in [*path.rglob("*"), path] if path.is_dir() else [path]:
        if not inner.is_symlink() and (inner.is_file() or inner.is_dir()):
            _flush_path(inner)


def _flush_path(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # other systems cannot open folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, kind: type = dict) -> Any:
    """The value of a JSON file, a `kind` (dict or list).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or holds another kind of value; the message names the file.
    """
    try:
        return parse_json(path.read_bytes(), kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str | bytes, kind: type = dict) -> Any:
    """Raises: ValueError: it is no JSON, nested too deep, or another kind of value than `kind`."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("expected JSON, its lists and objects are nested too deep") from error
    except ValueError as error:
        raise ValueError(f"expected JSON: {error}") from error
    if not isinstance(value, kind):
        raise ValueError(f"expected a JSON {kind.__name__}, got a {type(value).__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Raises: OSError: the file could not be written, for example because the disk is full."""
    with replacing(path) as temporary:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata=metadata)
        except SafetensorError as error:  # what safetensors makes of every failure of the system
            raise OSError(f"{path} could not be written: {error}") from error


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
    with path.open("wb") as file:
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
    return _version(distributions[0]) if distributions else None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this code, and whether tracked files differ from it."""
    if _output("git", "ls-files", "--error-unmatch", __file__) is None:  # no git, or somebody else's repository
        return os.environ.get("POINTALIGN_COMMIT"), None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return _output("git", "rev-parse", "--short=12", "HEAD"), None if changed is None else bool(changed)


_distributions = functools.cache(importlib.metadata.packages_distributions)


@functools.cache
def _version(distribution: str) -> str:
    return importlib.metadata.version(distribution)


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


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged; the message names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return load_file(path)
    except (SafetensorError, *DAMAGED_TENSORS) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def read_tensors(path: Path, expected: set[str], ignored: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without those whose names contain one of `ignored`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the names differ from `expected`, or the file is damaged.
    """
    state = {key: tensor for key, tensor in load_tensors(path).items() if not any(part in key for part in ignored)}
    require_names(path, state, expected)
    return state


def require_names(path: Path, state: Mapping[str, Tensor], expected: set[str]) -> None:
    """Raises: ValueError: the names of the tensors of the file `path` differ from `expected`."""
    problems = [f"missing {key}" for key in sorted(expected - state.keys())]
    problems += [f"unexpected {key}" for key in sorted(state.keys() - expected)]
    _refuse(path, problems)


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:10])
        raise ValueError(f"{path} does not fit this model ({len(problems)} problems):\n  {shown}")


def load_state(model: nn.Module, path: Path, expected: set[str], ignored: Collection[str] = ()) -> None:
    """Load the tensors that `read_tensors` returns into a model, cast to the model's dtypes.

    Raises: ValueError: a key is missing, unexpected, or of another shape: nothing is ever loaded in part.
    """
    copy_state(model, path, read_tensors(path, expected, ignored))


def copy_state(model: nn.Module, path: Path, state: Mapping[str, Tensor]) -> None:
    """Put the tensors of the file `path` into a model that has all of their names, cast to the model's dtypes.

    Raises: ValueError: one is of another shape: nothing is ever loaded in part.
    """
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

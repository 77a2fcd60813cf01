"""What a reader needs to repeat a measurement: device, versions, commit, date, load of the machine."""

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# import names of what a benchmark may run beside torch; absent ones are left out of the record
PACKAGES = (
    "transformers",
    "peft",
    "bitsandbytes",
    "liger_kernel",
    "scipy",
    "fpsample",
    "torch_quickfps",
    "torch_fps",
)


def _output(*command: str) -> str | None:
    """Standard output of a program; None where it is missing, fails or hangs, so that the field says null."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _distributions() -> Mapping[str, Sequence[str]]:
    return importlib.metadata.packages_distributions()


def version_of(import_name: str) -> str | None:
    """The version of the package that is imported under this name; its wheel may be named otherwise.

    Returns: None where no such package is installed.
    """
    distributions = _distributions().get(import_name)
    return importlib.metadata.version(distributions[0]) if distributions else None


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"Model name:\s*(.+)", _output("lscpu") or "")
    return f"{model[1] if model else platform.machine()}, threads: {torch.get_num_threads()}"


def load_average() -> float | None:
    """Processes that ran or waited over the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def provenance(device: torch.device) -> dict:
    """Fields of a result file. POINTALIGN_COMMIT names the commit where git is absent.

    Nothing here raises where git, lscpu, nvidia-smi or a package is missing: the field says null.
    """
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **{name: version_of(name) for name in ("torch", "triton", "numpy")},
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or os.environ.get("POINTALIGN_COMMIT"),
        "uncommitted_changes": None if changed is None else bool(changed),
        "date": datetime.date.today().isoformat(),
        "load_average": load_average(),
    }

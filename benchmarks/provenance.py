"""What a reader needs to repeat a measurement: device, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, no driver: the field says null


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"Model name:\s*(.+)", _output("lscpu") or "")
    return f"{model[1] if model else platform.machine()}, threads: {torch.get_num_threads()}"


def provenance(device: torch.device) -> dict:
    """Fields of a result file. POINTALIGN_COMMIT names the commit where git is absent."""
    versions = {}
    for package in ("torch", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "device": device_name(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        **versions,
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or os.environ.get("POINTALIGN_COMMIT"),
        "uncommitted_changes": bool(changed),
        "date": datetime.date.today().isoformat(),
    }

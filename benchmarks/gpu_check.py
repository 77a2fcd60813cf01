"""What this GPU box has, and whether the native library loads and computes there: the first minute of the suite.

    PYTHONPATH=.:kernels python benchmarks/gpu_check.py --output FOLDER [--rehearse]

Prints and writes FOLDER/gpu_check_<card>.json: card, driver, versions, measured ceilings. The exit status says whether
the native library ran on the device; `--rehearse` asks the same of a CPU.
"""

import argparse
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import torch
from gpu_probe import CARD, DEVICE, measured_ceilings

from pointalign.storage import device_name, provenance
from pointalign_kernels import farthest_point_sample, group_points, knn, point_ops

PACKAGES = ("transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "torch-fps", "torch-quickfps-cu130")


def versions() -> dict[str, str | None]:
    """Of the packages that rows of the tables depend on; None where one is missing."""
    installed = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return {name: installed.get(name) for name in PACKAGES}


def check_library() -> None:
    """Raises where the native point ops cannot run on the device or differ from those of the CPU."""
    if DEVICE.type not in point_ops.NATIVE_DEVICES:
        reason = point_ops._load_error or f"it was built for {sorted(point_ops.NATIVE_DEVICES)}"
        raise RuntimeError(f"no native point ops for {DEVICE.type}: {reason}")
    points = torch.rand(4, 1000, 6, generator=torch.Generator().manual_seed(0))
    moved = points.to(DEVICE)
    index = farthest_point_sample(points, 64, impl="reference")
    pairs = {
        "farthest_point_sample": (farthest_point_sample(moved, 64, impl="native"), index),
        "knn": (
            knn(moved[:, :64, :3], moved, 8, impl="native")[1],
            knn(points[:, :64, :3], points, 8, impl="reference")[1],
        ),
        "group_points": (
            group_points(moved, index.to(DEVICE), 8, impl="native"),
            group_points(points, index, 8, impl="reference"),
        ),
    }
    for name, (native, expected) in pairs.items():
        if not torch.equal(native.cpu(), expected):
            raise RuntimeError(f"{name} on {DEVICE.type} differs from the reference on the CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, where nothing is measured")
    options = parser.parse_args()
    if CARD == options.rehearse:
        parser.error("--rehearse is for machines without a GPU" if CARD else "needs a GPU (or --rehearse)")
    content = {
        "benchmark": "gpu_check",
        "provenance": provenance(DEVICE) | {"rehearsal": options.rehearse},
        "versions": versions(),
        "ceilings": measured_ceilings(),
    }
    if CARD:
        properties = torch.cuda.get_device_properties(DEVICE)
        content["card"] = {
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": properties.total_memory / 1e9,
            "l2_mb": properties.L2_cache_size / 1e6,
        }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"gpu_check_{re.sub(r'[^a-z0-9]+', '_', device_name(DEVICE).lower())}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))
    check_library()
    print(f"native point ops on {DEVICE.type} equal the reference")


if __name__ == "__main__":
    sys.exit(main())

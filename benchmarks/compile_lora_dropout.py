"""Compile the kernels of LoRA's dropout ahead of time, without a card, and report what they need.

    python benchmarks/compile_lora_dropout.py [--output benchmarks/results/lora_dropout_resources.json]

Each row: kernel, compute capability, tile, registers per thread, stack and local bytes (spills), shared memory.
"""

import argparse
from pathlib import Path

import torch
from compile_alignment import compile_case, write_or_print

from pointalign.storage import provenance
from pointalign_kernels import lora_dropout_triton as kernels
from pointalign_kernels.alignment_tiles import TILES
from pointalign_kernels.philox import ROUNDS

COMMON = {"NUM_ROUNDS": ROUNDS, "PRECISION": "ieee", "RANK": kernels.LARGEST_RANGE}
CASES = (  # in bf16, sums in slices
    ("down", kernels.down_kernel, kernels.DOWN_TILE, {"low_ptr": "fp32"}),
    ("down gradient", kernels.down_gradient_kernel, kernels.DOWN_GRADIENT_TILE, {"da_ptr": "fp32"}),
    ("input gradient", kernels.input_gradient_kernel, kernels.INPUT_GRADIENT_TILE, {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; standard output when missing")
    output = parser.parse_args().output
    types = {"seed_ptr": "i64", "scale": "fp32"}
    rows = [
        {"kernel": name, **compile_case(capability, kernel, COMMON | tile, types | pointers)}
        for capability in TILES
        for name, kernel, tile, pointers in CASES
    ]
    write_or_print({"provenance": provenance(torch.device("cpu")), "rows": rows}, output)


if __name__ == "__main__":
    main()

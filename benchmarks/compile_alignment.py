"""Compile the alignment kernels ahead of time for every supported card, without one, and report what they need.

    python benchmarks/compile_alignment.py [--tiles all] [--output benchmarks/results/alignment_resources.json]

Each row: kernel, compute capability, tile, registers per thread, stack and local bytes (spills), shared memory.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pointalign.storage import provenance
from pointalign_kernels import alignment_triton as kernels
from pointalign_kernels.alignment_tiles import TILES, BackwardTile, Tile

SHARED_MEMORY_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # most that one block may have
DOT = {"PRECISION": "ieee"}
ANY = ("dx_tiles", "db_tiles", "ranges", "adapters", "threshold", "scale")  # no multiples of 16


def linear_case(tile: Tile, silu: bool = True) -> tuple[object, dict, dict]:
    """Kernel, constants and pointer types that are not bf16."""
    constants = {"SILU": silu, "EVEN": True, **DOT, **kernels._options(tile)}
    return kernels.linear_kernel, constants, {"b_ptr": "fp32"} | ({} if silu else {"z_ptr": "fp32"})


def backward_case(tile: BackwardTile) -> tuple[object, dict, dict]:
    constants = {
        "DSILU": True,
        "SCALE": True,
        "EVEN_N": True,
        "EVEN_R": False,
        **DOT,
        **kernels._backward_options(tile),
    }
    return kernels.backward_kernel, constants, {"upstream_ptr": "fp32", "dw_ptr": "fp32", "db_ptr": "fp32"}


def cases(capability: int, every_tile: bool) -> list[tuple[str, object, dict, dict]]:
    """(name, kernel, constants, pointer types that are not bf16) of what a training step in bf16 launches."""
    tiles = TILES[capability]
    rows = []
    for tile in tiles.linear if every_tile else tiles.linear[:1]:
        rows += [("linear+silu", *linear_case(tile)), ("linear split-K", *linear_case(tile, silu=False))]
    rows += [("backward", *backward_case(tile)) for tile in (tiles.backward if every_tile else tiles.backward[:1])]
    options = {"EPS": 1e-8, "PARTS": 2, "BIAS": True, "LIMIT": 0.0, "ROWS": 1, "num_stages": 3}
    for width in (768, 2560):
        block = triton.next_power_of_2(width)
        constants = {**options, "BLOCK": block, "num_warps": max(1, block // 256)}
        pointers = {"y_ptr": "fp32", "b_ptr": "fp32", "cos_ptr": "fp32"}
        rows.append((f"cosine D={width}", kernels.cosine_kernel, constants, pointers))
    if every_tile:
        fp32 = {name: "fp32" for name in kernels.backward_kernel.arg_names if name.endswith("_ptr")}
        for tile in kernels.FLOAT32_TILES.backward:
            rows.append(("backward fp32", *backward_case(tile)[:2], fp32))
        pointers = {"cos_ptr": "fp32", "loss_ptr": "fp32"}
        rows.append(("mean", kernels.mean_kernel, {"BLOCK": 1024, "num_warps": 4, "num_stages": 3}, pointers))
    return rows


def compile_case(capability: int, kernel, constants: dict, pointers: dict) -> dict:
    """What a kernel needs; `pointers`: types of pointers that are not bf16 and of numbers that are not i32."""
    constants = dict(constants)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        kind = pointers.get(name, "bf16" if pointer else "i32")
        described = kind.startswith("tensordesc")
        signature[name] = f"*{kind}" if pointer and not described else kind
        if name not in ANY and not described and not kernel.params[place].do_not_specialize:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    sizes = ("ROWS", "COLS", "DEPTH", "DX_ROWS", "DX_COLS", "DX_DEPTH", "DW_ROWS", "DW_COLS", "DW_DEPTH")
    tile = [constants[key] for key in sizes if key in constants and {"DEPTH", "DX_DEPTH"} & constants.keys()]
    return {
        "capability": capability,
        "tile": tile,
        **options,
        "registers": int(found["REG"]),
        "stack_bytes": int(found["STACK"]),
        "local_bytes": int(found["LOCAL"]),
        "shared_kib": compiled.metadata.shared / 1024,
        "shared_limit_kib": SHARED_MEMORY_KIB[capability],
        "matrix_instruction": next((name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), None),
        "asynchronous_copy": "cp.async" in ptx,
    }


def write_or_print(content: dict, output: Path | None) -> None:
    text = json.dumps(content, indent=1) + "\n"
    if output:
        output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", choices=("largest", "all"), default="largest", help="which rows of the tile table")
    parser.add_argument("--output", type=Path, help="JSON file to write; standard output when missing")
    options = parser.parse_args()
    rows = [
        {"kernel": name, **compile_case(capability, kernel, constants, pointers)}
        for capability in TILES
        for name, kernel, constants, pointers in cases(capability, options.tiles == "all")
    ]
    content = {"provenance": provenance(torch.device("cpu")), "tiles": options.tiles, "rows": rows}
    write_or_print(content, options.output)


if __name__ == "__main__":
    main()

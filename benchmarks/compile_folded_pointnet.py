"""Compile the kernel of the folded mini-PointNet ahead of time, without a card, and count what it and PyTorch move.

    python benchmarks/compile_folded_pointnet.py [--output benchmarks/results/folded_pointnet_resources.json]

Rows: compute capability, points of a group, tile, registers per thread, stack and local bytes (spills), shared memory.
Traffic: launches and bytes of a forward pass over 16 clouds in bf16 at the paper's sizes. PyTorch's are counted on
tensors without data: every operator that is no view reads its inputs and writes its results once.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from compile_alignment import compile_case, write_or_print
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pointalign.models.configuration import PRESETS, PointBertConfig
from pointalign.models.point_encoder import MiniPointNet, fold_pointnet
from pointalign.storage import provenance
from pointalign_kernels import folded_pointnet_triton as kernels
from pointalign_kernels.alignment_tiles import TILES
from pointalign_kernels.folded_pointnet import MAX_POINTS, MAX_WIDTH, FoldedPointNet, folded_pointnet_reference

CLOUDS = 16
CONFIG = PointBertConfig(**PRESETS["minigpt3d-phi2"]["point_config"])


class Traffic(TorchDispatchMode):
    """Counts operators that are no views, and the bytes of their inputs and results."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.launches += 1
            self.bytes += sum(map(bytes_of, tensors))
        return result


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def compiled(capability: int, points: int, width: int, outputs: int) -> dict[str, Any]:
    tile = kernels.TILES[max(known for known in kernels.TILES if known <= capability)]
    constants = kernels.constants(CONFIG.in_channels, points, width, outputs, tile)
    row = compile_case(capability, kernels.folded_pointnet_kernel, constants | {"PRECISION": "ieee"}, {})
    return {"points": points, **row, "rows": tile["ROWS"]}


def paper_weights() -> FoldedPointNet:
    net = MiniPointNet(CONFIG.in_channels, CONFIG.pointnet_width or CONFIG.group_dim, CONFIG.group_dim).bfloat16()
    return fold_pointnet(*(part.eval() for part in (net.first_conv, net.second_conv)))


def traffic(weights: FoldedPointNet) -> list[dict[str, Any]]:
    """Of PyTorch, and of the kernel, whose programs read the weights from L2, with the tiles of 80 and of 90."""
    shape = (CLOUDS, CONFIG.num_groups, CONFIG.group_size, CONFIG.in_channels)
    groups = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    pairs = [tuple(t.to("meta") for t in part) if isinstance(part, tuple) else part.to("meta") for part in weights]
    with torch.no_grad(), Traffic() as counted:
        out = folded_pointnet_reference(groups, FoldedPointNet(*pairs))  # type: ignore[arg-type]
    weight_bytes = sum(map(bytes_of, weights.tensors()))
    rows = [{"form": "PyTorch", "launches": counted.launches, "memory_bytes": counted.bytes, "l2_weight_bytes": None}]
    moved = bytes_of(groups) + bytes_of(out) + weight_bytes
    for capability in (80, 90):
        tile = kernels.TILES[capability]
        programs = kernels._ceil(CLOUDS * CONFIG.num_groups, tile["ROWS"] // CONFIG.group_size)
        row = {"form": f"kernel, {tile['ROWS']} points a program", "launches": 1, "memory_bytes": moved}
        rows.append(row | {"l2_weight_bytes": programs * weight_bytes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; standard output when missing")
    output = parser.parse_args().output
    weights = paper_weights()
    width, outputs = len(weights.lift[1]), len(weights.last[1])
    rows = [compiled(capability, CONFIG.group_size, width, outputs) for capability in TILES]
    rows += [
        compiled(capability, points, MAX_WIDTH, MAX_WIDTH) for capability in (89, 90) for points in (1, MAX_POINTS)
    ]
    content = {
        "provenance": provenance(torch.device("cpu")),
        "rows": rows,
        "clouds": CLOUDS,
        "groups": CONFIG.num_groups,
        "points": CONFIG.group_size,
        "traffic": traffic(weights),
    }
    write_or_print(content, output)


if __name__ == "__main__":
    main()

"""The folded mini-PointNet as one Triton kernel: of a group its points are read and its vector is written.

A program has ROWS points of whole groups. Both halves are the same loop, over chunks of the inner columns,

    total += relu(x A_chunk^T + bias) B_chunk^T

so nothing between the points and the vector of a group is ever larger than a chunk, but for what the registers hold:
the features between the halves and the total, `[ROWS, w]` and `[ROWS, d]`. The published module concatenates the
maximum of a group to its points; here its product with the shared weights is computed once per group, chunk by chunk,
and is the bias of the second loop. Products are those of tensor cores, of 16-bit factors summed in fp32; each factor is
rounded once. Every program reads all weights, from L2: more rows a program mean less of that traffic.

A program has at most 16 groups. They are padded to its rows by repeating their last point, which changes no maximum. As
in PyTorch, a NaN passes through the maxima: it shows in the vector of its group.

Shape legend: T groups of k points with C channels; w features of a point; d features of a group.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton types a launch as a plain call of the kernel)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointalign_kernels.alignment_triton import INTERPRETED, _capability, _ceil, _precision

# Points of a program, inner columns of a step, warps, pipeline stages, by compute capability. Chosen so that nothing
# spills and shared memory fits (tests/test_compile_folded_pointnet.py), not measured.
TILES = {
    80: {"ROWS": 64, "CHUNK": 32, "num_warps": 8, "num_stages": 2},
    90: {"ROWS": 128, "CHUNK": 32, "num_warps": 8, "num_stages": 3},
    120: {"ROWS": 64, "CHUNK": 32, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def _transposed(w_ptr, outputs, inputs, num_outputs: tl.constexpr, num_inputs: tl.constexpr):
    """Tile `[inputs, outputs]` of the transpose of a weight `[num_outputs, num_inputs]`, zero outside."""
    mask = (inputs[:, None] < num_inputs) & (outputs[None, :] < num_outputs)
    return tl.load(w_ptr + outputs[None, :] * num_inputs + inputs[:, None], mask=mask, other=0.0)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _maximum_of_groups(x, GROUPS: tl.constexpr):
    """`[ROWS, columns]` -> `[GROUPS, columns]`"""
    return tl.reduce(tl.reshape(x, (GROUPS, x.shape[0] // GROUPS, x.shape[1])), 1, _larger)


@triton.jit
def _repeated(x, TIMES: tl.constexpr):
    """`[rows, columns]` -> `[rows * TIMES, columns]`, every row TIMES times in turn."""
    wide = tl.broadcast_to(x[:, None, :], (x.shape[0], TIMES, x.shape[1]))
    return tl.reshape(wide, (x.shape[0] * TIMES, x.shape[1]))


@triton.jit(do_not_specialize=["T"])
def folded_pointnet_kernel(
    points_ptr,  # [T, k, C]
    first_ptr, first_bias_ptr,  # [w / 2, C]
    lift_ptr, lift_bias_ptr,  # [w, w / 2]
    shared_ptr, shared_bias_ptr,  # [2w, w]
    local_ptr,  # [2w, w]
    last_ptr, last_bias_ptr,  # [d, 2w]
    out_ptr,  # [T, d]
    T, k,
    C: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, OUT: tl.constexpr,
    CHANNELS: tl.constexpr, COLS: tl.constexpr, OUT_COLS: tl.constexpr,  # C, WIDTH and OUT, padded
    GROUPS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    dtype = points_ptr.dtype.element_ty
    row = tl.arange(0, ROWS)
    group = tl.minimum(tl.program_id(0) * GROUPS + row // (ROWS // GROUPS), T - 1).to(tl.int64)
    place = tl.minimum(row % (ROWS // GROUPS), k - 1)
    channels = tl.arange(0, CHANNELS)
    cols = tl.arange(0, COLS)
    out_cols = tl.arange(0, OUT_COLS)
    points = points_ptr + (group * k + place)[:, None] * C + channels[None, :]
    x = tl.load(points, mask=channels[None, :] < C, other=0.0)

    features = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, HALF, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        bias = tl.load(first_bias_ptr + inner, mask=inner < HALF, other=0.0).to(tl.float32)
        hidden = tl.dot(x, _transposed(first_ptr, inner, channels, HALF, C), input_precision=PRECISION)
        hidden = _larger(hidden + bias[None, :], 0.0).to(dtype)
        features = tl.dot(hidden, _transposed(lift_ptr, cols, inner, WIDTH, HALF), features, input_precision=PRECISION)
    features += tl.load(lift_bias_ptr + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]

    maximum = _maximum_of_groups(features, GROUPS).to(dtype)
    maximum = _repeated(maximum, 16 // GROUPS)  # a product has at least 16 rows
    local = features.to(dtype)
    total = tl.zeros((ROWS, OUT_COLS), tl.float32)
    for start in range(0, INNER, CHUNK):
        inner = start + tl.arange(0, CHUNK)
        bias = tl.load(shared_bias_ptr + inner, mask=inner < INNER, other=0.0).to(tl.float32)
        shared = tl.dot(maximum, _transposed(shared_ptr, inner, cols, INNER, WIDTH), input_precision=PRECISION)
        shared = _repeated(shared + bias[None, :], ROWS // 16)
        hidden = tl.dot(local, _transposed(local_ptr, inner, cols, INNER, WIDTH), input_precision=PRECISION)
        hidden = _larger(hidden + shared, 0.0).to(dtype)
        total = tl.dot(hidden, _transposed(last_ptr, out_cols, inner, OUT, INNER), total, input_precision=PRECISION)

    vector = _maximum_of_groups(total, GROUPS)
    vector += tl.load(last_bias_ptr + out_cols, mask=out_cols < OUT, other=0.0).to(tl.float32)[None, :]
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = (group[:, None] < T) & (out_cols[None, :] < OUT)
    tl.store(out_ptr + group.to(tl.int64)[:, None] * OUT + out_cols[None, :], vector.to(dtype), mask=mask)


# ---------------------------------------------------------------- launch


def tile_of(device: torch.device) -> dict[str, int]:
    capability = 80 if INTERPRETED else _capability(device)
    return TILES[max(known for known in TILES if known <= capability)]


def padded(size: int) -> int:
    """A power of two, at least 16: the least rows, columns and depth of a product."""
    return max(16, triton.next_power_of_2(size))


def constants(channels: int, points: int, width: int, outputs: int, tile: dict[str, int]) -> dict[str, int]:
    """What the kernel is compiled for, but for the precision of its products."""
    sizes = {"C": channels, "HALF": width // 2, "WIDTH": width, "INNER": 2 * width, "OUT": outputs}
    columns = {"CHANNELS": padded(channels), "COLS": padded(width), "OUT_COLS": padded(outputs)}
    return sizes | columns | {"GROUPS": min(16, tile["ROWS"] // triton.next_power_of_2(points))} | tile


def launch(groups: Tensor, weights: Sequence[Tensor], out: Tensor) -> None:
    """Write the vectors of groups `[B, G, k, C]` into `out [B, G, d]`; all tensors are contiguous."""
    batch, num_groups, points, channels = groups.shape
    total = batch * num_groups
    if total == 0:
        return
    sizes = constants(channels, points, weights[2].shape[0], out.shape[2], tile_of(groups.device))
    folded_pointnet_kernel[(_ceil(total, sizes["GROUPS"]),)](
        groups, *weights, out, total, points, PRECISION=_precision(groups.dtype), **sizes
    )

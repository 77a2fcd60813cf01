"""Triton kernels of LoRA's dropout: masks exist in registers only, between a load or a product and its use.

    down_kernel             low = (mask * x) A^T           a program: rows of an adapter, a slice of the K inputs
    down_gradient_kernel    dA = dlow^T (mask * x)         a program: columns of an adapter, a slice of the R rows
    input_gradient_kernel   dx += sum of mask * (dlow A)   a program: a tile of dx, all adapters
    sum_kernel              slices added in a fixed order, for there are no atomics

Bytes of device memory per element of x, 16 bits, for an adapter whose product is cuBLAS's and whose mask is stored, and
for these kernels, which read what several adapters share from the L2 cache or once:

    forward        dropout reads 2, writes 2 + 1; the product reads 2       7 an adapter    2 all adapters
    dA             x * mask reads 3, writes 2; the product reads 2          7 an adapter    2 all adapters
    dx             the product writes 2; the sum reads 5, writes 2          9 an adapter    4 all adapters

So masked products do not go to cuBLAS. Philox costs about 9 integer instructions an element and use instead, which
may bound the kernels: a call serves eight columns, in the order in which a thread loads 16 bytes.

Shape legend: R rows; K inputs; A adapters of rank r, each in `ranges` of RANK; S = A r.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton types a launch as a plain call of the kernel)

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointalign_kernels.alignment_triton import _ceil, _multiprocessors, _precision
from pointalign_kernels.philox import ROUNDS

# Rows and columns of a tile of x, warps, pipeline stages; predictions from registers and shared memory, not measured.
DOWN_TILE = {"ROWS": 64, "COLS": 64, "num_warps": 8, "num_stages": 3}
DOWN_GRADIENT_TILE = {"ROWS": 64, "COLS": 64, "num_warps": 4, "num_stages": 3}
INPUT_GRADIENT_TILE = {"ROWS": 64, "COLS": 128, "num_warps": 8, "num_stages": 2}
LARGEST_RANGE = 64
MAX_PARTS = 8  # slices of a sum
PROGRAMS = 2  # on a multiprocessor, that slices shall provide


@triton.jit
def _kept(
    seed, rows, first, adapter, threshold, ROWS: tl.constexpr, COLS: tl.constexpr, NUM_ROUNDS: tl.constexpr
):  # fmt: skip
    """Mask `[ROWS, COLS]` of the columns from `first` on, a multiple of eight."""
    zeros = tl.zeros((ROWS, COLS // 8), tl.int32)
    octets = zeros + (first // 8 + tl.arange(0, COLS // 8))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, octets, zeros + rows[:, None], zeros + adapter, zeros, NUM_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, COLS // 8, 2, 2]: w0, w1, w2, w3
    numbers = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.reshape(numbers, (ROWS, COLS)) >= threshold


@triton.jit(do_not_specialize=["R"])
def down_kernel(
    x_ptr,  # [R, K]
    a_ptr,  # [S, K]
    seed_ptr,  # [1]
    low_ptr,  # [R, S], or fp32 partial sums [parts, R, S]
    R, K, part_size, rank, ranges, threshold, scale,
    NUM_ROUNDS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    adapter = tl.program_id(1) // ranges
    place = tl.program_id(1) % ranges * RANK + tl.arange(0, RANK)
    factors = adapter * rank + place
    part = tl.program_id(2)
    seed = tl.load(seed_ptr)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
    total = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(part * part_size, tl.minimum((part + 1) * part_size, K), COLS):
        cols = first + tl.arange(0, COLS)
        x = tl.load(x_rows + cols[None, :], mask=(rows[:, None] < R) & (cols[None, :] < K), other=0.0)
        inside = (place[None, :] < rank) & (cols[:, None] < K)
        a = tl.load(a_ptr + factors[None, :] * K + cols[:, None], mask=inside, other=0.0)
        kept = _kept(seed, rows, first, adapter, threshold, ROWS, COLS, NUM_ROUNDS)
        total = tl.dot(tl.where(kept, x, 0.0).to(x.dtype), a, total, input_precision=PRECISION)
    low_rows = low_ptr + (part.to(tl.int64) * R + rows[:, None]) * (tl.num_programs(1) // ranges * rank)
    mask = (rows[:, None] < R) & (place[None, :] < rank)
    tl.store(low_rows + factors[None, :], (total * scale).to(low_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def down_gradient_kernel(
    x_ptr,  # [R, K]
    dlow_ptr,  # [R, S]
    seed_ptr,  # [1]
    da_ptr,  # [S, K], or fp32 partial sums [parts, S, K]
    R, K, part_size, rank, ranges, threshold,
    NUM_ROUNDS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * COLS
    cols = first + tl.arange(0, COLS)
    adapter = tl.program_id(1) // ranges
    place = tl.program_id(1) % ranges * RANK + tl.arange(0, RANK)
    factors = adapter * rank + place
    width = tl.num_programs(1) // ranges * rank  # S
    part = tl.program_id(2)
    seed = tl.load(seed_ptr)
    total = tl.zeros((RANK, COLS), tl.float32)
    for start in range(part * part_size, tl.minimum((part + 1) * part_size, R), ROWS):
        rows = start + tl.arange(0, ROWS)
        x_rows = x_ptr + rows.to(tl.int64)[:, None] * K
        x = tl.load(x_rows + cols[None, :], mask=(rows[:, None] < R) & (cols[None, :] < K), other=0.0)
        inside = (place[:, None] < rank) & (rows[None, :] < R)
        dlow = tl.load(dlow_ptr + rows[None, :] * width + factors[:, None], mask=inside, other=0.0)
        kept = _kept(seed, rows, first, adapter, threshold, ROWS, COLS, NUM_ROUNDS)
        total = tl.dot(dlow, tl.where(kept, x, 0.0).to(x.dtype), total, input_precision=PRECISION)
    da_rows = da_ptr + (part.to(tl.int64) * width + factors[:, None]) * K
    mask = (place[:, None] < rank) & (cols[None, :] < K)
    tl.store(da_rows + cols[None, :], total.to(da_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def input_gradient_kernel(
    dx_ptr,  # [R, K], read and written
    dlow_ptr,  # [R, S]
    a_ptr,  # [S, K]
    seed_ptr,  # [1]
    R, K, rank, adapters, threshold,
    NUM_ROUNDS: tl.constexpr, PRECISION: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    cols = first + tl.arange(0, COLS)
    seed = tl.load(seed_ptr)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for adapter in range(adapters):
        product = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, rank, RANK):
            place = start + tl.arange(0, RANK)
            factors = adapter * rank + place
            inside = (rows[:, None] < R) & (place[None, :] < rank)
            dlow = tl.load(dlow_ptr + rows[:, None] * (adapters * rank) + factors[None, :], mask=inside, other=0.0)
            inside = (place[:, None] < rank) & (cols[None, :] < K)
            a = tl.load(a_ptr + factors[:, None] * K + cols[None, :], mask=inside, other=0.0)
            product = tl.dot(dlow, a, product, input_precision=PRECISION)
        total += tl.where(_kept(seed, rows, first, adapter, threshold, ROWS, COLS, NUM_ROUNDS), product, 0.0)
    places = dx_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :]
    mask = (rows[:, None] < R) & (cols[None, :] < K)
    dx = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    tl.store(places, (dx + total).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "parts"])
def sum_kernel(parts_ptr, out_ptr, size, parts, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(parts_ptr + part * size + places, mask=places < size, other=0.0)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=places < size)


# ---------------------------------------------------------------- launches


def _range(rank: int) -> int:
    """Factors of an adapter that a program handles: a product has at least 16."""
    return min(LARGEST_RANGE, max(16, triton.next_power_of_2(rank)))


def _parts(x: Tensor, programs: int, steps: int) -> int:
    """Slices of a sum of `steps` steps, so that the programs fill the card."""
    return max(1, min(MAX_PARTS, steps, PROGRAMS * _multiprocessors(x.device) // programs))


def _sum(parts: Tensor, out: Tensor) -> None:
    block = 1024
    sum_kernel[(_ceil(out.numel(), block),)](parts, out, out.numel(), len(parts), BLOCK=block)


def down(x: Tensor, a: Tensor, seed: Tensor, adapters: int, threshold: int, scale: float, low: Tensor) -> None:
    """Write `scale * (mask * x) A^T` into `low [R, S]`; x `[R, K]` and a `[S, K]` are contiguous."""
    rows, inputs = x.shape
    if rows == 0:
        return
    rank, tile = len(a) // adapters, DOWN_TILE
    block = _range(rank)
    ranges, steps = _ceil(rank, block), _ceil(inputs, tile["COLS"])
    row_tiles = _ceil(rows, tile["ROWS"])
    parts = _parts(x, row_tiles * adapters * ranges, steps)
    out = low if parts == 1 else x.new_empty((parts, *low.shape), dtype=torch.float32)
    down_kernel[(row_tiles, adapters * ranges, parts)](
        x, a, seed, out, rows, inputs, _ceil(steps, parts) * tile["COLS"], rank, ranges, threshold, scale,
        NUM_ROUNDS=ROUNDS, PRECISION=_precision(x.dtype), RANK=block, **tile,
    )  # fmt: skip
    if parts > 1:
        _sum(out, low)


def down_gradient(x: Tensor, dlow: Tensor, seed: Tensor, adapters: int, threshold: int, da: Tensor) -> None:
    """Write `dlow^T (mask * x)` into `da [S, K]`; all contiguous, dlow `[R, S]`."""
    rows, inputs = x.shape
    rank, tile = len(da) // adapters, DOWN_GRADIENT_TILE
    block = _range(rank)
    ranges, steps = _ceil(rank, block), _ceil(rows, tile["ROWS"])
    col_tiles = _ceil(inputs, tile["COLS"])
    parts = _parts(x, col_tiles * adapters * ranges, max(1, steps))
    out = da if parts == 1 else x.new_empty((parts, *da.shape), dtype=torch.float32)
    down_gradient_kernel[(col_tiles, adapters * ranges, parts)](
        x, dlow, seed, out, rows, inputs, _ceil(steps, parts) * tile["ROWS"], rank, ranges, threshold,
        NUM_ROUNDS=ROUNDS, PRECISION=_precision(x.dtype), RANK=block, **tile,
    )  # fmt: skip
    if parts > 1:
        _sum(out, da)


def input_gradient(dx: Tensor, dlow: Tensor, a: Tensor, seed: Tensor, adapters: int, threshold: int) -> None:
    """Add the sum of `mask * (dlow A)` over the adapters to `dx [R, K]`; all contiguous."""
    rows, inputs = dx.shape
    if rows == 0:
        return
    rank, tile = len(a) // adapters, INPUT_GRADIENT_TILE
    input_gradient_kernel[(_ceil(rows, tile["ROWS"]), _ceil(inputs, tile["COLS"]))](
        dx, dlow, a, seed, rows, inputs, rank, adapters, threshold,
        NUM_ROUNDS=ROUNDS, PRECISION=_precision(dx.dtype), RANK=_range(rank), **tile,
    )  # fmt: skip

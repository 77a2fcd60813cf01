"""Triton kernels of the alignment loss and their launches: eight for forward and backward together.

    F1, F2  z = x W^T + b, a = silu(z)                 `linear_kernel`, activation in the epilogue
    F3      y = a W^T in K-slices                      `linear_kernel`, fp32 partial sums (split-K)
    L       y summed + b; cos, d(1 - cos)/dy per row   `cosine_kernel`
    S       1 - mean cos                               `mean_kernel`, fixed order, no atomics
    B3..B1  dx = dz W * silu'(z), dW = dz^T x, db      `backward_kernel`, one launch per linear

L runs before the upstream gradient is known, so it writes the gradient of a single row's `1 - cos`; B3 multiplies its
fp32 accumulators by upstream / M, read on the device. dx, db and dW of a linear share a launch, in this order: the many
short tiles of dW fill the multiprocessors that the few long tiles of dx leave idle, and db, which waits for memory at
every step of its loop, does not come last. dx and dW have tiles of their own (`alignment_tiles.py`).

Shape legend: L tapped layers, M rows of point tokens, C hidden size, H projector width, D target width; G projectors
(L when stacked, 1 when shared) with R rows each (G * R = L * M); a linear maps K inputs to N outputs.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton types a launch as a plain call of the kernel)

import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from pointalign_kernels.alignment_tiles import BackwardTile, Tile, Tiles, choose_backward, choose_linear, same, tiles_of
from pointalign_kernels.reference import EPSILON

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


FLOAT32_TILES = Tiles(  # fp32 without tf32 does not use the tensor cores
    linear=(Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    linear_share=0.75,
    backward=same(Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2)),
    backward_share=0.375,
)
INTERPRETER_TILES = Tiles(  # few, large steps: each step is a numpy call
    (Tile(128, 256, 256, 4, 1),), 0, (BackwardTile(Tile(128, 256, 256, 4, 1), Tile(256, 128, 128, 4, 1)),), 0
)
MAX_PARTS = 4  # K-slices of the last linear
BIAS_BLOCK = {"BIAS_ROWS": 128, "BIAS_COLS": 64}  # of dz, per step of a program that sums db


# ---------------------------------------------------------------- kernels


@triton.jit
def _product(
    a_ptr, a_row, a_depth, b_ptr, b_depth, b_col, rows, cols, num_rows, num_cols, first, last,
    DEPTH: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 tile `[rows, cols]` of a @ b over the depth range [first, last); EVEN: the range is a multiple of DEPTH."""
    depth = first + tl.arange(0, DEPTH)
    a_ptrs = a_ptr + rows[:, None] * a_row + depth[None, :] * a_depth
    b_ptrs = b_ptr + depth[:, None] * b_depth + cols[None, :] * b_col
    row_mask = rows[:, None] < num_rows
    col_mask = cols[None, :] < num_cols
    total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for start in range(first, last, DEPTH):
        if EVEN:
            a = tl.load(a_ptrs, mask=row_mask, other=0.0)
            b = tl.load(b_ptrs, mask=col_mask, other=0.0)
        else:
            left = last - start
            a = tl.load(a_ptrs, mask=row_mask & (tl.arange(0, DEPTH)[None, :] < left), other=0.0)
            b = tl.load(b_ptrs, mask=col_mask & (tl.arange(0, DEPTH)[:, None] < left), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += DEPTH * a_depth
        b_ptrs += DEPTH * b_depth
    return total


@triton.jit
def linear_kernel(
    x_ptr,  # [G, R, K]
    w_ptr,  # [G, N, K]
    b_ptr,  # [G, N]
    z_ptr,  # [G, R, N], or fp32 partial sums [parts, G, R, N] where SILU is off
    a_ptr,  # [G, R, N]
    R, N, K, part_size,
    SILU: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    row_tiles = tl.cdiv(R, ROWS)
    # Neighbouring programs share a weight tile, the larger operand, so it comes from device memory once.
    rows = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) // row_tiles * COLS + tl.arange(0, COLS)
    first = part * part_size
    z = _product(
        x_ptr + group * R * K, K, 1, w_ptr + group * N * K, 1, K,
        rows, cols, R, N, first, tl.minimum(first + part_size, K), DEPTH, EVEN, PRECISION,
    )  # fmt: skip
    _store_linear(z, rows, cols, group, part, b_ptr, z_ptr, a_ptr, R, N, SILU)


@triton.jit
def _store_linear(z, rows, cols, group, part, b_ptr, z_ptr, a_ptr, R, N, SILU: tl.constexpr):
    mask = (rows[:, None] < R) & (cols[None, :] < N)
    place = rows[:, None] * N + cols[None, :]
    if SILU:
        z += tl.load(b_ptr + group * N + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(z_ptr + group * R * N + place, z.to(z_ptr.dtype.element_ty), mask=mask)
        tl.store(a_ptr + group * R * N + place, (z * tl.sigmoid(z)).to(a_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(z_ptr + (part * tl.num_programs(1) + group) * R * N + place, z, mask=mask)


@triton.jit
def cosine_kernel(
    y_ptr,  # [PARTS, rows, D] partial sums
    b_ptr,  # [G, D]
    t_ptr,  # [M, D]
    cos_ptr,  # [rows] fp32
    dy_ptr,  # [rows, D] gradient of each row's 1 - cos
    num_rows, M, R, D, EPS: tl.constexpr,
    PARTS: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < D)
    y = tl.zeros((ROWS, BLOCK), tl.float32)
    for part in tl.static_range(PARTS):
        y += tl.load(y_ptr + (part * num_rows + rows) * D + cols, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(b_ptr + rows // R * D + cols, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + rows % M * D + cols, mask=mask, other=0.0).to(tl.float32)
    y_norm = tl.sqrt(tl.sum(y * y, 1, keep_dims=True))
    y_bound = tl.maximum(y_norm, EPS)
    t_unit = t / tl.maximum(tl.sqrt(tl.sum(t * t, 1, keep_dims=True)), EPS)
    cos = tl.sum(y / y_bound * t_unit, 1, keep_dims=True)
    tl.store(cos_ptr + rows, cos, mask=rows < num_rows)
    # Below the clamp the norm is still differentiated, as aten does; the norm of a zero row has gradient 0.
    along = tl.where(y_norm > 0, y / tl.where(y_norm > 0, y_norm, 1.0), 0.0)
    dy = (cos * along - t_unit) / y_bound
    if LIMIT > 0:  # a row of almost zero length would overflow fp16 to infinity
        dy = tl.where(dy > LIMIT, LIMIT, tl.where(dy < -LIMIT, -LIMIT, dy))
    tl.store(dy_ptr + rows * D + cols, dy.to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mean_kernel(cos_ptr, loss_ptr, M, BLOCK: tl.constexpr):
    layer = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, M, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.load(cos_ptr + layer * M + rows, mask=rows < M, other=0.0)
    tl.store(loss_ptr + layer, 1 - tl.sum(total, 0) / M)


@triton.jit
def _input_gradient(
    tile, dz_ptr, w_ptr, z_ptr, dx_ptr, scale, R, N, K, DSILU: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(R, ROWS)
    rows = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    cols = tile // row_tiles * COLS + tl.arange(0, COLS)
    dx = _product(dz_ptr, N, 1, w_ptr, K, 1, rows, cols, R, K, 0, N, DEPTH, EVEN, PRECISION)
    _store_input_gradient(dx, rows, cols, z_ptr, dx_ptr, scale, R, K, DSILU)


@triton.jit
def _store_input_gradient(dx, rows, cols, z_ptr, dx_ptr, scale, R, K, DSILU: tl.constexpr):
    mask = (rows[:, None] < R) & (cols[None, :] < K)
    place = rows[:, None] * K + cols[None, :]
    if DSILU:
        z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
        gate = tl.sigmoid(z)
        dx *= gate * (1 + z * (1 - gate))
    tl.store(dx_ptr + place, (dx * scale).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(
    tile, dz_ptr, x_ptr, dw_ptr, scale, R, N, K, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    col_tiles = tl.cdiv(K, COLS)
    rows = tile // col_tiles * ROWS + tl.arange(0, ROWS)
    cols = tile % col_tiles * COLS + tl.arange(0, COLS)
    dw = _product(dz_ptr, 1, N, x_ptr, K, 1, rows, cols, N, K, 0, R, DEPTH, EVEN, PRECISION)
    _store_weight_gradient(dw, rows, cols, dw_ptr, scale, N, K)


@triton.jit
def _store_weight_gradient(dw, rows, cols, dw_ptr, scale, N, K):
    mask = (rows[:, None] < N) & (cols[None, :] < K)
    tl.store(dw_ptr + rows[:, None] * K + cols[None, :], (dw * scale).to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gradient(tile, dz_ptr, db_ptr, scale, R, N, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tile * COLS + tl.arange(0, COLS)
    total = tl.zeros((COLS,), tl.float32)
    for start in range(0, R, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < R) & (cols[None, :] < N)
        block = tl.load(dz_ptr + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(block.to(tl.float32), 0)
    tl.store(db_ptr + cols, (total * scale).to(db_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def backward_kernel(
    dz_ptr,  # [G, R, N]
    w_ptr,  # [G, N, K]
    x_ptr,  # [G, R, K] input of this linear
    z_ptr,  # [G, R, K] what SiLU turned into x, where DSILU
    upstream_ptr,  # [G] fp32 gradient of each loss, where SCALE
    dx_ptr,  # [G, R, K]
    dw_ptr,  # [G, N, K]
    db_ptr,  # [G, N]
    R, N, K, dx_tiles, db_tiles,
    DSILU: tl.constexpr, SCALE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr,
    DX_ROWS: tl.constexpr, DX_COLS: tl.constexpr, DX_DEPTH: tl.constexpr,
    DW_ROWS: tl.constexpr, DW_COLS: tl.constexpr, DW_DEPTH: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
):  # fmt: skip
    """Programs in this order: tiles of dx (the longest first), column blocks of db, tiles of dW."""
    tile = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    dz_ptr += group * R * N
    scale = 1.0
    if SCALE:
        scale = tl.load(upstream_ptr + group) / R
    if tile < dx_tiles:
        _input_gradient(
            tile, dz_ptr, w_ptr + group * N * K, z_ptr + group * R * K, dx_ptr + group * R * K, scale, R, N, K,
            DSILU, EVEN_N, PRECISION, DX_ROWS, DX_COLS, DX_DEPTH,
        )  # fmt: skip
    elif tile < dx_tiles + db_tiles:
        _bias_gradient(tile - dx_tiles, dz_ptr, db_ptr + group * N, scale, R, N, BIAS_ROWS, BIAS_COLS)
    else:
        _weight_gradient(
            tile - dx_tiles - db_tiles, dz_ptr, x_ptr + group * R * K, dw_ptr + group * N * K, scale, R, N, K,
            EVEN_R, PRECISION, DW_ROWS, DW_COLS, DW_DEPTH,
        )  # fmt: skip


# ---------------------------------------------------------------- launches


def _tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    if INTERPRETED:
        return INTERPRETER_TILES
    if dtype == torch.float32:
        return FLOAT32_TILES
    return tiles_of(_capability(device))


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _precision(dtype: torch.dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _options(tile: Tile) -> dict[str, int]:
    return dict(zip(("ROWS", "COLS", "DEPTH", "num_warps", "num_stages"), tile, strict=True))


def _backward_options(tile: BackwardTile) -> dict[str, int]:
    names = ("DX_ROWS", "DX_COLS", "DX_DEPTH", "DW_ROWS", "DW_COLS", "DW_DEPTH")
    sizes = dict(zip(names, (*tile.dx[:3], *tile.dw[:3]), strict=True))
    return {**sizes, **BIAS_BLOCK, "num_warps": tile.dx.warps, "num_stages": tile.dx.stages}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, a: Tensor | None) -> Tensor:
    """Write `z = x W^T + b` and `a = silu(z)`; without z and a, return fp32 partial sums `[parts, G, R, N]` of `x W^T`.

    Args:
        x, weight, bias: `[G, R, K]`, `[G, N, K]`, `[G, N]`.
    """
    groups, rows, inputs = x.shape
    outputs = weight.shape[1]
    sliced = z is None

    tile = choose_linear(
        _tiles(x.device, x.dtype), _multiprocessors(x.device), groups * (MAX_PARTS if sliced else 1), rows, outputs
    )
    tiles = _ceil(rows, tile.rows) * _ceil(outputs, tile.cols)
    steps = _ceil(inputs, tile.depth)
    room = _multiprocessors(x.device) // (tiles * groups)
    parts = max(1, min(MAX_PARTS, steps, room)) if sliced else 1
    out = x.new_empty((parts, groups, rows, outputs), dtype=torch.float32) if z is None else z
    linear_kernel[(tiles, groups, parts)](
        x, weight, bias, out, a, rows, outputs, inputs, _ceil(steps, parts) * tile.depth,
        SILU=not sliced, EVEN=inputs % tile.depth == 0, PRECISION=_precision(x.dtype), **_options(tile),
    )  # fmt: skip
    return out


def cosine(partial: Tensor, bias: Tensor | None, target: Tensor, rows_per_group: int, dy: Tensor) -> Tensor:
    """Write each row's gradient of `1 - cos` into `dy` `[L * M, D]` and return the losses `[L]`, fp32.

    Args:
        partial: partial sums of the projections, `[parts, ...]` with L * M * D values per part.
        bias: `[G, D]`; None for none.
        target: `[M, D]`.
        rows_per_group: R, rows that share a bias.
    """
    rows, width = dy.shape
    num_rows = target.shape[0]
    cosines = torch.empty(rows, device=dy.device, dtype=torch.float32)
    loss = torch.empty(rows // num_rows, device=dy.device, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    rows_per_program = 64 if INTERPRETED else 1
    cosine_kernel[(_ceil(rows, rows_per_program),)](
        partial, bias, target, cosines, dy, rows, num_rows, rows_per_group, width, EPS=EPSILON,
        PARTS=partial.numel() // dy.numel(), BIAS=bias is not None,
        LIMIT=torch.finfo(dy.dtype).max if dy.dtype == torch.float16 else 0.0,
        ROWS=rows_per_program, BLOCK=block, num_warps=min(16, max(1, block // 256)),
    )  # fmt: skip
    mean_kernel[(loss.numel(),)](cosines, loss, num_rows, BLOCK=1024, num_warps=4)
    return loss


def backward(
    dz: Tensor, weight: Tensor, x: Tensor, z: Tensor | None, upstream: Tensor | None,
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """Write the gradients of a linear into `dx`, `dw` and `db`, except where they are None.

    Args:
        dz: `[G, R, N]`, gradient of its outputs.
        weight, x: `[G, N, K]` and its inputs `[G, R, K]`.
        z: `[G, R, K]` where `x = silu(z)`: dx is then the gradient of z.
        upstream: `[G]` fp32, gradients of the losses: all results are multiplied by `upstream / R`.
    """
    groups, rows, outputs = dz.shape
    inputs = x.shape[2]

    tile = choose_backward(
        _tiles(dz.device, dz.dtype), _multiprocessors(dz.device), groups, rows, outputs, inputs, dx is not None
    )
    dx_tiles = _ceil(rows, tile.dx.rows) * _ceil(inputs, tile.dx.cols) if dx is not None else 0
    db_tiles = _ceil(outputs, BIAS_BLOCK["BIAS_COLS"]) if db is not None else 0
    dw_tiles = _ceil(outputs, tile.dw.rows) * _ceil(inputs, tile.dw.cols) if dw is not None else 0
    backward_kernel[(dx_tiles + db_tiles + dw_tiles, groups)](
        dz, weight, x, *(dz if tensor is None else tensor for tensor in (z, upstream, dx, dw, db)),
        rows, outputs, inputs, dx_tiles, db_tiles,
        DSILU=z is not None, SCALE=upstream is not None, EVEN_N=outputs % tile.dx.depth == 0,
        EVEN_R=rows % tile.dw.depth == 0, PRECISION=_precision(dz.dtype), **_backward_options(tile),
    )  # fmt: skip

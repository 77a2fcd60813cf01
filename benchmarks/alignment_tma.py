"""The products of the alignment loss with TMA descriptors (sm_90): a way of the benchmark, measured but not shipped.

Operands come by the bulk copy engine instead of pointers in registers, which leaves room for the accumulators of
128 x 256 tiles; what lies outside of a matrix is read as zero, so that no load needs a mask. Programs are not
persistent: the linears have fewer programs than the card has multiprocessors, and the long tiles of dx and the short
ones of dW balance better in the order that the hardware gives them out than in a fixed one.

Rows of every operand must be multiples of 16 bytes. Epilogues and the sum of db are those of the library.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
# (Triton types a launch as a plain call of the kernel)

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pointalign_kernels import alignment_triton as library
from pointalign_kernels.alignment_tiles import BackwardTile, Tile, Tiles, choose_backward, choose_linear

store_linear, store_input_gradient = library._store_linear, library._store_input_gradient
store_weight_gradient, bias_gradient = library._store_weight_gradient, library._bias_gradient

TILES = Tiles(
    linear=(Tile(128, 128, 64, 8, 4), Tile(64, 64, 128, 4, 4)),
    linear_share=0.33,
    backward=(
        BackwardTile(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
        BackwardTile(Tile(64, 64, 128, 4, 3), Tile(128, 128, 64, 4, 3)),
    ),
    backward_share=0.3,
)


@triton.jit
def _product(
    a, b, group, row, col, first, last, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    A_BY_DEPTH: tl.constexpr, B_BY_DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 tile of a @ b over the depth range [first, last); BY_DEPTH: the operand's rows in memory are the depth."""
    total = tl.zeros((ROWS, COLS), tl.float32)
    for depth in range(first, last, DEPTH):
        if A_BY_DEPTH:
            left = a.load([group, depth, row]).reshape(DEPTH, ROWS).T
        else:
            left = a.load([group, row, depth]).reshape(ROWS, DEPTH)
        if B_BY_DEPTH:
            right = b.load([group, depth, col]).reshape(DEPTH, COLS)
        else:
            right = b.load([group, col, depth]).reshape(COLS, DEPTH).T
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def linear_tma_kernel(
    x,  # descriptor of [G, R, K], blocks [1, ROWS, DEPTH]
    w,  # descriptor of [G, N, K], blocks [1, COLS, DEPTH]
    b_ptr, z_ptr, a_ptr, R, N, K, part_size,
    SILU: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    part = tl.program_id(2)
    row_tiles = tl.cdiv(R, ROWS)
    row = tl.program_id(0) % row_tiles * ROWS
    col = tl.program_id(0) // row_tiles * COLS
    first = part * part_size
    last = tl.minimum(first + part_size, K)
    z = _product(x, w, group, row, col, first, last, ROWS, COLS, DEPTH, False, False, PRECISION)
    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    store_linear(z, rows, cols, group.to(tl.int64), part, b_ptr, z_ptr, a_ptr, R, N, SILU)


@triton.jit
def backward_tma_kernel(
    dz_rows,  # descriptor of dz [G, R, N], blocks [1, DX_ROWS, DX_DEPTH]
    w,  # descriptor of [G, N, K], blocks [1, DX_DEPTH, DX_COLS]
    dz_depth,  # descriptor of dz [G, R, N], blocks [1, DW_DEPTH, DW_ROWS]
    x,  # descriptor of [G, R, K], blocks [1, DW_DEPTH, DW_COLS]
    dz_ptr, z_ptr, upstream_ptr, dx_ptr, dw_ptr, db_ptr, R, N, K, dx_tiles, db_tiles,
    DSILU: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    DX_ROWS: tl.constexpr, DX_COLS: tl.constexpr, DX_DEPTH: tl.constexpr,
    DW_ROWS: tl.constexpr, DW_COLS: tl.constexpr, DW_DEPTH: tl.constexpr,
    BIAS_ROWS: tl.constexpr, BIAS_COLS: tl.constexpr,
):  # fmt: skip
    """Programs in the order of the library's `backward_kernel`."""
    tile = tl.program_id(0)
    group = tl.program_id(1)
    place = group.to(tl.int64)
    scale = 1.0
    if SCALE:
        scale = tl.load(upstream_ptr + group) / R
    if tile < dx_tiles:
        row_tiles = tl.cdiv(R, DX_ROWS)
        row, col = tile % row_tiles * DX_ROWS, tile // row_tiles * DX_COLS
        dx = _product(dz_rows, w, group, row, col, 0, N, DX_ROWS, DX_COLS, DX_DEPTH, False, True, PRECISION)
        rows, cols = row + tl.arange(0, DX_ROWS), col + tl.arange(0, DX_COLS)
        store_input_gradient(dx, rows, cols, z_ptr + place * R * K, dx_ptr + place * R * K, scale, R, K, DSILU)
    elif tile < dx_tiles + db_tiles:
        bias_gradient(tile - dx_tiles, dz_ptr + place * R * N, db_ptr + place * N, scale, R, N, BIAS_ROWS, BIAS_COLS)
    else:
        tile -= dx_tiles + db_tiles
        col_tiles = tl.cdiv(K, DW_COLS)
        row, col = tile // col_tiles * DW_ROWS, tile % col_tiles * DW_COLS
        dw = _product(dz_depth, x, group, row, col, 0, R, DW_ROWS, DW_COLS, DW_DEPTH, True, True, PRECISION)
        rows, cols = row + tl.arange(0, DW_ROWS), col + tl.arange(0, DW_COLS)
        store_weight_gradient(dw, rows, cols, dw_ptr + place * N * K, scale, N, K)


def _blocks(tensor: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """Blocks `[1, rows, cols]` of a contiguous `[G, ...]`."""
    return TensorDescriptor.from_tensor(tensor, [1, rows, cols])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, a: Tensor | None) -> Tensor:
    """As `alignment_triton.linear`."""
    groups, rows, inputs = x.shape
    outputs = weight.shape[1]
    sliced = z is None
    multiprocessors = library._multiprocessors(x.device)
    repeats = groups * (library.MAX_PARTS if sliced else 1)
    tile = choose_linear(TILES, multiprocessors, repeats, rows, outputs)
    tiles = library._ceil(rows, tile.rows) * library._ceil(outputs, tile.cols)
    steps = library._ceil(inputs, tile.depth)
    parts = max(1, min(library.MAX_PARTS, steps, multiprocessors // (tiles * groups))) if sliced else 1
    out = x.new_empty((parts, groups, rows, outputs), dtype=torch.float32) if z is None else z
    linear_tma_kernel[(tiles, groups, parts)](
        _blocks(x, tile.rows, tile.depth), _blocks(weight, tile.cols, tile.depth), bias, out, a,
        rows, outputs, inputs, library._ceil(steps, parts) * tile.depth,
        SILU=not sliced, PRECISION=library._precision(x.dtype), **library._options(tile),
    )  # fmt: skip
    return out


def backward(
    dz: Tensor, weight: Tensor, x: Tensor, z: Tensor | None, upstream: Tensor | None,
    dx: Tensor | None, dw: Tensor | None, db: Tensor | None,
) -> None:  # fmt: skip
    """As `alignment_triton.backward`."""
    groups, rows, outputs = dz.shape
    inputs = x.shape[2]
    tile = choose_backward(TILES, library._multiprocessors(dz.device), groups, rows, outputs, inputs, dx is not None)
    dx_tiles = library._ceil(rows, tile.dx.rows) * library._ceil(inputs, tile.dx.cols) if dx is not None else 0
    db_tiles = library._ceil(outputs, library.BIAS_BLOCK["BIAS_COLS"]) if db is not None else 0
    dw_tiles = library._ceil(outputs, tile.dw.rows) * library._ceil(inputs, tile.dw.cols) if dw is not None else 0
    backward_tma_kernel[(dx_tiles + db_tiles + dw_tiles, groups)](
        _blocks(dz, tile.dx.rows, tile.dx.depth), _blocks(weight, tile.dx.depth, tile.dx.cols),
        _blocks(dz, tile.dw.depth, tile.dw.rows), _blocks(x, tile.dw.depth, tile.dw.cols),
        dz, *(dz if tensor is None else tensor for tensor in (z, upstream, dx, dw, db)),
        rows, outputs, inputs, dx_tiles, db_tiles,
        DSILU=z is not None, SCALE=upstream is not None, PRECISION=library._precision(dz.dtype),
        **library._backward_options(tile),
    )  # fmt: skip


@contextmanager
def by_tma() -> Iterator[None]:
    """The alignment loss takes these launches inside."""
    before = library.linear, library.backward
    library.linear, library.backward = linear, backward
    try:
        yield
    finally:
        library.linear, library.backward = before

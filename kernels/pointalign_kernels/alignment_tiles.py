"""The tile table of the alignment kernels and the choice from it; imports neither Triton nor PyTorch.

A launch has few, long programs, so a larger tile saves traffic and a smaller one uses more multiprocessors. Each list
is ordered from large to small tiles, and a launch takes the first whose programs reach a share of the card's
multiprocessors.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Output rows and columns of a program, depth of a step of its loop, warps and pipeline stages."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


class BackwardTile(NamedTuple):
    """Tiles of a launch that computes dx and dW; both have the same warps and stages."""

    dx: Tile
    dw: Tile


class Tiles(NamedTuple):
    """Tiles of one card.

    Attributes:
        linear: of the launches that compute a linear.
        linear_share: programs per multiprocessor that a tile of `linear` must reach.
        backward: of the launches that compute gradients.
        backward_share: programs of dx (of dW where no dx is needed) per multiprocessor, likewise.
    """

    linear: tuple[Tile, ...]
    linear_share: float
    backward: tuple[BackwardTile, ...]
    backward_share: float


def same(*tiles: Tile) -> tuple[BackwardTile, ...]:
    """dx and dW in the same tile."""
    return tuple(BackwardTile(tile, tile) for tile in tiles)


def _filling(*tiles: Tile) -> Tiles:
    """Tiles of a card whose matrix units are the limit: programs on three quarters of it, dx on half of that."""
    return Tiles(tiles, 0.75, same(*tiles), 0.375)


# By compute capability. 80, 86, 89, 90: predictions of benchmarks/alignment_traffic.py (docs/performance.md), which no
# card has confirmed yet; tiles that spill registers are out. 100, 120: by analogy.
#   80 to 89, 120  mma.sync is slower than L2 delivers: an idle multiprocessor costs more than a small tile.
#   90             L2 is the limit: a linear on a third of the multiprocessors with a larger tile reads less and ends
#                  earlier. dW has the larger tile, since it has the most tiles. Four warps and 96 KiB: two blocks share
#                  a multiprocessor, and one computes while the other starts or stores.
TILES = {
    80: _filling(Tile(128, 128, 32, 8, 4), Tile(64, 128, 32, 4, 4), Tile(64, 64, 64, 4, 4), Tile(64, 32, 64, 4, 4)),
    86: _filling(Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4)),
    89: _filling(Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 4), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4)),
    90: Tiles(
        linear=(Tile(128, 128, 64, 8, 4), Tile(64, 64, 128, 4, 4)),
        linear_share=0.33,
        backward=(
            BackwardTile(Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 4)),
            BackwardTile(Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3)),
            BackwardTile(Tile(64, 64, 128, 4, 3), Tile(128, 128, 64, 4, 3)),
        ),
        backward_share=0.4,
    ),
    100: _filling(Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 8, 4), Tile(64, 32, 128, 4, 4)),
    120: _filling(Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 4), Tile(64, 64, 64, 4, 3), Tile(64, 32, 64, 4, 4)),
}


def tiles_of(capability: int) -> Tiles:
    """The tiles of a compute capability, or of the highest below it that the table has."""
    return TILES[max(known for known in TILES if known <= capability)]


def choose_linear(tiles: Tiles, multiprocessors: int, repeats: int, rows: int, outputs: int) -> Tile:
    """The largest tile that occupies enough of the card with `repeats` products `[rows, outputs]`."""

    def programs(tile: Tile) -> int:
        return repeats * _ceil(rows, tile.rows) * _ceil(outputs, tile.cols)

    wanted = tiles.linear_share * multiprocessors
    return next((tile for tile in tiles.linear if programs(tile) >= wanted), tiles.linear[-1])


def choose_backward(
    tiles: Tiles, multiprocessors: int, groups: int, rows: int, outputs: int, inputs: int, need_dx: bool
) -> BackwardTile:
    """The largest tiles of the gradients of `groups` linears that occupy enough of the card."""

    def programs(tile: BackwardTile) -> int:
        if need_dx:
            return groups * _ceil(rows, tile.dx.rows) * _ceil(inputs, tile.dx.cols)
        return groups * _ceil(outputs, tile.dw.rows) * _ceil(inputs, tile.dw.cols)

    wanted = tiles.backward_share * multiprocessors
    return next((tile for tile in tiles.backward if programs(tile) >= wanted), tiles.backward[-1])


def _ceil(size: int, block: int) -> int:
    return -(-size // block)

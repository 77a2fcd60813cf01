"""Tile sets of the alignment kernels that one call measures beside the table of the library.

`EARLIER` is the table that held before the traffic model. `LINEAR` and `BACKWARD` are the tiles that the model chose
from; those of `SPILLING_LINEAR` and `SPILLING_BACKWARD` spill registers, as benchmarks/alignment_traffic.py records.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from pointalign_kernels import alignment_triton
from pointalign_kernels.alignment_tiles import BackwardTile, Tile, Tiles, same

_EARLIER_90 = (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 5), Tile(64, 32, 128, 4, 4))
EARLIER = {90: Tiles(_EARLIER_90, 0.75, same(*_EARLIER_90), 0.375)}

LINEAR = {
    90: (
        Tile(128, 128, 64, 8, 4),
        Tile(64, 256, 64, 8, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(128, 64, 64, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(64, 64, 128, 4, 3),
    )
}
SPILLING_LINEAR = {90: (Tile(128, 256, 64, 8, 3), Tile(128, 256, 32, 8, 4), Tile(128, 128, 64, 4, 3))}
BACKWARD = {
    90: (
        *same(Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
        BackwardTile(Tile(64, 256, 64, 8, 3), Tile(128, 256, 32, 8, 3)),
        BackwardTile(Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 4, 3)),
        BackwardTile(Tile(64, 64, 128, 4, 3), Tile(128, 128, 64, 4, 3)),
        BackwardTile(Tile(64, 64, 128, 4, 3), Tile(128, 64, 64, 4, 3)),
    )
}
SPILLING_BACKWARD = {
    90: (
        *same(Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 4, 3)),
        BackwardTile(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3)),
        BackwardTile(Tile(128, 64, 64, 4, 3), Tile(128, 128, 64, 4, 3)),
    )
}


@contextmanager
def under(tiles: Tiles) -> Iterator[None]:
    """Launches inside take their tiles from this table, whatever the device."""
    before = alignment_triton._tiles
    alignment_triton._tiles = lambda device, dtype: tiles
    try:
        yield
    finally:
        alignment_triton._tiles = before

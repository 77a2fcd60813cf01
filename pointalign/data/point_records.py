"""Rows of points as bytes or text, to named columns: what the readers of the point formats share.

Every reader compares what the header promises with the bytes that are there before it touches the data, so that a
false header costs nothing; on a memory-mapped file the binary readers therefore are the header check as well.
Vectorised numpy does the reading: plyfile goes row by row in Python and laspy trusts the record counts of the header.
"""

import io
import mmap
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

Buffer = bytes | mmap.mmap
EXPANSION = 32  # bytes that a byte of a compressed file may stand for; scans reach about 20
FREE_BYTES = 1 << 26  # that any file may unpack to
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


class PointCloudError(ValueError):
    """A point cloud or mesh file that cannot be used; the message says what was expected and what came."""


class RawPoints(NamedTuple):
    """Columns as stored.

    Attributes:
        xyz, rgb: three arrays `[N]` each.
        full_scale: the value of full colour; None where the values themselves have to tell.
        scale, offset: of each axis: a coordinate is its stored number times the scale plus the offset, in float64.
        keep: `[N]` bool, the points to use; None for all.
        holes: an organised image of points, whose empty pixels are NaN by design.
        notes: what was left out or assumed, for the user.
    """

    xyz: Columns
    rgb: Columns | None
    full_scale: float | None = None
    scale: tuple[float, ...] | None = None
    offset: tuple[float, ...] = (0.0, 0.0, 0.0)
    keep: np.ndarray | None = None
    holes: bool = False
    notes: tuple[str, ...] = ()


class Field(NamedTuple):
    """A field of a point: numpy type, byte offset in a binary record, column in a text row."""

    kind: str
    offset: int
    column: int


class Layout(NamedTuple):
    """The fields of a point by name in lower case, the bytes of a binary record and the columns of a text row."""

    fields: dict[str, Field]
    record: int
    width: int


COLOUR_NAMES = (
    ("red", "green", "blue"),
    ("r", "g", "b"),
    ("diffuse_red", "diffuse_green", "diffuse_blue"),
    ("scalar_r", "scalar_g", "scalar_b"),  # CloudCompare
    ("scalar_red", "scalar_green", "scalar_blue"),
)
SPLAT_NAMES = ("f_dc_0", "f_dc_1", "f_dc_2")  # colours of Gaussian splats, as coefficients
_TEXT_COLUMNS = {"x", "y", "z", "rgb", "rgba", "opacity"}.union(SPLAT_NAMES, *COLOUR_NAMES)  # parsed of a text row


def check_size(data: Buffer, start: int, count: int, width: int, what: str = "points", slack: int = 0) -> None:
    """`count` rows of at least `width` bytes must lie after `start`; the last line of a text may lack its newline."""
    left = max(len(data) - start, 0)
    if count * width > left + slack:
        raise PointCloudError(
            f"the header promises {count} {what} (at least {count * width} bytes) but {left} bytes follow it: "
            "the file is truncated or its header is wrong"
        )


def check_expansion(unpacked: int, stored: int, what: str) -> None:
    """Refuse packed data that would unpack to more than `EXPANSION` times its `stored` bytes and `FREE_BYTES`."""
    if unpacked > EXPANSION * stored + FREE_BYTES:
        raise PointCloudError(
            f"{what}: {unpacked} bytes would come out of {stored}, more than the {EXPANSION}-fold: refused. Save the "
            "file uncompressed if that is what it holds"
        )


def make_layout(specs: Iterable[tuple[str, str, int]]) -> Layout:
    """Fields laid end to end, given as (name, numpy type, how many of them); the first of a repeated name counts."""
    specs = list(specs)
    fields: dict[str, Field] = {}
    record = width = 0
    for name, kind, count in specs:
        if count:
            fields.setdefault(name.lower(), Field(kind, record, width))
        record += count * np.dtype(kind).itemsize
        width += count
    if not {"x", "y", "z"} <= fields.keys():
        names = ", ".join(name for name, _, _ in specs)[:200] or "none"
        raise PointCloudError(f"expected the fields x, y and z, got {names}")
    return Layout(fields, record, width)


def colour_names(names: Iterable[str]) -> tuple[str, str, str] | None:
    """The first colour triple of `COLOUR_NAMES` that is complete among `names`, which are in lower case."""
    present = set(names)
    return next((triple for triple in COLOUR_NAMES if present.issuperset(triple)), None)


def columns_to_points(columns: dict[str, np.ndarray], layout: Layout) -> RawPoints:
    """xyz, and the colours that the fields' names tell; the fields' types tell the value of full colour."""
    xyz = columns["x"], columns["y"], columns["z"]
    rgb = colour_names(columns)
    if rgb is None:
        return RawPoints(xyz, None)
    kind = layout.fields[rgb[0]].kind[-2:]
    full_scale = 65535.0 if kind == "u2" else 255.0 if kind[0] in "iu" else None
    return RawPoints(xyz, (columns[rgb[0]], columns[rgb[1]], columns[rgb[2]]), full_scale)


def binary_table(data: Buffer, start: int, count: int, layout: Layout) -> dict[str, np.ndarray]:
    """Views on the columns of `count` records from byte `start` on."""
    check_size(data, start, count, layout.record)
    kinds, offsets = [f.kind for f in layout.fields.values()], [f.offset for f in layout.fields.values()]
    names = [*layout.fields]
    dtype = np.dtype({"names": names, "formats": kinds, "offsets": offsets, "itemsize": layout.record})
    table = np.frombuffer(data, dtype, count, start)
    return {name: table[name] for name in names}


def text_table(data: Buffer, start: int, count: int, layout: Layout, skip: int = 0) -> dict[str, np.ndarray]:
    """The columns that matter of `count` rows of numbers, `skip` lines after byte `start`."""
    check_size(data, start, count, 2 * layout.width, slack=1)
    names = layout.fields.keys() & _TEXT_COLUMNS
    rows = io.TextIOWrapper(io.BytesIO(data[start:]), "latin-1")
    picked = [layout.fields[name].column for name in names]
    try:
        table = np.loadtxt(rows, skiprows=skip, max_rows=count, usecols=picked, ndmin=2, comments=None)
    except ValueError as error:
        raise PointCloudError(f"expected {count} rows of {layout.width} numbers: {error}") from error
    if len(table) != count:
        raise PointCloudError(f"the header promises {count} points, {len(table)} rows follow it")
    return dict(zip(names, table.T, strict=True))

"""Readers of points in tables: .npy, .npz, the dicts of OpenShape, and text (.xyz, .pts, .csv, .txt)."""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from pointalign.data.pickles import MALFORMED_PICKLE, Array, read_pickle
from pointalign.data.point_records import (
    Buffer,
    Columns,
    PointCloudError,
    RawPoints,
    check_expansion,
    check_size,
    colour_names,
)

_XYZ_KEYS = ("xyz", "points", "point_cloud", "pointcloud", "pos", "coords", "coord", "pc", "vertices", "data", "arr_0")
_RGB_KEYS = ("rgb", "colors", "colours", "color", "colour")
_SHAPES = "[N, 3] (xyz), [N, 6] (xyz + rgb, or + normals), [N, 7] (xyz + rgb + one more) or [N, 9] (xyz, rgb, normals)"
_DEFLATE = 1040  # bytes that a byte of a zip file can stand for


def read_npy(data: Buffer) -> RawPoints:
    """An array of `_SHAPES`, or a pickled dict with the arrays `xyz` and `rgb`; no code of the pickle runs."""
    shape, fortran_order, dtype, start = _npy_header(data)
    if dtype.hasobject:
        return _pickled(data[start:])
    if dtype.kind not in "fiu":
        raise PointCloudError(f"expected real numbers, the array holds {dtype}")
    if len(shape) != 2 or shape[1] not in (3, 6, 7, 9) or shape[0] < 0:
        raise PointCloudError(
            f"expected an array [N, 3] (xyz) or [N, 6] (xyz + rgb), got shape {list(shape)}; [N, 7] and [N, 9], with a "
            "label or normals beside the colours, are read too"
        )
    check_size(data, start, shape[0], shape[1] * dtype.itemsize)
    table = np.frombuffer(data, dtype, shape[0] * shape[1], start)
    return split_columns(table.reshape(shape, order="F" if fortran_order else "C"))


def _npy_header(data: Buffer) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    stream = io.BytesIO(data[: 1 << 16])
    if stream.getvalue()[:6] != b"\x93NUMPY":
        raise PointCloudError("not a .npy file (no NUMPY magic); save the array with numpy.save")
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    return shape, fortran_order, dtype, stream.tell()


def _pickled(data: bytes) -> RawPoints:
    """The arrays of a dict that numpy.save wrote, as OpenShape stores its clouds."""
    try:
        content = read_pickle(data)
    except MALFORMED_PICKLE as error:
        if isinstance(error, PointCloudError):
            raise PointCloudError(f"expected real numbers or a dict of arrays: {error}") from error
        raise PointCloudError(f"expected real numbers, the array holds Python objects ({error})") from error
    items = content.items() if isinstance(content, Array) else None
    if items is None or len(items) != 1 or not isinstance(items[0], dict):
        raise PointCloudError("expected real numbers, or a dict with the arrays xyz and rgb; got other Python objects")
    arrays = {str(name): value.numpy() for name, value in items[0].items() if _is_numeric(value)}
    return _named_arrays(arrays)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Array) and value.items() is None


def read_npz(data: Buffer) -> RawPoints:
    """An archive of arrays, `xyz` or `points` (or the only one) and `rgb` or `colors` among them."""
    arrays, unpacked = {}, 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            if member.file_size > _DEFLATE * member.compress_size + 1024:
                raise PointCloudError(f"{member.filename} promises {member.file_size} bytes: the archive is corrupt")
            name = member.filename.removesuffix(".npy").lower()
            with archive.open(member) as file:
                head = file.read(1 << 16)
                shape, fortran_order, dtype, start = _npy_header(head)
                needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
                if dtype.kind not in "fiu" or len(shape) != 2:
                    continue
                if start + needed > member.file_size:
                    raise PointCloudError(f"{name} promises {needed} bytes, the archive holds {member.file_size}")
                unpacked += needed
                check_expansion(unpacked, len(data), "the arrays of the archive")
                content = head + file.read(start + needed - len(head)) if start + needed > len(head) else head
            table = np.frombuffer(content, dtype, shape[0] * shape[1], start)
            arrays[name] = table.reshape(shape, order="F" if fortran_order else "C")
    return _named_arrays(arrays)


def _named_arrays(arrays: Mapping[str, np.ndarray]) -> RawPoints:
    """Points of the arrays by their names; colours beside them must be as many."""
    tables = {name.lower(): array for name, array in arrays.items() if array.ndim == 2}
    xyz = next((tables[name] for name in _XYZ_KEYS if name in tables), None)
    if xyz is None and len(tables) == 1 and tables.keys().isdisjoint(_RGB_KEYS):
        xyz = next(iter(tables.values()))
    if xyz is None or xyz.shape[1] not in (3, 6, 7, 9):
        listed = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())[:300] or "none"
        raise PointCloudError(f"expected an array xyz or points of {_SHAPES}, got {listed}")
    rgb = next((tables[name] for name in _RGB_KEYS if name in tables), None)
    if rgb is None:
        return split_columns(xyz)
    if rgb.shape[0] != len(xyz) or rgb.shape[1] not in (3, 4):
        raise PointCloudError(f"expected a colour for each of {len(xyz)} points, got the shape {list(rgb.shape)}")
    full_scale = {"u1": 255.0, "u2": 65535.0}.get(rgb.dtype.str[-2:])
    return RawPoints(_three(xyz, 0), _three(rgb, 0), full_scale)


def _three(table: np.ndarray, first: int) -> Columns:
    return table[:, first], table[:, first + 1], table[:, first + 2]


def split_columns(table: np.ndarray) -> RawPoints:
    """Columns without names `[N, C]` as points: by their number and, where normals may be among them, by their values.

    3: xyz. 4: xyz and an intensity. 6: xyz, then rgb or unit normals. 7: xyz and rgb with a value behind or before
    them. 9: xyz, then rgb and unit normals in either order.

    Raises: PointCloudError: another number of columns, or nine of which no three are unit normals.
    """
    width = table.shape[1]
    xyz = _three(table, 0)
    if width == 3:
        return RawPoints(xyz, None)
    if width == 4:
        return RawPoints(xyz, None, notes=("column 4 was left out (no colours)",))
    if width == 6:
        if _are_normals(table[:, 3:6]):
            return RawPoints(xyz, None, notes=("columns 4 to 6 are unit normals, no colours",))
        return RawPoints(xyz, _three(table, 3))
    if width == 7:
        if _are_normals(table[:, 3:6]):
            return RawPoints(xyz, None, notes=("columns 4 to 6 are unit normals, no colours; column 7 was left out",))
        first = 4 if (table[:, 3:6] < 0).any() and not (table[:, 4:7] < 0).any() else 3
        return RawPoints(xyz, _three(table, first), notes=(f"column {7 if first == 3 else 4} was left out",))
    if width == 9:
        normals = [first for first in (3, 6) if _are_normals(table[:, first : first + 3])]
        if len(normals) == 1:
            return RawPoints(xyz, _three(table, 9 - normals[0]))
        raise PointCloudError("expected nine columns of xyz, rgb and unit normals: columns 4 to 9 do not tell which")
    raise PointCloudError(f"expected {_SHAPES}, got {width} columns")


def _are_normals(triple: np.ndarray) -> bool:
    """Whether rows `[N, 3]` are directions: of length 1, and some component is negative, which no colour is."""
    sample = np.asarray(triple[:: max(1, len(triple) // 4096)], np.float64)
    lengths = np.linalg.norm(sample[np.isfinite(sample).all(axis=1)], axis=1)
    lengths = lengths[lengths > 0]  # isolated points have normals of length 0
    return len(lengths) > 0 and bool((np.abs(lengths - 1) < 0.02).mean() > 0.98) and bool((triple < 0).any())


def read_pts(data: Buffer) -> RawPoints:
    """Leica's .pts: a line with the number of points, then x y z, intensity, r g b."""
    return read_text(data, intensity_first=True)


def read_text(data: Buffer, intensity_first: bool = False) -> RawPoints:
    """Rows of numbers between spaces, tabs, commas or semicolons; named columns where a line of names comes first.

    Lines that start with `#` or `//` are comments; a line with a single whole number before the rows is their number.

    Args:
        intensity_first: seven columns are x y z, intensity, r g b.

    Raises: PointCloudError: no rows, rows that are no numbers or of unequal length, or fewer than the file promises.
    """
    encoding = _encoding(data)
    head = data[: 1 << 16].decode(encoding, "replace")
    skip, names, promised, first = _text_head(head)
    delimiter = next((mark for mark in ",;" if mark in first), None)
    rows = io.TextIOWrapper(io.BytesIO(data[:]), encoding, errors="replace")
    picked = None
    if names:
        wanted = [*"xyz", *(colour_names(names) or ())]
        picked = [names.index(name) for name in wanted]
    try:
        table = np.loadtxt(
            rows, delimiter=delimiter, skiprows=skip, usecols=picked, ndmin=2, comments=["#", "//"], encoding=encoding
        )
    except ValueError as error:
        raise PointCloudError(f"expected rows of numbers: {error}") from error
    if promised is not None and len(table) != promised:
        raise PointCloudError(f"the header promises {promised} points, {len(table)} rows follow it")
    if names:
        points = RawPoints(_three(table, 0), _three(table, 3) if table.shape[1] == 6 else None)
    elif intensity_first and table.shape[1] == 7:
        points = RawPoints(_three(table, 0), _three(table, 4), 255.0)
    else:
        points = split_columns(table)
    return points._replace(full_scale=_text_scale(points.rgb)) if points.full_scale is None else points


def _encoding(data: Buffer) -> str:
    start = data[:4]
    if start[:3] == b"\xef\xbb\xbf":
        return "utf-8-sig"
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin-1"


def _text_head(head: str) -> tuple[int, list[str] | None, int | None, str]:
    """Lines before the first row of numbers, the columns' names, the promised number of rows, and that first row."""
    names = promised = None
    for number, line in enumerate(head.split("\n")):
        bare = line.strip().lstrip("\ufeff")
        words = [word.strip(" \"'").lower() for word in bare.lstrip("#/ ").replace(",", " ").replace(";", " ").split()]
        if {"x", "y", "z"} <= set(words):
            names = words
            continue
        if not bare or bare.startswith(("#", "//")):
            continue
        if promised is None and bare.isdecimal():
            promised = int(bare)
            continue
        return number, names, promised, bare
    raise PointCloudError("the file holds no rows of numbers")


def _text_scale(rgb: Columns | None) -> float | None:
    """65535 where whole numbers exceed 255: 16-bit colours written as text."""
    if rgb is None or not len(rgb[0]) or max(float(column.max()) for column in rgb) <= 255:
        return None
    return 65535.0 if all((column == np.floor(column)).all() for column in rgb) else None

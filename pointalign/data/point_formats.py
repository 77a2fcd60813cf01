"""Readers of the point formats .npy, .ply, .pcd and .las: bytes in, views on its columns out.

Every reader compares what the header promises with the bytes that are there before it touches the data, so that a
false header costs nothing; on a memory-mapped file the binary readers therefore are the header check as well.
Vectorised numpy does the reading: plyfile goes row by row in Python and laspy trusts the record counts of the header.
"""

import io
import math
import mmap
import struct
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

Buffer = bytes | mmap.mmap


class PointCloudError(ValueError):
    """A point cloud or mesh file that cannot be used; the message says what was expected and what came."""


class RawPoints(NamedTuple):
    """Columns as stored: `xyz` and `rgb` three arrays [N] each; `full_scale` is the value of full colour or None."""

    xyz: tuple[np.ndarray, np.ndarray, np.ndarray]
    rgb: tuple[np.ndarray, np.ndarray, np.ndarray] | None
    full_scale: float | None


class Field(NamedTuple):
    """A field of a point: numpy type, byte offset in a binary record, column in a text row."""

    kind: str
    offset: int
    column: int


class Layout(NamedTuple):
    """The fields of a point by name, the bytes of a binary record and the columns of a text row."""

    fields: dict[str, Field]
    record: int
    width: int


def read_npy(data: Buffer) -> RawPoints:
    """An array [N, 3] (xyz) or [N, 6] (xyz + rgb) of real numbers; pickled objects are refused."""
    stream = io.BytesIO(data[: 1 << 16])
    if stream.getvalue()[:6] != b"\x93NUMPY":
        raise PointCloudError("not a .npy file (no NUMPY magic); save the array with numpy.save")
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = header(stream)
    if dtype.kind not in "fiu":
        raise PointCloudError(f"expected real numbers, the array holds {dtype} (pickled objects are not loaded)")
    if len(shape) != 2 or shape[1] not in (3, 6) or shape[0] < 0:
        raise PointCloudError(f"expected an array [N, 3] (xyz) or [N, 6] (xyz + rgb), got shape {list(shape)}")
    _check_size(data, stream.tell(), shape[0], shape[1] * dtype.itemsize)
    table = np.frombuffer(data, dtype, shape[0] * shape[1], stream.tell())
    columns = table.reshape(shape, order="F" if fortran_order else "C").T
    rgb = (columns[3], columns[4], columns[5]) if shape[1] == 6 else None
    return RawPoints((columns[0], columns[1], columns[2]), rgb, None)


_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
_PLY_COLOURS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_TEXT_COLUMNS = {"x", "y", "z", "rgb", "rgba"}.union(*_PLY_COLOURS)  # what is parsed of a text row
_PLY_ENCODINGS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class PlyElement(NamedTuple):
    """One element of a PLY header: `fields` are (name, numpy type) pairs; the type of a list is None."""

    name: str
    count: int
    fields: list[tuple[str, str | None]]


def ply_header(data: Buffer) -> tuple[str, list[PlyElement], int]:
    """Byte order ("" = ascii), elements and offset of the data; checked against the size of the file."""
    end = data.find(b"end_header")
    start = data.find(b"\n", end) + 1
    if data[:3] != b"ply" or end < 0 or start <= 0:
        raise PointCloudError("not a .ply file (no 'ply ... end_header')")
    order, elements = None, []
    for line in data[:end].decode("latin-1").splitlines()[1:]:
        match line.split():
            case ["format", encoding, _] if encoding in _PLY_ENCODINGS:
                order = _PLY_ENCODINGS[encoding]
            case ["element", name, count] if count.isdecimal():
                elements.append(PlyElement(name, int(count), []))
            case ["property", "list", size, item, name] if elements and {size, item} <= _PLY_TYPES.keys():
                elements[-1].fields.append((name, None))
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1].fields.append((name, _PLY_TYPES[kind]))
            case ["comment" | "obj_info", *_] | []:
                pass
            case _:
                raise PointCloudError(f"PLY header line not understood: {line[:80]!r}")
    if order is None:
        raise PointCloudError("the PLY header names no known format (ascii, binary_little_endian, binary_big_endian)")
    for element in elements:
        # a list holds at least its length byte; an ascii value at least one digit and a separator
        smallest = [2 if order == "" else 1 if kind is None else np.dtype(kind).itemsize for _, kind in element.fields]
        _check_size(data, start, element.count, sum(smallest), element.name, slack=1)
    return order, elements, start


def read_ply(data: Buffer) -> RawPoints:
    """The vertices of a PLY file, ascii or binary, with `red, green, blue` (or `r, g, b`, `diffuse_*`) if present."""
    order, elements, offset = ply_header(data)
    lines = 0
    for element in elements:
        if element.name == "vertex":
            break
        if any(kind is None for _, kind in element.fields):
            raise PointCloudError(f"PLY element {element.name!r} with lists before the vertices is not supported")
        lines += element.count
        if order:
            offset += element.count * sum(np.dtype(kind).itemsize for _, kind in element.fields)
    else:
        raise PointCloudError("the PLY file has no element 'vertex'")
    specs = [(name, order + kind, 1) for name, kind in element.fields if kind is not None]
    if len(specs) < len(element.fields):
        raise PointCloudError("PLY vertices with list properties are not supported")
    layout = _layout(specs)
    rgb = next((names for names in _PLY_COLOURS if layout.fields.keys() >= set(names)), None)
    if order:
        columns = _binary_table(data, offset, element.count, layout)
    else:
        columns = _text_table(data, offset, element.count, layout, skip=lines)
    return _columns_to_points(columns, layout, rgb)


def read_pcd(data: Buffer) -> RawPoints:
    """A PCL cloud: DATA ascii, binary or binary_compressed; colours as packed `rgb` / `rgba` or `r, g, b` fields."""
    header: dict[str, list[str]] = {}
    offset = 0
    while "DATA" not in header:
        end = data.find(b"\n", offset, offset + 4096)
        if end < 0:
            raise PointCloudError("not a .pcd file (no DATA line in the header)")
        key, *values = data[offset:end].decode("latin-1").split() or ["#"]
        if not key.startswith("#"):
            header[key] = values
        offset = end + 1
    missing = {"FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT"} - header.keys()
    if missing or len(header["DATA"]) != 1:
        raise PointCloudError(f"PCD header incomplete: {', '.join(sorted(missing)) or 'DATA'} missing")
    names, sizes, types = header["FIELDS"], header["SIZE"], header["TYPE"]
    counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
    points = int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
    if not len(names) == len(sizes) == len(types) == len(counts) or min([points, *counts]) < 0:
        raise PointCloudError("PCD header: FIELDS, SIZE, TYPE and COUNT must be non-negative and of one length")
    unknown = [name for name, kind in zip(names, zip(types, sizes, strict=True), strict=True) if kind not in _PCD_TYPES]
    if unknown:
        raise PointCloudError(f"PCD fields {', '.join(unknown):.200} are of unknown TYPE and SIZE")
    kinds = [f"<{kind.lower()}{size}" for kind, size in zip(types, sizes, strict=True)]
    layout = _layout(zip(names, kinds, counts, strict=True))
    match header["DATA"][0].lower():
        case "ascii":
            columns = _text_table(data, offset, points, layout)
        case "binary":
            columns = _binary_table(data, offset, points, layout)
        case "binary_compressed":
            columns = _unpack_columns(data, offset, points, layout)
        case other:
            raise PointCloudError(f"PCD DATA is ascii, binary or binary_compressed, got {other!r}")
    packed = next((name for name in ("rgb", "rgba") if name in columns), None)
    if packed is None:
        return _columns_to_points(columns, layout, ("r", "g", "b") if {"r", "g", "b"} <= columns.keys() else None)
    bits = columns[packed]
    # PCL packs 0xAARRGGBB into 32 bits, often declared as a float: its bits count, not its value
    if layout.fields[packed].kind == "<f4":
        bits = np.ascontiguousarray(bits, "<f4").view("<u4")
    bits = bits.astype(np.int64)
    rgb = (bits >> 16) & 255, (bits >> 8) & 255, bits & 255
    return RawPoints(_columns_to_points(columns, layout, None).xyz, rgb, 255.0)


_PCD_TYPES = {(k, s) for k, sizes in {"F": "48", "I": "1248", "U": "1248"}.items() for s in sizes}


def _unpack_columns(data: Buffer, start: int, count: int, layout: Layout) -> dict[str, np.ndarray]:
    """binary_compressed: uint32 packed size, uint32 unpacked size, LZF data; field after field."""
    left = len(data) - start - 8
    packed, unpacked = struct.unpack_from("<II", data, start) if left >= 0 else (0, 0)
    # LZF turns three bytes into at most 264
    if unpacked != count * layout.record or packed > left or unpacked > 88 * packed:
        raise PointCloudError(
            f"the header promises {count} points ({count * layout.record} bytes), the compressed block declares "
            f"{unpacked} bytes in {packed}, and {max(left, 0)} follow it"
        )
    table = _lzf_decompress(bytes(data[start + 8 : start + 8 + packed]), unpacked)
    return {
        name: np.frombuffer(table, field.kind, count, field.offset * count) for name, field in layout.fields.items()
    }


def _lzf_decompress(packed: bytes, size: int) -> bytes:
    """LZF: a control byte below 32 starts a literal run, others a copy from up to 8 KiB back."""
    out = bytearray()
    i = 0
    while i < len(packed) and len(out) <= size:
        control = packed[i]
        i += 1
        if control < 32:
            out += packed[i : i + control + 1]
            i += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += packed[i]
            i += 1
        start = len(out) - ((control & 31) << 8) - packed[i] - 1
        i += 1
        if start < 0:
            raise PointCloudError("the compressed block is corrupt (a copy from before its start)")
        chunk = out[start : start + length + 2]
        # a copy may overlap its own output: the available bytes then repeat
        out += (chunk * math.ceil((length + 2) / len(chunk)))[: length + 2]
    if len(out) != size:
        raise PointCloudError(f"the compressed block is corrupt ({len(out)} bytes came out, {size} expected)")
    return bytes(out)


# offset of red, green, blue (uint16) in the record of each LAS point format that has colour
_LAS_COLOUR_OFFSET = {2: 20, 3: 28, 5: 28, 7: 30, 8: 30, 10: 30}


def read_las(data: Buffer) -> RawPoints:
    """LAS 1.0 to 1.4, all point formats (ASPRS LAS specification 1.4 R15, tables 3 and 7 to 17); .laz is refused."""
    if data[:4] != b"LASF" or len(data) < 227:
        raise PointCloudError("not a .las file (no LASF header)")
    (start,) = struct.unpack_from("<I", data, 96)
    kind, record, count = struct.unpack_from("<BHI", data, 104)
    if count == 0 and data[25] >= 4 and len(data) >= 255:
        (count,) = struct.unpack_from("<Q", data, 247)
    if kind & 0xC0:
        raise PointCloudError("the points are LAZ-compressed; decompress the file to plain .las first")
    colour = _LAS_COLOUR_OFFSET.get(kind)
    if kind > 10 or record < (20 if colour is None else colour + 6):
        raise PointCloudError(f"LAS point format {kind} with records of {record} bytes is not supported")
    scale = struct.unpack_from("<6d", data, 131)
    fields = {"x": Field("<i4", 0, 0), "y": Field("<i4", 4, 0), "z": Field("<i4", 8, 0)}
    if colour is not None:
        fields |= {name: Field("<u2", colour + 2 * i, 0) for i, name in enumerate(("red", "green", "blue"))}
    table = _binary_table(data, start, count, Layout(fields, record, 0))
    x, y, z = (table[axis] * scale[i] + scale[3 + i] for i, axis in enumerate("xyz"))
    rgb = (table["red"], table["green"], table["blue"]) if colour is not None else None
    return RawPoints((x, y, z), rgb, 65535.0)


POINT_READERS = {".npy": read_npy, ".ply": read_ply, ".pcd": read_pcd, ".las": read_las}


def _check_size(data: Buffer, start: int, count: int, width: int, what: str = "points", slack: int = 0) -> None:
    """`count` rows of at least `width` bytes must lie after `start`; the last line of a text may lack its newline."""
    left = max(len(data) - start, 0)
    if count * width > left + slack:
        raise PointCloudError(
            f"the header promises {count} {what} (at least {count * width} bytes) but {left} bytes follow it: "
            "the file is truncated or its header is wrong"
        )


def _layout(specs: Iterable[tuple[str, str, int]]) -> Layout:
    """Fields laid end to end, given as (name, numpy type, how many of them); the first of a repeated name counts."""
    fields: dict[str, Field] = {}
    record = width = 0
    for name, kind, count in specs:
        if count:
            fields.setdefault(name, Field(kind, record, width))
        record += count * np.dtype(kind).itemsize
        width += count
    if not {"x", "y", "z"} <= fields.keys():
        raise PointCloudError(f"expected the fields x, y and z, got {', '.join(fields)[:200] or 'none'}")
    return Layout(fields, record, width)


def _columns_to_points(columns: dict[str, np.ndarray], layout: Layout, rgb: tuple[str, str, str] | None) -> RawPoints:
    xyz = columns["x"], columns["y"], columns["z"]
    if rgb is None:
        return RawPoints(xyz, None, None)
    kind = layout.fields[rgb[0]].kind[-2:]
    full_scale = 65535.0 if kind == "u2" else 255.0 if kind[0] in "iu" else None
    return RawPoints(xyz, (columns[rgb[0]], columns[rgb[1]], columns[rgb[2]]), full_scale)


def _binary_table(data: Buffer, start: int, count: int, layout: Layout) -> dict[str, np.ndarray]:
    _check_size(data, start, count, layout.record)
    kinds, offsets = [f.kind for f in layout.fields.values()], [f.offset for f in layout.fields.values()]
    names = [*layout.fields]
    dtype = np.dtype({"names": names, "formats": kinds, "offsets": offsets, "itemsize": layout.record})
    table = np.frombuffer(data, dtype, count, start)
    return {name: table[name] for name in names}


def _text_table(data: Buffer, start: int, count: int, layout: Layout, skip: int = 0) -> dict[str, np.ndarray]:
    _check_size(data, start, count, 2 * layout.width, slack=1)
    names = layout.fields.keys() & _TEXT_COLUMNS
    rows = io.StringIO(data[start:].decode("latin-1"))
    picked = [layout.fields[name].column for name in names]
    try:
        table = np.loadtxt(rows, skiprows=skip, max_rows=count, usecols=picked, ndmin=2, comments=None)
    except ValueError as error:
        raise PointCloudError(f"expected {count} rows of {layout.width} numbers: {error}") from error
    if len(table) != count:
        raise PointCloudError(f"the header promises {count} points, {len(table)} rows follow it")
    return dict(zip(names, table.T, strict=True))

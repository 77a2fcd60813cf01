"""Readers of .pcd, .las and .laz, and the table of all readers of points."""

import math
import struct
import subprocess
import sys
from importlib.util import find_spec

import numpy as np

from pointalign.data.ply import read_ply
from pointalign.data.point_records import (
    Buffer,
    Field,
    Layout,
    PointCloudError,
    RawPoints,
    binary_table,
    check_expansion,
    columns_to_points,
    make_layout,
    text_table,
)
from pointalign.data.tables import read_npy, read_npz, read_pts, read_text


def read_pcd(data: Buffer) -> RawPoints:
    """A PCL cloud: DATA ascii, binary or binary_compressed; colours as packed `rgb` / `rgba` or `r, g, b` fields.

    A cloud with a HEIGHT above 1 is an image: its pixels without a depth are NaN, however many.
    """
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
    height = int(header["HEIGHT"][0])
    points = int(header["WIDTH"][0]) * height
    if not len(names) == len(sizes) == len(types) == len(counts) or min([points, *counts]) < 0:
        raise PointCloudError("PCD header: FIELDS, SIZE, TYPE and COUNT must be non-negative and of one length")
    unknown = [name for name, kind in zip(names, zip(types, sizes, strict=True), strict=True) if kind not in _PCD_TYPES]
    if unknown:
        raise PointCloudError(f"PCD fields {', '.join(unknown):.200} are of unknown TYPE and SIZE")
    kinds = [f"<{kind.lower()}{size}" for kind, size in zip(types, sizes, strict=True)]
    layout = make_layout(zip(names, kinds, counts, strict=True))
    match header["DATA"][0].lower():
        case "ascii":
            columns = text_table(data, offset, points, layout)
        case "binary":
            columns = binary_table(data, offset, points, layout)
        case "binary_compressed":
            columns = _unpack_columns(data, offset, points, layout)
        case other:
            raise PointCloudError(f"PCD DATA is ascii, binary or binary_compressed, got {other!r}")
    packed = next((name for name in ("rgb", "rgba") if name in columns), None)
    if packed is None:
        return columns_to_points(columns, layout)._replace(holes=height > 1)
    bits = columns[packed]
    # PCL packs 0xAARRGGBB into 32 bits, often declared as a float: its bits count, not its value
    if layout.fields[packed].kind == "<f4":
        bits = np.ascontiguousarray(bits, "<f4").view("<u4")
    bits = bits.astype(np.int64)
    rgb = (bits >> 16) & 255, (bits >> 8) & 255, bits & 255
    return RawPoints((columns["x"], columns["y"], columns["z"]), rgb, 255.0, holes=height > 1)


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
    check_expansion(unpacked, packed, "the compressed points")
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
    """LAS 1.0 to 1.4, all point formats (ASPRS LAS specification 1.4 R15, tables 3 and 7 to 17)."""
    start, kind, record, count = _las_header(data)
    if kind & 0xC0:
        raise PointCloudError("the points are LAZ-compressed: name the file .laz")
    colour = _LAS_COLOUR_OFFSET.get(kind)
    if kind > 10 or record < (20 if colour is None else colour + 6):
        raise PointCloudError(f"LAS point format {kind} with records of {record} bytes is not supported")
    fields = {"x": Field("<i4", 0, 0), "y": Field("<i4", 4, 0), "z": Field("<i4", 8, 0)}
    if colour is not None:
        fields |= {name: Field("<u2", colour + 2 * i, 0) for i, name in enumerate(("red", "green", "blue"))}
    return _scaled(data, binary_table(data, start, count, Layout(fields, record, 0)))


def _las_header(data: Buffer) -> tuple[int, int, int, int]:
    """Offset of the points, point format, bytes of a record and number of points."""
    if data[:4] != b"LASF" or len(data) < 227:
        raise PointCloudError("not a LAS file (no LASF header)")
    (start,) = struct.unpack_from("<I", data, 96)
    kind, record, count = struct.unpack_from("<BHI", data, 104)
    if count == 0 and data[25] >= 4 and len(data) >= 255:
        (count,) = struct.unpack_from("<Q", data, 247)
    return start, kind, record, count


def _scaled(data: Buffer, table: dict[str, np.ndarray]) -> RawPoints:
    """Integer coordinates with the scales and offsets of the LAS header."""
    scale = struct.unpack_from("<6d", data, 131)
    rgb = (table["red"], table["green"], table["blue"]) if "red" in table else None
    return RawPoints((table["x"], table["y"], table["z"]), rgb, 65535.0, scale[:3], scale[3:])


# Runs in another process: where a corrupt file promises too much, lazrs does not raise but aborts, or never ends.
_DECOMPRESS = """
import io, sys, laspy
points = laspy.read(io.BytesIO(sys.stdin.buffer.read()), laz_backend=laspy.LazBackend.Lazrs).points
names = set(points.point_format.dimension_names)
for name in ("X", "Y", "Z", "red", "green", "blue"):
    if name in names:
        sys.stdout.buffer.write(points[name].astype("<i4" if name in "XYZ" else "<u2").tobytes())
"""


def read_laz(data: Buffer) -> RawPoints:
    """LAZ, decompressed by laspy and lazrs (extra: laz) in another process."""
    start, kind, record, count = _las_header(data)
    (descriptions,) = struct.unpack_from("<I", data, 100)
    (extended,) = struct.unpack_from("<I", data, 243) if data[25] >= 4 and len(data) >= 375 else (0,)
    if 54 * descriptions > start or 60 * extended > len(data):
        raise PointCloudError(f"the header promises {descriptions + extended} descriptions: the header is wrong")
    check_expansion(count * record, len(data), f"the header promises {count} points")
    if find_spec("laspy") is None or find_spec("lazrs") is None:
        raise PointCloudError("reading .laz needs laspy and lazrs: pip install 'pointalign[laz]'")
    limit = 20 + count / 50_000  # seconds
    try:
        child = subprocess.run([sys.executable, "-c", _DECOMPRESS], input=data, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise PointCloudError(f"the compressed points are corrupt: no end after {limit:.0f} s") from error
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "memory allocation" in line), lines[-1])
        raise PointCloudError(f"the compressed points cannot be read ({reason[:200]})")
    coloured = kind & 0x3F in _LAS_COLOUR_OFFSET
    if count == 0 or len(child.stdout) != count * (18 if coloured else 12):
        raise PointCloudError(f"the header promises {count} points, {len(child.stdout)} bytes of them came out")
    places = np.frombuffer(child.stdout, "<i4", 3 * count).reshape(3, count)
    table = dict(zip("xyz", places, strict=True))
    if coloured:
        colours = np.frombuffer(child.stdout, "<u2", 3 * count, 12 * count).reshape(3, count)
        table |= dict(zip(("red", "green", "blue"), colours, strict=True))
    return _scaled(data, table)


POINT_READERS = {
    ".npy": read_npy, ".npz": read_npz, ".ply": read_ply, ".pcd": read_pcd, ".las": read_las, ".laz": read_laz,
    ".xyz": read_text, ".pts": read_pts, ".csv": read_text, ".txt": read_text,
}  # fmt: skip

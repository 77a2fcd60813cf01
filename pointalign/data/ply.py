"""Reader of .ply: points, and the header of meshes; Gaussian splats by their base colour."""

import math
from typing import NamedTuple

import numpy as np

from pointalign.data.point_records import (
    COLOUR_NAMES,
    SPLAT_NAMES,
    Buffer,
    PointCloudError,
    RawPoints,
    binary_table,
    check_size,
    columns_to_points,
    make_layout,
    text_table,
)

_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
_PLY_ENCODINGS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


class PlyElement(NamedTuple):
    """One element of a PLY header: `fields` are (name, numpy type) pairs; the type of a list is None."""

    name: str
    count: int
    fields: list[tuple[str, str | None]]


def ply_header(data: Buffer) -> tuple[str, list[PlyElement], int]:
    """Byte order ("" = ascii), elements and offset of the data; checked against the size of the file."""
    end = data.find(b"\nend_header") + 1  # a comment may hold the word
    start = data.find(b"\n", end) + 1
    if data[:3] != b"ply" or end <= 0 or start <= 0:
        raise PointCloudError("not a .ply file (no 'ply ... end_header')")
    order, elements = None, []
    # comments may be UTF-8 or GBK: as latin-1 they hold characters that `str.splitlines` takes for line ends
    for line in data[:end].decode("latin-1").split("\n")[1:]:
        match line.strip(" \t\r").split():
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
        check_size(data, start, element.count, sum(smallest), element.name, slack=1)
    return order, elements, start


def read_ply(data: Buffer) -> RawPoints:
    """The vertices of a PLY file, ascii or binary, with `red, green, blue` (or another of `COLOUR_NAMES`) if present.

    Of Gaussian splats (`f_dc_0` to `f_dc_2`) the colour is that of the degree-0 harmonic, and splats with an opacity
    below `MIN_OPACITY` are left out. Source: Kerbl et al., 3D Gaussian Splatting (SIGGRAPH 2023), released code.
    """
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
    if any(name == "packed_position" for name, _, _ in specs):
        raise PointCloudError("compressed Gaussian splats (packed_position) are not read: save them as a plain .ply")
    layout = make_layout(specs)
    if order:
        columns = binary_table(data, offset, element.count, layout)
    else:
        columns = text_table(data, offset, element.count, layout, skip=lines)
    points = columns_to_points(columns, layout)
    return _splats(points, columns) if points.rgb is None and columns.keys() >= set(SPLAT_NAMES) else points


HARMONIC = 0.28209479177387814  # the spherical harmonic of degree 0, 1 / (2 sqrt(pi))
MIN_OPACITY = 0.05


def _splats(points: RawPoints, columns: dict[str, np.ndarray]) -> RawPoints:
    """Gaussian splats as points: base colours, clipped to 0..1, and a mask of those that can be seen."""
    red, green, blue = (np.clip(0.5 + np.float32(HARMONIC) * columns[name], 0, 1) for name in SPLAT_NAMES)
    points = points._replace(rgb=(red, green, blue), full_scale=1.0)
    if "opacity" not in columns:
        return points
    seen = ~(columns["opacity"] < math.log(MIN_OPACITY / (1 - MIN_OPACITY)))  # stored before the sigmoid
    hidden = len(seen) - int(seen.sum())
    if hidden == len(seen):
        raise PointCloudError(f"all {hidden} splats have an opacity below {MIN_OPACITY}")
    note = f"{hidden} of {len(seen)} splats have an opacity below {MIN_OPACITY} and were left out"
    return points._replace(keep=seen, notes=(note,)) if hidden else points


def plain_mesh_header(data: Buffer) -> bytes:
    """A mesh's content with a header that trimesh understands: vertex fields by their usual names, ASCII comments."""
    _, _, start = ply_header(data)
    usual = {name: plain for triple in COLOUR_NAMES for name, plain in zip(triple, COLOUR_NAMES[0], strict=True)}
    lines, element = [], ""
    for line in bytes(data[:start]).decode("utf-8", "replace").split("\n"):
        words = line.split()
        if words[:1] == ["element"]:
            element = words[1]
        if element == "vertex" and len(words) == 3 and words[0] == "property":
            name = words[2].lower()
            line = " ".join([*words[:2], usual.get(name, name)])
        lines.append(line)
    return "\n".join(lines).encode("utf-8") + bytes(data[start:])

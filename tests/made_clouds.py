"""Files of points and meshes, written by other libraries or byte by byte."""

import struct

import laspy
import numpy as np
import plyfile
import pytest
import trimesh
from trimesh.visual import TextureVisuals

from pointalign.data.point_cloud import PointCloudError, load_point_cloud

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(200, 3)).astype(np.float32)
RGB = RNG.integers(0, 256, (200, 3), dtype=np.uint8)
RGB16 = RGB.astype(np.uint16) * 257
EXPECTED = np.hstack([XYZ, RGB / np.float32(255)])


def save_npy(path, array):
    np.save(path, array, allow_pickle=True)
    return path


def save_ply(path, text=False, order="<", colours=("red", "green", "blue"), rgb=RGB):
    fields = [(axis, "f4") for axis in "xyz"] + [("confidence", "f8")] + [(name, rgb.dtype.str) for name in colours]
    rows = np.zeros(len(XYZ), fields)
    for i, axis in enumerate("xyz"):
        rows[axis] = XYZ[:, i]
    for i, name in enumerate(colours):
        rows[name] = rgb[:, i]
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")], text=text, byte_order=order).write(path)
    return path


def lzf(raw):
    """LZF by literal runs and, where the last 8 bytes repeat, one overlapping copy."""
    out, i = bytearray(), 0
    while i < len(raw):
        period = next((p for p in (1, 4, 8) if i >= p and raw[i : i + 20] == (raw[i - p : i] * 20)[:20]), 0)
        if period and i + 20 <= len(raw):
            out += bytes([7 << 5, 20 - 2 - 7, period - 1])  # 20 bytes from `period` back
            i += 20
            continue
        run = raw[i : i + 32]
        out += bytes([len(run) - 1]) + run
        i += len(run)
    return bytes(out)


def pcd_bytes(kind, points=None, rgb_type="F"):
    packed = (RGB.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(axis=1).astype(np.uint32)
    table = np.zeros(len(XYZ), [("x", "f4"), ("y", "f4"), ("z", "f4"), ("_", "u1", 4), ("rgb", "u4"), ("label", "u2")])
    for i, axis in enumerate("xyz"):
        table[axis] = XYZ[:, i]
    table["rgb"] = packed
    header = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z _ rgb label\nSIZE 4 4 4 1 4 2\n"
        f"TYPE F F F U {rgb_type} U\nCOUNT 1 1 1 4 1 1\nWIDTH {points or len(XYZ)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n"
        f"POINTS {points or len(XYZ)}\nDATA {kind}\n"
    ).encode()
    if kind == "ascii":
        colours = packed.view(np.float32) if rgb_type == "F" else packed
        rows = [
            " ".join([*(repr(float(v)) for v in p), "0 0 0 0", repr(c.item()), "7"])
            for p, c in zip(XYZ, colours, strict=True)
        ]
        return header + "\n".join(rows).encode()
    if kind == "binary":
        return header + table.tobytes()
    columns = b"".join(np.ascontiguousarray(table[name]).tobytes() for name in ("x", "y", "z"))
    columns += table["_"].T.tobytes() + table["rgb"].tobytes() + table["label"].tobytes()
    packed_columns = lzf(columns)
    return header + struct.pack("<II", len(packed_columns), len(columns)) + packed_columns


def save_las(path, point_format=2, version="1.2", rgb=RGB16, offset=0.0, scale=1e-6):
    las = laspy.LasData(laspy.LasHeader(point_format=point_format, version=version))
    las.header.scales, las.header.offsets = [scale] * 3, [offset] * 3
    las.x, las.y, las.z = (XYZ.astype(np.float64) + offset).T
    if point_format in (2, 3, 5, 7, 8, 10):
        las.red, las.green, las.blue = rgb.T
    las.write(path)
    return path


def square(**visual):
    """A 2 x 1 rectangle in the z = 0 plane with its lower left corner at the origin."""
    mesh = trimesh.Trimesh([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    if visual:
        mesh.visual = TextureVisuals(uv=[[0, 0], [1, 0], [1, 1], [0, 1]], **visual)
    return mesh


QUADRANTS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)  # image rows go down


def error_of(path, **options):
    with pytest.raises(PointCloudError) as caught:
        load_point_cloud(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def written(path, content):
    path.write_bytes(content)
    return path

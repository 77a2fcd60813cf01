"""Files written by other libraries (numpy, trimesh, plyfile, laspy) or byte by byte, read back by load_point_cloud."""

import itertools
import json
import pickle
import struct
import subprocess
import sys
import tracemalloc

import laspy
import numpy as np
import plyfile
import pytest
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial, SimpleMaterial

from pointalign.data.point_cloud import (
    FORMATS,
    MISSING_COLORS,
    UP_AXES,
    PointCloudError,
    Reading,
    load_point_cloud,
    normalise,
    point_count,
    read_point_cloud,
    subsample,
)

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


# Points, format by format


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_npy_with_colours(tmp_path, dtype):
    points = load_point_cloud(save_npy(tmp_path / "a.npy", EXPECTED.astype(dtype)))
    assert points.dtype == np.float32 and points.shape == (200, 6)
    np.testing.assert_allclose(points, EXPECTED.astype(dtype).astype(np.float32))


def test_npy_fortran_order(tmp_path):
    points = load_point_cloud(save_npy(tmp_path / "a.npy", np.asfortranarray(EXPECTED)))
    np.testing.assert_array_equal(points, EXPECTED)


def test_a_missing_colour_is_black_or_what_is_asked_for_in_every_reader(tmp_path):
    save_npy(tmp_path / "a.npy", XYZ)
    save_ply(tmp_path / "b.ply", colours=("u", "v", "w"))
    save_las(tmp_path / "c.las", 6, "1.4")
    trimesh.creation.box().export(tmp_path / "d.stl")
    trimesh.creation.box().export(tmp_path / "e.glb")
    (tmp_path / "f.obj").write_text("mtllib gone.mtl\nusemtl wood\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\n")
    np.savetxt(tmp_path / "g.xyz", XYZ)
    trimesh.PointCloud(XYZ).export(tmp_path / "h.obj")
    for path in sorted(tmp_path.iterdir()):
        assert (load_point_cloud(path)[:, 3:] == 0).all(), path
        for name, level in MISSING_COLORS.items():
            assert (load_point_cloud(path, missing_color=name)[:, 3:] == level).all(), path
    np.testing.assert_array_equal(load_point_cloud(tmp_path / "a.npy")[:, :3], XYZ)


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_npy_colours_up_to_255_are_recognised(tmp_path, dtype):
    array = np.hstack([(XYZ * 100), RGB]).astype(dtype)
    points = load_point_cloud(save_npy(tmp_path / "a.npy", array))
    np.testing.assert_allclose(points[:, 3:], RGB / 255, atol=1e-6)


@pytest.mark.parametrize(("text", "order"), [(True, "="), (False, "<"), (False, ">")])
def test_ply_points(tmp_path, text, order):
    np.testing.assert_allclose(load_point_cloud(save_ply(tmp_path / "a.ply", text, order)), EXPECTED, rtol=1e-6)


@pytest.mark.parametrize(
    ("rgb", "scale"),
    [(RGB, 255), (RGB16, 65535), ((RGB / 255).astype(np.float32), 1), (RGB.astype("f4"), 255)],
    ids=["uint8", "uint16", "unit float", "float to 255"],
)
@pytest.mark.parametrize("text", [True, False])
def test_ply_colour_types(tmp_path, rgb, scale, text):
    points = load_point_cloud(save_ply(tmp_path / "a.ply", text, rgb=rgb))
    np.testing.assert_allclose(points[:, 3:], rgb / scale, atol=1e-6)


def test_ply_dark_uint8_colours_stay_dark(tmp_path):
    points = load_point_cloud(save_ply(tmp_path / "a.ply", rgb=np.ones((200, 3), np.uint8)))
    np.testing.assert_allclose(points[:, 3:], 1 / 255)


def test_ply_other_colour_names_and_elements_around_the_vertices(tmp_path):
    path = save_ply(tmp_path / "a.ply", colours=("diffuse_red", "diffuse_green", "diffuse_blue"))
    vertex = plyfile.PlyData.read(path, mmap=False)["vertex"]
    camera = plyfile.PlyElement.describe(np.zeros(3, [("a", "f4"), ("b", "u1")]), "camera")
    for text, elements in itertools.product((True, False), ([camera, vertex], [vertex, camera])):
        plyfile.PlyData(elements, text=text).write(path)
        np.testing.assert_allclose(load_point_cloud(path), EXPECTED, rtol=1e-6)


@pytest.mark.parametrize("kind", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("rgb_type", ["F", "U"])
def test_pcd(tmp_path, kind, rgb_type):
    path = tmp_path / "a.pcd"
    path.write_bytes(pcd_bytes(kind, rgb_type=rgb_type))
    np.testing.assert_allclose(load_point_cloud(path), EXPECTED, rtol=1e-6)


def test_pcd_colour_fields_and_bad_headers(tmp_path):
    header = "FIELDS x y z r g b\nSIZE 4 4 4 1 1 1\nTYPE F F F U U U\nWIDTH 2\nHEIGHT 1\nDATA ascii\n"
    rows = "0 0 0 255 0 51\n1 2 3 1 1 1\n"
    points = load_point_cloud(written(tmp_path / "a.pcd", (header + rows).encode()))
    np.testing.assert_allclose(points, [[0, 0, 0, 1, 0, 0.2], [1, 2, 3, *[1 / 255] * 3]], rtol=1e-6)
    for old, new, message in [
        ("TYPE F F F", "TYPE F F Q", "PCD fields z are of unknown TYPE and SIZE"),
        ("SIZE 4 4 4 1 1 1", "SIZE 4 4 4", "of one length"),
        ("FIELDS x y z", "FIELDS u v w", "expected the fields x, y and z, got u, v, w"),
        ("WIDTH 2\n", "", "PCD header incomplete: WIDTH missing"),
        ("DATA ascii", "DATA zip", "got 'zip'"),
        ("WIDTH 2", "COUNT 1 1 1 99999999 1 1\nWIDTH 2", "promises 2 points"),
        ("1 2 3 1", "1 2 red 1", "expected 2 rows of 6 numbers"),
    ]:
        path = written(tmp_path / "b.pcd", (header + rows).replace(old, new).encode())
        assert message in error_of(path)


def test_pcd_compression_repeats_overlapping_copies(tmp_path):
    raw = pcd_bytes("binary_compressed")
    body = raw[raw.index(b"binary_compressed\n") + 18 :]
    packed, unpacked = struct.unpack_from("<II", body)
    assert packed < unpacked  # the zero padding column did go through copies


@pytest.mark.parametrize(("point_format", "version"), [(2, "1.2"), (3, "1.3"), (5, "1.3"), (7, "1.4"), (8, "1.4")])
def test_las(tmp_path, point_format, version):
    points = load_point_cloud(save_las(tmp_path / "a.las", point_format, version))
    np.testing.assert_allclose(points, EXPECTED, atol=1e-6)


def test_las_without_colour_and_with_8_bit_colour(tmp_path):
    assert (load_point_cloud(save_las(tmp_path / "a.las", 6, "1.4"))[:, 3:] == 0).all()
    eight_bit = load_point_cloud(save_las(tmp_path / "b.las", rgb=RGB.astype(np.uint16)))
    np.testing.assert_allclose(eight_bit[:, 3:], RGB / 255, atol=1e-6)


def test_georeferenced_cloud_keeps_its_shape(tmp_path):
    points = load_point_cloud(save_las(tmp_path / "a.las", offset=4_500_000.0, scale=1e-3))
    np.testing.assert_allclose(points[:, :3] - points[:, :3].mean(0), XYZ - XYZ.mean(0), atol=2e-3)


# Meshes


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb", ".gltf", ".stl", ".off"])
def test_mesh_is_sampled_by_area(tmp_path, suffix):
    path = tmp_path / f"box{suffix}"
    trimesh.creation.box((1, 2, 4)).export(path)
    points = load_point_cloud(path, num_points=4000)
    assert points.shape == (4000, 6) and (points[:, 3:] == 0).all()
    half = np.array([0.5, 1, 2], np.float32)
    on_face = np.isclose(np.abs(points[:, :3]), half, atol=1e-6)
    assert on_face.any(axis=1).all() and (np.abs(points[:, :3]) <= half + 1e-6).all()
    # faces across x, y, z have areas 8, 4, 2 (each twice): 5 standard deviations of a binomial
    np.testing.assert_allclose(on_face.mean(axis=0), np.array([8, 4, 2]) / 14, atol=0.04)
    np.testing.assert_array_equal(points, load_point_cloud(path, num_points=4000))


def test_mesh_seed_comes_from_the_content(tmp_path):
    trimesh.creation.box((1, 2, 4)).export(tmp_path / "a.stl")
    (tmp_path / "b.stl").write_bytes((tmp_path / "a.stl").read_bytes())
    trimesh.creation.box((1, 2, 4.001)).export(tmp_path / "c.stl")
    a, b, c = (load_point_cloud(tmp_path / f"{name}.stl") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


@pytest.mark.parametrize("suffix", [".obj", ".glb"])
def test_texture_colours(tmp_path, suffix):
    texture = Image.fromarray(QUADRANTS.repeat(8, 0).repeat(8, 1))
    material = PBRMaterial(baseColorTexture=texture) if suffix == ".glb" else SimpleMaterial(image=texture)
    square(material=material).export(tmp_path / f"a{suffix}")
    points = load_point_cloud(tmp_path / f"a{suffix}")
    right, up = points[:, 0] > 1, points[:, 1] > 0.5
    np.testing.assert_array_equal(points[:, 3:], QUADRANTS[1 - up.astype(int), right.astype(int)] / np.float32(255))


def test_material_colours(tmp_path):
    square(material=SimpleMaterial(diffuse=[255, 51, 0, 255])).export(tmp_path / "a.obj")
    np.testing.assert_allclose(load_point_cloud(tmp_path / "a.obj")[:, 3:], [[1, 0.2, 0]] * 8192, atol=1e-6)
    grey = Image.fromarray(np.full((4, 4, 3), 102, np.uint8))
    square(material=PBRMaterial(baseColorTexture=grey, baseColorFactor=[255, 0, 0, 255])).export(tmp_path / "b.glb")
    np.testing.assert_allclose(load_point_cloud(tmp_path / "b.glb")[:, 3:], [[0.4, 0, 0]] * 8192, atol=1e-6)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_vertex_colours_are_interpolated(tmp_path, suffix):
    mesh = square()
    mesh.visual.vertex_colors = [[0, 0, 0, 255], [255, 0, 0, 255], [255, 0, 0, 255], [0, 0, 0, 255]]
    mesh.export(tmp_path / f"a{suffix}")
    points = load_point_cloud(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(points[:, 3], points[:, 0] / 2, atol=1e-5)
    assert (points[:, 4:] == 0).all()


def test_face_colours(tmp_path):
    mesh = square()
    mesh.visual.face_colors = [[255, 0, 0, 255], [0, 0, 255, 255]]
    mesh.export(tmp_path / "a.ply")
    points = load_point_cloud(tmp_path / "a.ply")
    lower = points[:, 1] < points[:, 0] / 2
    np.testing.assert_array_equal(points[:, 3:], np.where(lower[:, None], [[1, 0, 0]], [[0, 0, 1]]))


def test_scene_transforms_are_applied(tmp_path):
    scene = trimesh.Scene()
    for x, scale in ((0.0, 1.0), (10.0, 3.0)):
        transform = np.diag([scale, scale, scale, 1.0])
        transform[0, 3] = x
        scene.add_geometry(square(), geom_name="square", transform=transform)
    scene.export(tmp_path / "a.glb")
    points = load_point_cloud(tmp_path / "a.glb")
    far = points[:, 0] >= 10
    np.testing.assert_allclose(far.mean(), 0.9, atol=0.02)  # 9 times the area
    np.testing.assert_allclose(points[far, :2].max(axis=0), [16, 3], atol=0.1)


@pytest.mark.parametrize("suffix", [".obj", ".glb"])
def test_mesh_formats_without_faces_give_their_points(tmp_path, suffix):
    trimesh.PointCloud(XYZ, colors=np.hstack([RGB, np.full((200, 1), 255, np.uint8)])).export(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(load_point_cloud(tmp_path / f"a{suffix}"), EXPECTED, atol=1e-6)


# The vertical, normalise, subsample


@pytest.mark.parametrize("axis", UP_AXES)
def test_up_axis_is_a_proper_rotation_onto_y(tmp_path, axis):
    path = save_npy(tmp_path / "a.npy", np.vstack([np.eye(3), np.zeros((1, 3))]).astype(np.float32))
    images = load_point_cloud(path, up_axis=axis)[:3, :3]
    np.testing.assert_array_equal(images["xyz".index(axis[-1])] * (-1 if axis[0] == "-" else 1), [0, 1, 0])
    np.testing.assert_allclose(np.linalg.det(images), 1)


def test_up_axis_z_and_unknown(tmp_path):
    path = save_npy(tmp_path / "a.npy", XYZ)
    x, y, z = XYZ.T
    np.testing.assert_array_equal(load_point_cloud(path, "z")[:, :3], np.stack([x, z, -y], axis=1))
    with pytest.raises(ValueError, match="up_axis must be one of"):
        load_point_cloud(path, "up")


def test_normalise():
    cloud = EXPECTED * [3, 3, 3, 1, 1, 1] + [5, 6, 7, 0, 0, 0]
    before = cloud.copy()
    unit = normalise(cloud)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit[:, :3].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit[:, :3], axis=1).max(), 1, rtol=1e-6)
    np.testing.assert_allclose(unit[:, 3:], EXPECTED[:, 3:])
    np.testing.assert_array_equal(cloud, before)
    with pytest.raises(PointCloudError, match="equal points"):
        normalise(np.ones((4, 6)))


def test_subsample_is_a_fixed_ordered_subset():
    assert subsample(EXPECTED, 200) is EXPECTED and subsample(EXPECTED, 500) is EXPECTED
    part = subsample(EXPECTED, 50)
    rows = [int(np.flatnonzero((EXPECTED == row).all(axis=1))[0]) for row in part]
    assert rows == sorted(set(rows)) and len(rows) == 50
    np.testing.assert_array_equal(part, subsample(EXPECTED.copy(order="F"), 50))
    assert not np.array_equal(part[:, :3], subsample(EXPECTED + 1, 50)[:, :3] - 1)
    code = "import numpy as np; from pointalign.data.point_cloud import subsample;"
    code += "print(subsample(np.arange(600, dtype='f4').reshape(100, 6), 10)[:, 0].tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == subsample(np.arange(600, dtype="f4").reshape(100, 6), 10)[:, 0].tolist()


def test_subsample_is_uniform():
    hits = np.zeros(100)
    for shift in range(400):
        hits[subsample(np.arange(100, dtype=np.float32)[:, None] + 1000 * shift, 25)[:, 0].astype(int) % 1000] += 1
    assert abs(hits - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)


# Bad input


def error_of(path, **options):
    with pytest.raises(PointCloudError) as caught:
        load_point_cloud(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def written(path, content):
    path.write_bytes(content)
    return path


def test_missing_empty_and_unknown_files(tmp_path):
    assert "no such file" in error_of(tmp_path / "gone.npy")
    assert "unknown format '.docx', expected one of .npy" in error_of(written(tmp_path / "a.docx", b"PK"))
    for suffix in FORMATS:
        assert "the file is empty" in error_of(written(tmp_path / f"a{suffix}", b""))
        assert error_of(written(tmp_path / f"b{suffix}", b"\x00\x01 this is no point cloud\n" * 9))


def test_npy_shapes_and_types(tmp_path):
    for shape in [(200,), (200, 2), (200, 4), (200, 8), (2, 100, 3)]:
        path = save_npy(tmp_path / "a.npy", np.ones(shape, np.float32))
        assert f"expected an array [N, 3] (xyz) or [N, 6] (xyz + rgb), got shape {list(shape)}" in error_of(path)
    assert "the file holds no points" in error_of(save_npy(tmp_path / "a.npy", np.ones((0, 6), np.float32)))
    for array in [np.array([[1, None, "x"]], object), np.ones((5, 3), complex), np.ones((5, 3), bool)]:
        assert "expected real numbers" in error_of(save_npy(tmp_path / "a.npy", array))
    assert "not a .npy file" in error_of(written(tmp_path / "a.npy", pickle.dumps(XYZ)))


def test_too_many_non_finite_points_are_named(tmp_path):
    for value in (np.nan, np.inf, -np.inf):
        cloud = EXPECTED.copy()
        cloud[17:60, 1] = value
        message = error_of(save_npy(tmp_path / "a.npy", cloud))
        assert "point 17 has coordinates" in message and "43 of 200" in message and "--data.max_nonfinite" in message
        cloud = EXPECTED.copy()
        cloud[18:60, 4] = value
        assert "point 18 has colours" in error_of(save_npy(tmp_path / "a.npy", cloud))
    cloud = EXPECTED.astype(np.float64)
    cloud[3, 0] = 1e300
    assert "too large for float32" in error_of(save_npy(tmp_path / "a.npy", cloud), max_nonfinite=0.0)
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 nan 0\nf 1 2 3\n")
    assert "vertex 2 is NaN or infinite" in error_of(tmp_path / "a.obj")
    assert "200 of 200 points are" in error_of(save_npy(tmp_path / "a.npy", EXPECTED * np.nan), max_nonfinite=0.99)


def test_few_non_finite_points_are_left_out_and_counted(tmp_path, caplog):
    cloud = EXPECTED.astype(np.float64)
    cloud[3, 0], cloud[4, 1], cloud[5, 5] = 1e300, np.nan, np.inf
    points = load_point_cloud(save_npy(tmp_path / "a.npy", cloud))
    np.testing.assert_array_equal(points, np.delete(EXPECTED, [3, 4, 5], axis=0))
    assert "a.npy: 3 of 200 points are NaN, infinite or too large; left out" in caplog.text
    mesh = trimesh.creation.icosphere(3)
    mesh.vertices[7] = np.nan
    mesh.export(tmp_path / "a.ply")
    points, notes = read_point_cloud(tmp_path / "a.ply", Reading())
    touching = int((mesh.faces == 7).any(axis=1).sum())
    assert len(points) == 8192 and notes == (f"{touching} faces with NaN or infinite vertices were left out",)
    assert np.linalg.norm(points[:, :3], axis=1).min() > 0.9


def test_an_organised_pcd_has_holes(tmp_path):
    header = "FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH 20\nHEIGHT 10\nDATA binary\n"
    image = XYZ.copy()
    image[:180] = np.nan
    path = written(tmp_path / "a.pcd", header.encode() + image.tobytes())
    np.testing.assert_array_equal(load_point_cloud(path)[:, :3], XYZ[180:])
    flat = header.replace("WIDTH 20\nHEIGHT 10", "WIDTH 200\nHEIGHT 1")
    assert "180 of 200" in error_of(written(tmp_path / "b.pcd", flat.encode() + image.tobytes()))


def test_colours_out_of_range(tmp_path):
    for value in (-0.1, 256.0, 1e6):
        cloud = EXPECTED.copy()
        cloud[5, 3] = value
        message = error_of(save_npy(tmp_path / "a.npy", cloud))
        assert "colours must lie in 0..1, 0..255 or 16 bits; point 5" in message
    path = save_ply(tmp_path / "a.ply", text=True, rgb=RGB.astype(np.int32))
    text = path.read_text().replace("int red", "uchar red", 1).splitlines()
    text[-1] = " ".join([*text[-1].split()[:-3], "300", "0", "0"])
    assert "point 199" in error_of(written(path, "\n".join(text).encode()))


def test_fewer_than_two_distinct_points(tmp_path):
    assert "at least 2 distinct points" in error_of(save_npy(tmp_path / "a.npy", EXPECTED[:1]))
    same = np.repeat(EXPECTED[:1], 50, axis=0)
    same[:, 3:] = EXPECTED[:50, 3:]
    assert "at least 2 distinct points are needed, got 50" in error_of(save_npy(tmp_path / "a.npy", same))
    assert len(load_point_cloud(save_npy(tmp_path / "a.npy", EXPECTED[:2]))) == 2


def test_npy_header_that_is_no_python(tmp_path):
    raw = save_npy(tmp_path / "a.npy", XYZ).read_bytes()
    assert "unreadable .npy file" in error_of(written(tmp_path / "a.npy", raw.replace(b"}", b"", 1)))


def test_unusable_meshes(tmp_path):
    (tmp_path / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    assert "total area of 0.0" in error_of(tmp_path / "flat.obj")
    (tmp_path / "index.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n")
    assert "vertices" in error_of(tmp_path / "index.off")
    square().export(tmp_path / "a.gltf")
    next(tmp_path.glob("*.bin")).unlink()
    assert "missing beside it" in error_of(tmp_path / "a.gltf")


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def lying_files(tmp_path):
    """Files of each format whose header promises 10^10 points, or as many as it can name."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 6), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    yield written(tmp_path / "a.npy", npy)
    for text in (True, False):
        raw = save_ply(tmp_path / "b.ply", text).read_bytes()
        yield written(tmp_path / f"{text}.ply", raw.replace(b"vertex 200", b"vertex 10000000000"))
    for kind in ("ascii", "binary", "binary_compressed"):
        yield written(tmp_path / f"{kind}.pcd", pcd_bytes(kind, points=10**10))
    raw = bytearray(save_las(tmp_path / "b.las").read_bytes())
    struct.pack_into("<I", raw, 107, 2**32 - 1)
    yield written(tmp_path / "c.las", raw)
    trimesh.creation.box().export(tmp_path / "m.ply")
    raw = (tmp_path / "m.ply").read_bytes()
    yield written(tmp_path / "n.ply", raw.replace(b"face 12", b"face 10000000000"))
    accessor = {"count": 10**10, "componentType": 5126, "type": "VEC3"}
    mesh = {"primitives": [{"attributes": {"POSITION": 0}}]}
    gltf = {"asset": {"version": "2.0"}, "accessors": [accessor], "meshes": [mesh], "nodes": [{"mesh": 0}]}
    yield written(tmp_path / "a.gltf", json.dumps(gltf | {"scenes": [{"nodes": [0]}], "scene": 0}).encode())


def test_false_headers_are_refused_before_allocation(tmp_path):
    load_point_cloud(save_npy(tmp_path / "warm.npy", XYZ))
    for path in lying_files(tmp_path):
        messages = []
        assert peak_bytes(lambda path=path, out=messages: out.append(error_of(path))) < 30e6, path
        assert "promises" in messages[0], messages
        if path.suffix != ".gltf":
            with pytest.raises(PointCloudError, match="promises"):
                point_count(path)


def test_point_count_reads_headers(tmp_path):
    paths = [save_npy(tmp_path / "a.npy", XYZ), save_ply(tmp_path / "a.ply"), save_las(tmp_path / "a.las")]
    paths.append(written(tmp_path / "a.pcd", pcd_bytes("binary")))
    assert [point_count(path) for path in paths] == [200] * 4
    trimesh.creation.box().export(tmp_path / "m.ply")
    assert point_count(tmp_path / "m.ply") is None
    for path in paths:
        written(path, path.read_bytes()[:-1])
        with pytest.raises(PointCloudError, match="promises 200 points"):
            point_count(path)


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory):
    """A function that lists a small valid file of every format as (suffix, bytes); as a list it would flood reports."""
    folder = tmp_path_factory.mktemp("valid")
    save_npy(folder / "a.npy", EXPECTED[:9])
    save_las(folder / "a.las", 7, "1.4")
    for text in (True, False):
        save_ply(folder / f"{text}.ply", text)
    for kind in ("ascii", "binary", "binary_compressed"):
        (folder / f"{kind}.pcd").write_bytes(pcd_bytes(kind))
    np.savez_compressed(folder / "a.npz", xyz=XYZ, rgb=RGB)
    save_npy(folder / "b.npy", np.array({"xyz": XYZ[:9], "rgb": RGB[:9], "id": "a"}, object))
    for suffix in ("xyz", "pts", "csv", "txt"):
        head = {"pts": "9\n", "csv": "x,y,z,r,g,b\n"}.get(suffix, "# a scan\n")
        delimiter = "," if suffix == "csv" else " "
        with (folder / f"a.{suffix}").open("w") as file:
            file.write(head)
            np.savetxt(file, np.hstack([XYZ[:9], RGB[:9]]), delimiter=delimiter)
    trimesh.Scene([trimesh.PointCloud(XYZ), square()]).export(folder / "scene.glb")
    texture = SimpleMaterial(image=Image.fromarray(QUADRANTS.repeat(4, 0)))
    for suffix in ("ply", "obj", "glb", "gltf", "stl", "off"):
        square(material=texture).export(folder / f"mesh.{suffix}")
    files = [(path.suffix, path.read_bytes()) for path in sorted(folder.iterdir()) if path.suffix in FORMATS]
    return lambda: files


@settings(max_examples=250, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbled_files_give_an_error_or_a_cloud(tmp_path, valid_files, data):
    suffix, raw = valid_files()[data.draw(st.integers(0, len(valid_files()) - 1))]
    content = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(300, len(content))) | st.integers(0, len(content)))  # headers often
        piece = data.draw(
            st.sampled_from([b"", b"\xff\xff\xff\xff", b"9999999999", b"-1", b"nan"]) | st.binary(max_size=8)
        )
        content[at : at + data.draw(st.integers(0, 8))] = piece
    path = written(
        tmp_path / f"fuzz{suffix}", bytes(content[: data.draw(st.integers(0, len(content)))]) or bytes(content)
    )
    outcome = []

    def load():
        try:
            outcome.append(load_point_cloud(path, num_points=64))
        except PointCloudError as error:
            outcome.append(error)

    assert peak_bytes(load) < 60e6
    if isinstance(outcome[0], np.ndarray):
        assert outcome[0].dtype == np.float32 and outcome[0].shape[1] == 6 and np.isfinite(outcome[0]).all()
        assert (outcome[0][:, 3:] >= 0).all() and (outcome[0][:, 3:] <= 1).all()

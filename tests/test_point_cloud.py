"""Files written by other libraries (numpy, trimesh, plyfile, laspy) or byte by byte, read back by load_point_cloud."""

import itertools
import json
import struct
import subprocess
import sys

import numpy as np
import plyfile
import pytest
import trimesh
from made_clouds import EXPECTED, RGB, RGB16, XYZ, error_of, pcd_bytes, save_las, save_npy, save_ply, written

from pointalign.data.point_cloud import MISSING_COLORS, UP_AXES, PointCloudError, load_point_cloud, normalise, subsample

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

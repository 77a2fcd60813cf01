"""Bad files of points and meshes: refused by name, before anything that they promise is allocated."""

import json
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_clouds import (
    EXPECTED,
    QUADRANTS,
    RGB,
    XYZ,
    error_of,
    pcd_bytes,
    save_las,
    save_npy,
    save_ply,
    square,
    written,
)
from PIL import Image
from trimesh.visual.material import SimpleMaterial

from pointalign.data.point_cloud import (
    FORMATS,
    PointCloudError,
    Reading,
    load_point_cloud,
    point_count,
    read_point_cloud,
)


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

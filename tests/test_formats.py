"""Point formats as users really have them: splats, tables, archives, dicts, compressed and georeferenced files."""

import io
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile

import laspy
import numpy as np
import plyfile
import pytest
from made_clouds import error_of

from pointalign.data.point_cloud import Reading, load_point_cloud, read_point_cloud, subsample

RNG = np.random.default_rng(0)
XYZ = RNG.normal(size=(200, 3)).astype(np.float32)
RGB = RNG.integers(0, 256, (200, 3), dtype=np.uint8)
NORMALS = (XYZ / np.linalg.norm(XYZ, axis=1, keepdims=True)).astype(np.float32)
EXPECTED = np.hstack([XYZ, RGB / np.float32(255)])
EPS = {"rtol": 1e-5, "atol": 1e-6}


def save_vertices(path, columns, text=False, comments=()):
    """A .ply of named columns."""
    rows = np.zeros(len(XYZ), [(name, values.dtype.str) for name, values in columns.items()])
    for name, values in columns.items():
        rows[name] = values
    plyfile.PlyData([plyfile.PlyElement.describe(rows, "vertex")], text=text, comments=list(comments)).write(path)
    return path


def axes():
    return {axis: XYZ[:, i] for i, axis in enumerate("xyz")}


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# PLY


@pytest.mark.parametrize("text", [True, False])
def test_gaussian_splats_have_their_colours(tmp_path, text, caplog):
    colours = RGB / 255
    opacity = np.linspace(-6, 6, 200).astype("f4")
    harmonics = {f"f_dc_{i}": ((colours[:, i] - 0.5) / 0.28209479).astype("f4") for i in range(3)}
    harmonics["f_dc_0"][-1] = 100.0  # far above 1: clipped
    shape = {name: np.zeros(200, "f4") for name in ("nx", "f_rest_0", "scale_0", "rot_0")}
    path = save_vertices(tmp_path / "a.ply", axes() | shape | harmonics | {"opacity": opacity}, text)
    points = load_point_cloud(path)
    seen = 1 / (1 + np.exp(-opacity.astype(np.float64))) >= 0.05
    colours[-1, 0] = 1.0
    assert len(points) == seen.sum() < 200
    np.testing.assert_allclose(points, np.hstack([XYZ, colours])[seen], atol=1e-5)
    assert f"{(~seen).sum()} of 200 splats have an opacity below 0.05 and were left out" in caplog.text
    opacity[:] = -9
    assert "all 200 splats" in error_of(save_vertices(tmp_path / "b.ply", axes() | harmonics | {"opacity": opacity}))


def test_compressed_splats_are_refused_by_name(tmp_path):
    packed = {"packed_position": np.zeros(200, "u4"), "packed_color": np.zeros(200, "u4")}
    assert "packed_position" in error_of(save_vertices(tmp_path / "a.ply", packed))


@pytest.mark.parametrize(
    "names", [("Red", "Green", "Blue"), ("R", "G", "B"), ("scalar_R", "scalar_G", "scalar_B"), ("RED", "GREEN", "BLUE")]
)
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_colours_under_other_names(tmp_path, names, kind):
    factor = 257 if kind == "u2" else 1
    colours = {name: RGB[:, i].astype(kind) * np.dtype(kind).type(factor) for i, name in enumerate(names)}
    for text in (True, False):
        path = save_vertices(tmp_path / "a.ply", axes() | colours, text)
        np.testing.assert_allclose(load_point_cloud(path), EXPECTED, **EPS)


@pytest.mark.parametrize(
    "comment", ["椅子 chair \u0085".encode(), "椅子带扶手".encode("gbk"), b"\x85 \x1c end_header \xff"]
)
def test_comments_in_any_encoding(tmp_path, comment):
    colours = dict(zip(("red", "green", "blue"), RGB.T, strict=True))
    raw = save_vertices(tmp_path / "a.ply", axes() | colours).read_bytes()
    path = written(tmp_path / "b.ply", raw.replace(b"ply\n", b"ply\ncomment " + comment + b"\n", 1))
    np.testing.assert_allclose(load_point_cloud(path), EXPECTED, **EPS)


# Tables of numbers without names


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ((XYZ, NORMALS), None),
        ((XYZ, RGB, np.arange(200)[:, None]), RGB),
        ((XYZ, RGB, np.full((200, 1), 255)), RGB),
        ((XYZ, -np.ones((200, 1)), RGB), RGB),
        ((XYZ, NORMALS, np.ones((200, 1))), None),
        ((XYZ, RGB, NORMALS), RGB),
        ((XYZ, NORMALS, RGB), RGB),
        ((XYZ, NORMALS, RGB / 255), RGB),
    ],
    ids=["normals", "label", "alpha", "value first", "curvature", "rgb, normals", "normals, rgb", "unit rgb"],
)
@pytest.mark.parametrize("suffix", [".npy", ".txt", ".npz"])
def test_columns_beside_xyz_and_rgb(tmp_path, columns, expected, suffix):
    table = np.hstack([np.asarray(column, np.float32) for column in columns])
    path = tmp_path / f"a{suffix}"
    {".npy": np.save, ".txt": np.savetxt, ".npz": lambda p, t: np.savez(p, points=t)}[suffix](path, table)
    points, notes = read_point_cloud(path, Reading(missing_color="white"))
    np.testing.assert_allclose(points[:, :3], XYZ, **EPS)
    np.testing.assert_allclose(points[:, 3:], np.ones((200, 3)) if expected is None else expected / 255, atol=1e-6)
    assert table.shape[1] == 9 or notes  # what was left out is said


def test_nine_columns_that_tell_nothing_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.hstack([XYZ, RGB / 255, RGB / 255]))
    assert "unit normals" in error_of(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "head", "separator"),
    [
        ("a.xyz", "", " "),
        ("a.txt", "", ","),
        ("a.txt", "# made by a scanner\n", "\t"),
        ("a.csv", "x,y,z,r,g,b\n", ","),
        ("a.csv", '"X";"Y";"Z";"Red";"Green";"Blue"\n', ";"),
        ("a.txt", "//X Y Z R G B\n200\n", " "),
        ("a.xyz", "200\n", " "),
        ("a.csv", "\ufeffX,Y,Z,R,G,B\n", ","),
    ],
)
def test_text(tmp_path, name, head, separator):
    rows = [separator.join([*(repr(float(v)) for v in p), *map(str, c)]) for p, c in zip(XYZ, RGB, strict=True)]
    for encoding in ("utf-8", "utf-16"):
        path = written(tmp_path / name, (head + "\r\n".join(rows) + "\n").encode(encoding))
        np.testing.assert_allclose(load_point_cloud(path), EXPECTED, **EPS)


def test_named_columns_in_any_order_and_16_bits(tmp_path):
    rows = "\n".join(f"{c[0] * 257},{c[1] * 257},{c[2] * 257},7,{p[2]},{p[0]},{p[1]}" for p, c in
                     zip(XYZ.tolist(), RGB.astype(int).tolist(), strict=True))  # fmt: skip
    path = written(tmp_path / "a.csv", "red,green,blue,class,z,x,y\n" + rows)
    np.testing.assert_allclose(load_point_cloud(path), EXPECTED, **EPS)


def test_leica_pts(tmp_path):
    rows = [f"{x} {y} {z} -1200 {r} {g} {b}" for (x, y, z), (r, g, b) in zip(XYZ.tolist(), RGB.tolist(), strict=True)]
    path = written(tmp_path / "a.pts", "200\r\n" + "\r\n".join(rows))
    np.testing.assert_allclose(load_point_cloud(path), EXPECTED, **EPS)
    path = written(tmp_path / "b.pts", "201\r\n" + "\r\n".join(rows))
    assert "promises 201 points, 200 rows" in error_of(path)


def test_text_that_is_no_cloud_is_refused(tmp_path):
    assert "rows of numbers" in error_of(written(tmp_path / "a.txt", "This is a caption of a chair.\nIt is red.\n"))
    assert "rows of numbers" in error_of(written(tmp_path / "b.xyz", "3\nwater\nO 0 0 0\nH 0 0 1\nH 0 1 0\n"))
    assert "got 5 columns" in error_of(written(tmp_path / "c.txt", "1 2 3 4 5\n2 3 4 5 6\n"))
    assert "rows of numbers" in error_of(written(tmp_path / "d.csv", "1,2,3\n1,2\n"))
    assert "no rows" in error_of(written(tmp_path / "e.csv", "x,y,z\n"))


# Archives and dicts


def test_npz_by_names(tmp_path):
    for names in (("xyz", "rgb"), ("points", "colors"), ("POS", "Color")):
        np.savez_compressed(tmp_path / "a.npz", **{names[0]: XYZ, names[1]: RGB, "label": np.arange(3)})
        np.testing.assert_allclose(load_point_cloud(tmp_path / "a.npz"), EXPECTED, **EPS)
    np.savez(tmp_path / "b.npz", anything=EXPECTED)
    np.testing.assert_allclose(load_point_cloud(tmp_path / "b.npz"), EXPECTED, **EPS)
    np.savez(tmp_path / "c.npz", xyz=XYZ, rgb=RGB.astype(np.uint16) * 257)
    np.testing.assert_allclose(load_point_cloud(tmp_path / "c.npz"), EXPECTED, **EPS)
    np.savez(tmp_path / "d.npz", xyz=XYZ, rgb=RGB[:50])
    assert "a colour for each of 200 points" in error_of(tmp_path / "d.npz")
    np.savez(tmp_path / "e.npz", first=XYZ, second=XYZ)
    assert "got first [200, 3], second [200, 3]" in error_of(tmp_path / "e.npz")
    np.savez(tmp_path / "f.npz", points=np.array([{"a": 1}], object))
    assert "expected an array xyz or points" in error_of(tmp_path / "f.npz")


def test_npz_that_lies_allocates_nothing(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 6), }"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("points.npy", member)
    tracemalloc.start()
    message = error_of(tmp_path / "a.npz")
    assert tracemalloc.get_traced_memory()[1] < 30e6 and "promises" in message
    tracemalloc.stop()


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_dicts_of_openshape_are_read_without_running_them(tmp_path, protocol, capsys):
    fields = {"dataset": "Objaverse", "group": "g", "id": "abc", "xyz": XYZ, "rgb": RGB / np.float32(255),
              "image_feat": np.zeros((12, 8), np.float32), "thumbnail_feat": None, "text": ["a chair"]}  # fmt: skip

    def save(path, content):
        stream = io.BytesIO()
        array = np.empty((), object)
        array[()] = content
        np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
        stream.seek(0)
        path.write_bytes(stream.getvalue() + pickle.dumps(array, protocol))
        return path

    path = save(tmp_path / "a.npy", fields)
    assert np.load(path, allow_pickle=True).item()["id"] == "abc"  # as numpy.save writes it
    np.testing.assert_allclose(load_point_cloud(path), EXPECTED, **EPS)
    message = error_of(save(tmp_path / "b.npy", fields | {"image_feat": Harmful()}))
    assert "refused: the pickle asks for" in message and "unpickled" not in capsys.readouterr().out
    assert "expected an array xyz" in error_of(save(tmp_path / "c.npy", {"rgb": RGB}))
    assert "other Python objects" in error_of(save(tmp_path / "d.npy", [1, 2]))


def test_a_pickle_that_numbers_its_objects_wildly_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array({"xyz": XYZ}, object))
    raw = (tmp_path / "a.npy").read_bytes()
    start = raw.index(b"\n") + 1
    path = written(tmp_path / "b.npy", raw[:start] + b"\x80\x02K\x01r\xff\xff\xff\x7f.")
    assert "numbers an object" in error_of(path)


# Compressed and georeferenced points


def save_laz(path, xyz=XYZ, scale=1e-6, offset=0.0):
    las = laspy.LasData(laspy.LasHeader(point_format=2, version="1.2"))
    las.header.scales, las.header.offsets = [scale] * 3, [offset] * 3
    las.x, las.y, las.z = xyz.astype(np.float64).T
    las.red, las.green, las.blue = (RGB.astype(np.uint16) * 257).T
    las.write(path)
    return path


def test_laz(tmp_path):
    pytest.importorskip("lazrs", reason="the lazrs wheel is not installed (extra: laz)")
    path = save_laz(tmp_path / "a.laz")
    np.testing.assert_allclose(load_point_cloud(path), EXPECTED, atol=2e-6)
    raw = bytearray(path.read_bytes())
    assert "LAZ-compressed: name the file .laz" in error_of(written(tmp_path / "b.las", bytes(raw)))
    struct.pack_into("<I", raw, 107, 2**32 - 1)
    assert "promises 4294967295 points" in error_of(written(tmp_path / "c.laz", bytes(raw)))
    cut = path.read_bytes()
    error_of(written(tmp_path / "d.laz", cut[: len(cut) * 3 // 4]))
    error_of(written(tmp_path / "e.laz", bytes(300)))
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, 100, 2**32 - 1)
    assert "descriptions" in error_of(written(tmp_path / "f.laz", bytes(raw)))
    raw = bytearray(path.read_bytes())
    (start,) = struct.unpack_from("<I", raw, 96)
    (table,) = struct.unpack_from("<q", raw, start)
    struct.pack_into("<I", raw, table + 4, 2**31 - 1)  # chunks: lazrs aborts its process, not this one
    assert "cannot be read" in error_of(written(tmp_path / "g.laz", bytes(raw)))


def test_laz_without_its_decoder_names_the_extra(tmp_path, monkeypatch):
    pytest.importorskip("lazrs", reason="the lazrs wheel is not installed (extra: laz)")
    path = save_laz(tmp_path / "a.laz")
    monkeypatch.setitem(sys.modules, "lazrs", None)
    assert "pointalign[laz]" in error_of(path)


@pytest.mark.parametrize("suffix", [".npy", ".ply", ".txt"])
def test_a_wide_georeferenced_cloud_keeps_its_millimetres(tmp_path, suffix):
    """UTM coordinates of a tile of 6 km: float32 alone resolves half a metre there."""
    xyz = RNG.uniform(0, 6000, (200, 3)) + np.array([500_000, 5_400_000, 300])
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, xyz)
    elif suffix == ".ply":
        save_vertices(path, dict(zip("xyz", xyz.T, strict=True)))
    else:
        np.savetxt(path, xyz, fmt="%.6f")
    points = load_point_cloud(path)[:, :3].astype(np.float64)
    np.testing.assert_allclose(points - points.mean(axis=0), xyz - xyz.mean(axis=0), atol=1e-3)


def test_an_array_in_double_precision_is_centred_in_it():
    from pointalign.models import PointAlignFeatureExtractor

    near = np.hstack([XYZ.astype(np.float64), RGB / 255])
    far = near + np.array([500_000, 5_400_000, 300, 0, 0, 0])
    extractor = PointAlignFeatureExtractor(num_points=200)
    np.testing.assert_allclose(extractor.prepare(far), extractor.prepare(near), atol=1e-6)


def test_six_million_points_are_sampled_without_copies(tmp_path, capsys):
    count = 6_000_000
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\nproperty double x\nproperty double y\n"
        "property double z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
    )
    rows = np.zeros(100_000, [("xyz", "<f8", 3), ("rgb", "u1", 3)])
    with (tmp_path / "a.ply").open("wb") as file:
        file.write(header.encode())
        for block in range(count // len(rows)):
            rows["xyz"] = np.random.default_rng(block).random((len(rows), 3)) + np.array([5e5, 5e6, 0])
            file.write(rows.tobytes())
    tracemalloc.start()
    began = time.perf_counter()
    points = subsample(load_point_cloud(tmp_path / "a.ply"), 8192)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with capsys.disabled():
        print(f" 6 M points, {(tmp_path / 'a.ply').stat().st_size / 1e6:.0f} MB: {seconds:.1f} s, {peak / 1e6:.0f} MB")
    assert len(points) == 8192 and np.abs(points[:, :3]).max() < 1.01
    assert peak < 400e6  # the result, [N, 6] float32, has 144 MB; its columns in double precision would have 288

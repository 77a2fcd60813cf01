"""ModelNet40's pickle, read without trusting it."""

import pickle

import numpy as np
import pytest

from pointalign.data.dataset import CLASSES, load_modelnet40
from pointalign.data.point_cloud import PointCloudError

RNG = np.random.default_rng(0)
CLOUDS = [RNG.normal(size=(32, 6)).astype(np.float32) for _ in range(3)]
LABELS = [np.array([n], dtype=np.int32) for n in (0, 15, 39)]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_is_read(tmp_path, protocol):
    path = tmp_path / "modelnet40_test_8192pts_fps.dat"
    path.write_bytes(pickle.dumps([CLOUDS, LABELS], protocol=protocol))
    clouds, labels = load_modelnet40(path)
    assert labels == [0, 15, 39] and [CLASSES[n] for n in labels] == ["airplane", "flower pot", "xbox"]
    for cloud, stored in zip(clouds, CLOUDS, strict=True):
        assert cloud.dtype == np.float32
        np.testing.assert_array_equal(cloud[:, :3], stored[:, :3])
        assert not cloud[:, 3:].any()  # normals are no colours


def test_other_layouts_of_arrays_and_labels(tmp_path):
    path = tmp_path / "a.dat"
    stored = [np.asfortranarray(CLOUDS[0]), CLOUDS[1].astype(">f8")]
    path.write_bytes(pickle.dumps((stored, [3, np.int64(4)])))
    clouds, labels = load_modelnet40(path)
    assert labels == [3, 4]
    for cloud, one in zip(clouds, stored, strict=True):
        np.testing.assert_allclose(cloud[:, :3], one[:, :3], rtol=1e-6)


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def touch(path):
    return Hostile(open, str(path), "w")


def test_nothing_in_the_pickle_is_executed(tmp_path):
    path, mark = tmp_path / "a.dat", tmp_path / "executed"
    for hostile in (touch(mark), [CLOUDS, [touch(mark)]], Hostile(eval, "1"), Hostile(np.load, "x")):
        path.write_bytes(pickle.dumps(hostile))
        with pytest.raises(PointCloudError, match="refused: the pickle asks for"):
            load_modelnet40(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        pickle.dumps([CLOUDS, LABELS])[:-200],
        pickle.dumps([CLOUDS]),
        pickle.dumps([CLOUDS, LABELS[:2]]),
        pickle.dumps([CLOUDS, [*LABELS[:2], np.array([40])]]),
        pickle.dumps([[np.array(["text"])], [1]]),
        pickle.dumps([[CLOUDS[0][:, :2]], [1]]),
        pickle.dumps({"a": 1}),
    ],
)
def test_bad_files_are_named(tmp_path, content):
    path = tmp_path / "bad.dat"
    path.write_bytes(content)
    with pytest.raises(PointCloudError, match=r"bad\.dat"):
        load_modelnet40(path)


def test_a_lying_shape_allocates_nothing(tmp_path):
    path = tmp_path / "bad.dat"
    data = pickle.dumps([[CLOUDS[0]], [1]], protocol=2)
    path.write_bytes(data.replace(b"K K\x06", b"J\x00\x00\x00\x7fK\x06"))
    with pytest.raises(PointCloudError, match="promises the shape"):
        load_modelnet40(path)

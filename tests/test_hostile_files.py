"""Files made to hurt: what reading them takes is bounded by their size, and what cannot be bounded is refused."""

import json
import pickle
import struct
import subprocess
import sys

import made_hostile
import numpy as np
import pytest
import torch

from pointalign.convert.files import ConversionError, Source
from pointalign.data.conversations import AnnotationError, IndexedConversations, load_conversations
from pointalign.data.dataset import load_modelnet40
from pointalign.data.gltf import _draco_counts, plain_gltf
from pointalign.data.gltf_scene import _flatten, _traverse
from pointalign.data.mesh import load_scene
from pointalign.data.point_cloud import PointCloudError, load_point_cloud, memory_bound
from pointalign.data.textures import BesideFiles

MEASURE = """
import json, sys, time
import PIL.Image, PIL.PngImagePlugin, trimesh
from pointalign.data import gltf
from pointalign.data.dataset import load_modelnet40
from pointalign.data.point_cloud import load_point_cloud

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

load_point_cloud(sys.argv[1])  # so that what is imported late is imported
for path in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before, start, message = peak(), time.process_time(), ""
    try:
        (load_modelnet40 if path.endswith(".dat") else load_point_cloud)(path)
    except ValueError as error:
        message = str(error)
    print(json.dumps([path.rpartition("/")[2], message, peak() - before, time.process_time() - start]), flush=True)
"""
REFUSED = {
    "texture.glb": "13304 x 13304 pixels", "texture.obj": "13304 x 13304 pixels", "textures.obj": "13304 x 13304",
    "instances.glb": "instances draw", "nodes.glb": "has 100001 nodes", "shared.glb": "primitives refer to",
    "views.glb": "buffer views hold", "zeros.pcd": "the compressed points", "zeros.npz": "the arrays of the archive",
    "memo.dat": "numbers an object 100000000", "sets.dat": "makes a set", "repeated.dat": "clouds of the pickle",
}  # fmt: skip
READ = ("pipe.obj", "pipe.glb", "objects.obj", "chain.glb")
SECONDS = 6  # of CPU for a file; before they were bounded, `objects.obj` took 8 and `chain.glb` minutes


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_small_files_take_little_memory_and_time(tmp_path):
    files = made_hostile.write_all(tmp_path)
    warm = tmp_path / "warm.glb"
    warm.write_bytes(made_hostile.glb(image=made_hostile.png(4, 4)))
    command = [sys.executable, "-c", MEASURE, str(warm), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    measured = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row[0] for row in measured} == {*REFUSED, *READ}, done.stderr
    for (name, message, memory, seconds), path in zip(measured, files, strict=True):
        assert (REFUSED[name] in message) if name in REFUSED else not message, (name, message)
        assert memory < min(200e6, memory_bound(path)) and seconds < SECONDS, (name, memory, seconds)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x05\x96" + b"\xff" * 8 + b"a.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"a.",
        b"\x80\x02\x8a\x09" + b"\x01" * 9 + b".",
    ],
)
def test_a_garbled_modelnet_file_is_named(data, tmp_path):
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(PointCloudError, match=r"x\.dat"):
        load_modelnet40(tmp_path / "x.dat")


@pytest.mark.parametrize("separator", [" ", "\n", ",,", ", ,"])
@pytest.mark.parametrize("count", [2, 3])
def test_annotations_without_commas_are_refused_by_both_readers(separator, count, tmp_path):
    turns = [{"from": "human", "value": "<point>?"}, {"from": "gpt", "value": "x"}]
    entry = json.dumps({"object_id": "a", "conversations": turns})
    path = tmp_path / "a.json"
    for text in (f"[{separator.join([entry] * count)}]", f"[{entry},]", f"[,{entry}]"):
        path.write_text(text)
        for read in (IndexedConversations, load_conversations):
            with pytest.raises(AnnotationError, match=r"a\.json: not JSON"):
                read(path)
    path.write_text(f"[{entry} ,\n {entry}]")
    assert len(IndexedConversations(path)) == 2


def test_deep_scenes_are_placed_as_trimesh_places_them(tmp_path):
    rng = np.random.default_rng(0)

    def change(tree):
        tree["nodes"] = [
            {
                "mesh": 0,
                "translation": rng.normal(size=3).tolist(),
                "rotation": (quaternion / np.linalg.norm(quaternion)).tolist(),
                "scale": rng.uniform(0.5, 2, 3).tolist(),
                "children": [i + 1],
            }
            for i, quaternion in enumerate(rng.normal(size=(7, 4)))
        ]
        tree["nodes"].append({"mesh": 0, "matrix": rng.normal(size=16).tolist()})

    path = tmp_path / "a.glb"
    path.write_bytes(made_hostile.glb(change, made_hostile.png(4, 4)))
    scene, _ = load_scene(path.read_bytes(), path)
    expected = [scene.graph[node][0] for node in scene.graph.nodes_geometry]
    data = plain_gltf(path.read_bytes(), path, BesideFiles(path))
    (length,) = struct.unpack_from("<I", data, 12)
    header = json.loads(data[20 : 20 + length])
    _flatten(header, list(_traverse(header)))
    placed = [np.reshape(header["nodes"][index]["matrix"], (4, 4)).T for index in header["scenes"][0]["nodes"]]
    np.testing.assert_allclose(placed, expected, rtol=1e-9, atol=1e-9)


def test_a_circle_of_nodes_ends(tmp_path):
    path = tmp_path / "a.glb"
    circle = [{"mesh": 0, "children": [i + 1]} for i in range(20)] + [{"children": [0]}]
    path.write_bytes(made_hostile.glb(lambda tree: tree.update(nodes=circle), made_hostile.png(4, 4)))
    assert len(load_point_cloud(path, num_points=64)) == 64


def test_the_sizes_that_draco_promises_are_read():
    DracoPy = pytest.importorskip("DracoPy")
    sphere = pytest.importorskip("trimesh").creation.icosphere(2)
    for preserve in (False, True):  # Edgebreaker, sequential
        content = DracoPy.encode(sphere.vertices, sphere.faces, preserve_order=preserve)
        assert set(_draco_counts(content)) == {len(sphere.vertices), len(sphere.faces)}


class ManyBytes:
    def __reduce__(self):
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("zipped", [True, False])
def test_published_weights_that_make_bytes_by_number_are_refused(zipped, tmp_path):
    content = {"model": {"query_tokens": torch.zeros(1)}, "more": ManyBytes()}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ConversionError, match=r"x\.pth: refused, .*bytearray"):
        Source("checkpoint", tmp_path / "x.pth")


def test_states_of_training_are_read(tmp_path):
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    config = {"dtype": torch.float16, "shape": torch.Size([1]), "device": torch.device("cpu"), "data": b"1"}
    content = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "config": config}
    for zipped in (True, False):
        torch.save(content, tmp_path / f"{zipped}.pth", _use_new_zipfile_serialization=zipped)
        assert {*Source("checkpoint", tmp_path / f"{zipped}.pth").shapes} == {*layer.state_dict()}
    (tmp_path / "list.pth").write_bytes(pickle.dumps([1]))
    with pytest.raises(ConversionError, match=r"list\.pth: "):
        Source("checkpoint", tmp_path / "list.pth")

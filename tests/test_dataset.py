"""Annotations joined with the files of a folder."""

import json
import pickle

import numpy as np
import pytest
import trimesh

from pointalign.data.conversations import AnnotationError
from pointalign.data.dataset import ConversationDataset, find_cloud
from pointalign.data.point_cloud import PointCloudError, load_point_cloud

CLOUD = np.random.default_rng(0).random((64, 6)).astype(np.float32)


def entry(object_ids, kind="single_round"):
    markers = "<point>" * (1 if isinstance(object_ids, str) else len(object_ids))
    conversations = [{"from": "human", "value": f"{markers}\nWhat is it?"}, {"from": "gpt", "value": "A box."}]
    return {"object_id": object_ids, "conversation_type": kind, "conversations": conversations}


@pytest.fixture
def annotation(tmp_path):
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps([entry("a"), entry("mesh", "multi_round"), entry(["a", "mesh"])]))
    np.save(tmp_path / "a_8192.npy", CLOUD)
    trimesh.creation.box().export(tmp_path / "mesh.stl")
    return path


def test_items_are_messages_with_loaded_clouds(tmp_path, annotation):
    dataset = ConversationDataset(annotation, tmp_path)
    assert len(dataset) == 3
    item = dataset[0]
    assert item["object_ids"] == ("a",) and [m["role"] for m in item["messages"]] == ["user", "assistant"]
    point, text = item["messages"][0]["content"]
    np.testing.assert_array_equal(point["point"], CLOUD)
    assert point["point"].dtype == np.float32 and text == {"type": "text", "text": "What is it?"}
    pair = [part["point"].shape for part in dataset[2]["messages"][0]["content"] if part["type"] == "point"]
    assert pair == [(64, 6), (8192, 6)]


def test_options_reach_the_clouds(tmp_path, annotation):
    dataset = ConversationDataset(annotation, tmp_path, types=["single_round"], up_axis="z")
    assert [c.object_ids for c in dataset.conversations] == [("a",), ("a", "mesh")]
    cloud = dataset[0]["messages"][0]["content"][0]["point"]
    np.testing.assert_array_equal(cloud, load_point_cloud(tmp_path / "a_8192.npy", "z"))
    with pytest.raises(ValueError, match="up_axis must be one of"):
        ConversationDataset(annotation, tmp_path, up_axis="w")


def test_file_of_an_object(tmp_path):
    with pytest.raises(PointCloudError, match=r"no cloud of object 'b' in .*: expected b_8192\.npy, b\.npy"):
        find_cloud(tmp_path, "b")
    for name in ("b.las", "b.ply", "b.npy", "b_8192.npy"):
        (tmp_path / name).touch()
        assert find_cloud(tmp_path, "b").name == name


def test_errors_and_worker_processes(tmp_path, annotation):
    (tmp_path / "a_8192.npy").unlink()
    dataset = pickle.loads(pickle.dumps(ConversationDataset(annotation, tmp_path)))
    with pytest.raises(PointCloudError, match="object 'a'"):
        dataset[0]
    with pytest.raises(AnnotationError):
        ConversationDataset(tmp_path / "gone.json", tmp_path)
    with pytest.raises(NotADirectoryError, match="folder of clouds"):
        ConversationDataset(annotation, tmp_path / "gone")

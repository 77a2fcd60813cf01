"""Procedural objects beside the embedded ones: training asks about them, their clouds are the same everywhere."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_records import box, record

from pointalign.embedded import catalogue
from pointalign.embedded.procedural_questions import procedural_record


def objects_of(annotations: Path) -> set[str]:
    entries = json.loads(annotations.read_text())
    named = [[entry["object_id"]] if isinstance(entry["object_id"], str) else entry["object_id"] for entry in entries]
    return {name for names in named for name in names}


def test_the_training_part_alone_asks_about_procedural_objects_of_its_nouns(tmp_path):
    chairs = [record(box(1, 2, 1), "chair") | {"object_id": f"chair-{i}", "split": "train"} for i in range(2)]
    lamp = record(box(1, 3, 1), "lamp") | {"object_id": "lamp", "split": "test"}
    procedural = [
        procedural_record(record(box(1, 2, 1), noun) | {"legs": 4}, f"procedural-{noun}") for noun in ("chair", "lamp")
    ]
    (tmp_path / "procedural.json").write_text(json.dumps(procedural))
    catalogue.write_annotations([*chairs, lamp], tmp_path, catalogue.SPLITS[::2])
    assert objects_of(tmp_path / "annotations" / "train.json") == {"chair-0", "chair-1", "procedural-chair"}
    assert objects_of(tmp_path / "annotations" / "test.json") == {"lamp"}
    entries = json.loads((tmp_path / "annotations" / "train.json").read_text())
    assert {e["object_id"] for e in entries if e["kind"] == "legs"} == {"procedural-chair"}
    stored = json.loads((tmp_path / "objects.json").read_text())
    assert [item["object_id"] for item in stored] == ["chair-0", "chair-1", "lamp"]


def test_procedural_clouds_are_the_same_on_every_machine(tmp_path, monkeypatch):
    makers = {noun: catalogue.MAKERS[noun] for noun in ("chair", "table")}
    monkeypatch.setattr(catalogue, "MAKERS", makers)
    written = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        records = catalogue.write_procedural_clouds(folder)
        written.append((records, {path.name: np.load(path) for path in sorted(folder.iterdir())}))
    (records, clouds), (again, others) = written
    assert records == again and clouds.keys() == others.keys()
    assert all(np.array_equal(clouds[name], others[name]) for name in clouds)
    assert {f"{r['object_id']}_8192.npy" for r in records} == set(clouds)
    assert [r["head_noun"] for r in records] == ["chair", "table"]
    for points in clouds.values():
        assert points.shape == (8192, 6) and np.linalg.norm(points[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)

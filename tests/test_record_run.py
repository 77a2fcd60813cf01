"""A run is recorded or shipped: complete, from its own stage 1, and without a path of the machine."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import demo_tables
import evidence_tables
import record_run

from pointalign import options, storage, train
from pointalign.data import dataset


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of a stage 1 and of a run from it; results and checkpoints go to folders of the test."""
    for name in ("stage1", "run", "results", "checkpoints"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(record_run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(record_run, "CHECKPOINTS", tmp_path / "checkpoints")
    state = {"model.query_tokens": torch.ones(2)}
    save_file(state, tmp_path / "stage1" / "stage.safetensors")
    save_file(state | {"lora_A": torch.ones(3)}, tmp_path / "run" / "stage.safetensors")
    stage1 = {"model": {"llm": "smollm2"}, "stage1": {"output": str(tmp_path / "stage1"), "seed": 0}}
    run = {"model": {"llm": "smollm2", "checkpoint": str(tmp_path / "stage1")}, "data": {"clouds": ["/a/b", "c/d"]}}
    run |= {"device": "CPU", "versions": {"torch": "2"}, "commit": "abc", "alignment": {"weight": 0.1}}
    run["training"] = {"output_dir": str(tmp_path / "run"), "max_steps": 3}
    for name, content in (("stage1", stage1), ("run", run)):
        (tmp_path / name / "stage.json").write_text(json.dumps(content))
    return tmp_path / "stage1", tmp_path / "run"


def test_a_shipped_pair(folders, tmp_path):
    stage1, run = folders
    record_run.main([str(run), "--ship", str(stage1)])
    written = tmp_path / "checkpoints"
    assert sorted(path.name for path in written.iterdir()) == sorted(
        f"{name}{suffix}" for name in ("furniture", "furniture-stage1") for suffix in (".json", ".safetensors")
    )
    assert load_file(written / "furniture.safetensors").keys() == {"model.query_tokens", "lora_A"}
    described = json.loads((written / "furniture.json").read_text())
    assert described["model"] == {"llm": "smollm2", "checkpoint": "furniture-stage1"}
    assert described["data"]["clouds"] == ["b", "c/d"]
    first = json.loads((written / "furniture-stage1.json").read_text())
    assert first["stage1"] == {"output": "stage1", "seed": 0}


def test_a_run_of_another_stage_1_is_not_shipped(folders, tmp_path):
    stage1, run = folders
    save_file({"model.query_tokens": torch.zeros(2)}, stage1 / "stage.safetensors")
    with pytest.raises(ValueError, match=r"does not start from .*model\.query_tokens differs"):
        record_run.main([str(run), "--ship", str(stage1)])
    assert not list((tmp_path / "checkpoints").iterdir())


def write_accuracy(run: Path, share: float = 0.5) -> None:
    """What a run leaves after its evaluation."""
    interval = {"mean": share, "low": share - 0.1, "high": share + 0.1, "count": 4}
    methods = (
        "model before training",
        "model",
        "model, random yaw",
        "model, shuffled clouds",
        "1-NN Chamfer, best of 16 yaws",
    )
    tests = {"model against 1-NN Chamfer, best of 16 yaws": interval | {"p": 0.25}}
    row = {"noun_in_training": True, "right": ["model"], "answer": "This is a bench."}
    accuracy = {
        "split": "test",
        "accuracy": {name: {"noun in training": interval, "all": interval} for name in methods},
        "tests": tests,
        "kinds": {
            "noun": interval | {"chance": 0.5, "yes_rate": 0.75, "balanced": 0.25},
            "longest side": interval | {"chance": 1 / 3},
        },
        "objects": [row | {"object_id": str(i), "family": f"family {i}"} for i in range(4)],
    }
    (run / "accuracy.json").write_text(json.dumps(accuracy))
    for name in record_run.PICTURES:
        (run / name).write_text(f"content of {name}")


def test_a_recorded_run_becomes_the_tables(folders, tmp_path, monkeypatch):
    _, run = folders
    write_accuracy(run)
    record_run.main([str(run)])
    results = tmp_path / "results"
    names = {"demo.json", "demo_repeats.json", "demo_answers.md", "demo_answers.png", "demo_loss.png"}
    assert {path.name for path in results.iterdir()} == names
    assert str(tmp_path) not in (results / "demo.json").read_text()

    monkeypatch.setattr(demo_tables, "RESULTS", results)
    text = demo_tables.demo()
    assert "| model | 50.0 [40.0, 60.0] |" in text and "noun occurs in training (n=4)" in text
    assert "all test objects" not in text, "the same objects"
    assert "| noun | 50.0 [40.0, 60.0] | 50 | 75 | 25 | 4 |" in text
    assert "| longest side | 50.0 [40.0, 60.0] | 33 |  |  | 4 |" in text
    assert "- model against 1-NN Chamfer, best of 16 yaws: +50.0 [+40.0, +60.0] points, p = 0.2500" in text
    assert "content of answers.md" in text


def test_repeated_runs_of_one_recipe_are_listed(folders, tmp_path, monkeypatch):
    _, run = folders
    write_accuracy(run)
    record_run.main([str(run)])
    results = tmp_path / "results"
    recorded = (results / "demo.json").read_text()
    monkeypatch.setattr(demo_tables, "RESULTS", results)
    assert "recorded once" in demo_tables.repeats()

    description = json.loads((run / "stage.json").read_text())
    elsewhere = description | {"device": "another CPU", "dtype": "bfloat16"}
    elsewhere["training"] = description["training"] | {"seed": 7, "output_dir": "elsewhere"}
    (run / "stage.json").write_text(json.dumps(elsewhere))
    write_accuracy(run, 0.25)
    for _ in range(2):  # the same run twice is one entry
        record_run.main([str(run), "--repeat"])
    assert (results / "demo.json").read_text() == recorded
    text = demo_tables.repeats()
    assert text.startswith("2 runs of the recipe (seeds: 2) name 25.0 to 50.0 %.")
    assert "| another CPU, bfloat16 | 7 | 25.0 [15.0, 35.0] | 25.0 [15.0, 35.0] | 25 | 25 | abc, 2" in text

    (run / "stage.json").write_text(json.dumps(description | {"alignment": {"weight": 0.0}}))
    with pytest.raises(ValueError, match=r"differs from those of demo_repeats\.json in alignment: record a run"):
        record_run.main([str(run), "--repeat"])
    record_run.main([str(run)])
    assert "recorded once" in demo_tables.repeats(), "runs of another recipe do not count"


def test_the_seed_of_a_repeated_run_is_the_one_it_had(monkeypatch):
    monkeypatch.setattr(storage, "file_hash", lambda *paths: "0")
    monkeypatch.setattr(dataset, "data_paths", lambda options: [Path("annotations.json")])
    described = [train.describe(options.parse(["demo", *seed])) for seed in ([], ["--training.seed", "42"])]
    accuracy = {method: {"noun in training": {}} for method in record_run.REPEATED}
    content = {"date": "2026-11-27", "accuracy": accuracy, "kinds": {}}
    assert [record_run.repeat_of(content | {"run": run})["seed"] for run in described] == [0, 42]


def test_an_alignment_check_is_recorded_without_a_run(folders, tmp_path, monkeypatch, capsys):
    _, run = folders
    columns = ("own, centred", "retrieval@1")
    rows = {name: dict.fromkeys(columns, mean) for name, mean in (("before training", 0.1), ("LoRA trains", 0.375))}
    estimate = {"mean": 0.25, "low": 0.125, "high": 0.375, "count": 4, "p": 0.5}
    difference = dict.fromkeys(columns, estimate)
    described = {"versions": {"torch": "2"}, "device": "CPU", "commit": "abc", "uncommitted_changes": True}
    content = {"results": rows, "differences": difference, "answer": "The language model moves.", "steps": 7}
    content |= {"split": "validation", "objects": 4, "run": described | {"data": {"clouds": str(tmp_path / "objects")}}}
    (run / "alignment.json").write_text(json.dumps(content))
    monkeypatch.setattr(evidence_tables, "RESULTS", tmp_path / "results")
    assert "Not measured" in evidence_tables.alignment_check()
    record_run.main(["--alignment-check", str(run)])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["alignment_check.json"]
    assert str(tmp_path) not in (tmp_path / "results" / "alignment_check.json").read_text()
    text = evidence_tables.alignment_check()
    assert text.startswith("The language model moves.") and "| LoRA trains | 0.375 | 0.375 |" in text
    assert "| LoRA trains less LoRA frozen | +0.250 [+0.125, +0.375] |" in text
    assert "4 validation objects, 7 steps" in text and "commit abc with uncommitted changes, 2" in text
    with pytest.raises(SystemExit):
        record_run.main([])
    assert "expected the folder of a run" in capsys.readouterr().err

"""The tables of README and docs come from result files, and say so where a file is missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import demo_tables
import evidence_tables
import feature_cache_table
import short_tables

from experiments import held_out_naming
from pointalign.embedded import catalogue
from pointalign.storage import file_hash


def estimate(mean: float, **more) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 4} | more


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_tables, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path / "benchmarks" / "results"


VERSIONS = {"device": "a card", "torch": "2", "commit": "abc"}


def test_an_evaluation_is_shown_with_what_its_cloud_adds(results):
    def task(right: list[float]) -> dict:
        rows = [{"id": str(i), "family": str(i), "values": {"head noun": value}} for i, value in enumerate(right)]
        metrics = {"head noun": estimate(sum(right) / 4), "mentioned": estimate(0.9)}
        return {"kind": "classification", "metrics": metrics, "questions": rows}

    tasks = {"classification-prompt0": task([1, 1, 1, 0]), "classification-prompt0-shuffled": task([0, 1, 0, 0])}
    asked = {"split": "test", "data": "furniture", "protocol": "greedy"}
    content = {"model": "m", "weights": "w", "asked": asked, "generation": {}, "versions": VERSIONS}
    (results / "evaluation.json").write_text(json.dumps(content | {"tasks": tasks}))
    text = evidence_tables.evaluation()
    assert "| classification-prompt0 | head noun | 75.0 | 65.0 to 85.0 | 4 |" in text
    assert "head noun +50.0 [+0.0, +100.0] points" in text and "a card, torch 2, commit abc, date not recorded" in text
    outside, folded = text.split("<details>")
    assert "mentioned" not in outside and "mentioned" in folded


def test_an_ablation_is_shown_with_what_it_says(results):
    folder = results / "ablation_objects"
    folder.mkdir()
    row = {"seeds": [0, 1], "metrics": {"likelihood margin": estimate(0.2), "generated accuracy": estimate(0.3)},
           "layer": 3, "centred cosine": 0.1, "retrieval@1": 0.2, "CKA": 0.3, "retention": None, "few_shot": {},
           "probes at the Q-Former": {"noun": 0.4}, "probes at the last layer": {"noun": 0.25}}  # fmt: skip
    margin = estimate(0.07, p=0.001, p_holm=0.002, detectable=0.03) | {"low": 0.05, "per_seed": [0.07, 0.07]}
    difference = {"seeds": [0, 1], "likelihood margin": margin, "generated accuracy": margin}
    arms = [row | {"arm": "no alignment"}, row | {"arm": "alignment", "differences": difference}]
    recipe = {"schedule": {"steps": 7, "batch_size": 2}, "weight": 0.1, "baseline": "no alignment"}
    recipe["arms"] = {"no alignment": {"weight": 0.0}, "alignment": {}}
    content = {
        "recipe": recipe,
        "versions": VERSIONS | {"date": "2026-11-25"},
        "arms": arms,
        "missing": ["random target", "random target"],
        "conclusion": ["Shown: as it was written when fewer seeds sufficed."],
    }
    (folder / "ablation.json").write_text(json.dumps(content))
    (folder / "layers.png").touch()
    text = evidence_tables.ablation("ablation_objects")
    assert "2 seeds; with fewer than 5 nothing counts as shown" in text and "Shown:" not in text
    assert "2 runs of the plan are missing: random target." in text
    assert "7 steps of 2 samples, lambda 0.1" in text
    assert "commit abc, 2026-11-25" in text
    assert "| alignment | 0-1 | +0.070 [+0.050, +0.170] | 0.002 | 0.030 |" in text
    assert "| noun | 0.400 | 0.250 | 0.250 |" in text
    assert "](../benchmarks/results/ablation_objects/layers.png)" in text and "differences.png" not in text


def test_probes_are_shown_by_layer(results):
    (results / "probe").mkdir()
    content = {"model": "m", "weights": "w", "data": "furniture", "versions": VERSIONS, "kinds": {"noun": "accuracy"},
               "probes": {"noun": {"Q-Former": 0.5, "0": 0.4}}, "similarity": {"0": {"CKA": 0.3}}}  # fmt: skip
    (results / "probe" / "probe.json").write_text(json.dumps(content))
    text = evidence_tables.probe()
    assert "| noun (accuracy) | 0.500 | 0.400 |" in text and "| CKA |  | 0.300 |" in text
    assert "](../benchmarks/results/probe/layers.png)" in text
    content["probes"] = {"noun": {"Q-Former": 0.5, "30": 0.3, "5": 0.2, "0": 0.4}}
    assert "input of the language model to its last layer: noun (accuracy) 0.40 to 0.30" in short_tables._probed(
        content
    )


def test_hours_of_a_feature_cache_follow_from_what_was_measured(results, monkeypatch):
    monkeypatch.setattr(feature_cache_table, "RESULTS", results)
    row = {"operations": 5e10, "read_seconds": 0.003, "encode_seconds": 0.9, "batch": 2}
    errors = {"bfloat16 autocast": {"all": 0.0123, "worst": 0.02}}
    provenance = VERSIONS | {"driver": None, "triton": None, "uncommitted_changes": False, "date": "2026-11-27"}
    content = {"provenance": provenance, "minigpt3d-phi2": row, "mini": row, "write_seconds": 0.001}
    content["precision"] = {"stage": "s", "objects": 16, "errors": errors, "nearest_other_object": 0.5}
    (results / "feature_cache_cpu.json").write_text(json.dumps(content))
    text = feature_cache_table.feature_cache()
    assert "| minigpt3d-phi2 | 50 | 3 | 900 | 1 | 1.11 |" in text
    card = 5e10 / 25e12 + feature_cache_table.point_op_seconds()  # float32: 2 ms of products
    alone, shared = 660_000 * (card + 0.004) / 3600, 660_000 * card / 3600
    assert f"| float32 | {card * 1e3:.2g} | {alone:.2g} | {shared:.2g} | {shared:.2g} |" in text
    assert "| bfloat16 autocast | 1.2e-02 | 2.0e-02 |" in text


STAGE = {
    "commit": "abc",
    "device": "CPU, 2 cores",
    "versions": {"torch": "2"},
    "model": {"lora_rank": 8},
    "alignment": {},
}
METHODS = ["model", "model, shuffled clouds", "1-NN Chamfer, best of 16 yaws"]


@pytest.fixture
def finished_folds(tmp_path, monkeypatch):
    """Two runs of three objects: the model is always right, 1-NN on the first objects only, the control never."""
    folders = [tmp_path / "kept" / "fold-0", tmp_path / "kept" / "fold-1"]
    for number, folder in enumerate(folders):
        objects = []
        for i in range(3):
            right = METHODS[:1] + METHODS[2:] * (i == 0)
            objects.append({"object_id": f"o{number}{i}", "family": f"f{number}{i // 2}", "truth": "bench",
                            "noun_in_training": i < 2, "answer": "a bench", "right": right})  # fmt: skip
        folder.mkdir(parents=True)
        accuracy = {name: {} for name in METHODS}
        (folder / "accuracy.json").write_text(json.dumps({"accuracy": accuracy, "objects": objects}))
        model = STAGE["model"] | {"checkpoint": f"{folder}-stage1"}
        (folder / "stage.json").write_text(json.dumps(STAGE | {"model": model}))
    splits = {f"o0{i}": {"split": "test"} for i in range(3)}
    monkeypatch.setattr(held_out_naming, "read_splits", lambda: splits)
    return folders


def test_objects_of_all_folds_count_as_one_set(finished_folds, capsys):
    pooled = held_out_naming.pool(finished_folds)
    every, alone = pooled["all folds"], pooled["objects of the test part"]
    assert list(every["accuracy"]) == METHODS and every["accuracy"]["model, shuffled clouds"]["all"]["mean"] == 0
    assert every["accuracy"]["model"]["all"]["count"] == 6 and len(pooled["objects"]) == 6
    assert every["accuracy"]["1-NN Chamfer, best of 16 yaws"]["all"]["mean"] == pytest.approx(2 / 6)
    tests = [part["tests"]["model against 1-NN Chamfer, best of 16 yaws"] for part in (every, alone)]
    assert [(test["mean"], test["count"]) for test in tests] == [(0.5, 4), (0.5, 2)]
    assert pooled["run"]["model"] == {"lora_rank": 8}, "what the folds have in common"
    assert "all (n=6)" in capsys.readouterr().out


@pytest.mark.parametrize(("key", "value"), [("commit", "another"), ("model", {"lora_rank": 4})])
def test_folds_that_differ_are_not_pooled(key, value, finished_folds):
    (finished_folds[1] / "stage.json").write_text(json.dumps(STAGE | {key: value}))
    with pytest.raises(ValueError, match=rf"fold-1 differs from .*fold-0 in {key}: remove one"):
        held_out_naming.pool(finished_folds)


def test_folds_are_kept_and_the_result_waits_for_all(finished_folds, results, tmp_path, monkeypatch, capsys):
    commands, stages = [], []

    def train_stage(fold, folder, steps):
        stages.append((fold, folder.name))
        return 0

    def train(command):
        commands.append(command)
        folder = Path(command[-1].removeprefix("--training.output_dir="))
        assert not folder.exists(), "a run that was stopped halfway must be removed"
        shutil.copytree(finished_folds[int(folder.name[-1])], folder)
        return subprocess.CompletedProcess(command, 0)

    out, result = tmp_path / "runs", results / "held_out_naming.json"
    (out / "fold-0").mkdir(parents=True)
    (out / "fold-0" / "options.json").write_text("{}")
    monkeypatch.setattr(held_out_naming, "train_stage", train_stage)
    monkeypatch.setattr(held_out_naming.subprocess, "run", train)
    monkeypatch.setattr(held_out_naming.storage, "provenance", lambda device: {"date": "today"})
    monkeypatch.setattr(catalogue, "FOLDS", 2)
    monkeypatch.setattr(held_out_naming, "RESULT", result)
    for folds, unfinished in ((["1"], True), (["0", "1"], False)):
        assert held_out_naming.main(["--output", str(out), "--folds", *folds]) == 0
        assert ("not finished: fold-0" in capsys.readouterr().out) == unfinished == (not result.exists())
    folds = [command[-2] for command in commands]
    assert folds == ["--data.fold=1", "--data.fold=0"], "a finished fold is not run again"
    assert stages == [(1, "fold-1-stage1"), (0, "fold-0-stage1")]
    assert [command[-3] for command in commands] == [f"--model.checkpoint={out / name}" for _, name in stages]
    monkeypatch.setattr(demo_tables, "RESULTS", results)
    text = demo_tables.held_out_naming()
    assert "| noun occurs in training (n=4) | all embedded objects (n=6) |" in text and "commit abc" in text
    assert "detects a true difference of " in text and "belong to 2 families; the four largest hold 100 %" in text
    assert "the test part alone (n=2): model 100.0" in text and "+50.0" in text
    monkeypatch.setattr(short_tables, "RESULTS", results)
    assert (
        "a shorter stage 1 each (n=4): model 100.0 [100.0, 100.0] %, nearest neighbour 50.0" in short_tables._in_folds()
    )
    result.unlink()
    assert short_tables._in_folds() == ""


@pytest.mark.parametrize(("seeds", "word"), [(5, "a gain"), (4, "no")])
def test_the_short_table_shows_no_gain_of_few_seeds(seeds, word, tmp_path, monkeypatch):
    monkeypatch.setattr(short_tables, "RESULTS", tmp_path)
    assert short_tables.studies() == "Not measured.\n"
    nats = estimate(0.07, p_holm=0.002, detectable=0.03) | {"low": 0.05}
    method = {"arm": "alignment", "differences": {"seeds": list(range(seeds)), "likelihood margin": nats}}
    method["differences"]["generated accuracy"] = estimate(0.02, p_holm=0.6, detectable=0.1)
    content = {"recipe": {"weight": 0.1, "weights": "of an earlier stage"}, "arms": [{"arm": "no alignment"}, method]}
    (tmp_path / "ablation_shapes").mkdir()
    (tmp_path / "ablation_shapes" / "ablation.json").write_text(json.dumps(content))
    text = short_tables.studies()
    assert f"| {seeds} | likelihood margin, nats | +0.070 [+0.050, +0.170] | 0.002 | 0.030 | {word} |" in text
    assert f"| {seeds} | generated accuracy, points | +2.0 [-8.0, +12.0] | 0.600 | 10.0 | no |" in text
    assert "Recorded with an earlier point branch" in text and "`ablation_shapes/ablation.json`" in text
    arms = {"before training": 0.01, "LoRA trains": 0.5, "LoRA frozen": 0.25}
    results = {name: {"own, centred": cosine} for name, cosine in arms.items()}
    (tmp_path / "alignment_check.json").write_text(json.dumps({"answer": "No answer yet.", "results": results}))
    text = short_tables.studies()
    assert "Does the language model itself move? No answer yet." in text
    assert "from 0.010 to 0.250; with LoRA it is 0.500" in text


def test_what_is_not_measured_is_listed_until_its_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(short_tables, "RESULTS", tmp_path)
    for name, (question, command, _) in short_tables.UNMEASURED.items():
        assert f"| {question} | `{command}` |" in short_tables.not_measured()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        assert question not in short_tables.not_measured()
    assert "|" not in short_tables.not_measured()


def test_without_files_nothing_is_claimed(results, tmp_path, monkeypatch, capsys):
    import report

    sections = {name: report.SECTIONS[name] for name in ("evaluation", "ablation_shapes", "probe")}
    (tmp_path / "docs").mkdir()
    documents = tuple(tmp_path / "docs" / name for name in ("README.md", "results.md", "performance.md"))
    monkeypatch.setattr(report, "SECTIONS", sections)
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "DOCUMENTS", documents)
    for name in report.SHIPPED:
        shutil.copy(report.CHECKPOINTS / f"{name}.json", tmp_path)
    (tmp_path / "furniture.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(report, "CHECKPOINTS", tmp_path)
    marked = [f"before\n<!-- {name}:begin -->\nold figures\n<!-- {name}:end -->\nafter\n" for name in sections]
    for document, text in zip(documents, marked, strict=True):
        document.write_text(text)
    report.main()
    for document, text in zip(documents, marked, strict=True):
        assert document.read_text() == text.replace("old figures", "Not measured.")
    assert "evaluation: evaluation.json is missing" in capsys.readouterr().out and not list(results.iterdir())


@pytest.mark.parametrize("copies", [0, 2])
def test_a_section_has_one_place(copies, tmp_path, monkeypatch):
    import report

    document = tmp_path / "results.md"
    document.write_text("<!-- probe:begin -->\n<!-- probe:end -->\n" * copies)
    monkeypatch.setattr(report, "SECTIONS", {"probe": lambda: "new\n"})
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    with pytest.raises(ValueError, match=f"section probe: expected its begin and end lines once .* found {copies}"):
        report.render()


def test_documents_hold_what_the_result_files_say(monkeypatch):
    """Run `make report` if this fails."""
    import report
    import train_step_table

    for module in (report, train_step_table):
        monkeypatch.setattr(module, "_plot", lambda results: None)
    for path, text in report.render().items():
        assert path.read_text() == text, f"{path.name} is out of date: run `make report`"


def test_every_figure_of_the_shipped_model_is_of_its_weights():
    """The recorded run of `make train` is the shipped model, and what was measured of it is of these very weights."""
    import report

    weights = file_hash(report.CHECKPOINTS / "furniture.safetensors")[:16]
    for name in ("evaluation.json", "audit.json", "probe/probe.json"):
        assert json.loads((report.RESULTS / name).read_text())["weights"] == weights, name
    run = json.loads((report.RESULTS / "demo.json").read_text())["run"]
    assert json.loads((report.CHECKPOINTS / "furniture.json").read_text()) == run

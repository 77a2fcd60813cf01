"""Five folds: nothing of a fold is seen by the stage that is asked about it, and all folds count as one set."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLOUDS, NAMES, tiny_text_config
from made_records import record
from safetensors.torch import load_file
from test_train import TINY
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evidence_tables
import short_tables

from experiments import folds, held_out_naming
from experiments.ablation import __main__ as ablation_command
from experiments.ablation import ablation
from experiments.ablation.measure import PRIMARY
from experiments.ablation.recipe import RECIPES, read_recipe
from pointalign import assets, stage_file, train
from pointalign.embedded import catalogue, stage1
from pointalign.embedded.procedural_questions import procedural_record
from pointalign.evaluation import probe, statistics
from pointalign.models import configuration


@pytest.fixture
def objects(tmp_path, monkeypatch):
    """The committed clouds as embedded objects: two folds, two nouns in each, two objects in a family."""
    monkeypatch.setattr(catalogue, "FOLDS", 2)
    families = [[f"family {i}" for i in range(20) if catalogue.fold_of(f"family {i}") == fold] for fold in range(2)]
    folder = tmp_path / "furniture"
    shutil.copytree(CLOUDS, folder / "clouds")
    records = []
    for i, name in enumerate(NAMES):
        title = ("bench", "cactus")[i // 2 % 2]
        entry = catalogue.CatalogueEntry(name, title, "kitchen", "made", "CC0-1.0", Path(), "", (1, 1, 1), ())
        points = np.load(CLOUDS / f"{name}_8192.npy").astype(np.float64)
        records.append(catalogue.describe_object(entry, points, families[i // 4][i // 2 % 2], catalogue.SPLITS[i % 3]))
    (folder / "objects.json").write_text(json.dumps(records))
    cloud = np.load(CLOUDS / f"{NAMES[0]}_8192.npy").astype(np.float64)
    procedural = [procedural_record(record(cloud, noun), f"procedural-{noun}") for noun in ("bench", "unicorn")]
    for item in procedural:
        np.save(folder / "clouds" / f"{item['object_id']}_8192.npy", cloud.astype(np.float32))
    (folder / "procedural.json").write_text(json.dumps(procedural))
    monkeypatch.setattr(assets, "_asset", lambda *_: folder)
    return records


def test_every_family_is_held_out_once_and_whole(objects):
    held_out = []
    for fold in range(2):
        folder = assets.embedded_objects(fold)
        records = {record["object_id"]: record for record in json.loads((folder / "objects.json").read_text())}
        parts = {part: {i for i, item in records.items() if item["split"] == part} for part in ("train", "test")}
        assert parts["train"] | parts["test"] == set(NAMES) and all(parts.values())
        assert not {records[i]["family"] for i in parts["train"]} & {records[i]["family"] for i in parts["test"]}
        for part, ids in parts.items():
            entries = json.loads((folder / "annotations" / f"{part}.json").read_text())
            named = [[e["object_id"]] if isinstance(e["object_id"], str) else e["object_id"] for e in entries]
            procedural = {"procedural-bench"} if part == "train" else set()  # nothing is a unicorn
            assert {name for names in named for name in names} == ids | procedural
        assert np.array_equal(np.load(folder / "clouds" / f"{NAMES[0]}_8192.npy"),
                              np.load(CLOUDS / f"{NAMES[0]}_8192.npy"))  # fmt: skip
        held_out += parts["test"]
    assert sorted(held_out) == NAMES
    with pytest.raises(ValueError, match="fold 2: expected 0 to 1"):
        assets.embedded_objects(2)


def test_the_committed_objects_are_shared_out_evenly():
    splits = catalogue.read_splits().values()
    families = [item["family"] for item in splits]
    for members in (families, sorted(set(families))):
        shares = np.bincount([catalogue.fold_of(family) for family in members], minlength=5) / len(members)
        assert shares == pytest.approx([0.2] * 5, abs=0.015)


@pytest.fixture
def recipes(tmp_path, tokenizer, monkeypatch):
    """A tiny language model, and recipes of an ablation and of a demo with it, in `tmp_path`."""
    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)
    monkeypatch.setattr(probe, "FIT_STEPS", 3)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    monkeypatch.setattr(stage1, "FIT_BATCHES", 2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    monkeypatch.setattr(assets, "language_model", lambda: tmp_path / "llm")
    model = "lora_rank: 4, dtype: float32"
    (tmp_path / "demo.yaml").write_text(f"""
model: {{{model}, train: [modality_projector, lora]}}
data: {{num_points: 256, views: 2}}
training: {{max_steps: 2, report_to: none, use_cpu: true, disable_tqdm: true, per_device_train_batch_size: 2}}
""")
    (tmp_path / "arms.yaml").write_text(f"""
data: furniture
model: {{{model}, train: [lora]}}
schedule: {{steps: 1, batch_size: 2}}
layers: 2
arms:
  no alignment: {{weight: 0.0}}
  alignment: {{}}
""")
    return tmp_path


@pytest.mark.usefixtures("random_point_branch")
def test_what_runs_wrote_of_their_objects_counts_as_one_set(objects, recipes, tmp_path):
    folders = [tmp_path / "out" / f"fold-{fold}" for fold in range(2)]
    for fold, folder in enumerate(folders):
        command = [str(recipes / "demo.yaml"), f"--data.fold={fold}", "--data.evaluate=test"]
        assert train.main([*command, f"--training.output_dir={folder}"]) == 0
    pooled = held_out_naming.pool(folders)
    assert sorted(item["object_id"] for item in pooled["objects"]) == NAMES
    assert {item["object_id"]: item["family"] for item in pooled["objects"]} == {
        item["object_id"]: item["family"] for item in objects
    }
    nearest = pooled["all folds"]["accuracy"]["1-NN Chamfer, best of 16 yaws"]
    assert nearest["all"]["count"] == len(NAMES) and all(item["noun_in_training"] for item in pooled["objects"])
    parts = [json.loads((folder / "accuracy.json").read_text())["accuracy"] for folder in folders]
    estimates = [part["1-NN Chamfer, best of 16 yaws"]["all"] for part in parts]
    assert nearest["all"]["mean"] == pytest.approx(
        np.average([item["mean"] for item in estimates], weights=[item["count"] for item in estimates])
    )


def test_folds_are_trained_apart_resumed_and_pooled(objects, recipes, tmp_path, monkeypatch, capsys):
    out, arms = tmp_path / "out", str(recipes / "arms.yaml")
    commands: list[list[str]] = []
    seen: list[list[np.ndarray]] = []  # the clouds of every stage 1
    runs: list[tuple] = []
    run_arm, run_stage1, make_views = ablation.run_arm, stage1.main, stage1.TrainingViews

    def run_until_the_sixth(*arguments):
        runs.append(arguments[3:5])
        if len(runs) == 6:  # of the second fold
            raise KeyboardInterrupt
        return run_arm(*arguments)

    monkeypatch.setattr(ablation, "run_arm", run_until_the_sixth)
    monkeypatch.setattr(stage1, "main", lambda command: (commands.append(command), run_stage1(command))[1])
    monkeypatch.setattr(stage1, "TrainingViews", lambda *given: (seen.append(given[0]), make_views(*given))[1])
    command = ["--recipe", arms, "--stage1-steps", "4", "--seeds", "2", "--output", str(out)]
    assert folds.main(command) == 130
    assert not (out / "ablation.json").exists()
    # as if stage 1 of the second fold had been stopped after its encoder
    second = out / "fold-1" / "stage1"
    complete = load_file(second / stage_file.STAGE_FILE)
    for file in (stage_file.STAGE_FILE, "queries.safetensors"):
        (second / file).unlink()
    shutil.rmtree(out / "fold-1" / "runs")
    (out / "fold-1" / "recipe.json").unlink()
    assert folds.main(command) == 0
    resumed = load_file(second / stage_file.STAGE_FILE)
    assert complete.keys() == resumed.keys() and all(torch.equal(complete[name], resumed[name]) for name in complete)
    assert len(runs) == 2 * 4 + 2
    assert [f"--fold={fold}" in given for fold, given in zip((0, 1, 1), commands, strict=True)] == [True] * 3
    assert {"--encoder-steps=3", "--query-steps=1"} < set(commands[0])

    family = {item["object_id"]: item["family"] for item in objects}
    for fold, clouds in zip((0, 1, 1), seen, strict=True):
        names = [i for i in NAMES for cloud in clouds if np.array_equal(cloud, np.load(CLOUDS / f"{i}_8192.npy"))]
        assert len(names) == 4 and all(catalogue.fold_of(family[name]) != fold for name in names)
    result = json.loads((out / "ablation.json").read_text())
    [plain, aligned] = result["arms"]
    difference = aligned["differences"][PRIMARY]
    assert difference["count"] == 8 and len(difference["per_seed"]) == 2 and 0 < difference["p_holm"] <= 1
    apart = [json.loads((out / f"fold-{fold}" / "ablation.json").read_text())["arms"] for fold in (0, 1)]
    for metric in plain["metrics"]:
        means = [rows[0]["metrics"][metric]["mean"] for rows in apart]
        assert plain["metrics"][metric]["mean"] == pytest.approx(np.mean(means))
    assert plain["CKA"] == pytest.approx(np.mean([rows[0]["CKA"] for rows in apart]))
    assert str(tmp_path) not in json.dumps(result["recipe"])
    assert "all folds:" in capsys.readouterr().out

    before = len(runs), len(commands)
    assert folds.main(command) == 0 and (len(runs), len(commands)) == before  # nothing is left to do

    # a stage of one fold knows what the other holds out
    stage, other = str(out / "fold-0" / "stage1"), ["--output", str(tmp_path / "other")]
    assert ablation_command.main([arms, "--fold", "1", "--checkpoint", stage, *other]) == 1
    assert "was trained under fold 0, and may know objects that fold 1 holds out" in capsys.readouterr().err
    assert ablation_command.main([arms, "--checkpoint", stage, *other]) == 1
    assert "that the committed split holds out" in capsys.readouterr().err
    again = [str(recipes / "demo.yaml"), "--data.fold", "1", "--model.checkpoint", stage]
    assert train.main([*again, "--training.output_dir", str(tmp_path / "again")]) == 1
    assert "was trained under fold 0" in capsys.readouterr().err

    stored = json.loads((out / "fold-1" / "recipe.json").read_text())
    (out / "fold-1" / "recipe.json").write_text(json.dumps(stored | {"weight": 0.7}))
    recipe = read_recipe(arms)
    recipe.seeds = 2
    with pytest.raises(ValueError, match=r"fold-1 differs from .*fold-0 in weight: remove one"):
        folds.pool(recipe, out)


@pytest.mark.usefixtures("objects")
@pytest.mark.parametrize("name", ["language_model", "language_model_full"])
def test_the_study_of_a_language_model_ends_in_the_report(name, recipes, tmp_path, monkeypatch):
    """The shipped recipes with a tiny language model and a single step: one command, whose result the report finds."""
    described = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    assert described["schedule"]["steps"] == 600 and described["seeds"] >= 5, "nothing is shown with fewer"
    described["model"] |= {"checkpoint": None, "lora_rank": 4 if name == "language_model" else 0}
    described["schedule"] = {"steps": 1, "batch_size": 2, "max_length": 900}
    described["questions"] = {kind: described["questions"][kind] for kind in ("quiz", "name", "aspect")}
    (recipes / f"{name}.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    results = tmp_path / "benchmarks" / "results"
    for module in (folds, evidence_tables, short_tables):
        monkeypatch.setattr(module, "RESULTS", results)
    command = ["--recipe", str(recipes / f"{name}.yaml"), "--stage1-steps", "4", "--seeds", "1"]
    assert folds.main(command) == 0
    content = json.loads((results / f"{name}_folds" / "ablation.json").read_text())
    assert content["missing"] == [] and [row["arm"] for row in content["arms"]] == list(described["arms"])
    asked = [len(json.loads(path.read_text())["geometry"]["right"])
             for path in results.glob(f"{name}_folds/fold-*/runs/alignment-0.json")]  # fmt: skip
    assert len(asked) == 2 and content["arms"][0]["metrics"]["geometry accuracy"]["count"] == sum(asked)
    text = evidence_tables.ablation(f"{name}_folds")
    assert "with fewer than 5 nothing counts as shown" in text and "differences.png" in text
    assert "geometry accuracy, points" in text and f"aspect bucket (n={len(NAMES)})" in text
    rows = [line for line in short_tables.studies().splitlines() if "accuracy" in line]
    assert [row.split(" | ")[3] for row in rows] == ["generated accuracy, points", "geometry accuracy, points"]
    for row in rows:
        assert row.startswith(f"| {short_tables.ABLATIONS[f'{name}_folds']} | 0.1 | 1 |") and row.endswith("| no |")
    assert f"--recipe {name}`" not in short_tables.not_measured()


def test_the_driver_waits_for_all_folds_and_reports_failures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(catalogue, "FOLDS", 3)
    pooled: list[list[Path]] = []

    def run(fold: int, folder: Path) -> int:
        if fold == 2 and not pooled:
            return 7
        folder.mkdir(parents=True, exist_ok=True)
        return 0

    def study(*numbers: int, run=run, pool=pooled.append) -> int:
        return folds.run_folds(tmp_path, numbers, run, Path.exists, pool)

    assert study(1) == 0 and "not finished: fold-0, fold-2" in capsys.readouterr().out
    assert study(0, 1, 2) == 7 and not pooled
    (tmp_path / "fold-2").mkdir()  # by another process
    assert study(0) == 0 and pooled == [[tmp_path / f"fold-{fold}" for fold in range(3)]]

    def stop(_fold: int, _folder: Path) -> int:
        raise KeyboardInterrupt

    def refuse(_folders: list[Path]) -> None:
        raise ValueError("these differ")

    assert study(0, run=stop) == 130 and "the same command continues" in capsys.readouterr().err
    assert study(0, pool=refuse) == 1 and "error: these differ" in capsys.readouterr().err

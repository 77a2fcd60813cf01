"""Five folds: nothing of a fold is seen by the stage that is asked about it, and all folds count as one set."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLOUDS, tiny_text_config
from safetensors.torch import load_file
from test_train import TINY
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from experiments import folds, held_out_naming
from experiments.ablation import __main__ as ablation_command
from experiments.ablation import ablation
from experiments.ablation.measure import PRIMARY
from experiments.ablation.recipe import read_recipe
from pointalign import assets, stage_file, train
from pointalign.embedded import catalogue, warm_up
from pointalign.evaluation import probe, statistics
from pointalign.models import configuration

NAMES = sorted(path.name.removesuffix("_8192.npy") for path in CLOUDS.glob("*.npy"))


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
    monkeypatch.setattr(assets, "_asset", lambda *_: folder)
    return records


def test_every_family_is_held_out_once_and_whole(objects):
    held_out = []
    for fold in range(2):
        folder = assets.embedded_objects(fold)
        records = {one["object_id"]: one for one in json.loads((folder / "objects.json").read_text())}
        parts = {part: {i for i, one in records.items() if one["split"] == part} for part in ("train", "test")}
        assert parts["train"] | parts["test"] == set(NAMES) and all(parts.values())
        assert not {records[i]["family"] for i in parts["train"]} & {records[i]["family"] for i in parts["test"]}
        for part, ids in parts.items():
            entries = json.loads((folder / "annotations" / f"{part}.json").read_text())
            named = [[e["object_id"]] if isinstance(e["object_id"], str) else e["object_id"] for e in entries]
            assert {name for names in named for name in names} == ids
        assert np.array_equal(np.load(folder / "clouds" / f"{NAMES[0]}_8192.npy"),
                              np.load(CLOUDS / f"{NAMES[0]}_8192.npy"))  # fmt: skip
        held_out += parts["test"]
    assert sorted(held_out) == NAMES
    with pytest.raises(ValueError, match="fold 2: expected 0 to 1"):
        assets.embedded_objects(2)


def test_the_committed_objects_are_shared_out_evenly():
    splits = catalogue.read_splits().values()
    for members in ([one["family"] for one in splits], sorted({one["family"] for one in splits})):
        shares = np.bincount([catalogue.fold_of(one) for one in members], minlength=5) / len(members)
        assert shares == pytest.approx([0.2] * 5, abs=0.015)


@pytest.fixture
def recipes(tmp_path, tokenizer, monkeypatch):
    """A stage 1 and an ablation, both tiny."""
    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)
    monkeypatch.setattr(probe, "FIT_STEPS", 3)
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    model = f"llm: {tmp_path / 'llm'}, lora_rank: 4, dtype: float32"
    (tmp_path / "stage1.yaml").write_text(f"""
model: {{{model}, train: [qformer, modality_projector, lora]}}
data: {{num_points: 256, evaluate: validation}}
alignment: {{weight: 0.0}}
training: {{contrastive_steps: 2, contrastive_batch_size: 4, max_steps: 2, save_steps: 1, report_to: none,
            use_cpu: true, disable_tqdm: true, per_device_train_batch_size: 2}}
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
    return ["--recipe", str(tmp_path / "arms.yaml"), "--stage1", str(tmp_path / "stage1.yaml"), "--seeds", "2"]


def test_what_runs_wrote_of_their_objects_counts_as_one_set(objects, recipes, tmp_path):
    folders = [tmp_path / "out" / f"fold-{fold}" for fold in range(2)]
    for fold, folder in enumerate(folders):
        command = [recipes[3], f"--data.fold={fold}", "--data.evaluate=test", f"--training.output_dir={folder}"]
        assert train.main(command) == 0
    made = held_out_naming.pool(folders)
    assert sorted(one["object_id"] for one in made["objects"]) == NAMES
    assert {one["object_id"]: one["family"] for one in made["objects"]} == {
        one["object_id"]: one["family"] for one in objects
    }
    every = made["all folds"]["accuracy"]["1-NN Chamfer, random yaw"]
    assert every["all"]["count"] == len(NAMES) and all(one["noun_in_training"] for one in made["objects"])
    parts = [json.loads((folder / "accuracy.json").read_text())["accuracy"] for folder in folders]
    each = [one["1-NN Chamfer, random yaw"]["all"] for one in parts]
    assert every["all"]["mean"] == pytest.approx(
        np.average([one["mean"] for one in each], weights=[one["count"] for one in each])
    )


def test_folds_are_trained_apart_resumed_and_pooled(objects, recipes, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    warmed, trained, runs = [], [], []
    warm_up_point_branch, run_arm, stage = warm_up.warm_up_point_branch, ablation.run_arm, train.main

    def counted(*given):
        runs.append(given[3:5])
        if len(runs) == 6:  # of the second fold
            raise KeyboardInterrupt
        return run_arm(*given)

    monkeypatch.setattr(
        warm_up, "warm_up_point_branch", lambda *given: (warmed.append(given[2]), warm_up_point_branch(*given))
    )
    monkeypatch.setattr(ablation, "run_arm", counted)
    monkeypatch.setattr(train, "main", lambda command: (trained.append(command), stage(command))[1])
    command = [*recipes, "--output", str(out)]
    assert folds.main(command) == 130
    assert not (out / "ablation.json").exists()
    # as if stage 1 of the second fold had been stopped at its first checkpoint
    second = out / "fold-1" / "stage1"
    whole = load_file(second / stage_file.STAGE_FILE)
    (second / stage_file.STAGE_FILE).unlink()
    shutil.rmtree(second / "checkpoint-2")
    shutil.rmtree(out / "fold-1" / "runs")
    (out / "fold-1" / "recipe.json").unlink()
    assert folds.main(command) == 0
    resumed = load_file(second / stage_file.STAGE_FILE)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert len(runs) == 2 * 4 + 2 and len(warmed) == 2
    assert [any("resume_from_checkpoint" in one for one in given) for given in trained] == [False, False, True]

    family = {one["object_id"]: one["family"] for one in objects}
    for fold, clouds in enumerate(warmed):
        seen = [i for i in NAMES for c in clouds if np.array_equal(c, np.load(CLOUDS / f"{i}_8192.npy"))]
        assert len(seen) == 4 and not {family[i] for i in seen} & {
            f for f in family.values() if catalogue.fold_of(f) == fold
        }
    result = json.loads((out / "ablation.json").read_text())
    [plain, aligned] = result["arms"]
    difference = aligned["differences"][PRIMARY]
    assert difference["count"] == 8 and len(difference["per_seed"]) == 2 and 0 < difference["p_holm"] <= 1
    kept = [json.loads((out / f"fold-{fold}" / "ablation.json").read_text())["arms"] for fold in (0, 1)]
    for metric in plain["metrics"]:
        each = [rows[0]["metrics"][metric]["mean"] for rows in kept]
        assert plain["metrics"][metric]["mean"] == pytest.approx(np.mean(each))
    assert plain["CKA"] == pytest.approx(np.mean([rows[0]["CKA"] for rows in kept]))
    assert str(tmp_path) not in json.dumps(result["recipe"] | {"model": result["recipe"]["model"] | {"llm": ""}})
    assert "all folds:" in capsys.readouterr().out

    before = len(runs), len(trained)
    assert folds.main(command) == 0 and (len(runs), len(trained)) == before  # nothing is left to do

    # a stage of one fold knows what the other holds out
    stage1, other = str(out / "fold-0" / "stage1"), ["--output", str(tmp_path / "other")]
    assert ablation_command.main([recipes[1], "--fold", "1", "--checkpoint", stage1, *other]) == 1
    assert "was trained under fold 0, and may know objects that fold 1 holds out" in capsys.readouterr().err
    assert ablation_command.main([recipes[1], "--checkpoint", stage1, *other]) == 1
    assert "that the committed split holds out" in capsys.readouterr().err
    again = [recipes[3], "--data.fold", "1", "--data.evaluate", "none", "--model.checkpoint", stage1]
    assert stage([*again, "--training.output_dir", str(tmp_path / "again")]) == 1
    assert "was trained under fold 0" in capsys.readouterr().err

    stored = json.loads((out / "fold-1" / "recipe.json").read_text())
    (out / "fold-1" / "recipe.json").write_text(json.dumps(stored | {"weight": 0.7}))
    recipe = read_recipe(recipes[1])
    recipe.seeds = 2
    with pytest.raises(ValueError, match=r"fold-1 differs from .*fold-0 in weight: remove one"):
        folds.pool(recipe, out)


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

"""Own clouds, from file names or a table to a model that is asked: the lines of the README."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_text_config
from test_train import TINY
from transformers import AutoModelForCausalLM

from pointalign import __main__ as door
from pointalign import annotate
from pointalign.models import configuration

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def clouds(tmp_path):
    folder = tmp_path / "my clouds"
    (folder / "scans").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("red_ball.npy", "scans/Oak-Table_02.npy", "scans/shelves01_8192.npy"):
        np.save(folder / name, np.hstack([rng.normal(size=(80, 3)), rng.random((80, 3))]).astype(np.float32))
    return folder


def written(folder) -> dict[str, tuple[str, str]]:
    entries = json.loads((folder / "annotations.json").read_text(encoding="utf-8"))
    return {e["object_id"]: tuple(turn["value"] for turn in e["conversations"]) for e in entries}


def test_file_names_become_answers(clouds, capsys):
    assert annotate.main([str(clouds)]) == 0
    question = "<point>\nWhat is this?"
    assert written(clouds) == {
        "red_ball.npy": (question, "This is a red ball."),
        "scans/Oak-Table_02.npy": (question, "This is an oak table."),
        "scans/shelves01_8192.npy": (question, "These are shelves."),
    }
    printed = capsys.readouterr().out
    (train,) = re.findall(r"train finetune (.*)", printed)
    assert shlex.split(train)[1] == str(clouds / "annotations.json") and shlex.split(train)[3] == str(clouds)
    assert annotate.main([str(clouds)]) == 1 and "annotations.json exists" in capsys.readouterr().err


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_brings_questions(clouds, delimiter):
    rows = [
        ["File", "Question", "Answer", "Name"],
        ["red_ball.npy", "Can it roll?", '"Yes, it can; it is round."', ""],
        ["red_ball.npy", "", "", "red ball"],
    ]
    text = "\n".join(delimiter.join(row) for row in rows)
    table = clouds / "table.csv"
    table.write_text("\ufeff" + text, encoding="utf-8")
    assert annotate.main([str(clouds), "--table", str(table)]) == 0
    entries = json.loads((clouds / "annotations.json").read_text(encoding="utf-8"))
    turns = [tuple(turn["value"] for turn in entry["conversations"]) for entry in entries]
    assert turns == [
        ("<point>\nCan it roll?", "Yes, it can; it is round."),
        ("<point>\nWhat is this?", "This is a red ball."),
    ]


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("file,colour\na.npy,red\n", "expected a first line with the columns file and answer (or name)"),
        ("file,name\nred_ball.npy,\n", "row 2: expected a file and an answer or a name"),
        ("file,name\ngone.npy,chair\n", "row 2: there is no file"),
        ("", "got an empty file"),
    ],
)
def test_a_bad_table_is_named(table, named, clouds, tmp_path, capsys):
    (tmp_path / "table.csv").write_text(table)
    assert annotate.main([str(clouds), "--table", str(tmp_path / "table.csv")]) == 1
    assert named in capsys.readouterr().err and not (clouds / "annotations.json").exists()


def test_names_that_say_nothing_and_folders_without_clouds_are_refused(tmp_path, capsys):
    np.save(tmp_path / "0001.npy", np.zeros((8, 3)))
    assert annotate.main([str(tmp_path)]) == 1
    assert "1 file names say nothing about the object (0001.npy)" in capsys.readouterr().err
    (tmp_path / "0001.npy").unlink()
    assert annotate.main([str(tmp_path)]) == 1
    assert "no cloud or mesh" in capsys.readouterr().err


def readme_lines() -> list[list[str]]:
    section = README.read_text(encoding="utf-8").partition("## Train on your own data")[2].partition("\n## ")[0]
    return [shlex.split(line) for line in re.findall(r"^pointalign (.*)$", section, re.MULTILINE)]


def test_the_lines_of_the_readme_lead_from_files_to_an_answer(tmp_path, tokenizer, monkeypatch, capsys):
    """As written, but two steps of a tiny model; the printed chat line is run too."""
    from pointalign.build import build_model
    from pointalign.model_options import DataOptions, ModelOptions
    from pointalign.stage_file import save_stage

    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    torch.manual_seed(0)
    start = ModelOptions(llm=str(tmp_path / "llm"), lora_rank=8, lora_alpha=16, train=[])
    save_stage(build_model(start, DataOptions())[0], tmp_path / "start.safetensors", {})
    folder = tmp_path / "my_clouds"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("red_ball", "blue_box"):
        rows = [" ".join(f"{value:.3f}" for value in row) + " 200 30 30" for row in rng.normal(size=(80, 3))]
        header = "\n".join(f"property float {axis}" for axis in "xyz")
        header += "\n" + "\n".join(f"property uchar {colour}" for colour in ("red", "green", "blue"))
        opening = f"ply\nformat ascii 1.0\nelement vertex 80\n{header}\nend_header\n"
        (folder / f"{name}.ply").write_text(opening + "\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    small = ["--model.llm", "llm", "--model.checkpoint", "start.safetensors", "--training.use_cpu", "true"]
    small += ["--training.max_steps", "2", "--training.report_to", "none", "--training.save_strategy", "no"]
    extra = {"annotate": [], "train": [*small, "--data.up_axis", "z"], "chat": ["--question", "What?"]}
    lines = readme_lines()
    assert [line[0] for line in lines] == ["annotate", "train", "chat"]
    for line in lines:
        assert door.main([*line, *extra[line[0]]]) == 0, line
    printed = capsys.readouterr().out
    (chat,) = re.findall(r"ask it yourself: .*pointalign (chat .*)", printed)
    assert shlex.split(chat)[1:2] == ["my_clouds/blue_box.ply"] and "red_ball.ply: 80 points" in printed
    config = json.loads(Path("runs/finetune/model/processor_config.json").read_text())
    assert config["feature_extractor"]["up_axis"] == "z"
    assert Path("runs/finetune/adapter/adapter_config.json").exists()
    assert "`annotations.json`" in Path("runs/finetune/model/README.md").read_text()


def test_another_language_model_behind_the_point_branch_of_a_stage(tmp_path, tokenizer, monkeypatch, capsys):
    """Its encoder and Q-Former are those of the stage, projector and adapters are new; frozen they are refused."""
    from safetensors.torch import load_file

    from pointalign import train
    from pointalign.build import build_model
    from pointalign.model_options import DataOptions, ModelOptions
    from pointalign.stage_file import save_stage

    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)
    for name, seed in (("first", 0), ("other", 1)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    stage = tmp_path / "start.safetensors"
    save_stage(build_model(ModelOptions(llm=str(tmp_path / "first"), train=[], seed=3), DataOptions())[0], stage, {})
    folder = tmp_path / "clouds"
    folder.mkdir()
    np.save(folder / "red_ball.npy", np.random.default_rng(0).random((80, 6)).astype(np.float32))
    assert annotate.main([str(folder)]) == 0
    command = ["finetune_any_llm", "--model.llm", str(tmp_path / "other"), "--model.point_branch", str(stage)]
    command += ["--data.annotations", str(folder / "annotations.json"), "--data.clouds", str(folder)]
    command += ["--training.max_steps", "1", "--training.use_cpu", "true", "--training.report_to", "none"]
    command += ["--training.output_dir", str(tmp_path / "run"), "--training.save_strategy", "no"]
    assert train.main([*command, "--model.train", "lora"]) == 1
    assert "modality_projector: drawn at random and frozen" in capsys.readouterr().err
    assert train.main(command) == 0
    before, after = load_file(stage), load_file(tmp_path / "run" / "stage.safetensors")
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    branch = {name for name in before if ".language_model." not in name and ".modality_projector." not in name}
    assert branch <= same and not any(".modality_projector." in n and n.endswith("weight") for n in same)

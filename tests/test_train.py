"""The command line: `python -m pointalign.train` from a recipe to a model that answers."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CLOUDS, tiny_text_config
from transformers import AutoModelForCausalLM

from pointalign import train
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor, configuration

TINY = {
    "model": {"num_query_tokens": 4, "projector_hidden_size": 16},
    "point_config": {
        "num_groups": 8,
        "group_size": 4,
        "group_dim": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "qformer_config": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 16,
    },
}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)


@pytest.fixture
def arguments(tmp_path, language_model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{llm: {language_model}, train: [modality_projector, lora], lora_rank: 4}}
data: {{annotations: {CLOUDS / "annotations.json"}, clouds: {CLOUDS}, num_points: 256}}
alignment: {{weight: 0.1}}
training: {{output_dir: {tmp_path / "run"}, max_steps: 4, logging_steps: 1, save_steps: 2, report_to: none,
            use_cpu: true, disable_tqdm: true, learning_rate: 1.0e-3}}
"""
    )
    return [str(recipe)]


def test_a_run_leaves_model_plot_log_and_checkpoints(tmp_path, arguments, capsys, clouds):
    assert train.main(arguments) == 0
    run = tmp_path / "run"
    for name in ("loss.png", "stage.safetensors", "stage.json", "options.json", "model/config.json", "checkpoint-4"):
        assert (run / name).exists(), name
    described = json.loads((run / "stage.json").read_text())
    assert described["last_log"]["alignment_loss"] > 0 and len(described["data_sha256"]) == 64
    for path in ("loss.png", "stage.safetensors", "model"):
        assert str(run / path) in capsys.readouterr().out or path != "loss.png"
    model = PointAlignForConditionalGeneration.from_pretrained(run / "model").eval()
    processor = PointAlignProcessor.from_pretrained(run / "model")
    message = [{"role": "user", "content": [{"type": "point", "point": clouds[0]}, {"type": "text", "text": "What?"}]}]
    batch = processor.apply_chat_template(message, tokenize=True, add_generation_prompt=True)
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def test_exported_model_has_no_trace_of_alignment(tmp_path, arguments):
    keys = []
    for weight in ("0.0", "0.1"):
        folder = tmp_path / weight
        assert train.main([*arguments, "--alignment.weight", weight, "--training.output_dir", str(folder)]) == 0
        model = PointAlignForConditionalGeneration.from_pretrained(folder / "model")
        keys.append({name: tuple(p.shape) for name, p in model.state_dict().items()})
        config = json.loads((folder / "model" / "config.json").read_text())
        assert not any("align" in key for key in config if key != "model_type")
    assert keys[0] == keys[1]
    assert not any("alignment" in key or "lora" in key for key in keys[0])


def test_fused_says_what_runs_instead(tmp_path, arguments, capsys, monkeypatch):
    import pointalign_kernels

    monkeypatch.setattr(pointalign_kernels, "fused_available", lambda device: False)
    assert train.main([*arguments, "--fused"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--fused")]
    assert len(lines) == 1 and "reference is used" in lines[0]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, arguments):
    assert train.main(arguments) == 0
    whole = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").state_dict()
    folder = tmp_path / "again"
    again = [*arguments, "--training.output_dir", str(folder)]
    assert train.main(again) == 0
    for leftover in ("model", "checkpoint-4"):
        shutil.rmtree(folder / leftover)
    assert train.main([*again, "--training.resume_from_checkpoint", str(folder / "checkpoint-2")]) == 0
    resumed = PointAlignForConditionalGeneration.from_pretrained(folder / "model").state_dict()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_a_finished_run_is_not_overwritten(tmp_path, arguments):
    assert train.main(arguments) == 0
    before = (tmp_path / "run" / "stage.safetensors").stat().st_mtime_ns
    assert train.main(arguments) == 0
    assert (tmp_path / "run" / "stage.safetensors").stat().st_mtime_ns == before
    assert (tmp_path / "run-2" / "stage.safetensors").exists()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--training.lerning_rate", "1"], "lerning_rate"),
        (["--alignment.layer", "[9]"], "layer 9"),
        (["--alignment.target", "nothing"], "alignment.target"),
        (["--model.train", "[head]"], "head"),
        (["--model.checkpoint", "nowhere"], "nowhere"),
        (["--model.llm", "nowhere"], "nowhere"),
        (["--data.up_axis", "w"], "up_axis"),
        (["--data.clouds", "null"], "belong together"),
        (["--training.contrastive_steps", "3"], "data.annotations"),
        (["--model.train", "[]", "--alignment.weight", "0"], "nothing trains"),
    ],
)
def test_bad_options_are_named(arguments, extra, named, capsys):
    try:
        status = train.main([*arguments, *extra])
    except SystemExit as exit_:
        status = exit_.code
    assert status != 0
    assert named in capsys.readouterr().err


def test_malformed_recipe_names_the_key(tmp_path, capsys):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("model: {size: large}\n")
    with pytest.raises(SystemExit):
        train.main([str(recipe)])
    assert "size" in capsys.readouterr().err


def test_bad_objects_stop_the_run_before_it_starts_or_are_skipped(tmp_path, arguments, capsys):
    folder = tmp_path / "clouds"
    shutil.copytree(CLOUDS, folder)
    bad = sorted(folder.glob("*.npy"))[0]
    points = np.load(bad).astype(np.float32)
    points[7, 1] = np.nan
    np.save(bad, points)
    given = [*arguments, "--data.clouds", str(folder)]
    assert train.main(given) == 1
    message = capsys.readouterr().err
    assert bad.stem.removesuffix("_8192") in message and "skip_bad" in message
    assert train.main([*given, "--data.skip_bad", "true"]) == 0
    assert "1" in capsys.readouterr().out

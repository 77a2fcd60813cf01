"""The dtype that a run trains in: measured, recorded and kept, unless an option names it."""

import json

import pytest
import torch
from conftest import tiny_text_config
from test_train import arguments, language_model, tiny_preset  # noqa: F401

from pointalign import run_checkpoints, train, training_dtype
from pointalign.model_options import DataOptions, MixturePart, ModelOptions
from pointalign.options import Options, TrainingOptions

BFLOAT16_WINS = {"float32": 0.02, "bfloat16": 0.01}
FLOAT32_WINS = {"float32": 0.01, "bfloat16": 0.02}


@pytest.fixture
def measured(monkeypatch):
    """A CPU that multiplies bfloat16, with seconds to be put in; `rows` of every measurement."""
    seconds, rows = {}, []
    monkeypatch.setattr(training_dtype, "has_bfloat16_products", lambda: True)
    monkeypatch.setattr(
        training_dtype, "step_seconds", lambda config, options, number: rows.append(number) or dict(seconds)
    )
    return seconds, rows


@pytest.fixture
def options(language_model):  # noqa: F811
    return Options(ModelOptions(llm=str(language_model)), training=TrainingOptions(use_cpu=True))


@pytest.mark.parametrize(
    ("seconds", "name"),
    [
        (BFLOAT16_WINS, "bfloat16"),
        (FLOAT32_WINS, "float32"),
        ({"float32": 0.0105, "bfloat16": 0.01}, "float32"),  # a near tie
        ({"float32": 0.002, "bfloat16": 0.001}, "float32"),  # too short to tell
    ],
)
def test_the_faster_dtype_is_chosen_and_one_line_says_why(seconds, name, options, measured, capsys):
    measured[0].update(seconds)
    assert training_dtype.training_dtype(options) == name
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"model.dtype=auto: {name}, measured: a step through one layer takes ")
    assert f"{1e3 * seconds['float32']:.3g} CPU ms in float32" in line


def test_the_batch_that_is_measured_is_that_of_the_training_up_to_a_size(options, measured):
    measured[0].update(FLOAT32_WINS)
    for size in (2, 100):
        options.training.per_device_train_batch_size = size
        training_dtype.training_dtype(options)
    options.data = DataOptions(mixture=[MixturePart(batch_size=3), MixturePart(batch_size=5)])
    training_dtype.training_dtype(options)
    assert measured[1] == [2, training_dtype.ROWS, 5]


def test_a_named_dtype_and_a_cpu_without_bfloat16_are_not_measured(options, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(training_dtype, "step_seconds", refuse)
    monkeypatch.setattr(training_dtype, "has_bfloat16_products", lambda: False)
    assert training_dtype.training_dtype(options) == "float32"
    assert "no fast bfloat16 products on this CPU" in capsys.readouterr().out
    monkeypatch.setattr(training_dtype, "has_bfloat16_products", lambda: True)
    options.model.dtype = "bfloat16"
    assert training_dtype.training_dtype(options) == "bfloat16"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("architecture", ["phi", "llama", "qwen3"])
@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16], ids=str)
def test_steps_of_one_layer_are_timed(architecture, slow, monkeypatch):
    step, layers, clock = training_dtype._step, [], [0.0]

    def delayed(layer, batch, dtype):
        layers.append((layer, batch.shape))
        step(layer, batch, dtype)
        first = len(layers) <= 2  # the steps that warm up are slow in either dtype
        clock[0] += 9.0 if first else 0.02 if dtype == slow else 0.01

    monkeypatch.setattr(training_dtype, "_step", delayed)
    monkeypatch.setattr(training_dtype, "process_time", lambda: clock[0])
    before = torch.get_rng_state()
    seconds = training_dtype.step_seconds(tiny_text_config(architecture), ModelOptions(lora_rank=4), 2)
    assert torch.equal(torch.get_rng_state(), before), "a run would draw other numbers"
    expected = {dtype: 0.02 if dtype == str(slow).removeprefix("torch.") else 0.01 for dtype in seconds}
    assert seconds == pytest.approx(expected) and seconds.keys() == {"float32", "bfloat16"}
    layer, shape = layers[0]
    assert len(layer.layers) == 1 and shape == (2, training_dtype.LENGTH, 32)
    adapted = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    assert adapted and all(".lora_" in name for name in adapted)
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)


def test_a_resumed_run_keeps_its_dtype_whatever_is_faster_now(tmp_path, arguments, measured, capsys):  # noqa: F811
    seconds, rows = measured
    seconds.update(BFLOAT16_WINS)
    assert train.main(arguments) == 0
    run = tmp_path / "run"
    for file in ("options.json", "stage.json"):
        described = json.loads((run / file).read_text())
        assert (described["dtype"], described["model"]["dtype"]) == ("bfloat16", "auto"), file
    assert run_checkpoints.verify(run / "checkpoint-2")["run"]["model"]["dtype"] == "bfloat16"
    (run / "stage.safetensors").unlink()
    capsys.readouterr()

    seconds.update(FLOAT32_WINS)
    resume = [*arguments, "--training.resume_from_checkpoint", str(run / "checkpoint-2")]
    assert train.main(resume) == 0
    assert f"model.dtype=auto: bfloat16, in which {run / 'checkpoint-2'} was written" in capsys.readouterr().out
    assert len(rows) == 1, "measured again"
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"

    (run / "stage.safetensors").unlink()
    assert train.main([*resume, "--model.dtype", "bfloat16"]) == 0, "the same dtype, named"
    (run / "stage.safetensors").unlink()
    assert train.main([*resume, "--model.dtype", "float32"]) == 1
    assert "model.dtype was bfloat16, is float32" in capsys.readouterr().err


def test_a_checkpoint_from_before_the_record_goes_on_by_the_rule(options, measured, tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    run_checkpoints.publish(tmp_path / "new", tmp_path / "checkpoint-1", {"model": {"dtype": "auto"}})
    measured[0].update(BFLOAT16_WINS)
    options.training.resume_from_checkpoint = str(tmp_path / "checkpoint-1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for supported, name in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert training_dtype.training_dtype(options) == name
        assert "before runs recorded their dtype" in capsys.readouterr().out
        now, before = {"model": {"dtype": name}}, {"model": {"dtype": "auto"}}
        assert run_checkpoints.differences(before, now, tmp_path) == []
        other = {"float32": "bfloat16", "bfloat16": "float32"}[name]
        with pytest.raises(run_checkpoints.CheckpointError, match=f"model.dtype was {name}, is {other}"):
            run_checkpoints.differences(before, {"model": {"dtype": other}}, tmp_path)

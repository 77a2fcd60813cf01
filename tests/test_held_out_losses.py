"""Losses on held-out conversations: logged by kind, always of the same samples, and training does not notice them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CLOUDS, tiny_text_config
from safetensors.torch import load_file
from test_train import TINY
from transformers import AutoModelForCausalLM

from pointalign import assets, held_out_losses, train, trainer
from pointalign.efficient import training_form
from pointalign.held_out_losses import HeldOutLosses
from pointalign.model_options import MixturePart
from pointalign.models import configuration
from pointalign.options import Options, TrainingOptions, parse

pytestmark = pytest.mark.usefixtures("random_point_branch")
PARTS = {"simple_description": "[simple_description]", "single_round": "[single_round, multi_round]"}


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config("llama")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(tmp_path, language_model, monkeypatch):
    """A recipe with a mixture of two parts; dropout would show whether a random number is drawn."""
    monkeypatch.setitem(configuration.PRESETS, "mini", TINY)
    mixture = ", ".join(f"{{types: {types}, batch_size: 4}}" for types in PARTS.values())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{llm: {language_model}, train: [modality_projector, lora], lora_rank: 4, lora_dropout: 0.1, dtype: float32}}
data: {{annotations: {CLOUDS / "annotations.json"}, clouds: {CLOUDS}, num_points: 256, mixture: [{mixture}]}}
training: {{output_dir: {tmp_path / "run"}, max_steps: 4, logging_steps: 2, save_steps: 4, report_to: none,
            use_cpu: true, disable_tqdm: true, learning_rate: 1.0e-3, per_device_train_batch_size: 1}}
"""
    )
    return [str(recipe)]


HELD_OUT = ["--data.validation", str(CLOUDS / "annotations.json")]


def history(folder) -> list[dict]:
    return json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]


def make(arguments, *more):
    """The callback of a training that has not begun, the aligned model and the options."""
    options = parse([*arguments, *HELD_OUT, *more])
    made, model, _ = train.make_trainer(options)
    [callback] = [part for part in made.callback_handler.callbacks if isinstance(part, HeldOutLosses)]
    return callback, made.model, model, options


def measured(arguments, *more) -> dict[str, float]:
    callback, _, model, options = make(arguments, *more)
    with training_form(model, options):
        callback.measure()
    logged = callback.trainer.state.log_history[-1]
    return {name: value for name, value in logged.items() if name.startswith("held_out/")}


def test_they_are_logged_before_the_first_step_and_at_every_log(tmp_path, arguments):
    assert train.main([*arguments, *HELD_OUT]) == 0
    logged = [entry for entry in history(tmp_path / "run") if any(name.startswith("held_out/") for name in entry)]
    assert [entry["step"] for entry in logged] == [0, 2, 4]
    names = {f"held_out/{name}" for name in (*PARTS, "alignment_loss")}
    assert all(names < entry.keys() for entry in logged)
    for name in names:
        assert len({entry[name] for entry in logged}) == 3, "training changes them"


def test_training_does_not_notice_them(tmp_path, arguments):
    for folder, more in (("with", HELD_OUT), ("without", [])):
        assert train.main([*arguments, *more, "--training.output_dir", str(tmp_path / folder)]) == 0
    losses = [
        [(entry["ntp_loss"], entry["alignment_loss"]) for entry in history(tmp_path / folder) if "ntp_loss" in entry]
        for folder in ("with", "without")
    ]
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    first, second = (load_file(tmp_path / folder / "stage.safetensors") for folder in ("with", "without"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_samples_every_time_and_the_model_trains_on(arguments):
    callback, aligned, model, options = make(arguments)
    aligned.train()
    logs = callback.trainer.state.log_history
    with training_form(model, options):
        for _ in range(2):
            callback.measure()
            assert aligned.training and model.training
    assert {**logs[-1]} == {**logs[-2]} and logs[-1]["held_out/single_round"] > 0


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--alignment.target", "encoder"],
        ["--alignment.weight", "0"],
        ["--data.views", "2"],
        ["--data.views", "2", "--alignment.target", "encoder"],
        ["--data.packing", "true"],
    ],
    ids=lambda more: " ".join(more),
)
def test_features_in_place_of_clouds_give_the_same_losses(more, arguments, monkeypatch):
    """Beside cached views the point branch is not part of the model; packed batches need packed attention."""
    expected = measured(arguments, *more)
    assert ("held_out/alignment_loss" in expected) == ("--alignment.weight" not in more)
    without_views = [word for word in more if word not in ("--data.views", "2")]
    monkeypatch.setattr(held_out_losses, "without_clouds", lambda aligned, batch: batch)
    assert measured(arguments, *without_views) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("part", ["point_encoder", "point_mlp", "qformer", "query_tokens", "query_experts"])
def test_clouds_stay_where_a_part_of_the_point_branch_trains(part, arguments):
    experts = ["--model.query_experts", "2"] if part == "query_experts" else []
    callback = make(arguments, "--model.train", f"[{part}]", *experts)[0]
    assert all("point_values" in batch and "query_features" not in batch for batch in callback.batches.values())
    frozen = make(arguments)[0]
    assert all("point_values" not in batch and "query_features" in batch for batch in frozen.batches.values())


def test_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "embedded_objects", lambda: tmp_path)
    options = Options(training=TrainingOptions(use_cpu=True))
    validation = tmp_path / "annotations" / "validation.json"
    assert held_out_losses.validation_paths(options) == (validation, tmp_path / "clouds")
    options.data.fold = 1
    assert held_out_losses.validation_paths(options) is None, "a fold has no validation part"
    options.data.fold, options.data.annotations, options.data.clouds = None, "a.json", "clouds"
    assert held_out_losses.validation_paths(options) is None, "own data, of which nothing is held out"
    options.data.validation = str(validation)
    assert held_out_losses.validation_paths(options) == (validation, "clouds")


def test_a_batch_for_every_part_of_the_mixture():
    options = Options(training=TrainingOptions(use_cpu=True))
    assert held_out_losses.kinds(options) == held_out_losses.EMBEDDED_KINDS
    options.data.annotations, options.data.validation = "a.json", "b.json"
    assert held_out_losses.kinds(options) == {"all": None}
    options.data.types = ["name"]
    assert held_out_losses.kinds(options) == {"name": ["name"]}
    options.data.mixture = [MixturePart(["colour", "place"]), MixturePart(["side"])]
    assert held_out_losses.kinds(options) == {"colour": ["colour", "place"], "side": ["side"]}


def test_their_time_is_not_training_time(tmp_path, arguments, monkeypatch):
    """By a clock that only steps and measurements move, one second a step."""
    clock = {"now": 0.0}
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    compute_loss, tokens = trainer.PointAlignTrainer.compute_loss, []

    def step(self, model, inputs, *arguments, **keywords):
        clock["now"] += 1
        tokens.append(inputs["input_ids"].numel())
        return compute_loss(self, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(trainer.PointAlignTrainer, "compute_loss", step)
    monkeypatch.setattr(HeldOutLosses, "measure", lambda self: clock.update(now=clock["now"] + 1000))
    assert train.main([*arguments, *HELD_OUT]) == 0
    speeds = [entry["tokens_per_second"] for entry in history(tmp_path / "run") if "tokens_per_second" in entry]
    assert speeds == [sum(tokens[:2]) / 2, sum(tokens[2:4]) / 2]

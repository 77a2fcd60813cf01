"""One dotted namespace over one recipe; whatever does not fit is named."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from pointalign.options import Options, TrainingOptions, parse
from pointalign.train import make_trainer
from pointalign.training_checks import check_cuda_graphs


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_no_arguments_mean_the_demo():
    options = parse([])
    assert options.model.checkpoint == "furniture-stage1" and options.model.train == ["lora"]
    assert options.alignment.weight == 0.1 and options.alignment.target == "qformer" and options.alignment.layer == []
    assert options.model.lora_rank == 8 and options.data.views > 0 and not options.data.augmentation
    assert options.data.evaluate == "test" and options.fused is False


def test_options_of_a_run_are_not_those_of_the_run_before():
    changed = parse(["demo", "--model.train", "[lora, modality_projector]", "--data.types", "[brief]"])
    changed.data.mixture.clear()
    again = parse(["demo"])
    assert again.model.train == ["lora"] and again.data.types is None and again.data.mixture


def test_a_recipe_by_name_by_path_and_under_options(tmp_path):
    assert parse(["align"]).alignment.layer == [15]
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("alignment:\n  weight: 0.3\n  layer: [2, 5]\ntraining:\n  max_steps: 7\n")
    options = parse([str(recipe), "--training.max_steps", "9", "--model.llm", "folder", "--fused"])
    assert options.alignment.weight == 0.3 and options.alignment.layer == [2, 5]
    assert options.training.max_steps == 9 and options.model.llm == "folder" and options.fused is True
    assert options.model.checkpoint is None, "a recipe of one's own does not inherit the demo's values"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--alignment.wieght", "1"], "alignment.wieght"),
        (["--modle.llm", "x"], "modle.llm"),
        (["--training.max_steps", "many"], "max_steps"),
        (["--alignment.weight=-1"], "alignment.weight=-1"),
        (["--alignment.target", "clip"], "alignment.target='clip'"),
        (["--model.train", "[lora, head]"], "unknown part 'head'"),
        (["--model.dtype", "int8"], "model.dtype='int8'"),
        (["--data.evaluate", "all"], "data.evaluate='all'"),
        (["--data.annotations", "a.json"], "data.annotations and data.clouds belong together"),
        (
            ["demo", "--data.evaluate", "validation", "--data.fold", "0"],
            "data.fold: of the embedded objects only, without validation",
        ),
        (["demo", "--data.views", "3"], "data.views=3: expected an even number"),
        (["demo", "--data.views=-2"], "data.views=-2: expected an even number"),
        (["nowhere"], "no recipe 'nowhere'"),
        (["nowhere.yaml"], "no recipe 'nowhere.yaml'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, named, capsys):
    assert named in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("alignment:\n  wieght: 1\n", "wieght"),
        ("optimiser: adam\n", "optimiser"),
        ("alignment:\n  weight: heavy\n", "weight"),
        ("alignment: [1\n", "line 1, column 12"),
    ],
)
def test_a_malformed_recipe_is_named(text, named, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    assert named in refused([str(recipe)], capsys)


def test_an_empty_recipe_means_the_defaults_and_they_agree_with_one_another(tmp_path):
    recipe = tmp_path / "empty.yaml"
    recipe.write_text("model: {}\n")
    parsed = parse([str(recipe), "--training.use_cpu", "true"])
    defaults = Options(training=TrainingOptions(use_cpu=True))
    defaults.check()
    for section in ("model", "data", "alignment"):
        assert getattr(parsed, section) == getattr(defaults, section)
    for field in fields(TrainingOptions):
        values = (getattr(options.training, field.name) for options in (parsed, defaults))
        assert field.name == "logging_dir" or len({str(value) for value in values}) == 1, field.name


CPU = ["--training.use_cpu", "true"]
OWN_DATA = ["align", "--model.llm", "x", "--data.annotations", "a.json", "--data.clouds", "c", *CPU]
MIXTURE = ["--data.mixture", "[{batch_size: 4}]"]
TOKENS = ["--data.packing", "true", "--data.pack_tokens", "99"]
GRAPHS = ["--training.cuda_graphs", "true"]
CACHE = ["--data.feature_cache", "cache"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*OWN_DATA, "--model.dequantize_once", "true"], "model.dequantize_once needs model.quantization=nf4"),
        ([*OWN_DATA, "--model.train", "[]", "--alignment.weight", "0"], "nothing trains: model.train is empty"),
        ([*OWN_DATA, *CACHE, "--model.train", "[lora,query_tokens]"], "but model.train has query_tokens"),
        ([*OWN_DATA, "--fused_parts", "[gelu]"], "fused_parts are parts of --fused"),
        ([*OWN_DATA, "--data.clouds", "null"], "data.annotations and data.clouds belong together"),
        ([*OWN_DATA, "--data.packing", "false", "--data.pack_tokens", "99"], "data.pack_tokens needs data.packing"),
        ([*OWN_DATA, *CACHE, "--data.augmentation", "true"], "no data.augmentation (the views are augmented)"),
        ([*OWN_DATA, "--data.fold", "1"], "data.fold: of the embedded objects only"),
        ([*OWN_DATA, *MIXTURE, "--training.per_device_train_batch_size", "4"], "data.mixture needs training.max_steps"),
        ([*OWN_DATA, *MIXTURE, "--training.max_steps", "-1"], "data.mixture needs training.max_steps"),
        ([*OWN_DATA, *MIXTURE, *TOKENS], "data.mixture has batches of its own"),
        ([*OWN_DATA, *GRAPHS], "training.cuda_graphs needs packed batches of one size"),
        ([*OWN_DATA, "--data.mixture", "[]", *TOKENS, *GRAPHS], "training.cuda_graphs needs a CUDA device"),
        ([*OWN_DATA, "--training.fsdp", "full_shard"], "accelerate shards on GPUs only"),
        (["demo", *CPU, "--data.augmentation", "true"], "data.views stand for the clouds: no data.augmentation"),
        (["demo", *CPU, "--model.train", "[lora,qformer]"], "but model.train has qformer"),
        (["demo", *CPU, "--training.auto_batch", "true"], "training.auto_batch cannot split a batch of data.mixture"),
        ([*OWN_DATA, "--data.mixture", "[]", *TOKENS, "--training.auto_batch", "true"], "auto_batch counts samples"),
        (
            [*OWN_DATA, "--training.warmup_learning_rate", "1e-7", "--training.minimum_learning_rate", "null"],
            "training.warmup_learning_rate belongs to the published schedule",
        ),
    ],
)
def test_options_that_contradict_one_another_are_refused_before_anything_is_loaded(arguments, message, capsys):
    """None of the folders and files named here exists."""
    assert message in refused(arguments, capsys)


def test_options_put_together_in_a_program_are_checked_too():
    options = Options(training=TrainingOptions(use_cpu=True))
    options.data.pack_tokens = 99
    with pytest.raises(ValueError, match=r"data\.pack_tokens needs data\.packing"):
        make_trainer(options)


@pytest.mark.parametrize(
    ("changed", "dtype", "attention", "message"),
    [
        ({"world_size": 2}, "bfloat16", "auto", "a run of one process"),
        ({"fsdp": "full_shard"}, "bfloat16", "auto", "a run of one process"),
        ({"gradient_checkpointing": True}, "bfloat16", "auto", "training.activation_checkpointing=false"),
        ({}, "bfloat16", "sdpa", "model.attention=auto or varlen, got sdpa"),
        ({}, "float32", "auto", "choose model.dtype=bfloat16"),
        ({}, "auto", "auto", None),
    ],
)
def test_what_cuda_graphs_need(changed, dtype, attention, message):
    cuda = {"device": SimpleNamespace(type="cuda"), "world_size": 1, "fsdp": "", "bf16": False, "fp16": False}
    training = SimpleNamespace(**cuda | changed)
    if message is None:
        check_cuda_graphs(training, dtype, attention, 4096)
        return
    with pytest.raises(ValueError, match=message):
        check_cuda_graphs(training, dtype, attention, 4096)


def test_an_abbreviated_option_is_unknown(capsys):
    with pytest.raises(SystemExit):
        parse(["demo", "--training.max_step", "3"])
    assert "--training.max_step" in capsys.readouterr().err

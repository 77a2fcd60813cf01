"""Through the real command line: what saves memory and time changes no loss."""

import inspect
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLOUDS, first_stage, tiny_text_config
from safetensors.torch import load_file
from test_train import TINY
from transformers import AutoModelForCausalLM

from pointalign import build, features, train
from pointalign.data.collator import token_counts
from pointalign.data.dataset import ConversationDataset, make_datasets
from pointalign.efficient import memory
from pointalign.model_options import DataOptions, MixturePart, ModelOptions
from pointalign.models import (
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignPhiConfig,
    PointAlignPhiForCausalLM,
    PointAlignProcessor,
    configuration,
)
from pointalign.options import Options, TrainingOptions
from pointalign.trainer import AlignedModel


@pytest.fixture(scope="module", autouse=True)
def tiny_preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configuration.PRESETS, "mini", TINY)
        yield


@pytest.fixture(scope="module", params=["phi"])
def language_model(request, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config(request.param)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_preset, language_model):
    """A recipe of three steps."""
    folder = tmp_path_factory.mktemp("recipe")
    recipe = folder / "recipe.yaml"
    start = first_stage(language_model, folder / "start.safetensors")
    recipe.write_text(
        f"""
model: {{llm: {language_model}, checkpoint: {start}, train: [modality_projector, lora], lora_rank: 4, lora_dropout: 0.0,
        dtype: float32}}
data: {{annotations: {CLOUDS / "annotations.json"}, clouds: {CLOUDS}, num_points: 256}}
alignment: {{weight: 0.5}}
training: {{max_steps: 3, logging_steps: 3, save_strategy: 'no', report_to: none, use_cpu: true, disable_tqdm: true,
            learning_rate: 1.0e-2, per_device_train_batch_size: 4}}
"""
    )
    return recipe


def last_log(recipe, folder, *options):
    """Of a training: loss, its parts and the gradient norm."""
    assert train.main([str(recipe), "--training.output_dir", str(folder), *options]) == 0
    return json.loads((folder / "stage.json").read_text())["last_log"]


@pytest.fixture(scope="module")
def plain(recipe, tmp_path_factory):
    return last_log(recipe, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def run(tmp_path, recipe):
    """`run(name, *options)` trains by the recipe and returns the last log."""

    def go(name, *options):
        return last_log(recipe, tmp_path / name, *options)

    go.recipe = str(recipe)
    return go


def assert_same(one, other, tolerance=2e-4):
    for name in ("loss", "ntp_loss", "alignment_loss", "grad_norm"):
        assert one[name] == pytest.approx(other[name], rel=tolerance), name


def test_packed_and_fused_runs_equal_the_plain_one(plain, run, capsys):
    assert_same(run("packed", "--data.packing", "true"), plain)
    assert "memory of a training step" in capsys.readouterr().out
    assert_same(run("fused", "--data.packing", "true", "--fused"), plain)
    assert "fused: lora (24), merged (4), gelu (4)" in capsys.readouterr().out
    assert_same(run("parts", "--fused", "--fused_parts", "[gelu,norms]"), plain)
    assert "fused: gelu (4), norms (5)\n" in capsys.readouterr().out
    assert_same(run("checkpointed", "--fused", "--training.gradient_checkpointing", "true"), plain)


def test_auto_batch_splits_the_batch_and_keeps_the_training(plain, run, capsys, monkeypatch):
    budgets = []
    budget = memory.budget

    def small(*arguments):
        budgets.append(budget(*arguments))
        # room for the two samples that were measured
        budgets[-1].limit = math.ceil(budgets[-1].total / memory.MARGIN) + 1
        return budgets[-1]

    monkeypatch.setattr(memory, "budget", small)
    split = run("split", "--training.auto_batch", "true")
    assert "auto_batch: 2 samples at a time, 2 times for a step" in capsys.readouterr().out
    assert_same(split, plain)
    assert budgets[0].activations > 0 and budgets[0].trained > 0


def test_token_budget_through_the_command_line(run, monkeypatch):
    """Batches are filled by tokens: none exceeds the budget, and they hold unequal numbers of samples."""
    shapes = []
    forward = AlignedModel.forward

    def spy(self, point_mask, **inputs):
        if inputs.get("num_point_rows") is not None:  # of a step, not of the memory plan
            shapes.append((tuple(point_mask.shape), len(inputs["cu_seq_lens_q"]) - 1))
        return forward(self, point_mask, **inputs)

    monkeypatch.setattr(AlignedModel, "forward", spy)
    log = run("tokens", "--data.packing", "true", "--data.pack_tokens", "300", "--training.max_steps", "6")
    assert np.isfinite(log["loss"]) and len(shapes) == 6
    assert all(rows == 1 and tokens <= 300 for (rows, tokens), _ in shapes)
    assert max(tokens for (_, tokens), _ in shapes) > 150 and len({samples for _, samples in shapes}) > 1


def test_the_plan_holds_for_a_long_sample_after_short_ones(run, tmp_path, monkeypatch):
    """Counted bytes of the largest micro-batch: within the plan, by which `auto_batch` chose its size."""
    entries = json.loads((CLOUDS / "annotations.json").read_text())
    short = next(entry for entry in entries if isinstance(entry["object_id"], str))
    turns = short["conversations"]
    short = short | {"conversations": [turns[0], {"from": "gpt", "value": "A bed."}]}
    long = short | {"conversations": [turns[0], {"from": "gpt", "value": "A very long bed. " * 24}]}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([short] * 12 + [long] * 2 + [short] * 2))
    planned = {}
    plan = memory.plan_memory

    def spy(aligned, samples, collator, options):
        first = collator([train_set[index] for index in range(4)])
        planned["short"] = memory.saved_bytes(lambda: aligned.train()(**first)["loss"])
        result = plan(aligned, samples, collator, options)
        batch = collator(samples[:1] * options.training.per_device_train_batch_size)
        planned["long"] = memory.saved_bytes(lambda: aligned.train()(**batch)["loss"])
        planned["plan"], planned["size"] = result, options.training.per_device_train_batch_size
        return result

    train_set = ConversationDataset(path, CLOUDS)
    budget = memory.budget

    def limited(*arguments):
        measured = budget(*arguments)
        # room for four short samples, or one of the two long ones
        measured.limit = round(measured.of(0.6).total / memory.MARGIN)
        return measured

    monkeypatch.setattr(memory, "plan_memory", spy)
    monkeypatch.setattr(memory, "budget", limited)
    run("long", "--data.annotations", str(path), "--training.auto_batch", "true")
    room = planned["plan"].limit - (planned["plan"].total - planned["plan"].activations)  # for activations
    assert planned["size"] == 1
    assert planned["long"] <= room < 2 * planned["long"]
    assert planned["short"] <= room, "measured on the first samples, four would have been taken to fit"


def test_the_longest_samples_are_those_with_the_most_tokens(tmp_path, processor):
    """Also where the entry with the most bytes has not the most tokens: clouds count, and identifiers do not."""

    def entry(ids, answer):
        question = "<point>" * len(ids) + "\nWhat?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"object_id": ids if len(ids) > 1 else ids[0], "conversations": turns}

    entries = [entry(["a"], "x"), entry(["a" * 300], "x" * 20), entry(["a"], "x" * 60), entry(["a"] * 30, "x")]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(entries))
    dataset = ConversationDataset(path, [], read_clouds=False)
    assert memory.longest_samples(dataset, processor, 512, 3) == [3, 2, 1]


@pytest.mark.parametrize("mixture", [False, True])
def test_the_plan_measures_the_longest_batch(mixture, tmp_path, processor):
    entries = json.loads((CLOUDS / "annotations.json").read_text())
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(entries))
    options = Options(
        data=DataOptions(annotations=str(path), clouds=str(CLOUDS)), training=TrainingOptions(use_cpu=True)
    )
    if mixture:
        options.data.mixture = [MixturePart(types=["simple_description"], batch_size=2), MixturePart(batch_size=40)]
    datasets = make_datasets(options)
    batch = memory.largest_batch(datasets, processor, options)
    assert len(batch) == (40 if mixture else 2)
    counts = token_counts(processor, datasets[-1].conversations, 512)
    longest = datasets[-1][counts.index(max(counts))]
    assert (
        batch[0]["object_ids"] == longest["object_ids"]
        and batch[0]["conversation_type"] == longest["conversation_type"]
    )


def test_cached_features_stand_for_the_clouds(plain, run, tmp_path, language_model, capsys, monkeypatch):
    cache = ["--data.feature_cache", str(tmp_path / "cache")]
    assert features.main([run.recipe, *cache]) == 0
    from pointalign.models.point_encoder import PointBertModel

    with monkeypatch.context() as patch:
        patch.setattr(PointBertModel, "forward", lambda *_: pytest.fail("the point encoder ran"))
        cached = run("cached", *cache, "--data.packing", "true", "--fused")
    assert_same(cached, plain, tolerance=2e-3)  # features were rounded to fp16

    assert (
        train.main([run.recipe, *cache, "--data.num_points", "128", "--training.output_dir", str(tmp_path / "x")]) == 1
    )
    assert "other weights or preprocessing" in capsys.readouterr().err
    other = ["--model.checkpoint", str(first_stage(language_model, tmp_path / "other.safetensors", seed=1))]
    assert train.main([run.recipe, *cache, *other, "--training.output_dir", str(tmp_path / "y")]) == 1
    assert "other weights or preprocessing" in capsys.readouterr().err


def test_cached_encoder_tokens(run, tmp_path):
    options = ["--data.feature_cache", str(tmp_path / "cache"), "--alignment.target", "encoder"]
    assert features.main([run.recipe, *options]) == 0
    assert_same(run("cached", *options), run("plain", "--alignment.target", "encoder"), tolerance=2e-3)


def test_impossible_options_are_named(run, tmp_path, capsys):
    folder = ["--training.output_dir", str(tmp_path / "x")]
    with pytest.raises(SystemExit):
        train.main([run.recipe, *folder, "--fused_parts", "[gelu]"])
    assert "add --fused" in capsys.readouterr().err
    for options, named in [
        (["--model.attention", "flash_attention_2", "--data.packing", "true"], "flash-attn"),
        (["--model.attention", "varlen"], "data.packing"),
        (["--training.memory_limit_gb", "22.5"], "caps the CUDA allocator"),
        (["--data.feature_cache", str(tmp_path / "none")], "no feature cache"),
        (["--fused", "--fused_parts", "[rope]"], "unknown part 'rope'"),
    ]:
        assert train.main([run.recipe, *folder, *options]) == 1
        assert named in capsys.readouterr().err


def test_the_memory_cap_takes_a_device_without_an_index(monkeypatch):
    """PyTorch's own function runs, down to its call of the driver; it refuses `torch.device("cuda")`."""
    fractions = []
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *given: fractions.append(given), raising=False)
    total = SimpleNamespace(total_memory=round(80 * memory.GB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: total)
    with pytest.raises(ValueError, match="with a specified index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    memory.cap_memory(20, torch.device("cuda"))
    memory.cap_memory(40, torch.device("cuda", 0))
    memory.cap_memory(None, torch.device("cuda"))
    assert fractions == [(0.25, 1), (0.5, 0), (1.0, 1)]
    with pytest.raises(ValueError, match=r"memory_limit_gb=100: the device has 80\.0 GB"):
        memory.cap_memory(100, torch.device("cuda"))


def test_the_recipe_for_24_gb_trains_the_published_phi(tmp_path, tokenizer, capsys):
    """`align_24gb` itself on a small converted folder: 4 bits, adapters and norms; --fused, and dequantised once."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = PointAlignPhiConfig(**sizes, vocab_size=259, bos_token_id=None, eos_token_id=256)
    model = PointAlignForConditionalGeneration.from_language_model(PointAlignPhiForCausalLM(config), "mini")
    adapters = {"lora_rank": 4, "lora_dropout": 0.0, "lora_targets": ["query_key_value", "dense"]}
    build.add_adapters(model, ModelOptions(**adapters))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2)
    extractor = PointAlignFeatureExtractor(num_points=256, min_points=64)
    converted = tmp_path / "converted"
    model.save_pretrained(converted)
    PointAlignProcessor(extractor, tokenizer, model.config.num_query_tokens).save_pretrained(converted)
    options = {
        "model.llm": converted,
        "model.dtype": "float32",
        "data.annotations": CLOUDS / "annotations.json",
        "data.clouds": CLOUDS,
        "data.num_points": 256,
        "alignment.layer": "[2]",
        "training.max_steps": 2,
        "training.logging_steps": 2,
        "training.warmup_steps": 1,
        "training.memory_limit_gb": "null",
        "training.use_cpu": "true",
        "training.save_strategy": "no",
        "training.dataloader_num_workers": 0,
        "training.report_to": "none",
        "training.learning_rate": 1e-2,
        "training.warmup_learning_rate": 1e-2,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    logs = {}
    once = ["--fused", "--model.dequantize_once", "true"]
    for name, extra in {"plain": [], "fused": ["--fused"], "once": once}.items():
        folder = tmp_path / name
        assert train.main(["align_24gb", *arguments, "--training.output_dir", str(folder), *extra]) == 0
        logs[name] = json.loads((folder / "stage.json").read_text())["last_log"]
    assert_same(logs["fused"], logs["plain"])
    assert_same(logs["once"], logs["plain"])
    assert "fused: lora (8), merged (0), gelu (4), swiglu (0), norms (0)" in capsys.readouterr().out
    state = load_file(tmp_path / "fused" / "stage.safetensors")
    before = model.state_dict()
    norms = [name for name in state if ".language_model." in name and name.endswith("layernorm.weight")]
    assert len(norms) == 4 * 4 + 1 and all(not torch.equal(state[name], before[name]) for name in norms)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_the_memory_plan_checkpoints_as_the_trainer_does(name):
    """transformers up to 5.17 has the second name; what places the checkpoints is no option of torch's checkpoint."""
    calls = []
    model = SimpleNamespace(**{f"{name}_enable": lambda *args, **kwargs: calls.append((args, kwargs))})
    options = {"use_reentrant": False, "every_n_layers": 2}
    memory.enable_checkpointing(model, SimpleNamespace(**{name: True, f"{name}_kwargs": options}))
    memory.enable_checkpointing(model, SimpleNamespace(**{name: False, f"{name}_kwargs": None}))
    assert calls == [(({"use_reentrant": False},), {"every_n_layers": 2})]
    assert options == {"use_reentrant": False, "every_n_layers": 2}  # the Trainer reads them again


def test_peak_memory_leaves_out_the_process_that_started_this_one():
    function = inspect.getsource(memory.peak_resident_bytes)  # alone: importing its module takes seconds
    measure = f"import re, sys\nfrom pathlib import Path\n{function}\nprint(peak_resident_bytes())"
    start = f"import subprocess, sys; block = b'x' * {2 * 10**9}; subprocess.run([sys.executable, '-c', {measure!r}])"
    output = subprocess.run([sys.executable, "-c", start], check=True, capture_output=True, text=True).stdout
    assert 0 < int(output) < 1.5e9

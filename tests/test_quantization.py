"""4 bits on a CPU: loaded, trained, dequantised to the same numbers, exported as a plain model."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_text_config
from torch import nn

from pointalign import build
from pointalign.efficient import quantization
from pointalign.model_options import ModelOptions

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from random_language_model import random_language_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A language model on disk whose widths fill NF4's blocks of 64."""
    from transformers import AutoModelForCausalLM

    config = tiny_text_config("phi")
    config.hidden_size, config.intermediate_size = 64, 128
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llm")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_model(folder, **options):
    from pointalign.model_options import DataOptions

    chosen = ModelOptions(llm=str(folder), dtype="float32", lora_dropout=0.0, lora_rank=4, **options)
    return build.build_model(chosen, DataOptions(num_points=256))


def losses(model, steps=1):
    """Next-token losses over a few LoRA updates, the first on untouched weights."""
    torch.manual_seed(0)
    ids = torch.randint(0, 250, (2, 24))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_nf4_trains_and_equals_its_dequantised_twin(folder):
    model, _ = make_model(folder, quantization="nf4")
    layers = model.model.language_model.get_decoder().layers
    assert quantization.is_4bit(layers[0].self_attn.q_proj.base_layer)
    assert not quantization.is_4bit(model.get_output_embeddings())
    twin, _ = make_model(folder, quantization="nf4", dequantize_once=True)
    twin_layers = twin.model.language_model.get_decoder().layers
    assert type(twin_layers[0].self_attn.q_proj.base_layer) is nn.Linear
    assert torch.equal(quantization.full_weight(layers[0].mlp.fc1.base_layer), twin_layers[0].mlp.fc1.base_layer.weight)
    full, _ = make_model(folder)
    four, once, plain = (losses(one, steps=4) for one in (model, twin, full))
    assert four == pytest.approx(once, rel=1e-5)
    assert abs(four[0] - plain[0]) > 1e-5  # 4 bits are not the weights
    assert four[-1] < four[0]


@pytest.mark.parametrize("options", [{"quantization": "nf4"}, {"quantization": "nf4", "dequantize_once": True}])
def test_quantised_models_are_exported_plain(folder, tmp_path, options):
    from pointalign.models import PointAlignForConditionalGeneration

    model, processor = make_model(folder, **options)
    losses(model, steps=2)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
    build.export(model, processor, tmp_path / "model")
    again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert getattr(again.config.text_config, "quantization_config", None) is None
    assert not any(quantization.is_4bit(module) for module in again.modules())
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["phi", "llama", "qwen3"])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_random_language_model(architecture, kind):
    config = tiny_text_config(architecture)
    config.hidden_size, config.intermediate_size = 64, 128
    model = random_language_model(config, kind, torch.float32, torch.device("cpu"))
    assert not any(one.is_meta for one in [*model.parameters(), *model.buffers()])
    assert quantization.is_4bit(model.get_decoder().layers[0].self_attn.v_proj) == (kind == "nf4")
    ids = torch.arange(12)[None]
    loss = model(input_ids=ids, labels=ids).loss
    assert 4 < loss.item() < 7  # near log(259): a uniform guess
    from transformers import AutoModelForCausalLM

    usual = AutoModelForCausalLM.from_config(config)
    for (name, mine), (_, theirs) in zip(model.named_buffers(), usual.named_buffers(), strict=False):
        if "inv_freq" in name:
            torch.testing.assert_close(mine, theirs)


def test_nf4_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"pointalign\[cuda\]"):
        quantization.quantization_config("nf4", torch.bfloat16)


def test_sharded_storage(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    config = quantization.quantization_config("nf4", torch.bfloat16)
    assert config.bnb_4bit_quant_storage == torch.bfloat16 and config.bnb_4bit_use_double_quant
    assert quantization.quantization_config("none", torch.bfloat16) is None


def test_unknown_quantization():
    with pytest.raises(ValueError, match="none or nf4"):
        ModelOptions(quantization="int8")


def test_a_stage_answers_in_the_weights_that_it_trained_on(folder, tmp_path, clouds, capsys):
    """Merged, or with its adapters on the 4-bit weights as in training; other weights are rounded, which is said."""
    from dataclasses import asdict

    from conftest import user

    from pointalign import chat, stage_file

    chosen = ModelOptions(llm=str(folder), dtype="float32", lora_rank=4, quantization="nf4")
    from pointalign.model_options import DataOptions

    trained, processor = build.build_model(chosen, DataOptions(num_points=256))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1).copy_(parameter.bfloat16())  # a stage file holds matrices in bfloat16
            elif ".lora_A." in name or "model.point" in name or "projector" in name:
                parameter.copy_(parameter.bfloat16())
    path = tmp_path / "stage.safetensors"
    stage_file.save_stage(trained, path, {"model": asdict(chosen), "data": {"num_points": 256}})
    batch = processor.apply_chat_template([user("What?", clouds[0])], tokenize=True, add_generation_prompt=True)
    with torch.no_grad():
        expected = trained.eval()(**batch).logits
        for bits in (None, "nf4"):
            model, _, _ = build.load(path, device="cpu", quantization=bits)
            layers = [m for m in model.get_decoder().modules() if quantization.is_4bit(m)]
            assert bool(layers) == (bits is not None)
            torch.testing.assert_close(model(**batch).logits, expected, atol=2e-2, rtol=2e-2)
            assert "rounded" not in capsys.readouterr().err
    build.export(build.load(path, device="cpu")[0], processor, tmp_path / "model")
    import numpy as np

    np.save(tmp_path / "cloud.npy", clouds[0])
    talk = [str(tmp_path / "cloud.npy"), "--model", str(tmp_path / "model"), "--max-new-tokens", "2", "--question", "?"]
    assert chat.main([*talk, "--quantization", "nf4"]) == 0
    shown = capsys.readouterr()
    assert "> ?" in shown.out and "trained in more bits, its weights are rounded" in shown.err

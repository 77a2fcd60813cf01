"""Language models by folder or by a name of the hub: the cache, and what a missing model's error says."""

import json

import huggingface_hub.constants
import pytest
import torch
from conftest import tiny_text_config
from transformers import AutoModelForCausalLM

from pointalign.build import build_model
from pointalign.language_model import find_folder
from pointalign.model_options import DataOptions, ModelOptions


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def store(cache, name, tokenizer):
    """A model in the cache as the hub's client leaves it there."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    folder = root / "snapshots" / ("0" * 40)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config()).save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_cached_model_is_used_by_its_name(cache, tokenizer):
    folder = store(cache, "somebody/tiny", tokenizer)
    assert find_folder("somebody/tiny") == folder
    options = ModelOptions(llm="somebody/tiny", dtype="float32", lora_rank=0, train=[])
    model, processor = build_model(options, DataOptions())
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(model.get_input_embeddings().weight, expected["model.embed_tokens.weight"])
    assert processor.tokenizer.eos_token == tokenizer.eos_token
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    missing = sorted(set(weights.values()))[-1]
    (folder / missing).unlink()  # a download that was stopped
    with pytest.raises(FileNotFoundError, match=rf"{missing} is missing: where .*hf download somebody/tiny"):
        find_folder("somebody/tiny")


def test_a_model_that_is_nowhere_is_named_with_what_to_do(cache, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        find_folder("Qwen/Qwen3-8B")
    message = str(error.value)
    assert "model.llm='Qwen/Qwen3-8B': neither a folder nor complete in the cache" in message and str(cache) in message
    assert "`hf download Qwen/Qwen3-8B`" in message and "or give the folder of a language model" in message
    for name in (str(tmp_path), "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"no language model in .*config\.json is missing"):
            find_folder(name)

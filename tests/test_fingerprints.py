"""The language model of a stage: known by a fingerprint, and refused where it is another."""

import pytest
import torch
from conftest import tiny_text_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_stages import make_model
from transformers import AutoModelForCausalLM

from pointalign import stage_file, storage


def test_another_language_model_is_refused(lively_llm, tmp_path, tokenizer):
    model, _ = make_model(lively_llm)
    path = tmp_path / stage_file.STAGE_FILE
    stage_file.save_stage(model, path, {})
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_config(tiny_text_config("llama"))
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained with the language model"):
        make_model(tmp_path / "other", checkpoint=str(path))
    save_file(load_file(path), tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match="was trained with the language model None"):
        make_model(lively_llm, checkpoint=str(tmp_path / "nameless.safetensors"))


def test_a_fine_tuned_language_model_is_refused(lively_llm, tmp_path, tokenizer):
    """Embeddings alone do not tell a model from its fine-tune: the fingerprint samples every tensor."""
    model, _ = make_model(lively_llm)
    path = tmp_path / stage_file.STAGE_FILE
    stage_file.save_stage(model, path, {})
    tuned = AutoModelForCausalLM.from_pretrained(lively_llm)
    with torch.no_grad():
        tuned.model.layers[3].mlp.down_proj.weight[:, 5] += 0.1
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert torch.equal(tuned.get_input_embeddings().weight, model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="was trained with the language model"):
        make_model(tmp_path / "tuned", checkpoint=str(path))


def test_a_language_model_has_the_same_fingerprint_in_every_form(lively_llm, tmp_path, tokenizer):
    """In bfloat16, in 4 bits and in files of another cut: a stage file of the float32 model fits all of them."""
    path = tmp_path / stage_file.STAGE_FILE
    stage_file.save_stage(make_model(lively_llm)[0], path, {})
    cut = tmp_path / "cut"
    AutoModelForCausalLM.from_pretrained(lively_llm, dtype=torch.bfloat16).save_pretrained(cut, max_shard_size="20KB")
    tokenizer.save_pretrained(cut)
    assert len(list(cut.glob("*.safetensors"))) > 2
    assert stage_file.weights_fingerprint(cut) == stage_file.weights_fingerprint(lively_llm)
    for loaded, changes in [(lively_llm, {"dtype": "bfloat16"}), (cut, {})]:
        make_model(loaded, checkpoint=str(path), **changes)
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for dequantize_once in (False, True):
        make_model(lively_llm, checkpoint=str(path), quantization="nf4", dequantize_once=dequantize_once)


def test_an_early_stage_file_is_known_by_its_embeddings(lively_llm, tmp_path, tokenizer):
    """Its header has no fingerprint of all weights."""
    path = tmp_path / stage_file.STAGE_FILE
    stage_file.save_stage(make_model(lively_llm)[0], path, {})
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    del header["language_model_weights"]
    storage.write_tensors(path, load_file(path), header)
    make_model(lively_llm, checkpoint=str(path))
    other = AutoModelForCausalLM.from_pretrained(lively_llm)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained with the language model"):
        make_model(tmp_path / "other", checkpoint=str(path))


def test_scalars_are_part_of_a_fingerprint(tmp_path):
    """Quantised language models hold scales without dimensions."""
    fingerprints = set()
    for scale in (1.0, 2.0):
        save_file({"weight": torch.ones(3, 4), "scale": torch.tensor(scale)}, tmp_path / "model.safetensors")
        fingerprints.add(stage_file.weights_fingerprint(tmp_path))
    assert len(fingerprints) == 2


def test_weights_in_another_format_have_a_fingerprint_of_their_bytes(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(bytes(range(256)) * 4096)
    first = stage_file.weights_fingerprint(tmp_path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert stage_file.weights_fingerprint(tmp_path) != first
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        stage_file.weights_fingerprint(tmp_path)

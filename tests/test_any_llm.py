"""The published encoder and Q-Former in front of any causal language model, from files to a model that answers."""

import json

import made_published as made
import pytest
import torch
from conftest import CLOUDS, tiny_text_config, user
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GenerationConfig, MistralConfig, Phi3Config

from pointalign import train
from pointalign.build import load, load_converted
from pointalign.convert import __main__ as convert
from pointalign.model_options import ModelOptions

SIZES = {
    "vocab_size": 259, "hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: tiny_text_config("llama"),
    "qwen3": lambda: tiny_text_config("qwen3"),  # its head is tied to the embeddings
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=12),
    "phi4": lambda: Phi3Config(**SIZES),  # as Phi-3 and Phi-4
    "mistral": lambda: MistralConfig(**SIZES),
}
SHORT = [
    "--data.annotations", str(CLOUDS / "annotations.json"), "--data.clouds", str(CLOUDS), "--data.num_points", "64",
    "--model.quantization=none", "--model.dtype=float32", "--training.max_steps=2", "--training.warmup_steps=0",
    "--training.learning_rate=1e-2", "--training.use_cpu=true", "--training.auto_batch=false",
    "--training.memory_limit_gb=null", "--training.dataloader_num_workers=0", "--training.report_to=none",
    "--training.disable_tqdm=true", "--training.save_strategy=no", "--training.logging_steps=1",
    "--training.per_device_train_batch_size=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    encoder = made.encoder()
    made.save_container(folder / "blip2.pth", made.blip2())
    made.save_container(folder / "point_model.pth", encoder, "base_model")
    made.save_container(folder / "stage3.pth", made.with_encoder_aliases(made.stage() | made.projector(), encoder))
    return folder


def save_llm(folder, name, tokenizer):
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[256, 258], pad_token_id=257).save_pretrained(folder)  # more marks than config.json
    return folder


def converted(files, llm, output, *extra):
    parts = ["--point-encoder", files / "point_model.pth", "--qformer", files / "blip2.pth", "--llm", llm]
    sizes = ["--head-size", "4", "--num-groups", "8", "--group-size", "4"]
    return convert.main([str(one) for one in [*parts, *extra, "--output", output, *sizes]])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_language_model_and_the_point_branch_are_those_of_their_files(name, files, tmp_path, tokenizer):
    llm = save_llm(tmp_path / "llm", name, tokenizer)
    assert converted(files, llm, tmp_path / "out", "--checkpoint", files / "stage3.pth") == 0
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert report["random"] == ["model.modality_projector"]
    ignored = {entry["tensor"] for entry in report["tensors"] if entry["detail"] == "of another language model"}
    assert {"llama_proj.weight", "llama_proj2.bias", "alignment_projector.projector.0.weight"} <= ignored
    assert all(one in ignored for one in made.stage() if one.startswith("llama_"))
    model = load_converted(tmp_path / "out", ModelOptions(dtype="float32")).eval()
    assert set(model.config.adapters) == {"qformer"}  # those of the checkpoint, for the Q-Former alone
    assert set(model.generation_config.eos_token_id) == {256, 258}
    with torch.no_grad():
        ids = torch.arange(20)[None]
        expected = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()(ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        cloud = torch.rand(64, 6, generator=torch.Generator().manual_seed(3))
        encoder = torch.load(files / "point_model.pth", weights_only=True)["base_model"]
        tokens = model.encode_point_clouds(cloud[None]).encoder[0]
        torch.testing.assert_close(tokens, made.encode(encoder, cloud), atol=1e-5, rtol=1e-5)
    assert convert.main(["--check", str(tmp_path / "out")]) == 0


def test_a_point_branch_by_two_commands_then_the_alignment_stage(files, tmp_path, tokenizer, clouds):
    llm = save_llm(tmp_path / "llm", "qwen3", tokenizer)
    assert converted(files, llm, tmp_path / "out") == 0
    first = tmp_path / "stage1"
    base = ["--model.llm", str(tmp_path / "out"), *SHORT]
    assert train.main(["stage1_any_llm", *base, "--training.output_dir", str(first)]) == 0
    later = ["--training.output_dir", str(tmp_path / "align"), "--model.checkpoint", str(first)]
    assert train.main(["align_24gb_8b", *base, *later]) == 0
    log = json.loads((tmp_path / "align" / "stage.json").read_text())["last_log"]
    assert log["alignment_loss"] > 0
    model, processor, _ = load(tmp_path / "align" / "model")
    batch = processor.apply_chat_template([user("What?", clouds[0])], tokenize=True, add_generation_prompt=True)
    batch = batch.to(model.device)
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def test_a_random_part_that_stays_frozen_is_an_error_before_anything_is_loaded(files, tmp_path, tokenizer, capsys):
    llm = save_llm(tmp_path / "llm", "llama", tokenizer)
    run = ["align_24gb_8b", *SHORT, "--model.checkpoint", "null", "--training.output_dir", str(tmp_path / "run")]
    (llm / "model.safetensors").rename(llm / "away")
    assert train.main([*run, "--model.llm", str(llm)]) == 1
    shown = capsys.readouterr().err
    assert "error: point_encoder, point_mlp, query_tokens, qformer: drawn at random and frozen" in shown
    assert f"pointalign convert --llm {llm}" in shown
    (llm / "away").rename(llm / "model.safetensors")
    assert converted(files, llm, tmp_path / "out") == 0
    assert "drawn at random and to be trained: model.point_mlp, model.modality_projector" in capsys.readouterr().out
    assert train.main([*run, "--model.llm", str(tmp_path / "out")]) == 1
    assert "error: point_mlp: drawn at random and frozen" in capsys.readouterr().err


def test_a_model_of_several_modalities_and_a_folder_without_configuration_are_named(files, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert converted(files, tmp_path, tmp_path / "out") == 1
    assert "is of 'gemma3', expected a causal language model of text alone" in capsys.readouterr().err
    assert converted(files, files, tmp_path / "out") == 1
    assert "config.json is missing" in capsys.readouterr().err

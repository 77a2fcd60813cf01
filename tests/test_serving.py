"""The model for engines that serve its language model: prompt embeddings, two files, a compiled decoding step."""

import numpy as np
import pytest
import torch
from conftest import lively, tiny_model, user
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from pointalign import build, chat, export
from pointalign.models import adapters, split_folder
from pointalign.models.serving import compiled_generation

LENGTH = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return lively(tiny_model())


@pytest.fixture
def talks(clouds):
    return [
        [user("What is this?", clouds[0][:300])],
        [user("Which of these is taller?", clouds[1][:300], clouds[2][:200])],
        [user("A question without a cloud, longer than the others")],
    ]


def test_prompt_embeddings_give_the_same_answers(model, processor, talks):
    """Each prompt by itself, as an engine batches it: against our own answers to the padded batch."""
    batch = processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)
    expected = processor.answers(model.generate(**batch, **LENGTH), batch["input_ids"].shape[1])
    prompts = model.prompt_embeddings(batch)
    assert [len(prompt) for prompt in prompts] == batch["attention_mask"].sum(dim=1).tolist()
    for prompt, from_messages in zip(prompts, model.prompt_embeddings(talks, processor), strict=True):
        assert prompt.shape[1] == 32 and torch.equal(prompt, from_messages)
    llm = model.model.language_model
    answers = [processor.answers(llm.generate(inputs_embeds=prompt[None], **LENGTH), 0)[0] for prompt in prompts]
    assert answers == expected and len(set(expected)) == 3


def test_prompt_embeddings_hold_the_clouds_and_need_the_processor_for_messages(model, processor, talks):
    (prompt,) = model.prompt_embeddings([talks[0]], processor)
    batch = processor.apply_chat_template([talks[0]], tokenize=True, add_generation_prompt=True)
    places = batch["point_mask"][0]
    projected = model.encode_point_clouds(batch["point_values"], batch["point_lengths"]).projected[0]
    torch.testing.assert_close(prompt[places], projected)
    words = model.get_input_embeddings()(batch["input_ids"][0])
    assert torch.equal(prompt[~places], words[~places])
    with pytest.raises(ValueError, match="needs the processor"):
        model.prompt_embeddings(talks)


def test_an_export_is_a_plain_language_model_and_a_small_file_and_answers_as_before(
    model, processor, talks, tmp_path, capsys
):
    adapted = lively(tiny_model())
    adapters.add(adapted, "language_model", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 4)
    adapted.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    assert export.main([str(tmp_path / "whole"), str(tmp_path / "served")]) == 0
    assert "point_branch.safetensors" in capsys.readouterr().out

    batch = processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)
    with torch.inference_mode():
        expected = adapted(**batch).logits
        plain = model(**batch).logits
    again, processor_again, digest = build.load(tmp_path / "served", device="cpu")
    with torch.inference_mode():
        found = again(**processor_again.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.1, "the adapters count"
    assert digest != build.load(tmp_path / "whole", device="cpu")[2]

    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "served" / "llm", dtype="auto", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served" / "llm", trust_remote_code=False)
    assert type(llm).__module__.startswith("transformers.") and tokenizer.chat_template
    prompts = again.prompt_embeddings(batch)
    answers = [processor.answers(llm.generate(inputs_embeds=prompt[None], **LENGTH), 0)[0] for prompt in prompts]
    assert answers == processor.answers(again.generate(**batch, **LENGTH), batch["input_ids"].shape[1])
    names = load_file(tmp_path / "served" / split_folder.POINT_BRANCH)
    assert names and not [name for name in names if "language_model" in name]

    assert export.main([str(tmp_path / "whole"), str(tmp_path / "served")]) == 1
    assert "exists: choose another folder" in capsys.readouterr().err


def test_an_export_keeps_every_bit_of_the_point_branch(model, processor, tmp_path):
    """bfloat16 only where a matrix survives it."""
    with torch.no_grad():
        model.model.query_tokens.copy_(model.model.query_tokens.bfloat16().float())
    split_folder.save(model, processor, tmp_path)
    stored, state = load_file(tmp_path / split_folder.POINT_BRANCH), model.state_dict()
    assert all(torch.equal(tensor.to(state[name].dtype), state[name]) for name, tensor in stored.items())
    assert stored["model.query_tokens"].dtype == torch.bfloat16
    assert stored["model.modality_projector.0.weight"].dtype == torch.float32
    (tmp_path / split_folder.POINT_BRANCH).unlink()
    from safetensors.torch import save_file

    del stored["model.query_tokens"]
    save_file(stored, tmp_path / split_folder.POINT_BRANCH)
    with pytest.raises(ValueError, match=r"does not fit .*query_tokens"):
        split_folder.load(tmp_path)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0, "temperature": 1.0}])
@pytest.mark.parametrize("clouds_as", ["points", "features"])
def test_a_static_cache_answers_as_one_that_grows(clouds_as, options, model, processor, talks):
    """Clouds in the prompt alone, prompts padded on the left, beams that exchange their caches."""
    batch = processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)
    if clouds_as == "features":
        points, lengths = batch.pop("point_values"), batch.pop("point_lengths")
        batch["query_features"] = model.get_qformer_features(points, lengths)
    assert not batch["attention_mask"].all()
    outputs = []
    for cache in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch, **LENGTH | options | cache, return_dict_in_generate=True))
    grown, static = outputs
    assert torch.equal(static.sequences, grown.sequences) and len(grown.sequences.unique(dim=0)) == 3
    assert isinstance(static.past_key_values, StaticCache) and not isinstance(grown.past_key_values, StaticCache)
    room = batch["input_ids"].shape[1] + LENGTH["max_new_tokens"]
    assert all(layer.keys.shape[2] >= room - 1 for layer in static.past_key_values.layers)


def test_a_compiled_step_with_a_static_cache_answers_a_batch_as_before(model, processor, talks):
    batch = processor.apply_chat_template(talks, tokenize=True, add_generation_prompt=True)
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    options = compiled_generation(backend, cache_length=512)
    expected = model.generate(**batch, **LENGTH)
    assert torch.equal(model.generate(**batch, **LENGTH, **options), expected)
    compiled = len(calls)
    assert compiled > 0, "the step was compiled"
    longer = processor.apply_chat_template([*talks[::-1]], tokenize=True, add_generation_prompt=True)
    assert torch.equal(model.generate(**longer, **LENGTH, **options), expected.flip(0))
    assert len(calls) == compiled, "another batch of as many rows uses the same code"
    torch._dynamo.reset()


def test_chat_compiles_first_and_says_how_long_that_took(model, processor, clouds, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "a.npy", clouds[0][:300])
    asked = [str(tmp_path / "a.npy"), "--model", str(tmp_path / "model"), "--max-new-tokens", "6"]
    asked += ["--question", "What is this?", "--question", "Why?"]
    assert chat.main(asked) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr("pointalign.models.serving.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("pointalign.models.serving.compiled_generation", lambda: compiled_generation("eager"))
    assert chat.main([*asked, "--compile"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("compiled in ") and [lines[0], *lines[2:]] == plain.splitlines()
    torch._dynamo.reset()

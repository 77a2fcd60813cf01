"""Sizes of the presets, any language model, losses, generation, saving, Auto classes, an encoder from outside."""

import pytest
import torch
from conftest import assistant, lively, point_inputs, tiny_config, tiny_model, tiny_text_config, user, without_dropout
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pointalign.models import (
    PointAlignConfig,
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignModel,
    PointAlignProcessor,
)

ARCHITECTURES = ("phi", "llama", "qwen3")


def count(module: nn.Module) -> int:
    return sum(one.numel() for one in module.parameters())


def prompts(processor, *conversations):
    return processor.apply_chat_template(list(conversations), tokenize=True, add_generation_prompt=True)


def labelled(processor, *conversations):
    return processor.apply_chat_template(list(conversations), tokenize=True, return_labels=True)


def greedy(model, batch, **options) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


def answers(model, batch, **options) -> list[list[int]]:
    return greedy(model, batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_the_papers_preset_has_the_papers_sizes():
    phi2 = PhiConfig(
        hidden_size=2560,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=10240,
        vocab_size=51200,
        partial_rotary_factor=0.4,
    )
    with torch.device("meta"):
        model = PointAlignForConditionalGeneration(PointAlignConfig.from_preset("minigpt3d-phi2", phi2)).model
    assert count(model.point_encoder) == 21_859_200
    assert count(model.point_mlp) == 1_378_432
    assert count(model.qformer) == 105_137_664 and model.query_tokens.shape == (1, 32, 768)
    assert count(model.modality_projector) == 13_638_144
    assert count(model.language_model) == 2_779_683_840


def test_the_mini_preset_trains_at_most_12_million_parameters():
    from peft import LoraConfig, inject_adapter_in_model

    smollm2 = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = PointAlignForConditionalGeneration(PointAlignConfig.from_preset("mini", smollm2))
        language_model = inject_adapter_in_model(
            LoraConfig(r=16, target_modules="all-linear"), model.model.language_model
        )
    lora = sum(one.numel() for name, one in language_model.named_parameters() if ".lora_" in name)
    branch = sum(count(part) for part in model.model.point_branch) + model.model.query_tokens.numel()
    assert lora > 0
    assert lora + branch <= 12_000_000


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match=r"unknown preset 'maxi'.*minigpt3d-phi2, mini"):
        PointAlignConfig.from_preset("maxi", LlamaConfig())


# -- any language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_forward_loss_and_generation(architecture, processor, clouds):
    model = lively(tiny_model(architecture))
    batch = labelled(processor, [user("What?", clouds[0]), assistant("A bench.")])
    out = model(**batch)
    assert out.logits.shape == (*batch["input_ids"].shape, 259)
    assert out.point_features.encoder.shape == (1, 9, 16)
    assert out.point_features.qformer.shape == (1, 4, 16)
    assert out.point_features.projected.shape == (1, 4, 32)
    expected = nn.functional.cross_entropy(out.logits[0, :-1], batch["labels"][0, 1:])
    torch.testing.assert_close(out.loss, expected)
    other = model(**batch | point_inputs(labelled(processor, [user("What?", clouds[1]), assistant("A bench.")])))
    assert not torch.equal(out.logits, other.logits), "the cloud changes nothing"
    assert len(answers(model, prompts(processor, [user("What?", clouds[0])]))[0]) == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_point_tokens_stand_in_their_places(architecture, processor, clouds):
    model = lively(tiny_model(architecture))
    batch = labelled(processor, [user("What?", clouds[0], clouds[1]), assistant("Two.")])
    features = model.encode_point_clouds(**{"points": batch["point_values"], "point_lengths": batch["point_lengths"]})
    by_hand = model.get_input_embeddings()(batch["input_ids"]).clone()
    by_hand[batch["point_mask"]] = features.projected.flatten(0, 1)
    expected = model.model.language_model(inputs_embeds=by_hand).logits
    torch.testing.assert_close(model(**batch).logits, expected)


def test_the_language_model_keeps_its_weights_and_phi_its_bias(processor, clouds):
    language_model = AutoModelForCausalLM.from_config(tiny_text_config("phi"))
    with torch.no_grad():
        for one in language_model.parameters():
            one.add_(0.5)
    before = {name: one.clone() for name, one in language_model.state_dict().items()}
    model = PointAlignForConditionalGeneration.from_language_model(language_model, "mini").eval()
    after = model.model.language_model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert model.get_output_embeddings() is language_model.lm_head
    ids = torch.tensor([[65, 66, 67]])
    plain = model(input_ids=ids).logits
    with torch.no_grad():
        language_model.lm_head.bias.add_(1.0)
    torch.testing.assert_close(model(input_ids=ids).logits, plain + 1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_language_model_that_was_loaded_before_stays_causal(architecture, attention, tmp_path):
    lively(AutoModelForCausalLM.from_config(tiny_text_config(architecture))).save_pretrained(tmp_path)
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).eval()
    ids, changed = torch.tensor([[65, 66, 67, 68]]), torch.tensor([[65, 66, 67, 99]])
    alone = language_model(input_ids=ids).logits
    model = PointAlignForConditionalGeneration.from_language_model(language_model, "mini").eval()
    assert language_model.config._attn_implementation == attention
    assert torch.equal(model(input_ids=ids).logits, alone)
    assert torch.equal(model(input_ids=changed).logits[:, :3], alone[:, :3]), "a word sees the words after it"


# -- the loss from supervised rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_items", [None, 100])
def test_supervised_rows_give_the_full_loss_and_its_gradients(architecture, num_items, processor, clouds):
    batch = labelled(
        processor,
        [user("What?", clouds[0]), assistant("A bench."), user("Colour?"), assistant("Beige.")],
        [user("And this, with a longer question?", clouds[1], clouds[2]), assistant("Two.")],
    )
    gradients, losses = [], []
    for full in (False, True):
        model = without_dropout(lively(tiny_model(architecture))).train()
        if full:
            labels = batch["labels"]
            logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            total = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            loss = total / (num_items or (labels[:, 1:] != -100).sum())
        else:
            out = model(**batch, num_items_in_batch=num_items)
            assert out.logits is None, "training computes no logits beside the supervised rows"
            loss = out.loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: one.grad for name, one in model.named_parameters()})
    torch.testing.assert_close(*losses)
    for name, expected in gradients[1].items():
        if expected is None:
            assert gradients[0][name] is None, name
        else:
            torch.testing.assert_close(gradients[0][name], expected, atol=1e-6, rtol=1e-4, msg=name)


def test_a_language_model_that_rescales_its_logits_keeps_its_own_loss(processor, clouds):
    from transformers import Gemma2Config

    text_config = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=259,
        final_logit_softcapping=2.0,
        pad_token_id=257,
    )
    config = tiny_config()
    config.text_config = text_config
    model = without_dropout(lively(PointAlignForConditionalGeneration(config).eval()))
    batch = labelled(processor, [user("What?", clouds[0]), assistant("A bench.")])
    model.train()
    torch.manual_seed(0)  # the Q-Former's attention has a dropout of its own
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert logits.abs().max() <= 2
    expected = nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])
    torch.manual_seed(0)
    torch.testing.assert_close(model(**batch).loss, expected)


# -- generation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_with_two_clouds_a_row_equals_the_singles(architecture, beams, processor, clouds):
    model = lively(tiny_model(architecture))
    conversations = [
        [user("Which is taller?", clouds[0], clouds[1])],
        [user("And of these two, which one is?", clouds[2], clouds[3])],
    ]
    together = answers(model, prompts(processor, *conversations), num_beams=beams)
    singles = [answers(model, prompts(processor, one), num_beams=beams)[0] for one in conversations]
    assert together == singles
    swapped = [user("Which is taller?", clouds[1], clouds[0])]
    features = [model(**prompts(processor, one)).logits[0, -1] for one in (conversations[0], swapped)]
    assert not torch.allclose(*features), "the order of the clouds changes nothing"


def test_beams_bind_unequal_numbers_of_clouds_to_their_rows(processor, clouds):
    model = lively(tiny_model())
    conversations = [
        [user("Nothing to see")],
        [user("Three", clouds[0], clouds[1], clouds[2])],
        [user("One", clouds[3])],
    ]
    together = answers(model, prompts(processor, *conversations), num_beams=3)
    assert together == [answers(model, prompts(processor, one), num_beams=3)[0] for one in conversations]


def test_clouds_are_encoded_once_and_the_cache_changes_nothing(processor, clouds):
    model = lively(tiny_model())
    batch = prompts(processor, [user("What?", clouds[0])], [user("And this one?", clouds[1])])
    calls = []
    model.model.point_encoder.register_forward_hook(lambda *_: calls.append(1))
    cached = answers(model, batch)
    assert len(calls) == 1
    assert answers(model, batch, use_cache=False) == cached
    assert len(calls) == 1 + 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_computes_the_logits_of_the_last_place_alone(architecture, beams, processor, clouds):
    model = lively(tiny_model(architecture))
    batch = prompts(processor, [user("What?", clouds[0])], [user("And which is taller?", clouds[1], clouds[2])])
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:2]))
    last = answers(model, batch, num_beams=beams)
    assert rows == [(2 * beams, 1)] * 8
    rows.clear()
    everywhere = answers(model, batch, num_beams=beams, logits_to_keep=0)
    assert rows[0] == (2 * beams, batch["input_ids"].shape[1]), "this test can fail"
    assert last == everywhere


@pytest.mark.parametrize("slices", [True, False], ids=["the language model slices", "it does not know how"])
def test_logits_to_keep_chooses_places(slices, processor, clouds, monkeypatch):
    model = lively(tiny_model())
    batch = prompts(processor, [user("What?", clouds[0])])
    everywhere = model(**batch).logits
    if not slices:
        language_model = model.model.language_model
        forward = language_model.forward

        def without(inputs_embeds, attention_mask=None, labels=None):
            return forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, labels=labels)

        monkeypatch.setattr(language_model, "forward", without)
    torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, everywhere[:, -3:])
    places = torch.tensor([0, 5])
    torch.testing.assert_close(model(**batch, logits_to_keep=places).logits, everywhere[:, places])
    torch.testing.assert_close(model(**batch).logits, everywhere)


def test_features_computed_before_replace_clouds(processor, clouds):
    model = lively(tiny_model())
    batch = prompts(processor, [user("What?", clouds[0])], [user("And this one?", clouds[1])])
    features = model.get_qformer_features(batch["point_values"], batch["point_lengths"])
    text = {name: value for name, value in batch.items() if name not in point_inputs(batch)}
    cached = text | {"query_features": features}
    torch.testing.assert_close(model(**cached).logits, model(**batch).logits)
    assert answers(model, cached, num_beams=2) == answers(model, batch, num_beams=2)


def test_both_ways_to_features_agree(processor, clouds):
    model = lively(tiny_model())
    inputs = point_inputs(prompts(processor, [user("What?", clouds[0], clouds[1])]))
    features = model.encode_point_clouds(inputs["point_values"])
    assert torch.equal(model.get_qformer_features(**inputs), features.qformer)
    assert torch.equal(model.model.modality_projector(features.qformer), features.projected)


def test_clouds_of_unequal_size_equal_each_alone(processor, clouds):
    model = lively(tiny_model())
    sizes = (60, 200, 9, 60)
    given = [cloud[:size] for cloud, size in zip(clouds, sizes, strict=False)]
    batch = processor.feature_extractor(given)
    assert batch["point_values"].shape == (4, 200, 6) and batch["point_lengths"].tolist() == list(sizes)
    together = model.encode_point_clouds(batch["point_values"], batch["point_lengths"]).projected
    for row, cloud in enumerate(given):
        alone = model.encode_point_clouds(processor.feature_extractor([cloud])["point_values"]).projected[0]
        torch.testing.assert_close(together[row], alone)


def test_a_mask_that_does_not_fit_the_clouds_is_an_error(processor, clouds):
    model = tiny_model()
    batch = dict(prompts(processor, [user("What?", clouds[0])], [user("What?", clouds[1])]))
    with pytest.raises(ValueError, match=r"2 clouds need 8 places .* got 7 places"):
        mask = batch["point_mask"].clone()
        mask[0, mask[0].nonzero()[0]] = False
        model(**batch | {"point_mask": mask})
    with pytest.raises(ValueError, match=r"multiple of 4 places for point tokens, got \[3, 5\]"):
        mask[1, -1] = True
        model(**batch | {"point_mask": mask})
    with pytest.raises(ValueError, match="expected `point_mask` beside the clouds"):
        model(**{name: value for name, value in batch.items() if name != "point_mask"})
    with pytest.raises(ValueError, match="expected point_values or query_features"):
        model(input_ids=batch["input_ids"], point_mask=batch["point_mask"])


def test_frozen_parts_stay_in_evaluation_mode():
    model = tiny_model()
    model.requires_grad_(False)
    model.model.modality_projector.requires_grad_(True)
    model.train()
    parts = {name: getattr(model.model, name) for name in ("point_encoder", "point_mlp", "qformer")}
    assert not any(one.training for part in parts.values() for one in part.modules())
    assert model.model.modality_projector.training and model.model.language_model.training
    model.model.point_encoder.requires_grad_(True)
    assert model.train().model.point_encoder.training


# -- saving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_it_generates_the_same(architecture, dtype, processor, clouds, tmp_path):
    model = lively(tiny_model(architecture))
    for one in model.model.language_model.parameters():  # rotary frequencies are fp32 beside any weights
        one.data = one.data.to(dtype)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = PointAlignForConditionalGeneration.from_pretrained(tmp_path, dtype="auto").eval()
    again = PointAlignProcessor.from_pretrained(tmp_path)
    saved, restored = model.state_dict(), loaded.state_dict()
    assert saved.keys() == restored.keys()
    for name, tensor in saved.items():
        assert restored[name].dtype == tensor.dtype or not tensor.is_floating_point(), name
        assert torch.equal(restored[name].to(tensor.dtype), tensor), name
    assert loaded.model.point_encoder.dtype == torch.float32
    conversations = [[user("What is this?", clouds[0], clouds[1])], [user("Hm?", clouds[2])]]
    ours, theirs = prompts(processor, *conversations), prompts(again, *conversations)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(greedy(model, ours), greedy(loaded, theirs))
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied == (architecture == "qwen3")


def test_auto_classes(processor, tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, PointAlignConfig)
    assert config.text_config.model_type == "qwen3" and config.point_config.num_groups == 8
    assert config.qformer_config.encoder_hidden_size == 16 and config.num_query_tokens == 4
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert isinstance(whole, PointAlignForConditionalGeneration)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(extractor, PointAlignFeatureExtractor) and extractor.num_points == 256
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, PointAlignProcessor) and isinstance(again.feature_extractor, PointAlignFeatureExtractor)
    assert (again.num_query_tokens, again.point_prefix, again.chat_template) == (4, "<PC>", processor.chat_template)


def same_base(base: PointAlignModel, model: PointAlignForConditionalGeneration) -> bool:
    return all(torch.equal(one, base.state_dict()[name]) for name, one in model.model.state_dict().items())


def test_the_base_model_has_its_auto_class(tmp_path):
    model = tiny_model()
    assert isinstance(AutoModel.from_config(tiny_config()), PointAlignModel)
    model.model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(base, PointAlignModel) and same_base(base, model)
    ids = torch.tensor([[65, 66]])
    decoder = model.get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(base(input_ids=ids).last_hidden_state, decoder)


def test_the_base_model_loads_from_the_whole(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert same_base(AutoModel.from_pretrained(tmp_path), model)


# -- a point encoder from outside --------------------------------------------------------------------------------------


class MaxPoolConfig(PreTrainedConfig):
    model_type = "test_max_pool"
    hidden_size: int = 12
    num_tokens: int = 3


class MaxPoolEncoder(PreTrainedModel):
    config_class = MaxPoolConfig

    def __init__(self, config):
        super().__init__(config)
        self.lift = nn.Linear(6, config.hidden_size * config.num_tokens)
        self.post_init()

    def forward(self, points):
        return self.lift(points).amax(dim=1).unflatten(-1, (self.config.num_tokens, self.config.hidden_size))


def test_another_encoder_takes_its_place_by_configuration(processor, clouds, tmp_path):
    AutoConfig.register("test_max_pool", MaxPoolConfig, exist_ok=True)
    AutoModel.register(MaxPoolConfig, MaxPoolEncoder, exist_ok=True)
    sizes = tiny_config()
    config = PointAlignConfig(
        text_config=sizes.text_config,
        point_config=MaxPoolConfig(),
        qformer_config=sizes.qformer_config,
        num_query_tokens=4,
        projector_hidden_size=16,
    )
    torch.manual_seed(0)
    model = lively(PointAlignForConditionalGeneration(config).eval())
    batch = prompts(processor, [user("What?", clouds[0])])
    assert model(**batch).point_features.encoder.shape == (1, 3, 12)
    model.save_pretrained(tmp_path)
    loaded = PointAlignForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.model.point_encoder, MaxPoolEncoder)
    assert torch.equal(greedy(loaded, batch), greedy(model, batch))

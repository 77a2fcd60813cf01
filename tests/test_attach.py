"""`pointalign.attach` on every kind of multimodal model: the loss trains what it should, detaching leaves no trace."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from made_multimodal import MODELS, make
from safetensors.torch import load_file

import pointalign
from pointalign.alignment import AlignmentConfig
from pointalign.attached_targets import PROJECTOR_INPUTS, _find, pool_to_tokens
from pointalign.trainer import AlignedModel

TAPPED = 2


def run(model, batch, **more):
    """The outputs of a forward pass with the same dropout every time."""
    torch.manual_seed(0)
    return model(**batch, **more)


def traces(model) -> dict:
    """Everything that could be left behind: names of modules, hooks, an overridden forward, names in the state dict."""
    hooks = {
        f"{name}.{kind}": len(value)
        for name, module in model.named_modules()
        for kind, value in vars(module).items()
        if "hooks" in kind and isinstance(value, dict)
    }
    overridden = [name for name, module in model.named_modules() if "forward" in vars(module)]
    return {"hooks": hooks, "modules": list(dict(model.named_modules())), "forward": overridden} | {
        "state": list(model.state_dict()), "parameters": list(dict(model.named_parameters()))
    }  # fmt: skip


def layer_of(model, index):
    decoder = model.get_decoder()
    return (decoder.layers if hasattr(decoder, "layers") else decoder.get_decoder().layers)[index - 1]


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_what_lies_before_the_tap_and_leaves_no_trace(name, tmp_path):
    model, batch, _ = make(name)
    plain = run(model, batch).loss
    before, weights = traces(model), deepcopy(model.state_dict())  # a first pass leaves hooks of transformers
    model.save_pretrained(tmp_path / "before")

    handle = pointalign.attach(model, layers=TAPPED, weight=0.5)
    outputs = run(model, batch)
    alignment = outputs.alignment_loss
    assert torch.equal(outputs.loss, plain + 0.5 * alignment) and 0 < float(alignment.detach()) < 2
    assert handle.losses["token_loss"] == plain.detach() and handle.losses["loss"] == outputs.loss.detach()
    first = next(layer_of(model, 1).parameters())
    behind = [*layer_of(model, TAPPED + 1).parameters(), model.get_output_embeddings().weight]
    gradients = torch.autograd.grad(alignment, [first, *handle.parameters(), *behind], allow_unused=True)
    reached = len(gradients) - len(behind)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[:reached])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert gradients[reached:-1] == (None,) * (len(behind) - 1) and (tied or gradients[-1] is None)

    model.save_pretrained(tmp_path / "attached")
    exported = [load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "attached")]
    assert exported[0].keys() == exported[1].keys() and list(model.state_dict()) == before["state"]
    model.load_state_dict(weights)  # strict

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        run(model, batch).loss.backward()
        losses.append(float(handle.losses["alignment_loss"]))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05, losses

    model.load_state_dict(weights)
    handle.detach()
    handle.detach()
    assert traces(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(run(model, batch).loss, plain)
    assert not hasattr(run(model, batch), "alignment_loss")


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_flows_into_the_target(name):
    """The same gradients as with the target's numbers given from outside."""
    model, batch, _ = make(name)
    handle = pointalign.attach(model, layers=TAPPED, seed=3)
    rows = []
    note, handle.target.rows = handle.target.rows, lambda *given: rows.append(note(*given)) or rows[-1]
    parameters = [parameter for key, parameter in model.named_parameters() if "pointalign" not in key]
    expected = torch.autograd.grad(run(model, batch).alignment_loss, parameters, allow_unused=True)
    handle.detach()
    width = rows[0].shape[-1]
    given = pointalign.attach(model, layers=TAPPED, seed=3, target=lambda inputs, outputs: rows[0], target_size=width)
    gradients = torch.autograd.grad(run(model, batch).alignment_loss, parameters, allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs))
    given.detach()


@pytest.mark.parametrize("name", MODELS)
def test_every_row_of_the_target_is_of_its_token(name):
    """A change of the j-th row that is tapped changes what the language model reads at the j-th token alone."""
    model, batch, places = make(name)
    model.eval()
    module = _find(model, PROJECTOR_INPUTS)
    read = []
    layer_of(model, 1).register_forward_pre_hook(
        lambda _module, args, inputs: read.append((args or (inputs["hidden_states"],))[0]), with_kwargs=True
    )
    positions = places.nonzero().tolist()
    changed_row = -1

    def change(_module, inputs):
        rows = inputs[0].contiguous().clone()
        if changed_row >= 0:
            rows.view(-1, rows.shape[-1])[changed_row] += 1 + torch.arange(rows.shape[-1]) % 3
        return (rows, *inputs[1:])

    module.register_forward_pre_hook(change)
    with torch.no_grad():
        run(model, batch)
        for changed_row in (0, 1, len(positions) // 2, len(positions) - 1):
            run(model, batch)
            different = (read[0] != read[-1]).any(dim=-1)
            assert different.nonzero().tolist() == [positions[changed_row]]


def test_our_own_trainer_computes_the_same_loss():
    model, batch, _ = make("PointAlign")
    for part in model.model.point_branch:
        part.requires_grad_(False)  # it then has no dropout, in the target either
    model.model.query_tokens.requires_grad_(False)
    aligned = AlignedModel(model, AlignmentConfig(weight=0.3, layer=[TAPPED], seed=5)).train()
    expected = run(aligned, batch)
    handle = pointalign.attach(model, layers=TAPPED, weight=0.3, seed=5, impl="reference")
    outputs = run(model, batch)
    assert torch.equal(outputs.loss, expected["loss"])
    assert torch.equal(outputs.alignment_loss, expected["alignment_loss"])
    handle.detach()
    encoder = AlignedModel(model, AlignmentConfig(weight=0.3, layer=[1], target="encoder", seed=5)).train()
    expected = run(encoder, batch)
    pointalign.attach(model, layers=1, weight=0.3, seed=5, target="vision", impl="reference")
    assert torch.equal(run(model, batch).loss, expected["loss"])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "BLIP-2"])
def test_features_of_the_vision_tower(name):
    model, batch, _ = make(name)
    handle = pointalign.attach(model, target="vision")
    run(model, batch).loss.backward()
    assert 0 < float(handle.losses["alignment_loss"]) < 2


def test_evaluation_is_as_before():
    model, batch, _ = make("LLaVA")
    model.eval()
    expected = run(model, batch)
    handle = pointalign.attach(model)
    outputs = run(model, batch)
    assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
    assert type(outputs) is type(expected) and handle.losses == {}
    assert model.generate(**{key: batch[key] for key in ("input_ids", "pixel_values")}, max_new_tokens=2).shape[1] > 0


def test_tokens_and_layers():
    model, batch, _ = make("LLaVA")
    expected = None
    for tokens in (None, "<image>", 120, lambda inputs: inputs["input_ids"] == 120):
        handle = pointalign.attach(model, tokens=tokens, layers=[1, 3])
        loss = float(run(model, batch).alignment_loss.detach())
        expected = expected or loss
        assert loss == expected
        handle.detach()
    handle = pointalign.attach(model, layers="learned")
    assert handle.layer_weights() == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 1 / 3})
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
    for _ in range(3):
        run(model, batch).loss.backward()
        optimizer.step()
    shares = handle.layer_weights()
    assert sum(shares.values()) == pytest.approx(1) and max(shares.values()) > 0.34


def test_stored_features(tmp_path):
    model, batch, _ = make("LLaVA")
    stored = {name: np.random.default_rng(i).normal(size=(16, 7)).astype(np.float32) for i, name in enumerate("ab")}
    for name, rows in stored.items():
        np.save(tmp_path / f"{name}.npy", rows)
    given = torch.from_numpy(np.concatenate([stored["b"], stored["a"]]))
    handle = pointalign.attach(model, target=lambda inputs, outputs: given, target_size=7)
    expected = run(model, batch).loss
    handle.detach()
    handle = pointalign.attach(model, target=tmp_path)
    assert torch.equal(run(model, batch, feature_ids=["b", "a"]).loss, expected)
    with pytest.raises(FileNotFoundError, match="no features of 'c'"):
        run(model, batch, feature_ids=["a", "c"])
    with pytest.raises(ValueError, match="needs `feature_ids`"):
        run(model, batch)
    with pytest.raises(ValueError, match=r"shape \[16, 7\], expected \[32, 7\]"):
        run(model, batch, feature_ids=["a"])


def test_features_are_pooled_to_tokens_or_refused():
    grid = torch.arange(16.0).view(1, 16, 1)
    with_class = torch.cat([torch.full((1, 1, 1), 99.0), grid], dim=1)
    for features in (grid, with_class):
        assert pool_to_tokens([features], 16).flatten().tolist() == list(range(16))
        assert pool_to_tokens([features], 4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pool_to_tokens([grid[0]], 4).flatten().tolist() == [1.5, 5.5, 9.5, 13.5]  # in merge order
    for features, count in ((grid, 5), (grid[0], 5), (with_class, 8), (grid.expand(2, -1, -1), 3)):
        with pytest.raises(ValueError, match="do not correspond to"):
            pool_to_tokens([features], count)


def test_text_alone_and_missing_images():
    model, batch, _ = make("LLaVA")
    handle = pointalign.attach(model)
    text = {key: value for key, value in batch.items() if key != "pixel_values"}
    text["input_ids"] = text["input_ids"].clamp(max=100)
    outputs = model(**text)
    outputs.loss.backward()
    assert handle.losses["alignment_loss"] == 0 and outputs.loss == handle.losses["token_loss"]
    assert all(parameter.grad is not None for parameter in handle.parameters())  # as DDP wants it
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="the vision part of the model did not run"):
        model(**{"input_ids": batch["input_ids"], "labels": batch["labels"]})
    with pytest.raises(ValueError, match="expected input_ids"):
        model(inputs_embeds=embeddings, labels=batch["labels"])
    with pytest.warns(UserWarning, match="add it to yours"):
        outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
    assert outputs.alignment_loss.requires_grad


def test_what_does_not_fit_is_refused():
    model, batch, _ = make("BLIP-2")
    handle = pointalign.attach(model)
    with pytest.raises(ValueError, match="attached to this model already"):
        pointalign.attach(model)
    handle.detach()
    refusals = {
        "queries of a Q-Former": {"target": "vision"},
        "tokenizer.convert_tokens_to_ids": {"tokens": "<img>"},
        "no point_token_id": {"tokens": "<point>"},
        "expected a number, several numbers, or 'learned'": {"layers": "middle"},
        "has layers 1 to 4": {"layers": 9},
        "needs target_size": {"target": lambda inputs, outputs: None},
        "expected projector_input, vision, a folder": {"target": "nowhere"},
    }
    before = traces(model)
    for message, options in refusals.items():
        with pytest.raises(ValueError, match=message):
            pointalign.attach(model, **options)
        assert traces(model) == before, message
    model.requires_grad_(False)
    pointalign.attach(model)
    with pytest.raises(ValueError, match="nothing before it trains"):
        run(model, batch)
    compiled = make("LLaVA")[0]
    compiled.compile()
    with pytest.raises(ValueError, match=r"attach before torch\.compile"):
        pointalign.attach(compiled)
    with pytest.raises(ValueError, match="expected a multimodal model of transformers"):
        pointalign.attach(torch.nn.Linear(2, 2))


def test_an_encoder_that_reads_the_images_is_refused():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        qformer_config=sizes | {"encoder_hidden_size": 24},
        text_config=text,
        image_token_id=98,
    )
    with pytest.raises(ValueError, match="encoder-decoder language model"):
        pointalign.attach(Blip2ForConditionalGeneration(config))


def test_the_projectors_are_saved_and_resumed():
    model, batch, _ = make("SmolVLM")
    handle = pointalign.attach(model, seed=1)
    expected = run(model, batch).alignment_loss
    state = {name: value.clone() for name, value in handle.state_dict().items()}
    handle.detach()
    handle = pointalign.attach(model, seed=2)
    assert run(model, batch).alignment_loss != expected
    handle.load_state_dict(state)
    assert torch.equal(run(model, batch).alignment_loss, expected)


def test_a_copy_of_the_model_has_its_own_alignment():
    model, batch, _ = make("LLaVA")
    handle = pointalign.attach(model)
    copy = deepcopy(model)
    expected = run(model, batch).loss
    assert torch.equal(run(copy, batch).loss, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(run(copy, batch).loss, expected) and handle.losses["loss"] == expected


def test_the_probe_tells_layers_apart():
    model, batch, _ = make("LLaVA")
    handle = pointalign.attach(model, layers=[1, 3])
    report = handle.probe(**batch)
    assert model.training and all(module.training for module in model.modules())
    assert [entry["layer"] for entry in report] == [1, 2, 3, 4]
    assert ["cosine" in entry for entry in report] == [True, False, True, False]
    assert all(0 <= entry["cka"] <= 1 + 1e-9 for entry in report)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        run(model, batch).loss.backward()
        optimizer.step()
    again = handle.probe(**batch)
    assert again[0]["cosine"] > report[0]["cosine"] and again[0]["cka"] == pytest.approx(report[0]["cka"])

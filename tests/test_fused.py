"""The fused parts equal the plain modules, each alone and all together."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model, tiny_text_config
from torch import nn
from torch.nn import functional

from pointalign import build
from pointalign.efficient import fused_lora, fused_parts
from pointalign.model_options import ModelOptions
from pointalign.models import PointAlignForConditionalGeneration, PointAlignPhiConfig, PointAlignPhiForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from random_language_model import random_language_model


def adapted(architecture, dropout=0.0, rank=4, model=None, targets="all-linear"):
    """A tiny model with adapters whose two halves are both random: peft's own start has gradients in one half only."""
    model = model or tiny_model(architecture)
    options = ModelOptions(lora_rank=rank, lora_alpha=8, lora_dropout=dropout, lora_targets=targets)
    build.add_adapters(model, options)
    build.set_trainable(model, ["lora"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return model.train()


def published_phi():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PointAlignPhiConfig(**sizes, vocab_size=259, bos_token_id=None, eos_token_id=256)
    torch.manual_seed(0)
    return PointAlignForConditionalGeneration.from_language_model(PointAlignPhiForCausalLM(config), "mini")


def step(model, dtype=None, **inputs):
    """Loss, gradients of the adapters, and of the embeddings: what every layer hands down."""
    ids = torch.randint(0, 250, (2, 30), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :10] = -100
    model.zero_grad()
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(inputs_embeds=embeds, labels=labels, use_cache=False, **inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients | {"embeddings": embeds.grad.clone()}


def assert_equal(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0].item(), rel=tolerance)
    assert found[1].keys() == expected[1].keys() and len(expected[1]) > 1
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * 10 * gradient.norm() + 1e-9, name


USED = {
    "phi": {
        "lora": 24,
        "merged": 4,
        "gelu": 4,
        "swiglu": 0,
        "norms": 5,
        "cross_entropy": 1,
    },
    "llama": {
        "lora": 28,
        "merged": 8,
        "gelu": 0,
        "swiglu": 4,
        "norms": 9,
        "cross_entropy": 1,
    },
    "qwen3": {
        "lora": 28,
        "merged": 8,
        "gelu": 0,
        "swiglu": 4,
        "norms": 17,
        "cross_entropy": 1,
    },
}


@pytest.mark.parametrize("architecture", ["phi", "llama", "qwen3"])
def test_all_parts_equal_the_plain_modules(architecture):
    model = adapted(architecture)
    names = [name for name, _ in model.named_parameters()]
    expected = step(model)
    with fused_parts.applied(model) as used:
        found = step(model)
    assert used == USED[architecture] | {"rotary": int(fused_parts.liger_rotary() is not None)}
    assert_equal(found, expected, 1e-5)
    assert_equal(step(model), expected, 1e-7)  # all undone
    assert names == [name for name, _ in model.named_parameters()]
    storages = [p.untyped_storage().data_ptr() for p in model.model.language_model.get_decoder().parameters()]
    assert len(storages) == len(set(storages))


@pytest.mark.parametrize("part", fused_parts.PARTS)
def test_each_part_alone(part):
    for architecture in ("phi", "llama"):
        model = adapted(architecture)
        expected = step(model)
        with fused_parts.applied(model, ["lora", part] if part == "merged" else [part]):
            assert_equal(step(model), expected, 1e-5)


def test_adapters_on_some_layers_merge_too():
    model = adapted("phi", targets=["q_proj", "k_proj", "v_proj", "dense"])
    expected = step(model)
    with fused_parts.applied(model) as used:
        assert (used["lora"], used["merged"]) == (16, 4)  # q, k, v of every block; dense by itself
        assert_equal(step(model), expected, 1e-5)


@pytest.mark.parametrize("architecture", ["phi", "llama"])
def test_mixed_precision_is_as_exact_as_the_plain_way(architecture):
    exact = step(adapted(architecture).double())
    model = adapted(architecture)
    model.model.language_model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    plain = step(model, torch.bfloat16)
    with fused_parts.applied(model):
        lean = step(model, torch.bfloat16)

    def errors(found):
        return {
            name: ((found[1][name].double() - truth).norm() / truth.norm()).item() for name, truth in exact[1].items()
        }

    theirs, ours = errors(plain), errors(lean)
    assert max(ours.values()) < 0.2
    assert sum(ours.values()) <= 1.2 * sum(theirs.values())


def test_the_published_phi():
    model = adapted("phi", model=published_phi())
    expected = step(model)
    with fused_parts.applied(model) as used:
        assert (used["lora"], used["merged"]) == (8, 2)  # query_key_value and fc1 of both blocks read one input
        assert_equal(step(model), expected, 1e-5)


def test_checkpointing_under_the_fused_parts():
    model = adapted("phi")
    expected = step(model)
    with fused_parts.applied(model):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert_equal(step(model), expected, 1e-5)


def test_4_bits_under_the_fused_parts():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = tiny_text_config("llama")
    config.hidden_size, config.intermediate_size = 64, 128
    text = random_language_model(config, "nf4", torch.float32, torch.device("cpu"))
    model = adapted("llama", model=PointAlignForConditionalGeneration.from_language_model(text, "mini"))
    expected = step(model)
    with fused_parts.applied(model) as used:
        assert used["lora"] == 28 and used["merged"] == 8
        assert_equal(step(model), expected, 1e-5)


def test_copies_of_the_adapters_follow_whatever_changes_them():
    """8-bit optimizers and loaded states write to the memory of a parameter without telling autograd."""
    model = adapted("llama")
    with fused_parts.applied(model):
        before, _ = step(model, torch.bfloat16)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.mul_(-1.5)
        with_copies = step(model, torch.bfloat16)
    assert with_copies[0] != before
    with fused_parts.applied(model):  # new groups, which hold no copies yet
        assert_equal(step(model, torch.bfloat16), with_copies, 0)


def test_dropout_drops_for_every_adapter_by_itself():
    """Against the same masks, drawn again from the same seed."""
    torch.manual_seed(0)
    model = adapted("phi", dropout=0.5)
    block = model.model.language_model.get_decoder().layers[0]
    names = [f"self_attn.{one}_proj" for one in "qkv"]
    layers = [block.get_submodule(name) for name in names] + [block.mlp.fc1]
    x = torch.randn(1, 9, 32, requires_grad=True)
    torch.manual_seed(3)
    masks = [torch.native_dropout(x.detach()[0], 0.5, True)[1] for _ in layers]
    assert not torch.equal(masks[0], masks[1])
    expected = [
        layer.base_layer(x)
        + functional.linear(
            functional.linear(x * mask * 2, layer.lora_A["default"].weight), layer.lora_B["default"].weight
        )
        * layer.scaling["default"]
        for layer, mask in zip(layers, masks, strict=True)
    ]
    wanted = [*(layer.lora_A["default"].weight for layer in layers), x]
    truth = torch.autograd.grad(sum(one.square().sum() for one in expected), wanted)
    with fused_parts.applied(model):
        torch.manual_seed(3)
        found = [layer(x) for layer in layers]
        gradients = torch.autograd.grad(sum(one.square().sum() for one in found), wanted)
        model.eval()
        calm = layers[0](x)
    for one, other in zip([*found, *gradients], [*expected, *truth], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calm, layers[0].eval()(x))


def test_products_by_finite_differences():
    model = adapted("llama").double()
    block = model.model.language_model.get_decoder().layers[0]
    group = fused_lora.AdapterGroup([block.mlp.gate_proj, block.mlp.up_proj])
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    adapters = [layer.lora_A["default"].weight for layer in group.modules]
    adapters += [layer.lora_B["default"].weight for layer in group.modules]
    assert torch.autograd.gradcheck(
        lambda x, *given: fused_lora.LoraProducts.apply(x, group, torch.float64, 0.0, *given),
        (x, *adapters),
        atol=1e-6,
        fast_mode=True,
    )
    group.unstack()
    assert torch.autograd.gradcheck(fused_parts.SiluProduct.apply, (x, x.detach().clone().requires_grad_()))


@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_in_pieces(monkeypatch, bias):
    monkeypatch.setattr(fused_parts, "ROWS_AT_ONCE", 7)
    torch.manual_seed(0)
    head = nn.Linear(16, 101, bias=bias).requires_grad_(False)
    rows = torch.randn(23, 16, requires_grad=True)
    targets = torch.randint(0, 101, (23,))
    expected = functional.cross_entropy(head(rows), targets, reduction="sum")
    found = fused_parts.head_cross_entropy(head, rows, targets)
    torch.testing.assert_close(found, expected)
    truth, gradient = (torch.autograd.grad(one * 0.3, rows)[0] for one in (expected, found))
    torch.testing.assert_close(gradient, truth)


def test_fewer_bytes_are_kept():
    """What the parts are for, counted: bf16, adapters in fp32 with dropout, as the recipes have it."""
    from pointalign.efficient.memory import saved_bytes

    model = adapted("phi", dropout=0.05)
    model.model.language_model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    ids = torch.randint(0, 250, (2, 60))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    plain = saved_bytes(run)
    with fused_parts.applied(model):
        lean = saved_bytes(run)
    assert lean < 0.6 * plain


def test_refusals():
    model = adapted("llama")
    with pytest.raises(ValueError, match="unknown part 'rope'"), fused_parts.applied(model, ["rope"]):
        pass
    with pytest.raises(ValueError, match="merged needs lora"), fused_parts.applied(model, ["merged"]):
        pass
    with pytest.raises(ValueError, match=r"'residual', expected some of lora, merged, gelu"):
        with fused_parts.applied(model, ["lora", "residual"]):
            pass


def test_layers_that_train_are_left_alone():
    model = adapted("llama")
    block = model.model.language_model.get_decoder().layers[0]
    block.mlp.up_proj.base_layer.weight.requires_grad_(True)
    expected = step(model)
    with fused_parts.applied(model) as used:
        assert used["lora"] == 27 and used["merged"] == 7
        assert_equal(step(model), expected, 1e-5)


def test_trained_norms_that_are_frozen_keep_every_bit():
    """The published Phi's norms train in fp32: bf16 would round away what a stage taught them."""
    model = published_phi()
    text = model.model.language_model
    for name, parameter in text.named_parameters():
        parameter.data = parameter.data.float() if "layernorm" in name else parameter.data.bfloat16()
        if "layernorm.weight" in name:
            parameter.data += 1e-3  # 1.001 is 1 in bf16
    model = adapted("phi", model=model)
    expected = step(model, torch.bfloat16)
    with fused_parts.applied(model, ["norms"]) as used:
        assert used["norms"] == 0
        assert_equal(step(model, torch.bfloat16), expected, 1e-7)

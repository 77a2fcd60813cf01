"""LoRA layers whose dropout masks come from a counter, by the reference; in the interpreter, by the kernels."""

import os

import pytest
import torch
from made_interpreter import run_in_the_interpreter
from test_fused import adapted, assert_equal, step
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pointalign import run_checkpoints
from pointalign.efficient import fused_lora, fused_parts
from pointalign.efficient.memory import saved_bytes
from pointalign_kernels import lora_dropout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def counter(monkeypatch):
    """As on a GPU, where the kernels run; here the ops take the reference, unless in the interpreter."""
    monkeypatch.setattr(fused_lora.AdapterGroup, "draws_from_counter", lambda group, rows: True)


@pytest.fixture
def seeds(monkeypatch):
    """The seeds that are drawn, in order."""
    drawn, draw = [], lora_dropout.draw_seed
    monkeypatch.setattr(lora_dropout, "draw_seed", lambda device: drawn.append(draw(device)) or drawn[-1])
    return drawn


def merged_group(dropout=0.5):
    """Phi's q, k, v and fc1, which read the same tensor."""
    torch.manual_seed(0)
    block = adapted("phi", dropout=dropout).model.language_model.get_decoder().layers[0]
    names = [f"self_attn.{name}_proj" for name in "qkv"]
    return fused_lora.AdapterGroup([*(block.get_submodule(name) for name in names), block.mlp.fc1])


def test_outputs_and_gradients_have_the_masks_of_the_seed(seeds):
    group = merged_group()
    x = torch.randn(2, 9, 32, requires_grad=True)
    leaves = [*group.adapters(), x]
    outputs = group.run(x)
    gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), leaves)
    (seed,) = seeds
    expected = []
    for adapter, layer in enumerate(group.modules):
        dropped = x * lora_dropout.dropout_mask(seed, 18, 32, adapter, 0.5).view(2, 9, 32) * 2
        low = functional.linear(dropped, layer.lora_A["default"].weight)
        expected.append(layer.base_layer(x) + functional.linear(low, layer.lora_B["default"].weight) * 2)
    truth = torch.autograd.grad(sum(output.square().sum() for output in expected), leaves)
    for result, wanted in zip([*outputs, *gradients], [*expected, *truth], strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_by_finite_differences():
    model = adapted("llama", dropout=0.3).double()
    block = model.model.language_model.get_decoder().layers[0]
    group = fused_lora.AdapterGroup([block.mlp.gate_proj, block.mlp.up_proj])
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)

    def outputs(x, *adapters):
        torch.manual_seed(4)  # the same masks at every difference
        return fused_lora.LoraProducts.apply(x, group, torch.float64, 0.3, *adapters)

    assert torch.autograd.gradcheck(outputs, (x, *group.adapters()), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_draws_the_same_masks_again(seeds, reentrant):
    group = merged_group()
    x = torch.randn(9, 32, requires_grad=True)
    leaves = [*group.adapters(), x]

    def gradients(run):
        torch.manual_seed(7)
        for leaf in leaves:
            leaf.grad = None
        sum(output.square().sum() for output in run(x)).backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(group.run)
    again = gradients(lambda x: checkpoint(group.run, x, use_reentrant=reentrant))
    for result, wanted in zip(again, plain, strict=True):
        assert torch.equal(result, wanted)
    assert len(seeds) == 3 and len({int(seed) for seed in seeds}) == 1


def test_checkpointing_of_the_model_changes_nothing():
    model = adapted("phi", dropout=0.2)
    with fused_parts.applied(model):
        torch.manual_seed(1)
        expected = step(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        assert_equal(step(model), expected, 1e-6)


def test_every_layer_and_step_draws_anew_and_a_resumed_run_draws_the_same(seeds):
    model = adapted("phi", dropout=0.2)
    with fused_parts.applied(model):
        step(model)
        states = run_checkpoints.torch_random()  # what a checkpoint holds
        expected = step(model)
        run_checkpoints.set_torch_random(states)
        resumed = step(model)
    assert resumed[0] == expected[0] and all(torch.equal(resumed[1][name], expected[1][name]) for name in expected[1])
    layers = model.model.language_model.config.num_hidden_layers
    drawn = [int(seed) for seed in seeds]
    assert len(drawn) == 3 * 3 * layers  # q, k, v and fc1 share a seed; dense; fc2
    first, second, third = drawn[: 3 * layers], drawn[3 * layers : 6 * layers], drawn[6 * layers :]
    assert second == third and len({*first, *second}) == 6 * layers


@pytest.mark.parametrize("dropout, training", [(0.0, True), (0.5, False)])
def test_without_dropout_nothing_is_drawn(seeds, dropout, training):
    model = adapted("llama", dropout=dropout).train(training)
    expected = step(model)
    before = torch.get_rng_state()
    with fused_parts.applied(model):
        assert_equal(step(model), expected, 1e-5)
    assert not seeds and torch.equal(torch.get_rng_state(), before)


def test_everything_dropped():
    """A share of 1, which has no factor 1 / (1 - p): what peft's dropout gives."""
    group = merged_group(dropout=1.0)
    x = torch.randn(9, 32, requires_grad=True)
    outputs = group.run(x)
    for output, base in zip(outputs, group.bases, strict=True):
        torch.testing.assert_close(output, base(x))
    assert all((grad == 0).all() for grad in torch.autograd.grad(outputs[0].sum(), group.adapters()))


def test_no_mask_is_stored(monkeypatch):
    """Beside what a layer without dropout saves, 8 bytes; a stored mask is a byte per element and adapter."""
    x = torch.randn(50, 32, requires_grad=True)

    def bytes_of(dropout):
        group = merged_group(dropout)
        return saved_bytes(lambda: sum(output.sum() for output in group.run(x)))

    assert bytes_of(0.5) - bytes_of(0.0) == 8
    monkeypatch.setattr(fused_lora.AdapterGroup, "draws_from_counter", lambda group, rows: False)
    assert bytes_of(0.5) - bytes_of(0.0) == 4 * x.numel()


def test_expected_output_is_that_without_dropout():
    """The mean over many draws, in standard errors."""
    x = torch.randn(3, 32)
    with torch.no_grad():
        group = merged_group(dropout=0.3)
        draws = torch.stack([torch.cat(group.run(x), dim=1) for _ in range(100)])
        truth = torch.cat(merged_group(dropout=0.0).run(x), dim=1)
    errors = (draws.mean(0) - truth) / (draws.std(0) / 10)
    assert errors.abs().max() < 5 and 0.8 < errors.std() < 1.2


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="this process runs the kernels itself")
def test_kernels_in_the_interpreter():
    chosen = "masks_of_the_seed or same_masks_again or no_mask or everything"
    assert "5 passed" in run_in_the_interpreter(__file__, "-k", chosen)

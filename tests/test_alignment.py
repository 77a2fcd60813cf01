"""Projector, tap, layers, targets and where the gradients of the alignment term go."""

import pytest
import torch
from conftest import assistant, lively, tiny_model, user, without_dropout
from torch import nn
from torch.utils.checkpoint import checkpoint

from pointalign.alignment import Alignment, AlignmentConfig, AlignmentProjector, LayerTap, pool_tokens
from pointalign.trainer import AlignedModel


@pytest.fixture
def batch(processor, clouds):
    talks = [
        [user("What?", clouds[0]), assistant("A bench.")],
        [user("Which of them?", clouds[1], clouds[2]), assistant("Both.")],
    ]
    return dict(processor.apply_chat_template(talks, tokenize=True, return_labels=True))


def with_lora(model):
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    inject_adapter_in_model(config, model.model.language_model)
    return model


# -- options -----------------------------------------------------------------------------------------------------------


def test_the_default_layer_is_15_of_32():
    assert AlignmentConfig().layers(32) == [15]
    assert AlignmentConfig().layers(30) == [14]
    assert AlignmentConfig().layers(1) == [1]
    assert AlignmentConfig(layer=[3, 7]).layers(8) == [3, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1}, "alignment.weight=-1"),
        ({"target": "clip"}, "alignment.target='clip'.*qformer, encoder, llm:<layer>"),
        ({"target": "llm:"}, "alignment.target='llm:'"),
        ({"target": "llm:x"}, "alignment.target='llm:x'"),
        ({"layer_weights": "fixed"}, "uniform or learned"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**options)


@pytest.mark.parametrize("options", [{"layer": [0]}, {"layer": [9]}, {"target": "llm:9"}, {"target": "llm:0"}])
def test_layers_that_the_model_lacks_are_refused(options):
    with pytest.raises(ValueError, match="has layers 1 to 8"):
        AlignmentConfig(**options).layers(8)


# -- projector ---------------------------------------------------------------------------------------------------------


def test_the_projector_has_the_papers_size_and_published_names():
    with torch.device("meta"):
        projector = AlignmentProjector(2560, 768)
    assert sum(one.numel() for one in projector.parameters()) == 8_310_784
    assert list(projector.state_dict()) == [f"projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]


def test_the_projector_draws_from_its_own_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = Alignment(AlignmentConfig(seed=1), [2], 32, 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second, other = (Alignment(AlignmentConfig(seed=seed), [2], 32, 16) for seed in (1, 2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
        assert tensor.abs().max() <= tensor.new_tensor([24, 32]).min() ** -0.5 + 1e-6


def test_the_loss_is_one_minus_the_mean_cosine():
    torch.manual_seed(0)
    alignment = Alignment(AlignmentConfig(), [2], 12, 6)
    hidden, target = torch.randn(5, 12, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    one, two, three = (alignment.alignment_projector[0].projector[i] for i in (0, 2, 4))
    x = hidden @ one.weight.T + one.bias
    x = x * x.sigmoid() @ two.weight.T + two.bias
    x = x * x.sigmoid() @ three.weight.T + three.bias
    cosine = (x * target).sum(dim=1) / (x.norm(dim=1) * target.norm(dim=1))
    loss = alignment({2: hidden}, target)
    torch.testing.assert_close(loss, 1 - cosine.mean())
    torch.testing.assert_close(alignment.alignment_projector[0](hidden), x)
    loss.backward()
    assert hidden.grad.abs().sum() > 0 and target.grad is None


def test_several_layers_are_weighted_uniformly_or_by_learned_weights():
    torch.manual_seed(0)
    hidden, target = {k: torch.randn(5, 12) for k in (2, 4, 7)}, torch.randn(5, 6)
    uniform = Alignment(AlignmentConfig(), [2, 4, 7], 12, 6)
    losses = [p.loss(hidden[k], target) for k, p in zip((2, 4, 7), uniform.alignment_projector, strict=True)]
    torch.testing.assert_close(uniform(hidden, target), sum(losses) / 3)
    learned = Alignment(AlignmentConfig(layer_weights="learned"), [2, 4, 7], 12, 6)
    torch.testing.assert_close(learned(hidden, target), sum(losses) / 3)
    with torch.no_grad():
        learned.layer_logits.copy_(torch.tensor([0.0, 1.0, 3.0]))
    weights = torch.tensor([0.0, 1.0, 3.0]).softmax(dim=0)
    loss = learned(hidden, target)
    torch.testing.assert_close(loss, (weights * torch.stack(losses)).sum())
    loss.backward()
    assert learned.layer_logits.grad.abs().sum() > 0


def test_encoder_tokens_are_pooled_in_order_without_cls():
    tokens = torch.arange(2 * 9 * 3, dtype=torch.float32).view(2, 9, 3)
    expected = tokens[:, 1:].view(2, 4, 2, 3).mean(dim=2)
    torch.testing.assert_close(pool_tokens(tokens, 4), expected)
    assert pool_tokens(tokens, 5).shape == (2, 5, 3)


# -- tap ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["phi", "llama", "qwen3"])
def test_the_tap_equals_hidden_states_and_leaves_no_hook(architecture, batch):
    model = lively(tiny_model(architecture))
    layers = model.get_decoder().layers
    tap = LayerTap(layers, [3, 1, 2])
    with tap.capture(batch["point_mask"]) as kept:
        model(**batch)
    assert not any(layer._forward_hooks for layer in layers)
    hidden_states = model(**batch, output_hidden_states=True).hidden_states
    assert sorted(kept) == [1, 2, 3]
    for k in kept:
        assert torch.equal(kept[k], hidden_states[k][batch["point_mask"]])


def test_a_tap_that_sees_nothing_stops_the_run(batch):
    tap = LayerTap(tiny_model().get_decoder().layers, [2])
    with pytest.raises(RuntimeError, match=r"layers \[2\].*did not run"), tap.capture(batch["point_mask"]):
        pass
    with pytest.raises(ZeroDivisionError), tap.capture(batch["point_mask"]):
        _ = 1 / 0
    assert not any(layer._forward_hooks for layer in tap.layers)


def checkpointed_run(batch, layer, use_reentrant, frozen_inputs):
    """Losses of two optimizer steps, gradients of the first; `use_reentrant` None: without checkpointing."""
    model = with_lora(without_dropout(lively(tiny_model())))
    if frozen_inputs:  # then nothing that enters the first decoder layer needs a gradient
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    aligned = AlignedModel(model, AlignmentConfig(layer=layer, weight=1.0)).train()
    if use_reentrant is not None:
        aligned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        assert model.is_gradient_checkpointing
    optimizer = torch.optim.SGD([one for one in aligned.parameters() if one.requires_grad], lr=1e-3)
    losses, gradients = [], {}
    for _ in range(2):
        out = aligned(**batch)
        out["loss"].backward()
        losses += [out[name].item() for name in ("loss", "ntp_loss", "alignment_loss")]
        if not gradients:
            gradients = {name: one.grad.clone() for name, one in aligned.named_parameters() if one.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


@pytest.mark.parametrize(
    ("layer", "frozen_inputs"), [([1, 3], False), ([2], True)], ids=["projector trains", "lora alone trains"]
)
def test_training_with_activation_checkpointing_equals_training_without(layer, frozen_inputs, batch):
    plain_losses, plain = checkpointed_run(batch, layer, None, frozen_inputs)
    assert len(plain) > 20 and len(set(plain_losses)) == 6
    for use_reentrant in (False, True):
        losses, gradients = checkpointed_run(batch, layer, use_reentrant, frozen_inputs)
        assert losses[:3] == plain_losses[:3]
        assert losses == pytest.approx(plain_losses, rel=2e-6)  # gradients are summed in another order
        assert gradients.keys() == plain.keys()
        for name, expected in plain.items():
            assert (gradients[name] - expected).norm() <= 5e-6 * expected.norm() + 2e-6, name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_backward_pass_inside_the_block_does_not_replace_the_rows(use_reentrant):
    """The hook runs inside the checkpointed region, as with transformers up to 5.17, and again in the backward pass."""
    layer = nn.Linear(4, 4)
    x, mask = torch.randn(2, 3, 4, requires_grad=True), torch.tensor([[True, False, True], [False, True, False]])
    with LayerTap([layer], [1]).capture(mask) as rows:
        output = checkpoint(layer, x, use_reentrant=use_reentrant)
        output.sum().backward()
    assert rows[1].grad_fn is not None and torch.equal(rows[1], output[mask])


def test_a_tap_inside_a_compiled_layer():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(2)])
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, True, False]])
    expected = layers[0](x)[mask]

    def run(x):
        return layers[1](layers[0](x)).sum()

    compiled = torch.compile(run, backend="eager")
    for _ in range(2):  # the second pass runs what the first one compiled
        with LayerTap(layers, [1]).capture(mask) as rows:
            compiled(x)
        assert torch.equal(rows[1], expected)
        torch.autograd.grad(rows[1].sum(), layers[0][0].weight)


def test_a_tap_on_a_mask_of_another_shape_is_an_error(batch):
    tap = LayerTap(nn.ModuleList([nn.Linear(4, 4)]), [1])
    with pytest.raises(ValueError, match=r"shape \[2, 3, 4\].*shape \[3, 2\]"):
        with tap.capture(torch.ones(3, 2, dtype=torch.bool)):
            tap.layers[0](torch.randn(2, 3, 4))


# -- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["qformer", "encoder", "llm:4"])
def test_the_alignment_term_reaches_lora_up_to_its_layer_and_nothing_of_the_point_branch(target, batch):
    model = with_lora(without_dropout(lively(tiny_model())))
    model.requires_grad_(False)
    for name, one in model.named_parameters():
        one.requires_grad_(".lora_" in name)
    aligned = AlignedModel(model, AlignmentConfig(layer=[2], target=target, weight=1.0)).train()
    out = aligned(**batch)
    alignment_only = out["loss"] - model(**batch).loss  # the next-token terms cancel, their gradients too
    assert alignment_only.item() == pytest.approx(out["alignment_loss"].item(), abs=1e-5)
    alignment_only.backward()
    largest: dict[int, float] = {}
    for name, one in model.named_parameters():
        if ".lora_" in name and one.grad is not None:
            index = int(name.partition(".layers.")[2].partition(".")[0])
            largest[index] = max(largest.get(index, 0.0), one.grad.abs().max().item())
        elif ".lora_" not in name:
            assert one.grad is None, name
    assert min(largest[0], largest[1]) > 1e-4
    assert max(largest.get(2, 0.0), largest.get(3, 0.0)) < 1e-7
    assert all(one.grad.abs().sum() > 0 for one in aligned.alignment.parameters())


@pytest.mark.parametrize("target", ["qformer", "encoder"])
def test_the_target_is_detached_even_where_the_point_branch_trains(target, batch):
    """Through the words of the language model gradients may reach a branch that trains, through the target never."""
    model = without_dropout(lively(tiny_model()))
    aligned = AlignedModel(model, AlignmentConfig(layer=[2], target=target))
    features = model.encode_point_clouds(batch["point_values"], batch["point_lengths"])
    assert features.qformer.requires_grad and features.encoder.requires_grad
    rows = aligned.target(features, {})
    assert not rows.requires_grad
    assert rows.shape == (3 * 4, 16)


def test_weight_zero_has_neither_tap_nor_projector(batch):
    model = lively(tiny_model())
    aligned = AlignedModel(model, AlignmentConfig(weight=0.0))
    assert aligned.alignment is None
    assert {name.removeprefix("model.") for name in aligned.state_dict()} == set(model.state_dict())
    out = aligned(**batch)
    assert out["loss"] == out["ntp_loss"] == model(**batch).loss and out["alignment_loss"] == 0


def test_any_list_of_layers_will_do():
    """Nothing of this package around it: two linear layers, and a tuple as the output of one."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x), None

    layers = nn.ModuleList([Pair(), Pair()])
    mask = torch.tensor([[True, False, True], [False, False, False]])
    x = torch.randn(2, 3, 4)
    with LayerTap(layers, [1]).capture(mask) as kept:
        expected = layers[0](x)[0]
        layers[1](expected)
    assert torch.equal(kept[1], expected[mask])

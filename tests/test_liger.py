"""liger-kernel under --fused: it takes over on CUDA only, with labels, normalisation and biases as they are."""

import sys

import pytest
import torch
from test_fused import adapted, assert_equal, step
from torch import nn
from torch.nn import functional
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi

from pointalign.efficient import fused_parts


class OnCuda(torch.Tensor):
    """A CPU tensor that says it lies on a GPU, to see what is chosen there."""

    is_cuda = True


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel by its signatures (0.8.5), computing in PyTorch; returns the calls it saw."""
    import types

    calls = []

    def stand_in(name, function, forward):
        def apply(*arguments):
            calls.append((name, *arguments))
            return forward(*arguments)

        module = types.ModuleType(f"liger_kernel.ops.{name}")
        setattr(module, function, types.SimpleNamespace(apply=apply))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    stand_in(
        "rms_norm",
        "LigerRMSNormFunction",
        lambda x, weight, epsilon, *_: functional.rms_norm(x, weight.shape, weight, epsilon),
    )
    stand_in("rope", "LigerRopeFunction", modeling_phi.apply_rotary_pos_emb)

    def cross_entropy(rows, weight, targets, bias, *options):
        assert len(options) == 14 and options[4] == "sum"
        loss = functional.cross_entropy(functional.linear(rows, weight, bias), targets, reduction="sum")
        return loss, None, None, None

    stand_in("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", cross_entropy)
    return calls


def test_liger_takes_over_on_cuda_only(liger, monkeypatch):
    model = adapted("llama")
    norm = model.model.language_model.get_decoder().norm
    plain = modeling_llama.apply_rotary_pos_emb
    expected = step(model)
    with fused_parts.applied(model) as used:
        assert used["rotary"] == 1
        assert_equal(step(model), expected, 1e-5)  # on a CPU, by PyTorch
        assert not liger
        norm(torch.randn(1, 2, 32).as_subclass(OnCuda))
        q, k = (torch.randn(1, heads, 5, 8).as_subclass(OnCuda) for heads in (4, 2))
        cos = torch.randn(1, 5, 8)
        found = modeling_llama.apply_rotary_pos_emb(q, k, cos, cos)
        for one, other in zip(found, plain(q, k, cos, cos), strict=True):
            assert torch.equal(one, other)
        for refused in ({"cos": cos.double()}, {"unsqueeze_dim": 1}):
            modeling_llama.apply_rotary_pos_emb(q, k, **({"cos": cos, "sin": cos} | refused))
        fused_parts.head_cross_entropy(
            model.get_output_embeddings(), torch.randn(3, 32).as_subclass(OnCuda), torch.tensor([1, 2, 3])
        )
    assert [call[0] for call in liger] == ["rms_norm", "rope", "fused_linear_cross_entropy"]
    assert liger[0][3:] == (norm.variance_epsilon, 0.0, "llama", False)
    assert modeling_llama.apply_rotary_pos_emb is plain
    for name in ("rms_norm", "rope", "fused_linear_cross_entropy"):
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", None)
    assert fused_parts.liger_rms_norm() is fused_parts.liger_rotary() is fused_parts.liger_cross_entropy() is None
    with fused_parts.applied(model) as used:
        assert used["rotary"] == 0
        assert modeling_llama.apply_rotary_pos_emb is plain


@pytest.mark.parametrize("bias", [True, False])
def test_liger_cross_entropy_keeps_labels_normalisation_and_bias(liger, monkeypatch, bias):
    """Through the model: ignored labels, the token count of the global batch, Phi's head with its bias, in pieces."""
    model = adapted("phi")
    head = model.get_output_embeddings()
    head.bias = nn.Parameter(torch.randn(259), requires_grad=False) if bias else None
    monkeypatch.setattr(fused_parts, "ROWS_AT_ONCE", 7)
    for tokens in ({}, {"num_items_in_batch": torch.tensor(77)}):
        expected = step(model, **tokens)
        with fused_parts.applied(model, ["cross_entropy"]), monkeypatch.context() as patch:
            patch.setattr(model, "supervised_cross_entropy", on_cuda(model.supervised_cross_entropy))
            assert_equal(step(model, **tokens), expected, 1e-5)
    assert {call[0] for call in liger} == {"fused_linear_cross_entropy"}
    assert [len(call[1]) for call in liger[:6]] == [7, 7, 7, 7, 7, 5]  # 40 labels of 60: the rest never reach it
    assert all((call[3] != -100).all() and (call[4] is not None) == bias for call in liger)
    assert liger[0][-1] * 32 >= 259  # a piece is not split again
    empty = torch.randn(0, 32, requires_grad=True).as_subclass(OnCuda)
    assert fused_parts.head_cross_entropy(head, empty, torch.zeros(0, dtype=torch.long)) == 0


def on_cuda(function):
    return lambda rows, targets: function(rows.as_subclass(OnCuda), targets).as_subclass(torch.Tensor)

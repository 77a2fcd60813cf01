"""What only a GPU can show: FlashAttention over packed samples, liger-kernel's norm, 4 bits, the memory cap."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from conftest import tiny_text_config
from test_fused import adapted, random_language_model
from test_packing import collate, conversations  # noqa: F401

from pointalign.alignment import AlignmentConfig
from pointalign.data.collator import pack
from pointalign.efficient import fused_parts, memory, quantization
from pointalign.models import PointAlignForConditionalGeneration
from pointalign.trainer import AlignedModel


def on_cuda(architecture, kind="none", exact=False):
    """A tiny aligned model in bf16; `exact`, the same weights in fp32."""
    config = tiny_text_config(architecture)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    text = random_language_model(config, kind, torch.bfloat16, torch.device("cuda"))
    if exact:
        quantization.dequantize(text)
        text.float()
    torch.manual_seed(0)
    model = PointAlignForConditionalGeneration.from_language_model(text, "mini", num_query_tokens=4)
    adapted(architecture, model=model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return AlignedModel(model, AlignmentConfig(weight=0.5, layer=[2])).cuda().train()


def run(aligned, batches, tokens, rows):
    aligned.zero_grad()
    total = 0.0
    for batch in batches:
        batch = {name: one.cuda() if isinstance(one, torch.Tensor) else one for name, one in batch.items()}
        loss = aligned(**batch, num_items_in_batch=tokens, num_point_rows=rows)["loss"]
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.float() for name, p in aligned.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ["phi", "llama", "qwen3"])
def test_packed_varlen_and_fused_equal_one_by_one(processor, conversations, architecture, kind):  # noqa: F811
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    batch = {k: v.repeat(1, 40, 1) if k == "point_values" else v for k, v in collate(processor, conversations).items()}
    batch["point_lengths"] = batch["point_lengths"] * 40
    tokens, rows = (batch["labels"] != -100).sum().cuda(), batch["point_mask"].sum().cuda()
    loss, truth = run(on_cuda(architecture, kind, exact=True), [batch], tokens, rows)

    def error(gradients):
        errors = [(gradients[name] - one).norm() / one.norm().clamp_min(1e-6) for name, one in truth.items()]
        return torch.stack(errors).mean()

    aligned = on_cuda(architecture, kind)
    theirs = error(run(aligned, [batch], tokens, rows)[1])
    aligned.model.model.language_model.set_attn_implementation("varlen")
    for parts in ((), fused_parts.PARTS):
        with fused_parts.applied(aligned.model, parts):
            found, gradients = run(aligned, [pack(batch)], tokens, rows)
        assert found == pytest.approx(loss, rel=1e-2)
        assert error(gradients) <= 1.25 * theirs + 1e-3


def test_liger_norm_equals_the_plain_one():
    liger = fused_parts.liger_rms_norm()
    if liger is None:
        pytest.skip("liger-kernel is not installed")
    x = torch.randn(50, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(256, device="cuda", dtype=torch.bfloat16)
    expected = torch.nn.functional.rms_norm(x.double(), (256,), weight.double(), 1e-6)
    found = liger(x, weight, 1e-6, 0.0, "llama", False)
    assert (found - expected).norm() / expected.norm() < 1e-2


def test_liger_rotary_equals_the_plain_one():
    from transformers.models.phi.modeling_phi import apply_rotary_pos_emb

    liger = fused_parts.liger_rotary()
    if liger is None:
        pytest.skip("liger-kernel is not installed")
    q, k = (torch.randn(1, 50, heads, 80, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for heads in (32, 8))
    leaves = [one.clone().requires_grad_() for one in (q, k)]
    angles = torch.randn(1, 50, 16, device="cuda").repeat(1, 1, 2)
    given = (*(one[..., :32] for one in leaves), angles.cos().bfloat16(), angles.sin().bfloat16())
    found, expected = liger(*given), apply_rotary_pos_emb(*(one.double() for one in given))
    form = [torch.randn_like(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() / other.norm() < 1e-2
    one, other = (
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(some, form, strict=True)), leaves)
        for some in (found, expected)
    )
    for found_gradient, gradient in zip(one, other, strict=True):
        assert (found_gradient - gradient).norm() / gradient.norm() < 1e-2


def test_liger_cross_entropy_equals_the_plain_one():
    liger = fused_parts.liger_cross_entropy()
    if liger is None:
        pytest.skip("liger-kernel is not installed")
    rows = torch.randn(1500, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16) / 16
    bias, targets = torch.randn(5000, device="cuda").bfloat16(), torch.randint(0, 5000, (1500,), device="cuda")
    logits = rows.double() @ weight.double().mT + bias.double()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    found = liger(rows, weight, targets, bias)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=1e-3)
    truth, gradient = (torch.autograd.grad(one * 0.3, rows)[0].double() for one in (expected, found))
    assert (gradient - truth).norm() / truth.norm() < 1e-2


def test_memory_is_capped():
    device = torch.device("cuda")
    limit = torch.cuda.memory_reserved() / 1e9 + 1
    memory.cap_memory(limit, device)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(round(1.5e9), dtype=torch.uint8, device=device)
    finally:
        memory.cap_memory(None, device)
    torch.empty(round(1.5e9), dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="the device has"):
        memory.cap_memory(1e6, device)

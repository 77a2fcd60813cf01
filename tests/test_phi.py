"""The published variant of Phi: as stock Phi where it should be, in 4 bits, with adapters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PhiConfig, PhiForCausalLM

from pointalign.models import PointAlignPhiConfig, PointAlignPhiForCausalLM
from pointalign.models.phi import Fp32LayerNorm

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PointAlignPhiForCausalLM(PointAlignPhiConfig(**SIZES)).eval()


def test_it_is_stock_phi_but_for_the_output_norm(model):
    """With the output norm taken out, stock Phi with q/k norms and the same weights computes the same."""
    stock = PhiForCausalLM(PhiConfig(**SIZES, partial_rotary_factor=0.4, qk_layernorm=True)).eval()
    state = model.state_dict()
    for i in range(len(stock.model.layers)):
        model.model.layers[i].self_attn.post_layernorm = torch.nn.Identity()
        for kind in ("weight", "bias"):
            fused = state.pop(f"model.layers.{i}.self_attn.query_key_value.{kind}")
            parts = fused.unflatten(0, (4, 3, 32)).unbind(1)
            for name, part in zip("qkv", parts, strict=True):
                state[f"model.layers.{i}.self_attn.{name}_proj.{kind}"] = part.flatten(0, 1)
        state.pop(f"model.layers.{i}.self_attn.post_layernorm.weight")
    stock.load_state_dict(state)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, atol=1e-6, rtol=1e-5)


def test_cached_generation_equals_reading_everything_again(model):
    ids, mask = torch.arange(12).view(1, 12), torch.ones(1, 12, dtype=torch.long)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_norms_stay_in_fp32_beside_half_precision(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PointAlignPhiConfig)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.config.rope_parameters["partial_rotary_factor"] == 0.4
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if "layernorm" in name else torch.bfloat16), name
    assert half(input_ids=torch.arange(8)[None]).logits.dtype == torch.bfloat16
    norm = Fp32LayerNorm(64)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 100
    truth = torch.nn.functional.layer_norm(x.bfloat16().double(), (64,)).float()
    assert (norm(x.bfloat16()) - truth).abs().max() < 0.01


def test_four_bits_with_fused_adapters_trains(model, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, inject_adapter_in_model

    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )
    attention = quantised.model.layers[0].self_attn
    assert type(attention.query_key_value).__name__ == "Linear4bit"
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["query_key_value", "dense"])
    inject_adapter_in_model(config, quantised)
    ids = torch.arange(16)[None]
    with torch.autocast("cpu", torch.bfloat16):
        loss = quantised(input_ids=ids, labels=ids).loss
    loss.backward()
    assert attention.query_key_value.lora_A.default.weight.shape == (2, 128)  # one for q, k and v
    assert attention.query_key_value.lora_B.default.weight.grad.abs().max() > 0
    assert attention.q_layernorm.weight.dtype == torch.float32
    full = model(input_ids=ids, labels=ids).loss
    assert abs(loss.item() - full.item()) < 0.2

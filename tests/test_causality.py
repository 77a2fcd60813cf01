"""A language model put behind a point branch still cannot see the future: without a mask, training would cheat."""

import pytest
import torch
from conftest import tiny_text_config
from transformers import AutoModelForCausalLM

from pointalign.models import PointAlignForConditionalGeneration


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "phi", "qwen3"])
def test_later_tokens_change_nothing_before_them(architecture, attention):
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(tiny_text_config(architecture), attn_implementation=attention)
    model = PointAlignForConditionalGeneration.from_language_model(language_model, "mini").eval()
    assert model.model.language_model.config._attn_implementation == attention
    ids = torch.arange(30)[None]
    other = ids.clone()
    other[0, 20:] += 50
    with torch.no_grad():
        before, after = (model(input_ids=one).logits for one in (ids, other))
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])

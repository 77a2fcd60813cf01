"""Phi-2 as the published checkpoints know it: a fused query-key-value projection and three more norms.

Beside stock Phi, q and k pass a LayerNorm per head before the rotary embedding, and the attention output passes an
RMSNorm before it joins the residual: `h = x + RMS(Attn(LN x)) + MLP(LN x)` (TinyGPT-V, MiniGPT-3D). One linear map
makes q, k and v, so that an adapter on it has one A for all three, as the published adapters have.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PhiConfig, PhiForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi.modeling_phi import PhiAttention, apply_rotary_pos_emb, eager_attention_forward


class PointAlignPhiConfig(PhiConfig):
    """`PhiConfig` of the variant; the defaults are Phi-2's.

    Args:
        post_norm_eps: of the RMSNorm on the attention output.
    """

    model_type = "pointalign_phi"
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    post_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        kwargs.setdefault("partial_rotary_factor", 0.4)
        super().__post_init__(**kwargs)


class Fp32LayerNorm(nn.LayerNorm):
    """Computed in fp32, returned in the input's dtype: its weights train, half precision would round their steps."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return functional.layer_norm(input.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(
            input.dtype
        )


class Fp32RMSNorm(nn.RMSNorm):
    """As `Fp32LayerNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class FusedPhiAttention(PhiAttention):
    """Rows of `query_key_value` lie as published: per head, q then k then v (`[heads, 3, head_dim]`)."""

    def __init__(self, config: PointAlignPhiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"the fused projection has as many key-value heads as heads, got {config.num_key_value_heads} "
                f"of {config.num_attention_heads}"
            )
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.num_attention_heads * self.head_dim)
        self.q_layernorm = Fp32LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.k_layernorm = Fp32LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.post_layernorm = Fp32RMSNorm(config.hidden_size, eps=config.post_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        query, key, value = (one.transpose(1, 2) for one in fused.unbind(dim=-2))  # [B, heads, T, head_dim]
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        cos, sin = position_embeddings
        size = self.rotary_ndims
        rotated = apply_rotary_pos_emb(query[..., :size], key[..., :size], cos, sin)
        query = torch.cat((rotated[0], query[..., size:]), dim=-1)
        key = torch.cat((rotated[1], key[..., size:]), dim=-1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = self.dense(output.reshape(*hidden_states.shape[:-1], -1))
        return self.post_layernorm(output), weights


class PointAlignPhiForCausalLM(PhiForCausalLM):
    """Stock Phi with another attention module in every layer."""

    config_class = PointAlignPhiConfig
    # The weights (not the biases) of these train beside the adapters, so a stage hands them on.
    trained_norms = ("q_layernorm", "k_layernorm", "post_layernorm", "input_layernorm", "final_layernorm")
    _keep_in_fp32_modules_strict: ClassVar = set(trained_norms)

    def __init__(self, config: PointAlignPhiConfig):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = FusedPhiAttention(config, index)
            layer.input_layernorm = Fp32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.model.final_layernorm = Fp32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

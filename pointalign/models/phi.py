"""Phi-2 as the published checkpoints use it: a single query-key-value projection and three more norms.

Other than in stock Phi, q and k pass a LayerNorm per head before the rotary embedding, and the attention output passes
an RMSNorm before it is added to the residual: `h = x + RMS(Attn(LN x)) + MLP(LN x)` (TinyGPT-V, MiniGPT-3D). A single
linear layer computes q, k and v, so that an adapter on it has one A for all three, as the published adapters have.
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
    """Computes in fp32, returns the dtype of the input: its weights train, half precision would round updates away."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        normed = functional.layer_norm(input.float(), self.normalized_shape, self.weight.float(), bias, self.eps)
        return normed.to(input.dtype)


class Fp32RMSNorm(nn.RMSNorm):
    """Computes in fp32 and returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class JoinedPhiAttention(PhiAttention):
    """Phi's attention with the layer `query_key_value`, whose rows are ordered as published: `[heads, 3, head_dim]`."""

    def __init__(self, config: PointAlignPhiConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.q_proj, self.k_proj, self.v_proj
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"query_key_value needs as many key-value heads as heads: expected {config.num_attention_heads} "
                f"num_key_value_heads, got {config.num_key_value_heads}"
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
        joined = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in joined.unbind(dim=-2))  # [B, heads, T, head_dim]
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        cos, sin = position_embeddings
        turned = self.rotary_ndims  # the first dimensions of a head turn, the others stay
        rotated = apply_rotary_pos_emb(query[..., :turned], key[..., :turned], cos, sin)
        query = torch.cat((rotated[0], query[..., turned:]), dim=-1)
        key = torch.cat((rotated[1], key[..., turned:]), dim=-1)
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
    """Stock Phi with `JoinedPhiAttention` in every layer and norms that compute in fp32."""

    config_class = PointAlignPhiConfig
    # The weights (not the biases) of these norms train beside the adapters, so a stage file holds them.
    trained_norms = ("q_layernorm", "k_layernorm", "post_layernorm", "input_layernorm", "final_layernorm")
    _keep_in_fp32_modules_strict: ClassVar = set(trained_norms)

    def __init__(self, config: PointAlignPhiConfig):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = JoinedPhiAttention(config, index)
            layer.input_layernorm = Fp32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.model.final_layernorm = Fp32LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

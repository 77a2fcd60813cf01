"""Attention over packed samples: `varlen`, registered with transformers, computes nothing across sample borders.

On CUDA in 16 bits it is FlashAttention through `torch.nn.attention.varlen`; elsewhere scaled-dot-product attention
sample by sample, which on CUDA is slow and logged once with the reason. Under autocast its inputs are cast first, as
PyTorch casts those of its own attention: rotary embeddings leave query and key in fp32. It builds no mask, so a batch
that does not say where its samples end is refused.
"""

import logging
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.utils.import_utils import is_flash_attn_2_available

logger = logging.getLogger(__name__)

ATTENTIONS = ("auto", "eager", "sdpa", "varlen", "flash_attention_2")


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention within each sample of one packed row, in the signature of transformers' interface.

    Args:
        query: `[1, heads, S, D]`, key and value `[1, key-value heads, S, D]`.
        cu_seq_lens_q: `[samples + 1]` int32, where samples begin and end.
        max_length_q: tokens of the longest sample.

    Returns: `[1, S, heads, D]` and None.

    Raises: ValueError: the batch is not packed, or asks for what FlashAttention in PyTorch lacks.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            "varlen attention reads packed batches only: one row, cu_seq_lens_q and max_length_q, no attention mask; "
            "for others call model.set_attn_implementation('sdpa')"
        )
    if softcap is not None or (sliding_window is not None and sliding_window < max_length_q):
        raise ValueError(
            f"varlen attention has neither soft capping (softcap={softcap}) nor a sliding window shorter than a sample "
            f"(sliding_window={sliding_window}, longest sample {max_length_q}): use --model.attention sdpa"
        )
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    obstacle = flash_obstacle(query)
    if query.is_cuda and obstacle is None:
        if dropout > 0:
            raise ValueError(
                f"varlen attention has no dropout, the model asks for {dropout}: use --model.attention sdpa"
            )
        from torch.nn.attention.varlen import varlen_attn

        options: dict[str, Any] = {}
        if (groups := query.shape[1] // key.shape[1]) > 1:
            if "enable_gqa" in signature(varlen_attn).parameters:
                options = {"enable_gqa": True}
            else:  # before PyTorch 2.12
                key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [S, heads, D]
        cuts, longest = cu_seq_lens_q, max_length_q  # the same of queries and keys
        output = varlen_attn(q, k, v, cuts, cuts, longest, longest, scale=scaling, window_size=(-1, 0), **options)
        assert isinstance(output, Tensor)
        return output[None], None
    if query.is_cuda:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"training.cuda_graphs needs FlashAttention, which cannot run here: {obstacle}")
        log_once(f"varlen attention runs sample by sample, slowly: {obstacle}")
    lengths = cu_seq_lens_q.diff().tolist()
    pieces = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


AttentionInterface.register("varlen", varlen_attention)


def flash_obstacle(query: Tensor) -> str | None:
    """Why FlashAttention cannot read `query [1, heads, S, D]` on CUDA; None where it can."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention needs float16 or bfloat16, got {str(query.dtype).removeprefix('torch.')}"
    size = query.shape[-1]
    if size % 8 or size > 256:
        return f"FlashAttention needs heads of up to 256 features, a multiple of 8, got {size}"
    return None


@lru_cache
def log_once(message: str) -> None:
    """Log a warning, the first time in this process."""
    logger.warning(message)


def choose_attention(name: str, packed: bool, device_type: str) -> str:
    """The attention that `--model.attention NAME` means.

    `auto` is, for packed batches, transformers' `flash_attention_2` where flash-attn is installed and `varlen`
    elsewhere; `sdpa` for padded ones.

    Raises: ValueError: the named attention cannot run here, or cannot read such batches.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"model.attention={name!r}: expected one of {', '.join(ATTENTIONS)}")
    flash = device_type == "cuda" and is_flash_attn_2_available()
    if name == "auto":
        return ("flash_attention_2" if flash else "varlen") if packed else "sdpa"
    if name == "flash_attention_2" and not flash:
        raise ValueError(
            "model.attention=flash_attention_2 needs a CUDA device and the flash-attn package "
            '(pip install "pointalign[flash-attn]"); varlen is FlashAttention from PyTorch itself'
        )
    if name == "varlen" and not packed:
        raise ValueError("model.attention=varlen reads packed batches: add --data.packing true, or choose sdpa")
    return name

"""The frozen language model in 4 bits: NF4 with double quantisation by bitsandbytes (QLoRA, Dettmers et al., 2023)."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel


def is_sharded() -> bool:
    """Whether this run shards weights by FSDP: it wants a single dtype of parameters, none of which share a buffer."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def quantization_config(kind: str, dtype: torch.dtype, skipped: tuple[str, ...] = ()) -> BitsAndBytesConfig | None:
    """The argument `quantization_config` of `from_pretrained` for `--model.quantization KIND`; None for `none`.

    Args:
        dtype: of the products.
        skipped: modules that keep their dtype; by default transformers' choice, the head.

    Raises: ImportError: bitsandbytes is missing.
    """
    if kind == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError('model.quantization=nf4 needs bitsandbytes: pip install "pointalign[cuda]"') from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if is_sharded() else torch.uint8,
        llm_int8_skip_modules=list(skipped) or None,
    )


def is_4bit(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight in 4 bits (bitsandbytes)."""
    return hasattr(getattr(module, "weight", None), "quant_state")


def full_weight(linear: nn.Module) -> Tensor:
    """The weight `[out, in]` with which a linear layer computes: as it is, or dequantised from its 4 bits."""
    weight: Any = linear.weight
    if not is_4bit(linear):
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)


def keep_layout(language_model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights at the first inference on a CPU: repacked ones pass no gradients."""
    for module in language_model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantized(linear: nn.Module) -> nn.Linear:
    """A plain linear layer with the dequantised weight of a 4-bit layer."""
    weight = full_weight(linear).detach()
    with torch.device("meta"):
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None)
    plain._is_hf_initialized = True  # type: ignore[assignment]  # else transformers draws it again
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)  # type: ignore[arg-type]
    return plain


def dequantize(language_model: PreTrainedModel) -> None:
    """Replace every 4-bit layer by a plain layer, one after the other, and forget that the model was quantised.

    The values stay those of the 4 bits; the memory grows to that of the dtype in which the layers compute.
    """
    for name, module in list(language_model.named_modules()):
        if is_4bit(module):
            language_model.set_submodule(name, dequantized(module))
    # the marks of `from_pretrained(quantization_config=...)`: with them the model would be saved as a quantised one
    for part in language_model.modules():
        if isinstance(part, PreTrainedModel):
            for config in (part.config, *(getattr(part.config, name) for name in part.config.sub_configs)):
                config.__dict__.pop("quantization_config", None)
            part.__dict__.pop("hf_quantizer", None)
            for mark in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
                part.__dict__.pop(mark, None)

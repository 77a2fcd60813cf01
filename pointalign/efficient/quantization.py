"""The frozen language model in 4 bits: NF4 with double quantisation by bitsandbytes (QLoRA, Dettmers et al., 2023)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

QUANTIZATIONS = ("none", "nf4")


def quantization_config(
    kind: str, dtype: torch.dtype, sharded: bool = False, skipped: tuple[str, ...] = ()
) -> BitsAndBytesConfig | None:
    """The argument `quantization_config` of `from_pretrained` for `--model.quantization KIND`; None for `none`.

    Args:
        dtype: of the products.
        sharded: store the packed weights in tensors of `dtype`: FSDP shards parameters of a single dtype only.
        skipped: modules that keep their dtype; by default transformers' choice, the head.

    Raises:
        ImportError: bitsandbytes is missing.
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
        bnb_4bit_quant_storage=dtype if sharded else torch.uint8,
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
    forget_quantization(language_model)


def forget_quantization(language_model: PreTrainedModel) -> None:
    """Remove the marks of `from_pretrained(quantization_config=...)`, so that the model is saved without it."""
    for part in language_model.modules():
        if isinstance(part, PreTrainedModel):
            for config in (part.config, *(getattr(part.config, name) for name in part.config.sub_configs)):
                config.__dict__.pop("quantization_config", None)
            part.__dict__.pop("hf_quantizer", None)
            for mark in ("is_quantized", "is_loaded_in_4bit", "quantization_method"):
                part.__dict__.pop(mark, None)


def random_language_model(
    config: PreTrainedConfig, kind: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A language model of any size with random weights, for benchmarks: speed does not depend on the weights.

    It is built and quantised on `device` layer by layer, so an 8B model needs its size in 4 bits and a single matrix.

    Args:
        config: of the language model.
        kind: `none` or `nf4`.
        dtype: of the products, and of the weights that are not quantised.

    Raises:
        ValueError: the model has a buffer that cannot be computed from its configuration.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head and kind == "nf4":
            model.set_submodule(name, _random_4bit(module, dtype, device, generator))
            continue
        for label, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, label, nn.Parameter(_random(parameter, label, module, device, generator), False))
        for label, _ in list(module.named_buffers(recurse=False)):
            _remake_buffer(module, label, config, device)
    keep_layout(model)
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    model.tie_weights()
    return model.eval()


def _random(
    parameter: Tensor, label: str, module: nn.Module, device: torch.device, generator: torch.Generator
) -> Tensor:
    """Values for a parameter: 0 for biases, 1 for norms, normal with standard deviation 0.02 for matrices."""
    if parameter.ndim < 2:
        return (torch.zeros if label == "bias" else torch.ones)(parameter.shape, dtype=parameter.dtype, device=device)
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    return values.normal_(std=0.02, generator=generator)


def _random_4bit(linear: nn.Linear, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> nn.Module:
    """A 4-bit layer of the size of `linear` with random weights."""
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    with torch.device("meta"):
        quantised = layers.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
        )
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(std=0.02, generator=generator)
    quantised.weight = layers.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=quantised
    ).to(device)
    if linear.bias is not None:
        quantised.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return quantised


def _remake_buffer(module: nn.Module, label: str, config: PreTrainedConfig, device: torch.device) -> None:
    """Compute a buffer of rotary frequencies on `device`: on the meta device it has no values.

    Raises:
        ValueError: the buffer is no rotary frequency.
    """
    if label != "inv_freq":
        if label == "original_inv_freq":
            return  # set together with inv_freq
        raise ValueError(f"expected rotary frequencies as the only buffers, {type(module).__name__} has {label!r}")
    for name, buffer in type(module)(config).named_buffers(recurse=False):  # type: ignore[call-arg]
        setattr(module, name, buffer.to(device))

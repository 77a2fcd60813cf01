"""Language models with random weights, in 4 bits or not: speed does not depend on the weights."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pointalign.efficient.quantization import keep_layout


def random_language_model(
    config: PreTrainedConfig, kind: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A language model with random weights.

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

"""LoRA on the language model and the Q-Former: put on, or kept in a file of its own beside the weights.

The adapters' file is apart so that the weights can be loaded in any precision, 4-bit included, before peft wraps them.
Loading is all or nothing: without its adapters a model trained with them answers garbage.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

ADAPTER_FILE = "adapters.safetensors"


def add(model: nn.Module, part: str, **options: Any) -> None:
    """Wrap the linear maps of `model.model.<part>` in LoRA, by the arguments of `peft.LoraConfig`."""
    from peft import LoraConfig, inject_adapter_in_model

    adapted = getattr(model.model, part)
    inject_adapter_in_model(LoraConfig(**options), adapted)
    adapted.train(adapted.training)  # peft's new layers start in training mode, their dropout on
    model.config.adapters = (model.config.adapters or {}) | {part: options}  # pyright: ignore[reportOperatorIssue]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names that they have without adapters."""
    tensors = model.state_dict().items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors if ".lora_" not in name}


def save(model: nn.Module, folder: str | Path) -> None:
    save_file({name: one.contiguous() for name, one in state(model).items()}, Path(folder) / ADAPTER_FILE)


def load(model: nn.Module, folder: str | Path) -> None:
    """Put the adapters of `model.config.adapters` on and fill them from the folder's file, in fp32.

    Raises:
        ValueError: a key is missing, unexpected, or of another shape.
        OSError: there is no such file.
    """
    for part, options in model.config.adapters.items():
        add(model, part, **options)
    path = cached_file(str(folder), ADAPTER_FILE)
    values, own = load_file(path), {name: one for name, one in model.named_parameters() if ".lora_" in name}
    wrong = [name for name in own if name in values and own[name].shape != values[name].shape]
    if values.keys() != own.keys() or wrong:
        raise ValueError(
            f"{path} does not fit this model: missing {sorted(own.keys() - values.keys())[:3]}, "
            f"unexpected {sorted(values.keys() - own.keys())[:3]}, of another shape {wrong[:3]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.data = values[name].to(parameter.device, torch.float32)

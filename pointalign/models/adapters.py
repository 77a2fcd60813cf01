"""LoRA on the language model and the Q-Former: added to a model, or stored in a file beside the weights.

The file is separate so that the weights can be loaded in any precision, 4-bit included, before peft wraps them.
Loading is all or nothing: without its adapters a model trained with them answers garbage.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from pointalign.models.phi import PointAlignPhiForCausalLM

ADAPTER_FILE = "adapters.safetensors"

LLM = "model.language_model."  # how the names of the language model's weights begin
QFORMER = "model.qformer."

# The published adapters. The Q-Former's alpha is always twice its rank.
LLM_TARGETS = ["query_key_value", "dense"]
QFORMER_TARGETS = ["query", "key", "value"]
LLM_ALPHA, LLM_DROPOUT, QFORMER_DROPOUT = 16, 0.05, 0.1

QFORMER_NORM = re.compile(r"encoder\.layer\.\d+\.((cross)?attention\.output|output_query)\.LayerNorm\.weight$")


def is_llm_norm(name: str) -> bool:
    """Whether a weight of the model is a norm of the language model that trains beside its adapters."""
    norms = PointAlignPhiForCausalLM.trained_norms
    return name.startswith(LLM) and name.endswith(tuple(f"{norm}.weight" for norm in norms))


def is_qformer_norm(name: str) -> bool:
    """Whether a weight is a norm of the Q-Former that trains beside its adapters: 30 in the published size."""
    return name.startswith(QFORMER) and QFORMER_NORM.search(name) is not None


def add(model: nn.Module, part: str, **options: Any) -> None:
    """Wrap linear layers of `model.model.<part>` in LoRA; `options` are the arguments of `peft.LoraConfig`."""
    from peft import LoraConfig, inject_adapter_in_model

    adapted = getattr(model.model, part)
    inject_adapter_in_model(LoraConfig(**options), adapted)
    adapted.train(adapted.training)  # peft leaves its new layers in training mode, with dropout
    model.config.adapters = (model.config.adapters or {}) | {part: options}  # pyright: ignore[reportOperatorIssue]


def adapted_layers(part: nn.Module, targets: str | Collection[str]) -> set[str]:
    """Names of the linear layers of a part that `add` wraps: `all-linear` but for the head, or those that end so."""
    linear = {name: module for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    if targets == "all-linear":
        head = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
        return {name for name, module in linear.items() if module is not head}
    names = [targets] if isinstance(targets, str) else targets
    return {name for name in linear if any(f".{name}".endswith(f".{target}") for target in names)}


@torch.no_grad()
def merge(model: nn.Module, tensors: dict[str, Tensor], described: Mapping[str, Mapping[str, Any]]) -> None:
    """Fold stored LoRA into the weights that it adapts, as `add`, loading and peft's merging would, without peft.

    To import peft takes seconds, to wrap every layer of a language model another.

    Args:
        model: without adapters, its weights not in 4 bits.
        tensors: of a file, all whose names hold `.lora_`; in the dtype in which they are multiplied.
        described: part of the model -> arguments of `add`.

    Raises: ValueError: a tensor is missing, unexpected, or of another shape; nothing has been changed.
    """
    changes, expected = {}, set()
    problems = []
    for part, options in described.items():
        for layer in sorted(adapted_layers(model.get_submodule(f"model.{part}"), options["target_modules"])):
            name = f"model.{part}.{layer}"
            down, up = (f"{name}.lora_{factor}.default.weight" for factor in "AB")
            expected |= {down, up}
            weight = model.get_submodule(name).weight
            if down not in tensors or up not in tensors:
                continue
            shapes = tuple(tensors[down].shape), tuple(tensors[up].shape)
            if shapes != ((options["r"], weight.shape[1]), (weight.shape[0], options["r"])):
                problems.append(f"of another shape {name}.lora_")
                continue
            changes[name] = (down, up, options["lora_alpha"] / options["r"])
    problems += [f"missing {name}" for name in sorted(expected - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected)]
    if problems:
        raise ValueError(f"adapters do not fit this model ({len(problems)} problems): {', '.join(problems[:3])}")
    for name, (down, up, scale) in changes.items():
        weight = model.get_submodule(name).weight
        weight += ((tensors[up].float() @ tensors[down].float()) * scale).to(weight.dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """All other tensors, under the names that they have in a model without adapters."""
    tensors = model.state_dict().items()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors if ".lora_" not in name}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the adapters' tensors to `ADAPTER_FILE` in the folder."""
    save_file({name: tensor.contiguous() for name, tensor in state(model).items()}, Path(folder) / ADAPTER_FILE)


def load(model: nn.Module, folder: str | Path) -> None:
    """Add the adapters that `model.config.adapters` describes and fill them from the folder's file, in fp32.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape.
        OSError: the folder has no such file.
    """
    for part, options in model.config.adapters.items():
        add(model, part, **options)
    path = cached_file(str(folder), ADAPTER_FILE)
    stored = load_file(path)
    parameters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    misshapen = [name for name in parameters if name in stored and parameters[name].shape != stored[name].shape]
    if stored.keys() != parameters.keys() or misshapen:
        raise ValueError(
            f"{path} does not fit this model: missing {sorted(parameters.keys() - stored.keys())[:3]}, "
            f"unexpected {sorted(stored.keys() - parameters.keys())[:3]}, of another shape {misshapen[:3]}; "
            "take the file and config.json from the same folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data = stored[name].to(parameter.device, torch.float32)


def save_peft(model: nn.Module, folder: str | Path, language_model: str) -> None:
    """Write the language model's adapter as `PeftModel.from_pretrained` reads it.

    Args:
        language_model: its name or folder, recorded as the base model.
    """
    from peft import LoraConfig

    named = {name.removeprefix(LLM): tensor for name, tensor in state(model).items() if name.startswith(LLM)}
    options: dict[str, Any] = dict(model.config.adapters["language_model"])  # type: ignore[index]
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in named})
    options = options | {"target_modules": targets, "base_model_name_or_path": language_model}
    LoraConfig(**options, task_type="CAUSAL_LM", inference_mode=True).save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{name.replace('.default.', '.')}": tensor.contiguous() for name, tensor in named.items()
    }
    save_file(tensors, Path(folder) / "adapter_model.safetensors", {"format": "pt"})

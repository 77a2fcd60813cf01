"""A folder with the merged language model and the point branch apart: what serves the one need not know the other.

llm/                         a language model and its tokenizer, as every engine reads them
point_branch.safetensors     encoder, point MLP, Q-Former and projector
config.json and others       the model's configuration and processor
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pointalign.models import saved_folder
from pointalign.models.configuration import PointAlignConfig
from pointalign.models.modeling import PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor

LLM_FOLDER, POINT_BRANCH = "llm", "point_branch.safetensors"
LLM_PREFIX = "model.language_model."


def is_split(folder: Path) -> bool:
    return (folder / POINT_BRANCH).is_file() and (folder / LLM_FOLDER / "config.json").is_file()


def save(model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, folder: Path) -> None:
    """Fill a folder; matrices of the point branch are in bfloat16 where that loses nothing.

    Args:
        model: without adapters.
    """
    language_model = model.model.language_model
    language_model.generation_config = model.generation_config  # with the marks that end an answer
    language_model.save_pretrained(folder / LLM_FOLDER)
    processor.tokenizer.save_pretrained(folder / LLM_FOLDER)
    state = {name: _compact(tensor) for name, tensor in model.state_dict().items() if not name.startswith(LLM_PREFIX)}
    save_file(state, folder / POINT_BRANCH, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    saved_folder.name_package(folder)


def load(folder: Path, **options: Any) -> PointAlignForConditionalGeneration:
    """The model of a folder that `save` filled.

    Args:
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises: ValueError: the point branch does not fit the configuration.
    """
    llm = AutoModelForCausalLM.from_pretrained(folder / LLM_FOLDER, trust_remote_code=False, **options)
    config = PointAlignConfig.from_pretrained(folder)
    config.text_config = deepcopy(llm.config)
    model = PointAlignForConditionalGeneration(config, llm)
    model.generation_config = llm.generation_config
    state = load_file(folder / POINT_BRANCH)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if problems := [*unexpected, *(name for name in missing if not name.startswith(LLM_PREFIX))]:
        raise ValueError(f"{folder / POINT_BRANCH} does not fit {folder / 'config.json'}: {', '.join(problems[:3])}")
    return model


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 matrix in bfloat16 if every value survives, as of weights that were stored so before."""
    if tensor.dtype != torch.float32 or tensor.ndim < 2:
        return tensor.contiguous()
    half = tensor.to(torch.bfloat16)
    return (half if torch.equal(half.float(), tensor) else tensor).contiguous()

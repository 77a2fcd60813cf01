"""A model for training: language model, point branch and adapters put together, started from and handed to a stage.

A stage file holds everything but the language model's own weights. It names the language model it was trained with, and
is refused by any other: adapters on the wrong weights would answer garbage without an error.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pointalign import checkpointing, quantization
from pointalign.models import PointAlignFeatureExtractor, PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.options import CHECKPOINTS, DataOptions, ModelOptions

STAGE_FILE = "stage.safetensors"


def resolve_dtype(name: str) -> torch.dtype:
    """The language model's dtype; `auto` is bfloat16 where this machine computes in it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def build(
    options: ModelOptions, data: DataOptions, point_branch_only: bool = False
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """Model with adapters and processor, as the options say; only the parts in `options.train` require gradients.

    With `point_branch_only` the language model stays on the meta device, without adapters: enough to encode clouds.
    """
    from transformers import AutoTokenizer

    from pointalign import assets

    folder = assets.language_model() if options.llm == "smollm2" else Path(options.llm)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"model.llm={options.llm!r}: no language model in {folder} (config.json is missing)")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    language_model = empty_language_model(folder) if point_branch_only else load_language_model(folder, options)
    torch.manual_seed(options.seed)
    model = PointAlignForConditionalGeneration.from_language_model(language_model, options.preset)
    if not point_branch_only:
        add_adapters(model, options)
    if options.checkpoint is not None:
        load_stage(model, find_stage(options.checkpoint), point_branch_only)
    set_trainable(model, options.train)
    point = model.config.point_config
    extractor = PointAlignFeatureExtractor(
        num_points=data.num_points, min_points=max(point.num_groups, point.group_size), up_axis=data.up_axis
    )
    processor = PointAlignProcessor(
        extractor,
        tokenizer,
        num_query_tokens=model.config.num_query_tokens,
        point_token_id=model.config.point_token_id,
    )
    return model, processor


def load_language_model(folder: Path, options: ModelOptions) -> PreTrainedModel:
    """The language model, in 4 bits or not, as `options` say."""
    dtype = resolve_dtype(options.dtype)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    four_bits = quantization.quantization_config(options.quantization, dtype, sharded)
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=four_bits)
    quantization.keep_layout(language_model)
    if options.dequantize_once:
        quantization.dequantize(language_model)
    return language_model


def empty_language_model(folder: Path) -> PreTrainedModel:
    """A language model's shape, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def add_adapters(model: PointAlignForConditionalGeneration, options: ModelOptions) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_targets,
    )
    inject_adapter_in_model(config, model.model.language_model)


def set_trainable(model: PointAlignForConditionalGeneration, parts: list[str]) -> None:
    """Freeze everything, then thaw `parts`; the Q-Former's queries belong to it."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".language_model." in name:
            parameter.requires_grad_("lora" in parts and ".lora_" in name)
        else:
            part = name.removeprefix("model.").partition(".")[0].replace("query_tokens", "qformer")
            parameter.requires_grad_(part in parts)


def merge_adapters(model: PointAlignForConditionalGeneration) -> None:
    """Fold LoRA into the language model's own weights and remove it, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if quantization.is_4bit(base):  # the sum of both has more than 4 bits
                base = quantization.dequantized(base)
                base.weight.data += module.get_delta_weight("default").to(base.weight)
            else:
                module.merge(safe_merge=True)
            model.set_submodule(name, base)
    quantization.dequantize(model)
    if hasattr(model.model.language_model, "peft_config"):
        del model.model.language_model.peft_config


def export(model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, folder: Path) -> None:
    """Merge the adapters and write a folder for `from_pretrained`: no projector, no trace of how it was trained."""
    merge_adapters(model)
    with checkpointing.replacing(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def load_for_inference(model: str | Path) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """A model to talk to: an exported folder, or a stage checkpoint put on the embedded language model."""
    folder = Path(model)
    if (folder / "config.json").exists():
        loaded = PointAlignForConditionalGeneration.from_pretrained(folder, dtype="auto")
        processor = PointAlignProcessor.from_pretrained(folder)
    else:
        find_stage(str(model))
        loaded, processor = build(ModelOptions(checkpoint=str(model)), DataOptions())
        merge_adapters(loaded)
    if torch.cuda.is_available():
        loaded.to("cuda")
    return loaded.eval(), processor


# -- stage files -------------------------------------------------------------------------------------------------------


def fingerprint(language_model: nn.Module) -> str:
    """Names a language model by its shape and a sample of its embedding matrix."""
    embedding = language_model.get_input_embeddings().weight
    sample = embedding.detach()[:: max(1, len(embedding) // 64)].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    config = language_model.config
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    return hashlib.sha256(json.dumps(shape).encode() + sample.tobytes()).hexdigest()[:16]


def save_stage(model: PointAlignForConditionalGeneration, path: Path, description: dict[str, Any]) -> None:
    """Write a stage file in bfloat16, and `description` beside it as JSON."""
    state = {
        name: one.to(torch.bfloat16) if one.is_floating_point() else one
        for name, one in checkpointing.stage_state(model).items()
    }
    checkpointing.write_tensors(path, state, {"language_model": fingerprint(model.model.language_model)})
    checkpointing.write_json(path.with_suffix(".json"), description)


def find_stage(checkpoint: str) -> Path:
    """A stage file by path, by the folder of the run that made it, or by the name of a shipped one."""
    shipped = CHECKPOINTS / f"{checkpoint}.safetensors"
    candidates = [Path(checkpoint), Path(checkpoint) / STAGE_FILE, shipped]
    for path in candidates:
        if path.is_file():
            return path
    names = ", ".join(one.stem for one in CHECKPOINTS.glob("*.safetensors")) or "none"
    raise FileNotFoundError(
        f"model.checkpoint={checkpoint!r}: expected a stage file, a run's folder with {STAGE_FILE}, or the name of a "
        f"shipped checkpoint ({names})"
    )


def load_stage(model: PointAlignForConditionalGeneration, path: Path, point_branch_only: bool = False) -> None:
    if point_branch_only:
        checkpointing.load_state(model, path, set(checkpointing.stage_state(model)), ignored=".lora_")
        return
    try:
        with safe_open(path, framework="pt") as file:
            trained_with = (file.metadata() or {}).get("language_model")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    own = fingerprint(model.model.language_model)
    if trained_with != own:
        raise ValueError(
            f"{path} was trained with the language model {trained_with}, this one is {own}: its adapters would only "
            f"disturb it"
        )
    checkpointing.load_state(model, path, set(checkpointing.stage_state(model)))

"""A model from options, a run folder, a stage file or an exported folder: the one loader."""

import json
import sys
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from pointalign import language_model, stage_file, storage
from pointalign.efficient import quantization
from pointalign.model_options import READING_OPTIONS, DataOptions, ModelOptions
from pointalign.models import (
    PointAlignConfig,
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignProcessor,
    adapters,
    chat_layout,
    split_folder,
)
from pointalign.models.configuration import PointBertConfig
from pointalign.models.modeling import LOADING_PROBLEMS
from pointalign.precision import resolve_dtype

MODEL_TYPE = PointAlignConfig.model_type
# Modules of a converted model outside the decoder blocks: they stay in their dtype.
NOT_QUANTIZED = (
    "model.point_encoder",
    "model.point_mlp",
    "model.qformer",
    "model.query_experts",
    "model.modality_projector",
    "model.language_model.lm_head",
)


def build_model(
    options: ModelOptions, data: DataOptions, point_branch_only: bool = False, merged: bool = False
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """Model with adapters, and its processor, from options; only the parts in `options.train` require gradients.

    Args:
        point_branch_only: enough to encode clouds. Nothing requires gradients, and the language model stays on the meta
            device, without adapters (that of a converted folder is read with the rest).
        merged: to answer, from `options.checkpoint`: its adapters are folded into weights that are not in 4 bits; a
            converted model, which may bring others, keeps them beside the weights.

    Raises:
        FileNotFoundError: a folder or file that the options name is missing.
        ValueError: the parts do not fit together.
    """
    from transformers import AutoTokenizer

    folder = language_model.find_folder(options.llm)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    merged = merged and model_type(folder) != MODEL_TYPE
    model = load_model(folder, options, point_branch_only, draw=not merged)
    # a language model without weights takes no adapters
    adapter_options = replace(options, lora_rank=0) if point_branch_only else options
    if merged:
        stage = stage_file.find_stage(str(options.checkpoint))
        parts = stage_file.adapted_parts(stage)
        described = {part: adapter for part, adapter in new_adapters(options).items() if part in parts}
        stage_file.load_merged(model, stage, described)
    elif options.checkpoint is not None:
        stage = stage_file.find_stage(options.checkpoint)
        add_adapters(model, adapter_options, stage_file.adapted_parts(stage))
        stage_file.load_stage(model, stage, point_branch_only)
    elif options.point_branch is not None:
        stage_file.load_point_branch(model, stage_file.find_stage(options.point_branch))
    if not merged:
        add_adapters(model, adapter_options)  # new ones, on parts that no earlier stage adapted
    choose_experts(model, options)
    set_trainable(model, [] if point_branch_only else options.train)
    point = model.config.point_config
    num_points = data.num_points or getattr(point, "num_points", PointBertConfig.num_points)
    extractor = PointAlignFeatureExtractor(
        num_points=num_points,
        min_points=max(point.num_groups, point.group_size),
        up_axis=data.up_axis,
        reading={name: getattr(data, name) for name in READING_OPTIONS},
    )
    template = None if stage_file.keeps_system_text(options) else chat_layout.without_system_text(tokenizer)
    processor = PointAlignProcessor(
        extractor, tokenizer, template, model.config.num_query_tokens, model.config.point_token_id
    )
    generation = model.generation_config
    generation.eos_token_id = processor.end_token_ids(generation.eos_token_id)
    return model, processor


def load_model(
    folder: Path, options: ModelOptions, point_branch_only: bool, draw: bool = True
) -> PointAlignForConditionalGeneration:
    """A converted model, or a language model behind a point branch drawn by `options.seed`; without new adapters.

    Args:
        draw: otherwise the point branch holds whatever was in memory: a file fills all of it.
    """
    converted = model_type(folder) == MODEL_TYPE
    if converted:
        model = load_converted(folder, options)
        torch.manual_seed(options.seed)
    else:
        if point_branch_only:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
                llm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        else:
            llm = load_language_model(folder, options)
        torch.manual_seed(options.seed)
        with nullcontext() if draw else no_init_weights():
            model = PointAlignForConditionalGeneration.from_language_model(llm, options.preset)
    if not point_branch_only:
        fingerprint = stage_file.weights_fingerprint(folder, "model.language_model." if converted else "")
        model.model.language_model.weights_fingerprint = fingerprint
    return model


RANDOM_PARTS = ("point_encoder", "point_mlp", "query_tokens", "qformer", "modality_projector")


def require_trained_parts(options: ModelOptions) -> None:
    """Refuse a run in front of a part that is random and frozen: the language model would learn to read noise.

    Looks at names and at a converted folder's report alone, before any weight is loaded. A stage file holds every part,
    and the run that wrote it came past here too.

    Raises: ValueError: names the parts and where trained ones come from.
    """
    if options.checkpoint is not None:
        return
    folder = language_model.find_folder(options.llm)
    report = folder / "conversion.json"
    if model_type(folder) == MODEL_TYPE:
        drawn = json.loads(report.read_text(encoding="utf-8"))["random"] if report.exists() else []
        drawn = [name.removeprefix("model.") for name in drawn]
        random = [part for part in RANDOM_PARTS if part in drawn or (part == "query_tokens" and "query" in drawn)]
    else:
        random = list(RANDOM_PARTS) if options.point_branch is None else ["modality_projector"]
    trained = {*options.train, *(["query_tokens"] if "qformer" in options.train else [])}
    if frozen := [part for part in random if part not in trained]:
        raise ValueError(
            f"{', '.join(frozen)}: drawn at random and frozen, so the language model would read noise. Start from a "
            f"trained stage (model.checkpoint); or put the published weights in front of the language model "
            f"(pointalign convert --llm {folder} --point_encoder FILE --qformer FILE --output FOLDER, "
            f"then model.llm=FOLDER); or add the parts to model.train"
        )


def load_converted(folder: Path, options: ModelOptions) -> PointAlignForConditionalGeneration:
    """The model of a folder that `pointalign.convert` wrote, in 4 bits or not, with the adapters of that folder."""
    dtype, config = resolve_dtype(options.dtype), PointAlignConfig.from_pretrained(folder)
    # put on last: peft wraps a 4-bit layer and a plain one differently
    stored_adapters, config.adapters = config.adapters, None
    four_bits = quantization.quantization_config(options.quantization, dtype, NOT_QUANTIZED)
    model = PointAlignForConditionalGeneration.from_pretrained(
        folder, config=config, dtype=dtype, quantization_config=four_bits
    )
    quantization.keep_layout(model)
    if options.dequantize_once:
        quantization.dequantize(model)
    if stored_adapters:
        model.config.adapters = stored_adapters
        adapters.load(model, folder)
    return model


def load_split(folder: Path, quantization_name: str | None) -> PointAlignForConditionalGeneration:
    """The model of a folder that `pointalign export` wrote, its language model in 4 bits or as stored."""
    if quantization_name is None:
        return split_folder.load(folder, dtype="auto")
    dtype = resolve_dtype("auto")
    four_bits = quantization.quantization_config(quantization_name, dtype)
    model = split_folder.load(folder, dtype=dtype, quantization_config=four_bits)
    quantization.keep_layout(model)
    return model


def load_language_model(folder: Path, options: ModelOptions) -> PreTrainedModel:
    """A language model's folder, in 4 bits or not, as `options` say.

    Raises: ValueError: weights are missing, unexpected or of another shape.
    """
    dtype = resolve_dtype(options.dtype)
    four_bits = quantization.quantization_config(options.quantization, dtype)
    llm, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=four_bits, output_loading_info=True, trust_remote_code=False
    )
    if problems := [str(key) for kind in LOADING_PROBLEMS for key in info[kind]]:
        raise ValueError(
            f"model.llm={options.llm!r}: the weights do not fit the configuration, {len(problems)} are missing or "
            f"unexpected: {', '.join(sorted(problems)[:3])}; Phi-2 in its old format goes through pointalign.convert"
        )
    quantization.keep_layout(llm)
    if options.dequantize_once:
        quantization.dequantize(llm)
    return llm


def model_type(folder: Path) -> str | None:
    """`model_type` of a folder's config.json: `MODEL_TYPE` where the model has a point branch."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")


def new_adapters(options: ModelOptions) -> dict[str, dict[str, Any]]:
    """The options' adapters: arguments of `adapters.add` by part."""
    described: dict[str, dict[str, Any]] = {}
    if options.lora_rank:
        described["language_model"] = {
            "r": options.lora_rank,
            "lora_alpha": options.lora_alpha,
            "lora_dropout": options.lora_dropout,
            "target_modules": options.lora_targets,
        }
    if rank := options.qformer_lora_rank:
        described["qformer"] = {
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": adapters.QFORMER_DROPOUT,
            "target_modules": adapters.QFORMER_TARGETS,
        }
    return described


def add_adapters(
    model: PointAlignForConditionalGeneration,
    options: ModelOptions,
    parts: Collection[str] = ("language_model", "qformer"),
) -> None:
    """Put the options' adapters on those of `parts` that have none."""
    for part, described in new_adapters(options).items():
        if part in parts and part not in (model.config.adapters or {}):
            adapters.add(model, part, **described)


def choose_experts(model: PointAlignForConditionalGeneration, options: ModelOptions) -> None:
    """Add the options' query experts to a model without, and route among those it has as the options say.

    Raises: ValueError: the model has another number of experts, or none to route among.
    """
    if options.query_experts and model.model.query_experts is None:
        model.model.add_query_experts(options.query_experts)
    if options.query_experts not in (0, model.config.num_query_experts):
        raise ValueError(
            f"model.query_experts={options.query_experts}: this model already has {model.config.num_query_experts}"
        )
    if options.query_routing is not None:
        if model.model.query_experts is None:
            raise ValueError(f"model.query_routing={options.query_routing}: this model has no query experts")
        model.model.route_queries(options.query_routing, model.config.query_top_k)


def set_trainable(model: PointAlignForConditionalGeneration, parts: list[str]) -> None:
    """Let the parameters of `parts` require gradients, and no others.

    Raises: ValueError: the model has no such part.
    """
    model.requires_grad_(False)
    if "llm_norms" in parts and not hasattr(model.model.language_model, "trained_norms"):  # no stage would hand them on
        raise ValueError("model.train: this model has no llm_norms that train: only the published Phi has")
    present = set()
    for name, parameter in model.named_parameters():
        parts_of_parameter = _parts_of(name) & set(parts)
        parameter.requires_grad_(bool(parts_of_parameter))
        present |= parts_of_parameter
    if missing := sorted(set(parts) - present):
        raise ValueError(f"model.train: this model has no {missing[0]}")


def _parts_of(name: str) -> set[str]:
    """The parts, as `model.train` names them, that a parameter belongs to."""
    if ".language_model." in name:
        return {"lora"} if ".lora_" in name else {"llm_norms"} if adapters.is_llm_norm(name) else set()
    part = name.removeprefix("model.").partition(".")[0]
    if part == "query_tokens":
        return {"qformer", "query_tokens"}
    if part == "qformer" and (".lora_" in name or adapters.is_qformer_norm(name)):
        return {"qformer", "qformer_lora"}
    return {part}


def merge_adapters(model: PointAlignForConditionalGeneration) -> None:
    """Fold LoRA into the weights they adapt and remove it, in place."""
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
    for part in (model.model.language_model, model.model.qformer):
        if hasattr(part, "peft_config"):
            del part.peft_config
    model.config.adapters = None


def export(model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, folder: Path) -> None:
    """Merge the adapters, in place, and write a folder for `from_pretrained`, without the alignment projector."""
    merge_adapters(model)
    with storage.replacing(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)


# -- the one loader of a trained model ---------------------------------------------------------------------------------


def default_model() -> str:
    """The model that answers where none is named: the newest of `make train` below this folder, else the shipped one.

    Prints which.
    """
    from pointalign.assets import SHIPPED_CHECKPOINT

    trained = [path.parent for path in Path("runs").glob("demo*/model/config.json")]
    name = str(max(trained, key=lambda folder: folder.stat().st_mtime)) if trained else SHIPPED_CHECKPOINT
    source = "which `make train` made" if trained else "which is shipped"
    print(f"model: {name}, {source}; name another to take its place", file=sys.stderr)
    return name


def find_model(name: str | Path) -> Path:
    """The exported folder or the stage file that `name` stands for; of a run's folder, its exported model comes first.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is the folder of another kind of model.
    """
    for folder in (Path(name), Path(name) / "model"):
        if not (folder / "config.json").exists():
            continue
        if (kind := model_type(folder)) != MODEL_TYPE:
            raise ValueError(
                f"{folder} holds a model of type {kind!r}, not {MODEL_TYPE!r}: expected a folder written by "
                f"pointalign.train or pointalign.convert, a stage file, or the name of a shipped checkpoint"
            )
        return folder
    return stage_file.find_stage(str(name))


def load(
    name: str | Path | None = None,
    up_axis: str | None = None,
    device: str | torch.device | None = None,
    quantization: str | None = None,
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor, str]:
    """Model in evaluation mode, processor, and a hash of the files that the weights were read from.

    Args:
        name: a folder for `from_pretrained` or of `pointalign export`, a run's folder, a stage file, or the name of a
            shipped checkpoint; by default that of `default_model`. A stage file is put on the language model it was
            trained with.
        up_axis: vertical axis of the clouds, in place of the processor's.
        device: by default CUDA where there is one.
        quantization: `nf4` keeps the language model's weights in 4 bits, where memory is short. A stage that trained in
            4 bits has the same weights either way; of other models the weights are rounded, which is printed.

    Raises:
        FileNotFoundError: none of these, or the stage file's language model is gone.
        ValueError: another kind of model, or a stage file that does not fit or does not say what it was trained with.
    """
    source = find_model(name or default_model())
    rounded = quantization is not None
    if source.is_dir():
        if split := split_folder.is_split(source):
            model = load_split(source, quantization)
        elif quantization is None:
            model = PointAlignForConditionalGeneration.from_pretrained(source, dtype="auto")
        else:
            model = load_converted(source, ModelOptions(quantization=quantization))
        processor = PointAlignProcessor.from_pretrained(source, trust_remote_code=False)
        files = sorted(source.glob("**/*.safetensors" if split else "*.safetensors"))
    else:
        options, data = stage_file.trained_options(source)
        rounded &= options.quantization != quantization
        options = replace(options, quantization=quantization or options.quantization)
        model, processor = build_model(options, data, merged=options.quantization == "none")
        if quantization is None and (model.config.adapters or options.quantization != "none"):
            merge_adapters(model)
        files = [source]
    if rounded:
        print(f"--quantization {quantization}: {source} trained in more bits, its weights are rounded", file=sys.stderr)
    if up_axis is not None:
        processor.feature_extractor.up_axis = up_axis
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model.eval().requires_grad_(False).to(device), processor, storage.file_hash(*files)[:16]

"""The model that published tensors describe: its sizes, its adapters, and whether every tensor has its place."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pointalign.convert import files
from pointalign.convert.files import ALIGNMENT, ENCODER, EXPERT, Collection, ConversionError, Piece
from pointalign.models import PointAlignConfig, PointAlignForConditionalGeneration, PointAlignPhiConfig, PointBertConfig
from pointalign.models.adapters import (
    LLM,
    LLM_ALPHA,
    LLM_DROPOUT,
    LLM_TARGETS,
    QFORMER,
    QFORMER_DROPOUT,
    QFORMER_TARGETS,
    is_llm_norm,
    is_qformer_norm,
)

Shapes = dict[str, tuple[int, ...]]  # by this package's names


def count_layers(pieces: dict[str, Piece], prefix: str) -> int:
    """1 + the highest number that follows `prefix` in a name, 0 without such a name."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in pieces if name.startswith(prefix)]
    return max(numbers, default=-1) + 1


def sizes_from(pieces: dict[str, Piece], **places: tuple[str, int]) -> dict[str, int]:
    """Values of configuration fields, each the size of one dimension of a tensor; absent where the tensor is."""
    return {field: pieces[name].shape[dim] for field, (name, dim) in places.items() if name in pieces}


def count_heads(width: int, name: str, head_size: int) -> int:
    if width % head_size:
        raise ConversionError(f"{name!r} is {width} wide, expected a multiple of --head_size {head_size}")
    return width // head_size


def configure(collected: Collection, llm: Path | None, options: argparse.Namespace) -> PointAlignConfig:
    """A configuration with the sizes that the tensors have, and published sizes where no tensor tells.

    Args:
        llm: folder of the language model, whose `config.json` is read.
        options: of the command line, for what no tensor tells: head size, groups and query routing.

    Raises: ConversionError: a width that is no multiple of the head size, or no language model of text alone.
    """
    pieces = collected.pieces
    num_experts = count_layers(pieces, EXPERT)
    return PointAlignConfig(
        text_config=_phi_config(pieces, llm) if llm is None or is_phi(llm) else _text_config(llm),
        point_config=_point_config(pieces, options),
        qformer_config=_qformer_config(pieces, options),
        num_query_experts=num_experts,
        query_routing=options.query_routing,
        query_top_k=min(options.query_top_k, max(1, num_experts)),
        **sizes_from(pieces, num_query_tokens=(f"{EXPERT}0" if num_experts else "model.query_tokens", 1)),
        **sizes_from(pieces, projector_hidden_size=("model.modality_projector.0.weight", 0)),
    )


def _point_config(pieces: dict[str, Piece], options: argparse.Namespace) -> PointBertConfig:
    block = f"{ENCODER}blocks.blocks."
    router = pieces.get("model.query_experts.router.0.weight")  # reads cls and the tokens' maximum side by side
    values = {} if router is None else {"hidden_size": router.shape[1] // 2}
    values |= sizes_from(pieces, hidden_size=("model.point_mlp.0.weight", 1))
    values |= sizes_from(
        pieces,
        in_channels=(f"{ENCODER}encoder.first_conv.0.weight", 1),
        pointnet_width=(f"{ENCODER}encoder.first_conv.3.weight", 0),
        group_dim=(f"{ENCODER}encoder.second_conv.3.weight", 0),
        hidden_size=(f"{ENCODER}cls_token", -1),
        intermediate_size=(f"{block}0.mlp.fc1.weight", 0),
    )
    if "hidden_size" in values:
        values["num_attention_heads"] = count_heads(values["hidden_size"], f"{ENCODER}cls_token", options.head_size)
    if layers := count_layers(pieces, block):
        values["num_hidden_layers"] = layers
    return PointBertConfig(num_groups=options.num_groups, group_size=options.group_size, **values)


def _qformer_config(pieces: dict[str, Piece], options: argparse.Namespace) -> Any:
    from transformers import Blip2QFormerConfig

    layer = f"{QFORMER}encoder.layer."
    key = f"{layer}0.crossattention.attention.key"
    key_weight = f"{key}.weight" if f"{key}.weight" in pieces else f"{key}.lora_A.default.weight"
    values = sizes_from(pieces, hidden_size=(f"{EXPERT}0", -1))
    values |= sizes_from(
        pieces, hidden_size=("model.query_tokens", -1), encoder_hidden_size=("model.point_mlp.2.weight", 0)
    )
    values |= sizes_from(
        pieces,
        hidden_size=(f"{layer}0.attention.output.LayerNorm.weight", 0),
        intermediate_size=(f"{layer}0.intermediate_query.dense.weight", 0),
        encoder_hidden_size=(key_weight, 1),
    )
    if "hidden_size" in values:
        values["num_attention_heads"] = count_heads(values["hidden_size"], "model.query_tokens", options.head_size)
    if layers := count_layers(pieces, layer):
        crossing = {int(name.removeprefix(layer).split(".")[0]) for name in pieces if ".crossattention." in name}
        values["num_hidden_layers"] = layers
        values["cross_attention_frequency"] = sorted(crossing)[1] if len(crossing) > 1 else layers
    return Blip2QFormerConfig(**values)


def is_phi(llm: Path) -> bool:
    """Whether a folder holds Phi-2, the language model of the published weights, in either format.

    Raises: ConversionError: the folder has no configuration.
    """
    if not (llm / "config.json").is_file():
        raise ConversionError(f"{llm}: expected the folder of a language model, but config.json is missing")
    return json.loads((llm / "config.json").read_text(encoding="utf-8")).get("model_type") in ("phi", "phi-msft")


def _text_config(llm: Path) -> PreTrainedConfig:
    """Of a causal language model other than Phi-2."""
    try:
        config = AutoConfig.from_pretrained(llm, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ConversionError(f"{llm}: config.json is of no model that transformers knows: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping or "text_config" in config.sub_configs:
        raise ConversionError(
            f"{llm}: config.json is of {config.model_type!r}, expected a causal language model of text alone"
        )
    return config


def _phi_config(pieces: dict[str, Piece], llm: Path | None) -> PointAlignPhiConfig:
    if llm is None:  # the files can hold adapters and norms alone
        norm = pieces.get(f"{LLM}model.layers.0.input_layernorm.weight")
        head = pieces.get(f"{LLM}model.layers.0.self_attn.q_layernorm.weight")
        if norm is None or head is None:
            return PointAlignPhiConfig()
        width, layers = norm.shape[0], count_layers(pieces, f"{LLM}model.layers.")
        return PointAlignPhiConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // head.shape[0]
        )
    stored = json.loads((llm / "config.json").read_text(encoding="utf-8"))
    values = {
        name: stored[name]
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "layer_norm_eps", "hidden_act", "bos_token_id", "eos_token_id",
        )
        if stored.get(name) is not None
    }  # fmt: skip
    rope = stored.get("rope_parameters") or {}
    for name, default in (("partial_rotary_factor", 0.4), ("rope_theta", 10000.0)):
        values[name] = stored.get(name, rope.get(name, default))
    return PointAlignPhiConfig(**values)


def expected_shapes(config: PointAlignConfig, collected: Collection | None = None) -> Shapes:
    """Of every weight of the model without adapters and tied weights; as in the files, a tensor per query expert.

    Args:
        collected: its copies of tied weights are dropped.
    """
    with torch.device("meta"):
        model = PointAlignForConditionalGeneration(config)
    tied = tied_weights(model)
    for name in tied.keys() & (collected.pieces.keys() if collected is not None else ()):
        collected.note(collected.pieces.pop(name).origin, "ignored", f"tied to {tied[name]}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    experts = shapes.pop("model.query_experts.queries", None)
    if experts:
        shapes |= {f"{EXPERT}{index}": (1, *experts[1:]) for index in range(experts[0])}
    return shapes


def tied_weights(model: PointAlignForConditionalGeneration) -> dict[str, str]:
    """Weights of the language model that are another of its weights, mostly the head the embeddings: name -> other."""
    tied = model.model.language_model.all_tied_weights_keys
    return {f"{LLM}{name}": f"{LLM}{other}" for name, other in tied.items()}


def verify(collected: Collection, shapes: Shapes, num_experts: int, with_llm: bool) -> list[str]:
    """Check that every piece has its place and every part is complete.

    Returns: names of the parts of which no file holds anything.

    Raises: ConversionError: pieces are missing, unexplained or of the wrong shape; the message lists up to 20 of them.
    """
    pieces = collected.pieces
    problems = _incomplete_bundles(collected, shapes, num_experts) + _misfits(pieces, shapes, num_experts)
    absent = []
    for prefix in (LLM, QFORMER, ENCODER, "model.point_mlp.", "model.query_", "model.modality_projector."):
        expected = {name for name in shapes if name.startswith(prefix)}
        present = {name for name in pieces if name.startswith(prefix)}
        if not present and not (with_llm and prefix == LLM):
            absent.append(prefix.removesuffix(".").removesuffix("_"))
            continue
        only_trained = all(".lora_" in name or is_llm_norm(name) or is_qformer_norm(name) for name in present)
        if with_llm or not only_trained:
            missing = sorted(expected - present - _identity_norms(shapes, pieces))
            problems += [f"{name!r} is missing" + _hint(name) for name in missing]
    if problems:
        lines = "\n  ".join(problems[:20])
        raise ConversionError(f"{len(problems)} problems:\n  {lines}")
    return absent


def _incomplete_bundles(collected: Collection, shapes: Shapes, num_experts: int) -> list[str]:
    problems = []
    for source, names in collected.by_source:
        for description, bundle in files.bundles(shapes, num_experts).items():
            # adapters tell that a file holds the bundle: norms are in the base files too
            telling = {name for name in bundle if ".lora_" in name} or bundle
            if source.role == "checkpoint" and telling & names.keys():
                missing = sorted(bundle - names.keys())
                problems += [f"{source.path}: {name!r} is missing, of {description}" for name in missing]
    return problems


def _misfits(pieces: dict[str, Piece], shapes: Shapes, num_experts: int) -> list[str]:
    """Pieces of another shape than the model's, and pieces that the model has no place for."""
    bundles = files.bundles(shapes, num_experts).values()
    factors = {name for bundle in bundles for name in bundle if ".lora_" in name}
    problems = []
    for name, piece in pieces.items():
        if name in shapes and piece.shape != shapes[name]:
            problems.append(f"{piece.origin} has shape {list(piece.shape)}, expected {list(shapes[name])} ({name})")
        elif name in factors:
            problems += _misfit_factor(name, pieces, shapes)
        elif name not in shapes and not name.startswith(ALIGNMENT):
            problems.append(f"{piece.origin}: the model has no place for it ({name})")
    return problems


def _misfit_factor(name: str, pieces: dict[str, Piece], shapes: Shapes) -> list[str]:
    """A problem where a LoRA factor, A `[r, in]` or B `[out, r]`, does not fit its weight or the other factor."""
    module, factor = name.split(".lora_")
    is_a = factor[0] == "A"
    piece, other = pieces[name], pieces.get(f"{module}.lora_{'B' if is_a else 'A'}.default.weight")
    rank = piece.shape[0 if is_a else 1]
    rows, columns = shapes[f"{module}.weight"]
    fits = piece.shape == ((rank, columns) if is_a else (rows, rank))
    if fits and (other is None or rank == other.shape[1 if is_a else 0]):
        return []
    return [f"{piece.origin} has shape {list(piece.shape)}, which fits no rank for {[rows, columns]}"]


def _identity_norms(shapes: Shapes, pieces: dict[str, Piece]) -> set[str]:
    """Norms that the variant adds to Phi-2: biases that no file stores, and weights where no checkpoint is given."""
    if not any(name.endswith(".self_attn.post_layernorm.weight") for name in shapes):  # another language model
        return set()
    added = {
        name for name in shapes if name.startswith(LLM) and any(f".{n}_layernorm." in name for n in ("q", "k", "post"))
    }
    adapted = any(name.startswith(LLM) and ".lora_" in name for name in pieces)
    return {name for name in added if name.endswith(".bias") or not adapted}


def _hint(name: str) -> str:
    flags = {LLM: "--llm", QFORMER: "--qformer", ENCODER: "--point_encoder"}
    return next((f": {flag} gives it" for prefix, flag in flags.items() if name.startswith(prefix)), "")


def adapter_options(collected: Collection, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of `peft.LoraConfig` by part that has adapters; the rank is the tensors'.

    Raises: ConversionError: the adapters of a part have several ranks.
    """
    described = {}
    for part, prefix, targets, dropout in (
        ("language_model", LLM, LLM_TARGETS, LLM_DROPOUT),
        ("qformer", QFORMER, QFORMER_TARGETS, QFORMER_DROPOUT),
    ):
        ranks = {
            piece.shape[0] for name, piece in collected.pieces.items() if name.startswith(prefix) and ".lora_A." in name
        }
        if len(ranks) > 1:
            raise ConversionError(f"the adapters of {part} have ranks {sorted(ranks)}, expected the same in all")
        for rank in ranks:
            alpha = (options.lora_alpha or LLM_ALPHA) if part == "language_model" else 2 * rank
            described[part] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    return described

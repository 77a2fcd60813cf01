"""The model that published tensors describe: its sizes, its adapters, and whether every tensor has its place."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pointalign.convert import tensors
from pointalign.convert.files import ConversionError, Found, Piece
from pointalign.convert.tensors import ALIGNMENT, ENCODER, EXPERT, LLM, QFORMER


def _count(pieces: dict[str, Piece], prefix: str) -> int:
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in pieces if name.startswith(prefix)]
    return max(numbers, default=-1) + 1


def configure(found: Found, llm: Path | None, options: argparse.Namespace) -> Any:
    """A `PointAlignConfig` with the sizes that the tensors have; published sizes where no tensor tells."""
    from transformers import Blip2QFormerConfig

    from pointalign.models import PointAlignConfig, PointBertConfig

    pieces = found.pieces

    def sizes(**wanted: tuple[str, int]) -> dict[str, int]:
        return {field: pieces[name].shape[dim] for field, (name, dim) in wanted.items() if name in pieces}

    def heads(width: int, name: str) -> int:
        if width % options.head_size:
            raise ConversionError(f"{name!r} is {width} wide, which is no multiple of --head-size {options.head_size}")
        return width // options.head_size

    block, layer = f"{ENCODER}blocks.blocks.", f"{QFORMER}encoder.layer."
    router = pieces.get("model.query_experts.router.0.weight")  # reads cls and the tokens' maximum side by side
    point = {} if router is None else {"hidden_size": router.shape[1] // 2}
    point |= sizes(hidden_size=("model.point_mlp.0.weight", 1)) | sizes(
        in_channels=(f"{ENCODER}encoder.first_conv.0.weight", 1),
        group_dim=(f"{ENCODER}encoder.first_conv.3.weight", 0),
        hidden_size=(f"{ENCODER}cls_token", -1),
        intermediate_size=(f"{block}0.mlp.fc1.weight", 0),
    )
    if "hidden_size" in point:
        point["num_attention_heads"] = heads(point["hidden_size"], f"{ENCODER}cls_token")
    if layers := _count(pieces, block):
        point["num_hidden_layers"] = layers
    crossed = f"{layer}0.crossattention.attention.key"
    qformer = (
        sizes(hidden_size=(f"{EXPERT}0", -1))
        | sizes(hidden_size=("model.query_tokens", -1), encoder_hidden_size=("model.point_mlp.2.weight", 0))
        | sizes(
            hidden_size=(f"{layer}0.attention.output.LayerNorm.weight", 0),
            intermediate_size=(f"{layer}0.intermediate_query.dense.weight", 0),
            encoder_hidden_size=(
                f"{crossed}.weight" if f"{crossed}.weight" in pieces else f"{crossed}.lora_A.default.weight",
                1,
            ),
        )
    )
    if "hidden_size" in qformer:
        qformer["num_attention_heads"] = heads(qformer["hidden_size"], "model.query_tokens")
    if layers := _count(pieces, layer):
        crossing = {int(name.removeprefix(layer).split(".")[0]) for name in pieces if ".crossattention." in name}
        qformer["num_hidden_layers"] = layers
        qformer["cross_attention_frequency"] = sorted(crossing)[1] if len(crossing) > 1 else layers
    num_experts = _count(pieces, EXPERT)
    return PointAlignConfig(
        text_config=_text_config(found, llm),
        point_config=PointBertConfig(num_groups=options.num_groups, group_size=options.group_size, **point),
        qformer_config=Blip2QFormerConfig(**qformer),
        num_query_experts=num_experts,
        query_routing=options.query_routing,
        query_top_k=min(options.query_top_k, max(1, num_experts)),
        **sizes(num_query_tokens=(f"{EXPERT}0" if num_experts else "model.query_tokens", 1)),
        **sizes(projector_hidden_size=("model.modality_projector.0.weight", 0)),
    )


def _text_config(found: Found, llm: Path | None) -> Any:
    from pointalign.models import PointAlignPhiConfig

    if llm is None:  # only adapters and norms can be there
        norm = found.pieces.get(f"{LLM}model.layers.0.input_layernorm.weight")
        head = found.pieces.get(f"{LLM}model.layers.0.self_attn.q_layernorm.weight")
        if norm is None or head is None:
            return PointAlignPhiConfig()
        width, layers = norm.shape[0], _count(found.pieces, f"{LLM}model.layers.")
        return PointAlignPhiConfig(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // head.shape[0]
        )
    stored = json.loads((llm / "config.json").read_text())
    if stored.get("model_type") not in ("phi", "phi-msft"):
        raise ConversionError(f"{llm}: config.json is of {stored.get('model_type')!r}, expected Phi-2 ('phi')")
    kept = {
        name: stored[name]
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "layer_norm_eps", "hidden_act", "bos_token_id", "eos_token_id",
        )
        if stored.get(name) is not None
    }  # fmt: skip
    rope = stored.get("rope_parameters") or {}
    for name, default in (("partial_rotary_factor", 0.4), ("rope_theta", 10000.0)):
        kept[name] = stored.get(name, rope.get(name, default))
    return PointAlignPhiConfig(**kept)


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every weight of the model without adapters, experts apart as in the files."""
    from pointalign.models import PointAlignForConditionalGeneration

    with torch.device("meta"):
        model = PointAlignForConditionalGeneration(config)
    shapes = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    experts = shapes.pop("model.query_experts.queries", None)
    if experts:
        shapes |= {f"{EXPERT}{index}": (1, *experts[1:]) for index in range(experts[0])}
    return shapes


def verify(found: Found, shapes: dict[str, tuple[int, ...]], num_experts: int, whole: bool) -> list[str]:
    """Check that every piece has its place and every part is complete; the names of parts that no file holds.

    Raises: ConversionError.
    """
    pieces, problems = found.pieces, []
    bundles = tensors.bundles(shapes, num_experts)
    for source, names in found.by_source:
        for what, bundle in bundles.items():
            telling = {name for name in bundle if ".lora_" in name} or bundle  # norms alone also lie in the base files
            if source.role == "checkpoint" and telling & names.keys():
                problems += [f"{source.path}: {name!r} is missing, of {what}" for name in sorted(bundle - names.keys())]
    loras = {name for bundle in bundles.values() for name in bundle if ".lora_" in name}
    for name, piece in pieces.items():
        if name in shapes and piece.shape != shapes[name]:
            problems.append(f"{piece.origin} has shape {list(piece.shape)}, expected {list(shapes[name])} ({name})")
        elif name in loras:
            base, factor = name.split(".lora_")
            rank = piece.shape[0 if factor[0] == "A" else 1]
            other = pieces.get(f"{base}.lora_{'B' if factor[0] == 'A' else 'A'}.default.weight")
            rows, columns = shapes[f"{base}.weight"]
            if piece.shape != ((rank, columns) if factor[0] == "A" else (rows, rank)) or (
                other and rank != other.shape[1 if factor[0] == "A" else 0]
            ):
                problems.append(
                    f"{piece.origin} has shape {list(piece.shape)}, which fits no rank for {[rows, columns]}"
                )
        elif name not in shapes and not name.startswith(ALIGNMENT):
            problems.append(f"{piece.origin}: the model has no place for it ({name})")
    absent = []
    for prefix in (LLM, QFORMER, ENCODER, "model.point_mlp.", "model.query_", "model.modality_projector."):
        wanted = {name for name in shapes if name.startswith(prefix)}
        own = {name for name in pieces if name.startswith(prefix)}
        if not own and not (whole and prefix == LLM):
            absent.append(prefix.removesuffix(".").removesuffix("_"))
            continue
        missing = sorted(wanted - own - _identity_norms(shapes, pieces))
        if whole or not all(
            ".lora_" in name or tensors.is_llm_norm(name) or tensors.is_qformer_norm(name) for name in own
        ):
            problems += [f"{name!r} is missing" + _hint(name) for name in missing]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ConversionError(f"{len(problems)} problems:\n  {shown}")
    return absent


def _identity_norms(shapes: dict[str, tuple[int, ...]], pieces: dict[str, Piece]) -> set[str]:
    """Norms that the variant adds to Phi-2: biases that no file stores, and weights where no checkpoint is given."""
    added = {
        name for name in shapes if name.startswith(LLM) and any(f".{n}_layernorm." in name for n in ("q", "k", "post"))
    }
    adapted = any(name.startswith(LLM) and ".lora_" in name for name in pieces)
    return {name for name in added if name.endswith(".bias") or not adapted}


def _hint(name: str) -> str:
    flags = {LLM: "--llm", QFORMER: "--qformer", ENCODER: "--point-encoder"}
    return next((f": {flag} gives it" for prefix, flag in flags.items() if name.startswith(prefix)), "")


def adapter_options(found: Found, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of `peft.LoraConfig` for each part that has adapters; the rank is what the tensors say."""
    made = {}
    for part, prefix, targets, dropout in (
        ("language_model", LLM, tensors.LLM_TARGETS, tensors.LLM_DROPOUT),
        ("qformer", QFORMER, tensors.QFORMER_TARGETS, tensors.QFORMER_DROPOUT),
    ):
        ranks = {
            piece.shape[0] for name, piece in found.pieces.items() if name.startswith(prefix) and ".lora_A." in name
        }
        if len(ranks) > 1:
            raise ConversionError(f"the adapters of {part} have ranks {sorted(ranks)}, expected one")
        for rank in ranks:
            alpha = options.lora_alpha if part == "language_model" else 2 * rank
            made[part] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": targets}
    return made

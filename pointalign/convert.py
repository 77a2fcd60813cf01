"""`python -m pointalign.convert`: the published weights (MiniGPT-3D, PointAlign, Phi-2, BLIP-2) become one folder.

Tensors are read, translated and written one at a time. Every tensor of every file is accounted for, in
`conversion.json`; what no rule explains, and what a part lacks, ends the conversion before anything is written.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pointalign import published
from pointalign.published import ALIGNMENT, ENCODER, EXPERT, LLM, QFORMER
from pointalign.published_files import ConversionError, Found, Piece, Source, collect

PARTS_FILE = "parts.safetensors"  # what a conversion without a language model writes
ALIGNMENT_FILE = "alignment_projector.safetensors"
REPORT_FILE = "conversion.json"
SHARD_BYTES = 512 * 2**20


# -- the model that the tensors describe -------------------------------------------------------------------------------


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
    point = sizes(hidden_size=("model.point_mlp.0.weight", 1)) | sizes(
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
    qformer = sizes(
        hidden_size=("model.query_tokens", -1), encoder_hidden_size=("model.point_mlp.2.weight", 0)
    ) | sizes(
        hidden_size=(f"{layer}0.attention.output.LayerNorm.weight", 0),
        intermediate_size=(f"{layer}0.intermediate_query.dense.weight", 0),
        encoder_hidden_size=(
            f"{crossed}.weight" if f"{crossed}.weight" in pieces else f"{crossed}.lora_A.default.weight",
            1,
        ),
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
    bundles = published.bundles(shapes, num_experts)
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
            ".lora_" in name or published.is_llm_norm(name) or published.is_qformer_norm(name) for name in own
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


# -- writing ---------------------------------------------------------------------------------------------------------


def adapter_options(found: Found, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arguments of `peft.LoraConfig` for each part that has adapters; the rank is what the tensors say."""
    made = {}
    for part, prefix, targets, dropout in (
        ("language_model", LLM, published.LLM_TARGETS, published.LLM_DROPOUT),
        ("qformer", QFORMER, published.QFORMER_TARGETS, published.QFORMER_DROPOUT),
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


def _merged(piece: Piece, name: str, found: Found, adapters: dict[str, dict[str, Any]]) -> Piece:
    """The piece with its LoRA folded in, in fp32 before rounding."""
    module = name.removesuffix(".weight")
    pair = [found.pieces.get(f"{module}.lora_{factor}.default.weight") for factor in "AB"]
    if pair[0] is None or pair[1] is None:
        return piece
    first, second = pair[0], pair[1]
    adapter = adapters["language_model" if name.startswith(LLM) else "qformer"]
    scale = adapter["lora_alpha"] / adapter["r"]

    def read() -> Tensor:
        return torch.addmm(piece.read().float(), second.read().float(), first.read().float(), alpha=scale)

    return piece._replace(read=read)


def assemble(
    found: Found, config: Any, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | None
) -> dict[str, Piece]:
    """Every weight to write in its final type: the point branch and all norms in fp32, the language model as stored."""
    from pointalign.models import PointAlignModel, PointAlignPhiForCausalLM

    pieces, missing = dict(found.pieces), [name for name in shapes if name not in found.pieces]
    added = [name for name in missing if name.startswith(LLM)]
    for name in added:
        value = torch.zeros(shapes[name]) if name.endswith("bias") else torch.ones(shapes[name])
        pieces[name] = Piece("the identity", shapes[name], torch.float32, lambda value=value: value)
        found.report.append({"file": "", "tensor": name, "status": "identity", "detail": "no file stores it"})
    drawn = [name for name in missing if name not in added]
    if drawn:
        torch.manual_seed(0)
        state = PointAlignModel(config, torch.nn.Identity()).state_dict()  # type: ignore[arg-type]
        for name in drawn:
            value = state[name.removeprefix("model.")]
            pieces[name] = Piece("drawn at random", shapes[name], torch.float32, lambda value=value: value)
            found.report.append({"file": "", "tensor": name, "status": "random", "detail": "in no file: train it"})
    experts = [pieces.pop(f"{EXPERT}{index}") for index in range(config.num_query_experts)]
    if experts:
        shape = (len(experts), *experts[0].shape[1:])
        pieces["model.query_experts.queries"] = Piece(
            "experts", shape, torch.float32, lambda: torch.cat([one.read().float() for one in experts])
        )
    for name, piece in pieces.items():
        half = name.startswith(LLM) and not any(f"{norm}." in name for norm in PointAlignPhiForCausalLM.trained_norms)
        wanted = (dtype or piece.dtype) if half and ".lora_" not in name else torch.float32
        if piece.dtype.is_floating_point:
            pieces[name] = piece._replace(dtype=wanted)
    return pieces


def write_weights(folder: Path, pieces: dict[str, Piece]) -> None:
    """`model-*.safetensors` and their index; one shard is in memory at a time."""
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    total = size = 0
    for name in sorted(pieces):
        own = pieces[name].dtype.itemsize * torch.Size(pieces[name].shape).numel()
        if shards[-1] and size + own > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + own, total + own
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: pieces[name].read().to(pieces[name].dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_processor(folder: Path, llm: Path, config: Any) -> None:
    """Tokenizer, prompt layout and end marks, where the language model's folder has a tokenizer."""
    from transformers import AutoTokenizer, GenerationConfig

    from pointalign.models import PointAlignFeatureExtractor, PointAlignProcessor

    text = config.text_config
    generation = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.eos_token_id,
    }
    if any((llm / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(llm)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        point = config.point_config
        extractor = PointAlignFeatureExtractor(min_points=max(point.num_groups, point.group_size))
        processor = PointAlignProcessor(
            extractor, tokenizer, num_query_tokens=config.num_query_tokens, point_token_id=config.point_token_id
        )
        processor.save_pretrained(folder)
        generation["eos_token_id"] = processor.end_token_ids()
    GenerationConfig(**generation).save_pretrained(folder)


LICENCES = {
    "llm": "Phi-2: MIT",
    "qformer": "BLIP-2 (LAVIS): BSD-3-Clause",
    "point_encoder": "PointBERT as released with PointLLM: CC-BY-NC-SA-4.0",
    "checkpoint": "MiniGPT-3D: CC-BY-NC-SA-4.0 (non-commercial, share alike)",
}


def card(sources: list[dict[str, Any]], random: list[str], adapters: dict) -> str:
    """README.md of the output: what it was made from, and under which licences."""
    roles = {source["role"] for source in sources}
    licence = "cc-by-nc-sa-4.0" if roles & {"checkpoint", "point_encoder"} else "other"
    lines = ["---", f"license: {licence}", "library_name: pointalign", "---", "", "# Converted weights", ""]
    lines += ["Written by `python -m pointalign.convert` from these files:", ""]
    for source in sources:
        lines += [f"- {source['role']}: `{name}`, sha256 `{digest}`" for name, digest in source["sha256"].items()]
    lines += ["", "Licences of what went in, which bind what came out:", ""]
    lines += [f"- {text}" for role, text in LICENCES.items() if role in roles]
    if adapters:
        lines += ["", "LoRA is kept apart, in `adapters.safetensors`; `from_pretrained` puts it on."]
    if random:
        lines += ["", f"In no file, so drawn at random and of no use before training: {', '.join(random)}."]
    return "\n".join([*lines, ""])


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Run the conversion that the options describe; the content of `conversion.json`.

    Raises: ConversionError: a file is refused, or tensors are missing, unexplained or of the wrong shape.
    """
    from pointalign import checkpointing, selftest
    from pointalign.models import adapters as lora

    paths = [("llm", options.llm), ("qformer", options.qformer), ("point_encoder", options.point_encoder)]
    paths += [("checkpoint", path) for path in options.checkpoint]
    sources = [Source(role, Path(path)) for role, path in paths if path is not None]
    if not sources:
        raise ConversionError("nothing to convert: give --llm, --qformer, --point-encoder or --checkpoint")
    found = collect(sources)
    whole = options.llm is not None
    config = configure(found, Path(options.llm) if whole else None, options)
    shapes = expected_shapes(config)
    random = verify(found, shapes, config.num_query_experts, whole)
    adapters = adapter_options(found, options)
    report = {
        "sources": [source.describe() for source in sources],
        "adapters": {} if options.merge_adapters else adapters,
        "merged_adapters": adapters if options.merge_adapters else {},
        "random": random if whole else [],
    }
    output = Path(options.output)
    with checkpointing.replacing(output) as folder:
        folder.mkdir()
        alignment = {name: piece for name, piece in found.pieces.items() if name.startswith(ALIGNMENT)}
        if not whole:
            if options.merge_adapters:
                raise ConversionError("--merge-adapters needs --llm, the weights to merge into")
            checkpointing.write_tensors(folder / PARTS_FILE, {name: one.read() for name, one in found.pieces.items()})
        else:
            if alignment:
                values = {name.removeprefix(ALIGNMENT): one.read().float() for name, one in alignment.items()}
                checkpointing.write_tensors(folder / ALIGNMENT_FILE, values)
            pieces = assemble(found, config, shapes, options.dtype and getattr(torch, options.dtype))
            weights = {name: one for name, one in pieces.items() if ".lora_" not in name and name not in alignment}
            if options.merge_adapters:
                weights = {name: _merged(one, name, found, adapters) for name, one in weights.items()}
            elif adapters:
                values = {name: one.read().float() for name, one in pieces.items() if ".lora_" in name}
                checkpointing.write_tensors(folder / lora.ADAPTER_FILE, values)
                config.adapters = adapters
            write_weights(folder, weights)
            stored = next(one.dtype for name, one in weights.items() if name.endswith("embed_tokens.weight"))
            config.dtype = config.text_config.dtype = stored
            config.architectures = ["PointAlignForConditionalGeneration"]
            config.save_pretrained(folder)
            write_processor(folder, Path(options.llm), config)
            report["fingerprint"] = selftest.run(folder)
        report["tensors"] = found.report
        checkpointing.write_json(folder / REPORT_FILE, report)
        (folder / "README.md").write_text(card(report["sources"], report["random"], report["adapters"]))
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pointalign.convert",
        description="Convert published weights into a folder for from_pretrained. Without --llm the parts are only "
        f"translated, into {PARTS_FILE}, which a later --checkpoint takes.",
    )
    parser.add_argument("--llm", help="folder of Phi-2, in either format")
    parser.add_argument("--qformer", help="BLIP-2 file, for the Q-Former")
    parser.add_argument("--point-encoder", help="PointBERT file, of MiniGPT-3D or PointLLM")
    parser.add_argument("--checkpoint", action="append", default=[], help="stage file; of several, the last one counts")
    parser.add_argument("--output", help="folder to write")
    parser.add_argument("--merge-adapters", action="store_true", help="fold LoRA into the weights, for inference")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="of the language model (as stored)")
    parser.add_argument("--lora-alpha", type=int, default=published.LLM_ALPHA, help="of the language model's adapters")
    parser.add_argument("--head-size", type=int, default=64, help="of Q-Former and point encoder (default: 64)")
    parser.add_argument("--num-groups", type=int, default=512, help="groups of the point encoder (default: 512)")
    parser.add_argument("--group-size", type=int, default=32, help="points per group (default: 32)")
    parser.add_argument("--query-routing", default="sparse", help="sparse, soft or constant, with query experts")
    parser.add_argument("--query-top-k", type=int, default=2, help="experts in use under sparse routing (default: 2)")
    parser.add_argument("--check", metavar="DIR", help="run the self-test of a converted folder again and compare")
    options = parser.parse_args(arguments)
    if (options.output is None) == (options.check is None):
        parser.error("give either --output DIR or --check DIR")
    try:
        if options.check:
            from pointalign import selftest

            selftest.compare(
                Path(options.check), json.loads((Path(options.check) / REPORT_FILE).read_text())["fingerprint"]
            )
            print(f"{options.check}: answers as it did when it was converted")
            return 0
        report = convert(options)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    counts: dict[str, int] = {}
    for one in report["tensors"]:
        counts[one["status"]] = counts.get(one["status"], 0) + 1
    print(f"{options.output}: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if report["random"]:
        print(f"in no file, drawn at random, to be trained: {', '.join(report['random'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

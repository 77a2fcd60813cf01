"""What a conversion writes: weights, adapters beside them or merged, processor and model card; and its self-test."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pointalign import storage
from pointalign.convert.files import ALIGNMENT, EXPERT, Collection, ConversionError, Piece
from pointalign.convert.sizes import tied_weights
from pointalign.models import (
    PointAlignConfig,
    PointAlignFeatureExtractor,
    PointAlignForConditionalGeneration,
    PointAlignModel,
    PointAlignPhiConfig,
    PointAlignPhiForCausalLM,
    PointAlignProcessor,
    saved_folder,
)
from pointalign.models.adapters import ADAPTER_FILE, LLM

ALIGNMENT_FILE = "alignment_projector.safetensors"
SHARD_BYTES = 512 * 2**20


def write(
    folder: Path,
    llm: Path,
    collected: Collection,
    config: PointAlignConfig,
    shapes: dict[str, tuple[int, ...]],
    adapters: dict[str, dict[str, Any]],
    merge: bool,
    dtype: torch.dtype | None,
) -> None:
    """Fill a folder for `from_pretrained`; the adapters and the alignment projector are in separate files.

    Args:
        folder: exists and is empty.
        llm: folder of the language model, for its tokenizer.
        shapes: of every weight, without adapters.
        adapters: arguments of `peft.LoraConfig` by part.
        merge: fold the adapters into the weights.
        dtype: of the language model's weights; None leaves them as stored.
    """
    pieces = _assemble(collected, config, shapes, dtype)
    alignment = {name: pieces.pop(name) for name in list(pieces) if name.startswith(ALIGNMENT)}
    if alignment:
        values = {name.removeprefix(ALIGNMENT): piece.read().float() for name, piece in alignment.items()}
        storage.write_tensors(folder / ALIGNMENT_FILE, values)
    weights = {name: piece for name, piece in pieces.items() if ".lora_" not in name}
    if merge:
        weights = {name: _merged(piece, name, collected, adapters) for name, piece in weights.items()}
    elif adapters:
        values = {name: piece.read().float() for name, piece in pieces.items() if ".lora_" in name}
        storage.write_tensors(folder / ADAPTER_FILE, values)
        config.adapters = adapters
    _write_weights(folder, weights)
    embeddings = next(piece for name, piece in weights.items() if name.endswith("embed_tokens.weight"))
    config.dtype = config.text_config.dtype = embeddings.dtype
    config.architectures = ["PointAlignForConditionalGeneration"]
    config.save_pretrained(folder)
    saved_folder.name_package(folder)
    _write_processor(folder, llm, config)


def _assemble(
    collected: Collection, config: PointAlignConfig, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | None
) -> dict[str, Piece]:
    """Every tensor to write in its final dtype: point branch and norms in fp32, the language model as stored."""
    pieces, missing = dict(collected.pieces), [name for name in shapes if name not in collected.pieces]
    added = [name for name in missing if name.startswith(LLM)]
    for name in added:
        value = torch.zeros(shapes[name]) if name.endswith("bias") else torch.ones(shapes[name])
        pieces[name] = Piece("the identity", shapes[name], torch.float32, lambda value=value: value)
        collected.note(name, "identity", "no file stores it")
    drawn = [name for name in missing if name not in added]
    if drawn:
        torch.manual_seed(0)
        state = PointAlignModel(config, torch.nn.Identity()).state_dict()  # type: ignore[arg-type]
        for name in drawn:
            value = state[name.removeprefix("model.")]
            pieces[name] = Piece("drawn at random", shapes[name], torch.float32, lambda value=value: value)
            collected.note(name, "random", "in no file: train it")
    experts = [pieces.pop(f"{EXPERT}{index}") for index in range(config.num_query_experts)]
    if experts:
        shape = (len(experts), *experts[0].shape[1:])
        pieces["model.query_experts.queries"] = Piece(
            "experts", shape, torch.float32, lambda: torch.cat([expert.read().float() for expert in experts])
        )
    phi = isinstance(config.text_config, PointAlignPhiConfig)
    for name, piece in pieces.items():
        is_norm = phi and any(f"{norm}." in name for norm in PointAlignPhiForCausalLM.trained_norms)
        in_fp32 = not name.startswith(LLM) or is_norm or ".lora_" in name
        if piece.dtype.is_floating_point:
            pieces[name] = piece._replace(dtype=torch.float32 if in_fp32 else dtype or piece.dtype)
    return pieces


def _merged(piece: Piece, name: str, collected: Collection, adapters: dict[str, dict[str, Any]]) -> Piece:
    """The piece with its LoRA folded in, in fp32 before rounding; without LoRA the piece as it is."""
    module = name.removesuffix(".weight")
    a, b = (collected.pieces.get(f"{module}.lora_{factor}.default.weight") for factor in "AB")
    if a is None or b is None:
        return piece
    adapter = adapters["language_model" if name.startswith(LLM) else "qformer"]
    scale = adapter["lora_alpha"] / adapter["r"]

    def read() -> Tensor:
        return torch.addmm(piece.read().float(), b.read().float(), a.read().float(), alpha=scale)

    return piece._replace(read=read)


def _write_weights(folder: Path, pieces: dict[str, Piece]) -> None:
    """Write `model-*.safetensors` and their index; a single shard is in memory at a time."""
    shards: list[list[str]] = [[]]
    total = size = 0
    for name in sorted(pieces):
        num_bytes = pieces[name].dtype.itemsize * torch.Size(pieces[name].shape).numel()
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + num_bytes, total + num_bytes
    file_of = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: pieces[name].read().to(pieces[name].dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    storage.write_json(folder / "model.safetensors.index.json", index)


def _write_processor(folder: Path, llm: Path, config: PointAlignConfig) -> None:
    """Write tokenizer, prompt layout and end marks, where the language model's folder has a tokenizer."""
    from transformers import AutoTokenizer, GenerationConfig

    text = config.text_config
    generation = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.eos_token_id
    )
    phi = isinstance(text, PointAlignPhiConfig)
    if (llm / "generation_config.json").is_file() and not phi:
        stored = GenerationConfig.from_pretrained(llm)  # it may name more end marks than config.json
        generation.eos_token_id = stored.eos_token_id or generation.eos_token_id
        generation.pad_token_id = stored.pad_token_id or generation.pad_token_id
    if any((llm / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        point = config.point_config
        extractor = PointAlignFeatureExtractor(min_points=max(point.num_groups, point.group_size))
        processor = PointAlignProcessor(
            extractor, tokenizer, num_query_tokens=config.num_query_tokens, point_token_id=config.point_token_id
        )
        processor.save_pretrained(folder)
        generation.eos_token_id = processor.end_token_ids(None if phi else generation.eos_token_id)
    generation.save_pretrained(folder)


LICENCES = {
    "llm": "Phi-2: MIT",
    "other_llm": "the language model: see its folder",
    "qformer": "BLIP-2 (LAVIS): BSD-3-Clause",
    "point_encoder": "PointBERT as released with PointLLM: CC-BY-NC-SA-4.0",
    "checkpoint": "MiniGPT-3D: CC-BY-NC-SA-4.0 (non-commercial, share alike)",
}


def card(sources: list[dict[str, Any]], random: list[str], adapters: dict, phi: bool) -> str:
    """README.md of the output: the files it was converted from and their licences.

    Args:
        sources: as `Source.describe` returns them.
        random: names of the parts that no file holds.
        adapters: those in `adapters.safetensors`; empty where they were merged.
        phi: whether the language model is Phi-2.
    """
    roles = {source["role"] if phi or source["role"] != "llm" else "other_llm" for source in sources}
    licence = "cc-by-nc-sa-4.0" if roles & {"checkpoint", "point_encoder"} else "other"
    lines = ["---", f"license: {licence}", "library_name: pointalign", "---", "", "# Converted weights", ""]
    lines += ["Written by `pointalign convert` from these files:", ""]
    for source in sources:
        lines += [f"- {source['role']}: `{name}`, sha256 `{digest}`" for name, digest in source["sha256"].items()]
    lines += ["", "Licences of these files, which bind the converted weights too:", ""]
    lines += [f"- {text}" for role, text in LICENCES.items() if role in roles]
    if adapters:
        lines += ["", "LoRA is in the separate file `adapters.safetensors`; `from_pretrained` adds it."]
    if random:
        lines += ["", f"In no file, so drawn at random and to be trained: {', '.join(random)}."]
    return "\n".join([*lines, ""])


# -- self-test ---------------------------------------------------------------------------------------------------------

RANGE = (1e-4, 1e4)  # of the standard deviation at every station
TOLERANCE = 2e-2  # of the scores, relative to their standard deviation: half-precision weights, other machines
NUM_TOKENS = 16


class Reader:
    """Reads weights of a folder one at a time, in fp32 with the adapters folded in."""

    def __init__(self, folder: Path, adapters: dict[str, dict[str, Any]] | None, tied: dict[str, str]):
        self.folder, self.adapters, self.tied = folder, adapters or {}, tied
        self.file_of = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
        self.factors = load_file(folder / ADAPTER_FILE) if self.adapters else {}

    def __call__(self, name: str) -> Tensor:
        name = self.tied.get(name, name)
        with safe_open(self.folder / self.file_of[name], framework="pt") as file:
            value = file.get_tensor(name)
        value = value.float() if value.is_floating_point() else value
        module = name.removesuffix(".weight")
        a, b = (self.factors.get(f"{module}.lora_{factor}.default.weight") for factor in "AB")
        if a is None or b is None:
            return value
        options = self.adapters["language_model" if ".language_model." in name else "qformer"]
        return torch.addmm(value, b, a, alpha=options["lora_alpha"] / options["r"])


def _stream_weights(module: nn.Module, name: str, read: Reader) -> None:
    """Read a module's weights before each forward pass and drop them after it."""
    empty = dict(module.named_parameters(recurse=False))

    def fill(*_: Any) -> None:
        for key in empty:
            module._parameters[key] = nn.Parameter(read(f"{name}.{key}"), requires_grad=False)

    def clear(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(clear)


@torch.inference_mode()
def measure(folder: Path) -> dict[str, Any]:
    """The fingerprint of a folder, for a cloud and a text that are always the same.

    Returns:
        `stations`: mean and standard deviation of the activations after the point encoder, the Q-Former, the
        projector, every layer of the language model and of the scores; `scores`: the first 16 of the last token.

    Raises: ConversionError: the folder's weights are not those of the model.
    """
    config = PointAlignConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model = PointAlignForConditionalGeneration(config).eval()
    read = Reader(folder, config.adapters, tied_weights(model))
    branch = {name: read(name) for name in read.file_of if ".language_model." not in name}
    absent, unexpected = model.load_state_dict(branch, strict=False, assign=True)
    missing = [name for name in absent if ".language_model." not in name]
    if unexpected or missing:
        raise ConversionError(f"{folder} does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, module in model.named_modules():
        if ".language_model." in f"{name}." and dict(module.named_parameters(recurse=False)):
            _stream_weights(module, name, read)
    stations: dict[str, Tensor] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda _m, _a, out, key=f"layer {index + 1}": stations.update({key: out}))
    point = config.point_config
    size = (1, 4 * max(point.num_groups, point.group_size), point.in_channels)
    cloud = torch.rand(size, generator=torch.Generator().manual_seed(0))
    cloud[..., :3] = cloud[..., :3] * 2 - 1
    queries = config.num_query_tokens
    ids = torch.arange(queries + NUM_TOKENS)[None] % config.text_config.vocab_size
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :queries] = True
    output = model(input_ids=ids, point_mask=mask, point_values=cloud, use_cache=False)
    features = output.point_features
    stations |= {"encoder": features.encoder, "qformer": features.qformer, "projected": features.projected}
    stations["scores"] = output.logits
    values = {station: [output.mean().item(), output.std().item()] for station, output in stations.items()}
    return {"stations": values, "scores": output.logits[0, -1, :16].tolist()}


def self_test(folder: Path) -> dict[str, Any]:
    """The fingerprint of a folder, checked for plausible values.

    Raises: ConversionError: a value is not finite, or a station's standard deviation is out of range.
    """
    fingerprint = measure(folder)
    for station, (mean, deviation) in fingerprint["stations"].items():
        if not RANGE[0] < deviation < RANGE[1] or mean != mean:
            raise ConversionError(
                f"the self-test failed at {station!r}: mean {mean}, standard deviation {deviation}, expected a finite "
                f"mean and a deviation between {RANGE[0]} and {RANGE[1]}: the weights do not belong together"
            )
    return fingerprint


def compare(folder: Path, stored: dict[str, Any]) -> None:
    """Check a folder against the fingerprint of its conversion.

    Raises: ConversionError: the self-test fails, or its scores differ from the stored ones by more than `TOLERANCE`.
    """
    measured = self_test(folder)
    deviation = stored["stations"]["scores"][1]
    worst = max(abs(a - b) for a, b in zip(measured["scores"], stored["scores"], strict=True))
    if not worst <= TOLERANCE * deviation:
        raise ConversionError(
            f"{folder}: scores differ by {worst:.3g} from the stored ones, expected at most {TOLERANCE * deviation:.3g}"
            ": the weights were changed, convert them again"
        )

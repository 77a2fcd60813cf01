"""What a conversion writes: weights, adapters apart from them or merged, processor and model card."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pointalign.convert.files import ConversionError, Found, Piece
from pointalign.convert.tensors import ALIGNMENT, EXPERT, LLM

ALIGNMENT_FILE = "alignment_projector.safetensors"
SHARD_BYTES = 512 * 2**20


def write(
    folder: Path,
    llm: Path,
    found: Found,
    config: Any,
    shapes: dict[str, tuple[int, ...]],
    adapters: dict[str, dict[str, Any]],
    merge: bool,
    dtype: torch.dtype | None,
) -> None:
    """A folder for `from_pretrained`, its adapters and the alignment projector in files of their own.

    Args:
        llm: folder of the language model, for its tokenizer.
        shapes: of every weight, without adapters.
        merge: fold the adapters into the weights.
        dtype: of the language model's own weights; None leaves them as stored.
    """
    from pointalign import storage
    from pointalign.models import adapters as lora

    pieces = _assemble(found, config, shapes, dtype)
    alignment = {name: pieces.pop(name) for name in list(pieces) if name.startswith(ALIGNMENT)}
    if alignment:
        values = {name.removeprefix(ALIGNMENT): one.read().float() for name, one in alignment.items()}
        storage.write_tensors(folder / ALIGNMENT_FILE, values)
    weights = {name: one for name, one in pieces.items() if ".lora_" not in name}
    if merge:
        weights = {name: _merged(one, name, found, adapters) for name, one in weights.items()}
    elif adapters:
        values = {name: one.read().float() for name, one in pieces.items() if ".lora_" in name}
        storage.write_tensors(folder / lora.ADAPTER_FILE, values)
        config.adapters = adapters
    _write_weights(folder, weights)
    stored = next(one.dtype for name, one in weights.items() if name.endswith("embed_tokens.weight"))
    config.dtype = config.text_config.dtype = stored
    config.architectures = ["PointAlignForConditionalGeneration"]
    config.save_pretrained(folder)
    _write_processor(folder, llm, config)


def _assemble(
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


def _write_weights(folder: Path, pieces: dict[str, Piece]) -> None:
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


def _write_processor(folder: Path, llm: Path, config: Any) -> None:
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


RANGE = (1e-4, 1e4)  # of the standard deviation at every station
TOLERANCE = 2e-2  # of a fingerprint, relative to the spread: half-precision weights, other machines
NUM_TOKENS = 16


class Reader:
    """Weights of a folder in fp32, adapters folded in, read one at a time."""

    def __init__(self, folder: Path, adapters: dict[str, dict[str, Any]] | None):
        self.folder, self.adapters = folder, adapters or {}
        self.places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self.loras = load_file(folder / "adapters.safetensors") if self.adapters else {}

    def __call__(self, name: str) -> Tensor:
        with safe_open(self.folder / self.places[name], framework="pt") as file:
            value = file.get_tensor(name)
        value = value.float() if value.is_floating_point() else value
        module = name.removesuffix(".weight")
        first, second = (self.loras.get(f"{module}.lora_{factor}.default.weight") for factor in "AB")
        if first is None or second is None:
            return value
        options = self.adapters["language_model" if ".language_model." in name else "qformer"]
        return torch.addmm(value, second, first, alpha=options["lora_alpha"] / options["r"])


def _stream(module: nn.Module, name: str, read: Reader) -> None:
    """Give a module its weights for the time of its forward pass."""
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
    """Mean and standard deviation at every station, and the first scores of the last token."""
    from pointalign.models import PointAlignConfig, PointAlignForConditionalGeneration

    config = PointAlignConfig.from_pretrained(folder)
    read = Reader(folder, config.adapters)
    with init_empty_weights(include_buffers=False):
        model = PointAlignForConditionalGeneration(config).eval()
    branch = {name: read(name) for name in read.places if ".language_model." not in name}
    missing, unexpected = model.load_state_dict(branch, strict=False, assign=True)
    if unexpected or any(".language_model." not in name for name in missing):
        raise ConversionError(f"{folder} lacks {missing[:3]} or holds {unexpected[:3]} beyond the model")
    for name, module in model.named_modules():
        if ".language_model." in f"{name}." and dict(module.named_parameters(recurse=False)):
            _stream(module, name, read)
    stations: dict[str, Tensor] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_hook(lambda _m, _a, out, key=f"layer {index + 1}": stations.update({key: out}))
    generator = torch.Generator().manual_seed(0)
    cloud = torch.rand(
        1,
        4 * max(config.point_config.num_groups, config.point_config.group_size),
        config.point_config.in_channels,
        generator=generator,
    )
    cloud[..., :3] = cloud[..., :3] * 2 - 1
    queries = config.num_query_tokens
    ids = torch.arange(queries + NUM_TOKENS)[None] % config.text_config.vocab_size
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :queries] = True
    output = model(input_ids=ids, point_mask=mask, point_values=cloud, use_cache=False)
    features = output.point_features
    stations |= {"encoder": features.encoder, "qformer": features.qformer, "projected": features.projected}
    stations["scores"] = output.logits
    values = {key: [one.mean().item(), one.std().item()] for key, one in stations.items()}
    return {"stations": values, "scores": output.logits[0, -1, :16].tolist()}


def run(folder: Path) -> dict[str, Any]:
    """The fingerprint of a folder.

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
    """Check a folder against the fingerprint of its conversion. Raises: ConversionError."""
    now = run(folder)
    spread = stored["stations"]["scores"][1]
    worst = max(abs(a - b) for a, b in zip(now["scores"], stored["scores"], strict=True))
    if not worst <= TOLERANCE * spread:
        raise ConversionError(
            f"{folder}: scores differ by {worst:.3g} from the stored ones, whose spread is {spread:.3g}"
        )

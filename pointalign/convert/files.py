"""Published weight files: their tensor names translated into this package's, their tensors read one at a time."""

import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pointalign import storage
from pointalign.models.adapters import LLM, LLM_TARGETS, QFORMER, QFORMER_TARGETS, is_llm_norm, is_qformer_norm

ENCODER = "model.point_encoder."
EXPERT = "model.query_experts.queries."  # + index: the files hold a tensor per expert
ALIGNMENT = "alignment_projector."
_OF_THE_LLM = (LLM, "model.modality_projector.", ALIGNMENT)  # trained for a language model's hidden states

_CHECKPOINT_RULES = [
    (r"point_2_Qformer_proj\.", "model.point_mlp."),
    (r"llama_proj\.", "model.modality_projector.0."),
    (r"llama_proj2\.", "model.modality_projector.1."),
    (r"query_tokens$", "model.query_tokens"),
    (r"query_expert_dict\.", EXPERT),
    (r"query_router\.", "model.query_experts.router."),
    (r"alignment_projector\.", ALIGNMENT),
    (r"(point_encoder|pc_encoder)\.", ENCODER),  # two names of one module
    (r"Qformer\.bert\.", QFORMER),
    (r"llama_model\.(base_model\.model\.)?", LLM),
    (r"model\.(point_|query_|qformer\.|modality_|language_model\.)", r"model.\1"),  # parts converted earlier
]
_RULES = {
    "llm": [(r"", LLM)],  # whether the model has a place for it, `sizes.verify` says
    "qformer": [(r"query_tokens$", "model.query_tokens"), (r"Qformer\.bert\.", QFORMER)],
    "point_encoder": [(r"(module\.point_encoder\.)?(?!module\.)", ENCODER)],
    "checkpoint": _CHECKPOINT_RULES,
}
_IGNORED = {
    "llm": [(r".*rotary_emb\.inv_freq$", "computed from the configuration")],
    "qformer": [
        (r"(ln_vision|visual_encoder)\.", "the image branch of BLIP-2"),
        (r"(t5_proj|opt_proj|llm_proj|vision_proj|text_proj|itm_head|temp$)", "the heads of BLIP-2"),
        (r"Qformer\.cls\.", "the word prediction head of BLIP-2"),
        (r"Qformer\.bert\.embeddings\.(word|position)_", "the text branch of the Q-Former"),
        (r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.", "the text branch of the Q-Former"),
    ],
    "point_encoder": [(r"module\.(?!point_encoder\.)", "not of the point encoder")],
    "checkpoint": [
        (r"visual_encoder\.|ln_vision\.|t5_proj\.", "the image branch of the model it was trained from"),
        (r"llama_model\..*rotary_emb\.inv_freq$", "computed from the configuration"),
    ],
}
_INDICES = (r"Qformer\.bert\.embeddings\.position_ids$", "positions of words that the Q-Former does not read")
_RENAMED = [
    (rf"^{QFORMER}embeddings\.LayerNorm\.", f"{QFORMER}layernorm."),
    (rf"^({QFORMER}.*\.(?:cross)?attention)\.self\.", r"\1.attention."),
    (rf"^({LLM}model\.layers\.\d+)\.post_layernorm\.", r"\1.self_attn.post_layernorm."),
    (r"\.base_layer\.", "."),
]


def translate(role: str, name: str) -> tuple[str | None, str]:
    """This package's name of a tensor in a file of `role` and "", or None and the reason to ignore the tensor.

    Raises: KeyError: no rule explains the name.
    """
    for pattern, reason in [*_IGNORED[role], _INDICES]:
        if re.match(pattern, name):
            return None, reason
    for pattern, replacement in _RULES[role]:
        translated, count = re.subn(rf"^{pattern}", replacement, name, count=1)
        if count:
            for old, new in _RENAMED:
                translated = re.sub(old, new, translated)
            return translated, ""
    raise KeyError(name)


def lora_names(names: Iterable[str], prefix: str, targets: list[str]) -> Iterator[str]:
    """Names of the LoRA factors A and B of every module in `targets` whose weight is among `names`."""
    for name in names:
        module, _, kind = name.rpartition(".")
        if name.startswith(prefix) and kind == "weight" and module.rpartition(".")[2] in targets:
            yield f"{module}.lora_A.default.weight"
            yield f"{module}.lora_B.default.weight"


def bundles(names: Iterable[str], num_experts: int) -> dict[str, set[str]]:
    """Sets of tensors of which a file holds all or none; the keys describe them for error messages.

    Args:
        names: of all weights of the model, without adapters.
        num_experts: query experts of the model, 0 for none.
    """
    names = set(names)
    return {
        "the adapters and norms of the language model": {
            *lora_names(names, LLM, LLM_TARGETS),
            *filter(is_llm_norm, names),
        },
        "the adapters and norms of the Q-Former": {
            *lora_names(names, QFORMER, QFORMER_TARGETS),
            *filter(is_qformer_norm, names),
        },
        "the point MLP": {name for name in names if name.startswith("model.point_mlp.")},
        "the modality projector": {name for name in names if name.startswith("model.modality_projector.")},
        "the query experts": {
            *(f"{EXPERT}{index}" for index in range(num_experts)),
            *(name for name in names if name.startswith("model.query_experts.router.")),
        },
        "the alignment projector": {
            f"{ALIGNMENT}projector.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
        },
    }


_CONTAINERS = {"qformer": ("model",), "point_encoder": ("base_model", "state_dict"), "checkpoint": ("model",)}
_SPLIT = ("q_proj", "k_proj", "v_proj")


class ConversionError(ValueError):
    """Files that cannot be converted; the message names the file and the tensor."""


# What torch.load raises for a garbled pickle, beside UnpicklingError: any of its instructions may fail.
_GARBLED = (
    RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError, OverflowError, AssertionError,
    ImportError, MemoryError, RecursionError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


# What a file of tensors asks for by name. PyTorch would accept more, a bytearray of any length among it.
_GLOBALS = re.compile(
    r"(collections OrderedDict|_codecs encode|torch (Size|device|\w+Storage|b?float\w+|u?int\d+|bool)"
    r"|torch\.serialization _get_layout|torch\.nn\.parameter Parameter|torch\.storage \w+Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|sparse_tensor|qtensor))"
)
_LEGACY_PICKLES = 5  # at the start of a file from before PyTorch 1.6: a number, a version, sizes, the content, keys


def _check_pickles(path: Path, is_zip: bool) -> None:
    """Refuse what could take much more memory than the file has bytes: compressed entries, objects made by number."""
    if not is_zip:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                if file.peek(1):
                    _check_globals(path, file)
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ConversionError(f"{path}: refused, its entries are compressed, as torch.save never does")
        if len(set(names)) < len(names):
            raise ConversionError(f"{path}: refused, it has two entries of a name")
        for name in names:
            if name.endswith("data.pkl"):
                with archive.open(name) as file:
                    _check_globals(path, file)


def _check_globals(path: Path, file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument)):
            raise ConversionError(f"{path}: refused, it holds more than tensors and plain values: {argument!r:.80}")


@lru_cache(maxsize=2)  # few at a time: the pages of a mapped file are freed with it
def _unpickled(path: Path, role: str) -> dict[str, Tensor]:
    """Tensors of a file of `torch.save`, under the role's container key that its content has, if the role has any."""
    try:
        with path.open("rb") as file:
            is_zip = torch.serialization._is_zipfile(file)
        _check_pickles(path, is_zip)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path}: refused, it holds more than tensors and plain values: {error}") from error
    except ConversionError:
        raise
    except _GARBLED as error:
        raise ConversionError(f"{path}: truncated or not written by torch.save: {error}") from error
    keys = _CONTAINERS.get(role)
    if keys is not None:
        key = next((key for key in keys if isinstance(content, dict) and key in content), None)
        if key is None:
            raise ConversionError(f"{path}: expected a file of torch.save with the key {' or '.join(map(repr, keys))}")
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConversionError(f"{path}: expected tensors by name, got a {type(content).__name__}")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        # an expanded tensor names more values than the file has
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ConversionError(f"{path}: refused, {name!r} is no plain tensor that the file holds all values of")
    return tensors


@dataclass
class Source:
    """A file, or the weight files of a folder, whose tensors are read one at a time.

    Raises: ConversionError: no weights there, or a file that is truncated or holds more than tensors.
    """

    role: str  # what it is the source of: `llm`, `qformer`, `point_encoder` or `checkpoint`
    path: Path  # a file or a folder

    def __post_init__(self) -> None:
        self.files = self._find()
        self.file_of: dict[str, Path] = {}  # these three by a tensor's name in the file
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in self.files:
            for name, (shape, dtype) in self._shapes_and_dtypes(path).items():
                self.file_of[name], self.shapes[name], self.dtypes[name] = path, shape, dtype

    def _find(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if not self.path.exists():
            raise ConversionError(f"{self.path}: no such file or folder")
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if files := sorted(self.path.glob(pattern)):
                return files
        raise ConversionError(f"{self.path}: expected weights (*.safetensors or pytorch_model*.bin), found none")

    def _shapes_and_dtypes(self, path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if path.suffix != ".safetensors":
            return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _unpickled(path, self.role).items()}
        try:
            with safe_open(path, framework="pt") as file:
                # a slice knows shape and dtype before anything is read
                slices = {name: file.get_slice(name) for name in file.keys()}
                return {name: (tuple(lazy.get_shape()), _DTYPES[lazy.get_dtype()]) for name, lazy in slices.items()}
        except (SafetensorError, *storage.DAMAGED_TENSORS) as error:
            raise ConversionError(f"{path}: truncated or not a safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        path = self.file_of[name]
        if path.suffix != ".safetensors":
            return _unpickled(path, self.role)[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    def describe(self) -> dict[str, Any]:
        """Role, name and hashes, for `conversion.json`."""
        hashes = {path.name: storage.file_hash(path) for path in self.files}
        return {"role": self.role, "name": self.path.name, "sha256": hashes}


_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Piece(NamedTuple):
    """A tensor to write: where it comes from, its shape and dtype, and a function that reads it."""

    origin: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass
class Collection:
    """What the sources hold, and what became of every tensor of every source."""

    pieces: dict[str, Piece] = field(default_factory=dict)  # by this package's names
    report: list[dict[str, str]] = field(default_factory=list)  # per tensor: file, tensor, status and detail
    by_source: list[tuple[Source, dict[str, str]]] = field(default_factory=list)  # names: this package's -> the file's

    def note(self, tensor: str, status: str, detail: str, file: str = "") -> None:
        self.report.append({"file": file, "tensor": tensor, "status": status, "detail": detail})


def collect(sources: list[Source], other_llm: bool = False) -> Collection:
    """Every source's tensors under this package's names; of several files that hold a tensor the last one counts.

    Args:
        other_llm: the language model is another than the stage files were trained with, so of those only the point
            branch is used. A projector to the same width is left out too: it leads into the other model's space.

    Raises: ConversionError: no rule explains a tensor, or two names of a tensor hold different values.
    """
    collected = Collection()
    for source in sources:
        file = source.path.name
        names: dict[str, str] = {}  # this package's name -> the file's
        aliases: list[tuple[str, str]] = []  # names of a tensor that has another name already
        for name in source.shapes:
            try:
                target, reason = translate(source.role, name)
            except KeyError:
                raise ConversionError(f"{source.path}: nothing explains the tensor {name!r}") from None
            if other_llm and source.role == "checkpoint" and target and target.startswith(_OF_THE_LLM):
                target, reason = None, "of another language model"
            if target is None:
                collected.note(name, "ignored", reason, file)
            elif target not in names:
                names[target] = name
                collected.note(name, "used" if target == name else "renamed", target, file)
            else:
                aliases.append((name, names[target]))
        if f"{EXPERT}0" in names and "model.query_tokens" in names:
            aliases.append((names.pop("model.query_tokens"), names[f"{EXPERT}0"]))
        for name, same in aliases:
            if not torch.equal(source.read(name), source.read(same)):
                raise ConversionError(f"{source.path}: {name!r} and {same!r} are two names of one tensor but differ")
            collected.note(name, "alias", f"equal to {same}", file)
        pieces = {
            target: Piece(f"{file}:{name}", source.shapes[name], source.dtypes[name], partial(source.read, name))
            for target, name in names.items()
        }
        if source.role == "llm" and not other_llm:
            pieces = _join_qkv(source, pieces)
        for target in collected.pieces.keys() & pieces.keys():
            collected.note(target, "replaced", pieces[target].origin)
        collected.pieces |= pieces
        collected.by_source.append((source, names))
    if f"{EXPERT}0" in collected.pieces and (queries := collected.pieces.pop("model.query_tokens", None)):
        collected.note(queries.origin, "replaced", "by the query experts")
    return collected


def _join_qkv(source: Source, pieces: dict[str, Piece]) -> dict[str, Piece]:
    """A `query_key_value` in place of the three projections; a folder that has it already stays as it is."""
    try:
        heads = storage.read_json(source.path / "config.json").get("num_attention_heads")
    except (ValueError, OSError) as error:
        raise ConversionError(f"{source.path}: its configuration cannot be read: {error}") from error
    if not isinstance(heads, int) or heads < 1:
        raise ConversionError(f"{source.path / 'config.json'}: expected num_attention_heads, got {heads!r}")
    joined = {name: piece for name, piece in pieces.items() if not any(f".{split}." in name for split in _SPLIT)}
    for name in [name for name in pieces if ".q_proj." in name]:
        target = name.replace("q_proj", "query_key_value")
        if target in pieces:
            raise ConversionError(f"{source.path}: holds both {name!r} and {target!r}; expected one format of Phi-2")
        parts = []
        for split in _SPLIT:
            if (part := name.replace("q_proj", split)) not in pieces:
                raise ConversionError(f"{source.path}: {part.removeprefix(LLM)!r} is missing")
            parts.append(pieces[part])
        rows, *rest = parts[0].shape
        if rows % heads or any(part.shape != parts[0].shape for part in parts):
            raise ConversionError(
                f"{source.path}: {name.removeprefix(LLM)!r} has {rows} rows, expected a multiple of {heads} "
                "(num_attention_heads in config.json), the same in q, k and v"
            )

        def read(parts: list[Piece] = parts) -> Tensor:
            # published order of rows: [heads, 3, head_dim]
            return torch.stack([part.read().unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 2)

        joined[target] = Piece(" + ".join(part.origin for part in parts), (3 * rows, *rest), parts[0].dtype, read)
    return joined

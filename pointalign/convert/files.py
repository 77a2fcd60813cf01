"""Published weight files: their tensors under this package's names, read one at a time."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pointalign import storage
from pointalign.convert import tensors
from pointalign.convert.tensors import EXPERT, LLM

_CONTAINERS = {"qformer": ("model",), "point_encoder": ("base_model", "state_dict"), "checkpoint": ("model",)}
_SPLIT = ("q_proj", "k_proj", "v_proj")


class ConversionError(ValueError):
    """Files that cannot be converted; the message names the file and the tensor."""


@lru_cache(maxsize=2)  # few at a time: the pages of a mapped file are freed with it
def _unpickled(path: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors of a file of `torch.save`, under the first of `keys` that its content has; no keys: the content."""
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=torch.serialization._is_zipfile(path.open("rb"))
        )
    except pickle.UnpicklingError as error:
        raise ConversionError(f"{path}: refused, it holds more than tensors and plain values: {error}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ConversionError(f"{path}: truncated or not written by torch.save: {error}") from error
    if not keys:
        return content
    key = next((key for key in keys if isinstance(content, dict) and key in content), None)
    if key is None:
        raise ConversionError(f"{path}: expected a file of torch.save with the key {' or '.join(map(repr, keys))}")
    return {name: value for name, value in content[key].items() if isinstance(value, Tensor)}


@dataclass
class Source:
    """A file, or the weight files of a folder, whose tensors are read one at a time.

    Attributes:
        role: what it is the source of: `llm`, `qformer`, `point_encoder` or `checkpoint`.
        path: a file or a folder.
        files: the weight files.
        shapes, dtypes: of every tensor, by its name in the file.

    Raises:
        ConversionError: no weights there, or a file that is truncated or holds more than tensors.
    """

    role: str
    path: Path
    files: list[Path] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = self._find()
        self.file_of: dict[str, Path] = {}
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
            content = _unpickled(path, _CONTAINERS.get(self.role, ()))
            return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}
        try:
            with safe_open(path, framework="pt") as file:
                # a slice knows shape and dtype before anything is read
                slices = {name: file.get_slice(name) for name in file.keys()}
                return {name: (tuple(lazy.get_shape()), _DTYPES[lazy.get_dtype()]) for name, lazy in slices.items()}
        except (SafetensorError, KeyError) as error:
            raise ConversionError(f"{path}: truncated or not a safetensors file: {error}") from error

    def read(self, name: str) -> Tensor:
        path = self.file_of[name]
        if path.suffix != ".safetensors":
            return _unpickled(path, _CONTAINERS.get(self.role, ()))[name]
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
    """Pieces by this package's names, and what became of every tensor of every source.

    Attributes:
        pieces: by this package's names.
        report: an entry per tensor: file, tensor, status and detail.
        by_source: every source with its names, this package's -> the file's.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    report: list[dict[str, str]] = field(default_factory=list)
    by_source: list[tuple[Source, dict[str, str]]] = field(default_factory=list)

    def note(self, source: Source, name: str, status: str, detail: str = "") -> None:
        self.report.append({"file": source.path.name, "tensor": name, "status": status, "detail": detail})


def collect(sources: list[Source]) -> Collection:
    """Every source's tensors under this package's names; of several files that hold a tensor the last one counts.

    Raises:
        ConversionError: no rule explains a tensor, or two names of a tensor hold different values.
    """
    collected = Collection()
    for source in sources:
        names: dict[str, str] = {}  # this package's name -> the file's
        for name in source.shapes:
            try:
                target, reason = tensors.translate(source.role, name)
            except KeyError:
                raise ConversionError(f"{source.path}: nothing explains the tensor {name!r}") from None
            if target is None:
                collected.note(source, name, "ignored", reason)
            elif target not in names:
                names[target] = name
                collected.note(source, name, "used" if target == name else "renamed", target)
            elif torch.equal(source.read(name), source.read(names[target])):
                collected.note(source, name, "alias", f"equal to {names[target]}")
            else:
                raise ConversionError(
                    f"{source.path}: {name!r} and {names[target]!r} are two names of one tensor but differ"
                )
        expert = f"{EXPERT}0"
        if expert in names and "model.query_tokens" in names:
            first, queries = names[expert], names.pop("model.query_tokens")
            if not torch.equal(source.read(first), source.read(queries)):
                raise ConversionError(
                    f"{source.path}: {first!r} and {queries!r} are two names of one tensor but differ"
                )
            collected.note(source, queries, "alias", f"equal to {first}")
        pieces = {
            target: Piece(f"{source.path.name}:{name}", source.shapes[name], source.dtypes[name], _reader(source, name))
            for target, name in names.items()
        }
        if source.role == "llm":
            pieces = _join_qkv(source, pieces)
        for target in collected.pieces.keys() & pieces.keys():
            collected.report.append(
                {"file": "", "tensor": target, "status": "replaced", "detail": pieces[target].origin}
            )
        collected.pieces |= pieces
        collected.by_source.append((source, names))
    if f"{EXPERT}0" in collected.pieces and (queries := collected.pieces.pop("model.query_tokens", None)):
        collected.report.append(
            {"file": "", "tensor": queries.origin, "status": "replaced", "detail": "by the query experts"}
        )
    return collected


def _reader(source: Source, name: str) -> Callable[[], Tensor]:
    return lambda: source.read(name)


def _join_qkv(source: Source, pieces: dict[str, Piece]) -> dict[str, Piece]:
    """A `query_key_value` in place of the three projections; a folder that has it already stays as it is."""
    config = json.loads((source.path / "config.json").read_text())
    heads = config["num_attention_heads"]
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

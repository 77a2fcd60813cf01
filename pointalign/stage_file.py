"""The stage-file format: everything but the language model's weights, handed from one training stage to the next.

A stage file identifies the language model it was trained with and is refused by any other: adapters on the wrong
weights would answer garbage without an error.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pointalign import storage
from pointalign.model_options import CHECKPOINTS, READING_OPTIONS, DataOptions, ModelOptions
from pointalign.models import PointAlignForConditionalGeneration, adapters

STAGE_FILE = "stage.safetensors"
EXPERTS = "model.query_experts.queries"
SAMPLED_ROWS = 8  # of every matrix, in the fingerprint of a language model


def stage_state(model: nn.Module) -> dict[str, Tensor]:
    """All that a stage hands to the next: everything but the language model's weights.

    Norms that the published stages train beside the adapters (`trained_norms` of the class) are included.
    """
    norms = getattr(model.get_submodule("model.language_model"), "trained_norms", ())
    trained = tuple(f"{norm}.weight" for norm in norms)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".language_model." not in f".{name}" or ".lora_" in name or name.endswith(trained)
    }


# -- which language model a stage belongs to -------------------------------------------------------------------------


def weights_fingerprint(folder: Path, prefix: str = "") -> str:
    """Identifies the weights of a folder of safetensors files: names, shapes and a sample of every tensor.

    Read from the files and sampled in bfloat16, so the same model has the same fingerprint however it is loaded
    (float32, bfloat16, 4 bits) and cut into files. Of a matrix 8 rows count, of a vector everything: a fine-tune
    changes some of them. Files in another format count by size and 8 blocks of bytes, and only equal themselves.

    Args:
        prefix: only tensors whose names begin so, without it: `model.language_model.` in a converted folder.
    """
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        return _bytes_fingerprint(sorted(folder.glob("pytorch_model*.bin")))
    files: dict[str, Path] = {}
    for path in paths:
        _, shapes = _contents(path)
        files |= {name: path for name in shapes if name.startswith(prefix) and ".lora_" not in name}
    if not files:
        raise ValueError(f"{folder}: no tensor whose name begins with {prefix!r} in {len(paths)} safetensors files")
    digest = hashlib.sha256()
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in paths}
        for name in sorted(files):
            values = opened[files[name]].get_slice(name)
            shape = values.get_shape()
            digest.update(json.dumps([name.removeprefix(prefix), shape]).encode())
            if len(shape) < 2:  # a slice of a scalar cannot be read
                rows = [opened[files[name]].get_tensor(name).flatten()]
            else:
                rows = [values[row : row + 1] for row in _places(shape[0])]
            for row in rows:
                row = row.to(torch.bfloat16) if row.is_floating_point() else row
                digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _places(count: int) -> list[int]:
    """Up to `SAMPLED_ROWS` of `count` places, evenly spaced, the last among them."""
    number = min(SAMPLED_ROWS, count)
    return [count - 1 - place * count // number for place in range(number)]


def _bytes_fingerprint(paths: list[Path]) -> str:
    if not paths:
        raise FileNotFoundError("no weights: expected model*.safetensors or pytorch_model*.bin")
    digest, block = hashlib.sha256(), 1 << 16
    for path in paths:
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            for place in _places(-(-size // block)):
                file.seek(place * block)
                digest.update(file.read(block))
    return digest.hexdigest()[:16]


def embedding_fingerprint(language_model: nn.Module) -> str:
    """Identifies a language model by its sizes and 64 rows of its embeddings.

    Every stage file carries it. It does not tell a model from its fine-tunes: it decides only where the file or the
    model has no `weights_fingerprint`, as early files and models that came from no folder.
    """
    embedding = language_model.get_input_embeddings().weight
    sample = embedding.detach()[:: max(1, len(embedding) // 64)].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    config = language_model.config
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    return hashlib.sha256(json.dumps(shape).encode() + sample.tobytes()).hexdigest()[:16]


def _fingerprints(language_model: nn.Module) -> dict[str, str]:
    """Both fingerprints, as they stand in the header of a stage file."""
    header = {"language_model": embedding_fingerprint(language_model)}
    weights = getattr(language_model, "weights_fingerprint", None)  # set by `pointalign.build` when it reads a folder
    return header if weights is None else header | {"language_model_weights": weights}


# -- writing and reading ---------------------------------------------------------------------------------------------


def save_stage(model: PointAlignForConditionalGeneration, path: Path, description: dict[str, Any]) -> None:
    """Write a stage file, matrices in bfloat16, and `description` beside it as JSON.

    Vectors stay in fp32: a norm's weights are near 1, where bfloat16 would round away what training changed. Settings
    that change what the tensors mean, and that no tensor shows, go into the file's header.
    """
    config = model.config
    settings = {name: getattr(config, name) for name in ("adapters", "query_routing", "query_top_k", "name_threshold")}
    header = _fingerprints(model.model.language_model) | {"model": json.dumps(settings)}
    state = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for name, tensor in stage_state(model).items()
    }
    storage.write_tensors(path, state, header)
    storage.write_json(path.with_suffix(".json"), description)


def find_stage(checkpoint: str) -> Path:
    """A stage file by path, by the folder of the run that made it, or by the name of a shipped one."""
    for path in (Path(checkpoint), Path(checkpoint) / STAGE_FILE, CHECKPOINTS / f"{checkpoint}.safetensors"):
        if path.is_file():
            return path
    names = ", ".join(path.stem for path in CHECKPOINTS.glob("*.safetensors")) or "none"
    raise FileNotFoundError(
        f"model.checkpoint={checkpoint!r}: expected a stage file, a run's folder with {STAGE_FILE}, or the name of a "
        f"shipped checkpoint ({names})"
    )


def require_fold(checkpoint: str | None, fold: int | None) -> None:
    """Refuse a stage that was trained with other embedded objects held out: it may have seen the test objects.

    Raises: ValueError: `data.fold` in the stage's description is not `fold`.
    """
    if checkpoint is None:
        return
    description = find_stage(checkpoint).with_suffix(".json")
    trained = _section(description, "data").get("fold") if description.exists() else None
    if trained != fold:
        names = ["the committed split" if number is None else f"fold {number}" for number in (trained, fold)]
        raise ValueError(f"{checkpoint} was trained under {names[0]}, and may know objects that {names[1]} holds out")


def _contents(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Header and shapes of a safetensors file.

    Raises: ValueError: it is damaged; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, *storage.DAMAGED_TENSORS) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _settings(path: Path, header: dict[str, str]) -> dict[str, Any]:
    """The settings in a stage file's header: `adapters` of parts, `query_routing`, `query_top_k`, `name_threshold`.

    Early stage files have none. Raises: ValueError: they are not as `save_stage` writes them.
    """
    try:
        settings = storage.parse_json(header.get("model", "{}"))
    except ValueError as error:
        raise ValueError(f"{path}: the settings in its header are damaged: {error}") from error
    adapters = settings.get("adapters") or {}
    valid = isinstance(adapters, dict) and all(
        isinstance(adapter, dict) and isinstance(adapter.get("lora_alpha"), int | float)
        for adapter in adapters.values()
    )
    routing, top_k = settings.get("query_routing"), settings.get("query_top_k")
    valid = valid and isinstance(settings.get("name_threshold", 0.0), int | float)
    if not valid or routing not in (None, "sparse", "soft", "constant") or not isinstance(top_k, int | None):
        raise ValueError(f"{path}: the settings in its header are damaged: {str(settings)[:200]}")
    return settings | {"adapters": adapters}


def _section(description: Path, name: str) -> dict[str, Any]:
    """A section of the JSON file beside a stage file. Raises: ValueError: the file is damaged."""
    section = storage.read_json(description).get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"{description}: expected a JSON dict under {name!r}, got a {type(section).__name__}")
    return section


def adapted_parts(path: Path) -> set[str]:
    """The parts, `language_model` and `qformer`, that a stage file was trained with adapters on.

    Raises: ValueError: the file is damaged.
    """
    return set(_settings(path, _contents(path)[0])["adapters"])


def keeps_system_text(options: ModelOptions) -> bool:
    """Whether the chat template keeps the text that it puts into the system turn by itself: as the options say, else as
    the checkpoint was trained.

    Raises: FileNotFoundError, ValueError: the checkpoint is missing, or its description damaged.
    """
    value, beside = options.system_text, Path()
    if value is None and options.checkpoint is not None:
        beside = find_stage(options.checkpoint).with_suffix(".json")
        value = _section(beside, "model").get("system_text") if beside.is_file() else None
    if value not in (None, True, False):
        raise ValueError(f"{beside}: model.system_text is {value!r}, expected true or false")
    return value is not False


def trained_options(path: Path) -> tuple[ModelOptions, DataOptions]:
    """The options that build a stage file's model again for answering, from the description beside it.

    Raises: ValueError: the description is missing, damaged or names no model.
    """
    beside = path.with_suffix(".json")
    described = {name: _section(beside, name) for name in ("model", "data")} if beside.is_file() else {"model": {}}
    if not described["model"]:
        raise ValueError(
            f"{path}: expected {beside.name} beside it, which names the language model and the adapters that it was "
            f"trained with"
        )
    names = ("llm", "preset", "dtype", "lora_rank", "lora_alpha", "lora_targets", "qformer_lora_rank", "quantization")
    model = {name: described["model"][name] for name in names if name in described["model"]}
    data = {
        name: value for name, value in described["data"].items() if name in ("num_points", "up_axis", *READING_OPTIONS)
    }
    for section, values, defaults in (("model", model, ModelOptions()), ("data", data, DataOptions(num_points=0))):
        for name, value in values.items():
            if name != "lora_targets" and value is not None and type(value) is not type(getattr(defaults, name)):
                raise ValueError(f"{beside}: {section}.{name} is {value!r}, another type than that option has")
    options = ModelOptions(**model, checkpoint=str(path), train=[])
    options.system_text = keeps_system_text(options)
    return options, DataOptions(**data)


def load_stage(model: PointAlignForConditionalGeneration, path: Path, point_branch_only: bool = False) -> None:
    """Load a stage file; with `point_branch_only` without the adapters and norms of the language model.

    Raises: ValueError: it belongs to another language model, to other adapters, or does not fit.
    """
    _take_settings(model, path, model.config.adapters or {}, point_branch_only)
    _load(model, path, (".language_model.",) if point_branch_only else ())


def load_merged(model: PointAlignForConditionalGeneration, path: Path, described: dict[str, dict[str, Any]]) -> None:
    """Load a stage file with its adapters folded into the weights, to answer: see `adapters.merge`.

    Args:
        model: without adapters.
        described: arguments of `adapters.add` for every part that the stage was trained with adapters on.

    Raises: ValueError: it belongs to another language model, to other adapters, or does not fit.
    """
    _take_settings(model, path, described)
    stored = {name.replace(".base_layer.", "."): tensor for name, tensor in storage.load_tensors(path).items()}
    state = {name: tensor for name, tensor in stored.items() if ".lora_" not in name}
    storage.require_names(path, state, set(stage_state(model)))
    storage.copy_state(model, path, state)
    try:
        adapters.merge(model, {name: stored[name] for name in stored.keys() - state.keys()}, described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _take_settings(
    model: PointAlignForConditionalGeneration,
    path: Path,
    described: Mapping[str, Mapping[str, Any]],
    point_branch_only: bool = False,
) -> None:
    """Check that a stage file belongs to the model and its adapters, and take over what its header says.

    Raises: ValueError: it does not.
    """
    header, shapes = _contents(path)
    fingerprints = {} if point_branch_only else _fingerprints(model.model.language_model)
    for name, current in fingerprints.items():
        trained = header.get(name)
        if trained != current and (name == "language_model" or trained is not None):
            raise ValueError(
                f"{path} was trained with the language model {trained}, this one is {current}: its adapters would only "
                f"disturb it"
            )
    settings = _settings(path, header)
    if not point_branch_only:
        model.config.name_threshold = settings.get("name_threshold", 0.0)
    for part, adapter in described.items():
        before = settings["adapters"].get(part, adapter)["lora_alpha"]
        if before != adapter["lora_alpha"]:
            raise ValueError(
                f"{path} was trained with lora_alpha={before} on the {part}, this model has {adapter['lora_alpha']}: "
                f"its adapters would act at another strength"
            )
    if EXPERTS in shapes:
        queries = [model.config.num_query_tokens, model.config.qformer_config.hidden_size]
        if shapes[EXPERTS][1:] != queries:
            raise ValueError(
                f"{path}: {EXPERTS} has shape {shapes[EXPERTS]}, expected [experts, {queries[0]}, {queries[1]}]"
            )
        if model.model.query_experts is None:
            model.model.add_query_experts(shapes[EXPERTS][0])
        if settings.get("query_routing") is not None and settings.get("query_top_k") is not None:
            model.model.route_queries(settings["query_routing"], settings["query_top_k"])


def load_point_branch(model: PointAlignForConditionalGeneration, path: Path) -> None:
    """Load encoder, point MLP and Q-Former of a stage file in front of another language model.

    The modality projector leads into the language model that the stage was trained with, and is left as it is.

    Raises: ValueError: the stage has adapters on its Q-Former, or does not fit.
    """
    if "qformer" in adapted_parts(path):
        raise ValueError(f"{path} has adapters on its Q-Former: they act with the language model it was trained with")
    _load(model, path, (".language_model.", ".modality_projector."))


def _load(model: nn.Module, path: Path, ignored: tuple[str, ...]) -> None:
    expected = {name for name in stage_state(model) if not any(part in name for part in ignored)}
    storage.load_state(model, path, expected, ignored)

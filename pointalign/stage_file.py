"""The stage-file format: everything but the language model's own weights, handed from one training stage to the next.

A stage file names the language model it was trained with and is refused by any other: adapters on the wrong weights
would answer garbage without an error.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pointalign import storage
from pointalign.models import PointAlignForConditionalGeneration
from pointalign.options import CHECKPOINTS, DataOptions, ModelOptions

STAGE_FILE = "stage.safetensors"
EXPERTS = "model.query_experts.queries"


def stage_state(model: nn.Module) -> dict[str, Tensor]:
    """All that a stage hands to the next: everything but the language model's own weights.

    Norms that the published stages train beside the adapters (`trained_norms` of the class) are handed on too.
    """
    norms = getattr(model.get_submodule("model.language_model"), "trained_norms", ())
    kept = tuple(f"{norm}.weight" for norm in norms)
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".language_model." not in f".{name}" or ".lora_" in name or name.endswith(kept)
    }


def fingerprint(language_model: nn.Module) -> str:
    """Names a language model by its shape and a sample of its embedding matrix."""
    embedding = language_model.get_input_embeddings().weight
    sample = embedding.detach()[:: max(1, len(embedding) // 64)].to("cpu", torch.bfloat16).view(torch.int16).numpy()
    config = language_model.config
    shape = [config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size]
    return hashlib.sha256(json.dumps(shape).encode() + sample.tobytes()).hexdigest()[:16]


def save_stage(model: PointAlignForConditionalGeneration, path: Path, description: dict[str, Any]) -> None:
    """Write a stage file, matrices in bfloat16, and `description` beside it as JSON.

    Vectors stay in fp32: a norm's weights are near 1, where bfloat16 would round away what training changed. Numbers
    that no tensor tells, and that change what the tensors mean, go into the file's header.
    """
    config = model.config
    untold = {"adapters": config.adapters, "query_routing": config.query_routing, "query_top_k": config.query_top_k}
    header = {"language_model": fingerprint(model.model.language_model), "model": json.dumps(untold)}
    state = {
        name: one.to(torch.bfloat16) if one.is_floating_point() and one.ndim > 1 else one
        for name, one in stage_state(model).items()
    }
    storage.write_tensors(path, state, header)
    storage.write_json(path.with_suffix(".json"), description)


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


def require_fold(checkpoint: str | None, fold: int | None) -> None:
    """Refuse a stage that was trained with another part of the embedded objects held out: it may know what is asked.

    Raises: ValueError: the stage's own `data.fold`, as its description says, is not `fold`.
    """
    if checkpoint is None:
        return
    description = find_stage(checkpoint).with_suffix(".json")
    trained = json.loads(description.read_text()).get("data", {}).get("fold") if description.exists() else None
    if trained != fold:
        split = ["the committed split" if one is None else f"fold {one}" for one in (trained, fold)]
        raise ValueError(f"{checkpoint} was trained under {split[0]}, and may know objects that {split[1]} holds out")


def _stage_contents(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """Header and shapes of a stage file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_slice(name).get_shape() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def adapted_parts(path: Path) -> set[str]:
    """The parts, `language_model` and `qformer`, that a stage file was trained with adapters on."""
    header, shapes = _stage_contents(path)
    if "model" in header:
        return set(json.loads(header["model"])["adapters"] or {})
    return {name.split(".")[1] for name in shapes if ".lora_" in name}  # an early file


def trained_options(path: Path) -> tuple[ModelOptions, DataOptions]:
    """The options that build a stage file's model again, to answer, from what its run left beside it.

    Raises: ValueError: the JSON file beside it is missing or does not tell.
    """
    beside = path.with_suffix(".json")
    described = json.loads(beside.read_text()) if beside.is_file() else {}
    if "model" not in described:
        raise ValueError(
            f"{path}: expected {beside.name} beside it, which names the language model and the adapters that it was "
            f"trained with"
        )
    names = ("llm", "preset", "dtype", "lora_rank", "lora_alpha", "lora_targets", "qformer_lora_rank")
    model = {name: described["model"][name] for name in names if name in described["model"]}
    data = {name: value for name, value in described.get("data", {}).items() if name in ("num_points", "up_axis")}
    return ModelOptions(**model, checkpoint=str(path), train=[]), DataOptions(**data)


def load_stage(model: PointAlignForConditionalGeneration, path: Path, point_branch_only: bool = False) -> None:
    """Load a stage file; with `point_branch_only` not what it holds of the language model.

    Raises: ValueError: it belongs to another language model, to other adapters, or does not fit.
    """
    header, shapes = _stage_contents(path)
    own = None if point_branch_only else fingerprint(model.model.language_model)
    if (trained_with := header.get("language_model")) != own and not point_branch_only:
        raise ValueError(
            f"{path} was trained with the language model {trained_with}, this one is {own}: its adapters would only "
            f"disturb it"
        )
    untold = json.loads(header.get("model", "{}"))  # early stage files have none
    for part, adapter in (model.config.adapters or {}).items():
        before = (untold.get("adapters") or {}).get(part, adapter)["lora_alpha"]
        if before != adapter["lora_alpha"]:
            raise ValueError(
                f"{path} was trained with lora_alpha={before} on the {part}, this model has {adapter['lora_alpha']}: "
                f"its adapters would act at another strength"
            )
    if EXPERTS in shapes:
        if model.model.query_experts is None:
            model.model.add_query_experts(shapes[EXPERTS][0])
        if untold:
            model.model.route_queries(untold["query_routing"], untold["query_top_k"])
    expected, ignored = set(stage_state(model)), None
    if point_branch_only:
        ignored = ".language_model."
        expected = {name for name in expected if ignored not in name}
    storage.load_state(model, path, expected, ignored)

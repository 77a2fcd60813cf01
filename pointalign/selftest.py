"""A converted folder answers: one pass from a cloud to next-token scores, a layer in memory at a time.

Garbage weights show as values that are not finite, vanish or explode; the pass also leaves a fingerprint that a copy of
the folder must reproduce.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pointalign.published_files import ConversionError

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

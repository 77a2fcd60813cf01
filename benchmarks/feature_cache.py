"""What `pointalign features` costs an object, and how precise its features are, into one file of results.

    python benchmarks/feature_cache.py --output benchmarks/results/feature_cache_cpu.json

One thread, CPU seconds. Reading is that of files of 8192 coloured points. The paper's sizes have random weights: speed
and operations do not depend on them. Precision is that of the shipped stage 1 on embedded objects, against float32: all
products under bfloat16 autocast, with factors rounded as TF32 rounds them, and the rounding of the float16 that a cache
stores. Needs the embedded objects, which `pointalign assets` prepares.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from pointalign import assets, feature_cache, stage_file, storage
from pointalign.models import PointAlignConfig, PointAlignFeatureExtractor, PointAlignForConditionalGeneration

OBJECTS = 16
PAPER_BATCH = 2
QUERIES = (32, 768)  # of an object at the paper's sizes


class RoundedProducts(TorchFunctionMode):
    """Rounds the factors of every matrix product to the 10 bits after the point that TF32 keeps."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in (functional.linear, functional.scaled_dot_product_attention, torch.matmul, torch.bmm):
            factors = 3 if function is functional.scaled_dot_product_attention else 2
            arguments = (*(to_tf32(value) for value in arguments[:factors]), *arguments[factors:])
        return function(*arguments, **(options or {}))


def to_tf32(values: Tensor) -> Tensor:
    """float32 values rounded to 10 bits of mantissa, to nearest, halves away from zero."""
    bits = values.detach().contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def new_model(preset: str) -> PointAlignForConditionalGeneration:
    """A point branch with random weights before a language model of no size."""
    torch.manual_seed(0)
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    return PointAlignForConditionalGeneration(PointAlignConfig.from_preset(preset, text)).eval().requires_grad_(False)


def seconds_of(call: Callable[[], object], rounds: int = 2) -> float:
    """The least CPU seconds of some calls."""
    times = []
    for _ in range(rounds):
        began = process_time()
        call()
        times.append(process_time() - began)
    return min(times)


@torch.inference_mode()
def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    files = sorted((assets.embedded_objects() / "clouds").glob("*.npy"))[:OBJECTS]
    rows: dict[str, Any] = {}
    paper, mini = new_model("minigpt3d-phi2"), new_model("mini")
    for name, model, count in (("minigpt3d-phi2", paper, PAPER_BATCH), ("mini", mini, OBJECTS)):
        point = model.config.point_config
        extractor = PointAlignFeatureExtractor(point.num_points, max(point.num_groups, point.group_size))
        points = extractor(files[:count])["point_values"]
        with FlopCounterMode(display=False) as counter:
            model.get_qformer_features(points)  # also warms up
        rows[name] = {
            "batch": count,
            "operations": counter.get_total_flops() / count,
            "read_seconds": seconds_of(lambda extractor=extractor: extractor(files)) / len(files),
            "encode_seconds": seconds_of(lambda model=model, points=points: model.get_qformer_features(points)) / count,
        }
    with TemporaryDirectory() as folder:
        names, values = [str(number) for number in range(256)], torch.zeros(256, *QUERIES).numpy()
        began = process_time()
        feature_cache.write(folder, names, lambda ids: {"queries": values[: len(ids)]}, "0")
        rows["write_seconds"] = (process_time() - began) / len(names)
    return rows | {"precision": precision(mini, files)}


def precision(model: PointAlignForConditionalGeneration, files: list[Path]) -> dict[str, Any]:
    """Relative L2 errors of the shipped stage's Q-Former features: of all, and of the worst object."""
    stage = stage_file.find_stage("furniture-stage1")
    state = {name: tensor for name, tensor in storage.load_tensors(stage).items() if ".modality_projector." not in name}
    _, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    points = PointAlignFeatureExtractor(1024, 64)(files)["point_values"]
    exact = model.get_qformer_features(points)
    with torch.autocast("cpu", torch.bfloat16):
        bfloat16 = model.get_qformer_features(points).float()
    with RoundedProducts():
        tf32 = model.get_qformer_features(points)
    contenders = {"bfloat16 autocast": bfloat16, "TF32 products": tf32, "float16 storage": exact.half().float()}
    errors = {}
    for name, features in contenders.items():
        rows = (features - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        errors[name] = {"all": ((features - exact).norm() / exact.norm()).item(), "worst": rows.max().item()}
    distances = torch.cdist(exact.flatten(1), exact.flatten(1)).fill_diagonal_(float("inf")).min(dim=1).values
    between = (distances / exact.flatten(1).norm(dim=1)).median().item()
    return {"stage": stage.stem, "objects": len(files), "errors": errors, "nearest_other_object": between}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args(arguments).output
    origin = storage.provenance(torch.device("cpu"))
    storage.write_json(output, {"provenance": origin | {"threads": 1}, **measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())

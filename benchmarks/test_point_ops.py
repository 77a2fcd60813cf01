"""Sampling, grouping and the mini-PointNet against the reference and the packages a user could install instead.

    pytest benchmarks/test_point_ops.py --benchmark-only --results FOLDER

Contenders take turns (benchmarks/turns.py). Nothing is timed before every contender's result was checked: the index
set of the reference, or, for samplers that choose their own first point, that every sample is a farthest point.
`benchmarks/report.py` makes the table and the plot.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import point_op_contenders as contenders
import pytest
import torch
from point_op_contenders import Clouds, make_clouds
from turns import synchronize

from pointalign.models.point_encoder import fold_pointnet
from pointalign_kernels import farthest_point_sample, group_points, knn, point_ops, reference
from pointalign_kernels.folded_pointnet import folded_pointnet

CUDA = torch.cuda.is_available()
SCALING_POINTS = (1024, 4096, 8192, 16384, 32768, 65536)
SCALING_SAMPLES = (64, 256, 1024, 4096)

pytestmark = pytest.mark.skipif(
    ("cuda" if CUDA else "cpu") not in point_ops.NATIVE_DEVICES,
    reason=f"no native point ops for {'cuda' if CUDA else 'cpu'}: {point_ops._load_error or 'not built for it'}",
)


def label(shape: tuple[int, int, int, int]) -> str:
    return "clouds{}-points{}-samples{}-neighbours{}".format(*shape)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.getoption("--small")
    sizes = (256, 16, 8) if small else (8192, 512, 32)  # points, samples, neighbours
    batches = (1, 2) if small else (1, 16, 132) if CUDA else (1, 16)
    scaling = [(1, 512, 16), (1, 256, 32)]
    if not small:
        scaling = [(1, points, 512) for points in SCALING_POINTS] + [(1, 8192, samples) for samples in SCALING_SAMPLES]
    name = metafunc.function.__name__
    if name in ("test_sampling", "test_grouping"):
        metafunc.parametrize("shape", [(batch, *sizes) for batch in batches], ids=label)
    elif name == "test_latency":
        metafunc.parametrize("shape", [(1, *sizes)], ids=label)
    elif name == "test_pointnet":
        metafunc.parametrize("shape", [(2 if small else 16 if CUDA else 1, *sizes)], ids=label)
    elif name == "test_scaling":
        metafunc.parametrize("shape", [(*scale, sizes[2]) for scale in scaling], ids=label)


@pytest.fixture
def executor():
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        yield threads


def input_sets(device: torch.device, shape: tuple[int, int, int, int]) -> list[Clouds]:
    """Inputs that rotate: on a GPU several sets, or the L2 cache would flatter."""
    batch, points, samples, _ = shape
    number = max(2, min(8, 264 // batch)) if device.type == "cuda" else 2
    return [make_clouds(device, batch, points, samples, seed, "native") for seed in range(number)]


def rotating(call: Callable[[Clouds], object], sets: list[Clouds]) -> Callable[[], object]:
    turn = itertools.count()
    return lambda: call(sets[next(turn) % len(sets)])


def cuda_variant(name: str, call: Callable[[Clouds], object]) -> Callable[[Clouds], object]:
    """`call` with the CUDA ops in that variant, "scan" or "buckets", whatever they would choose."""

    def run(clouds: Clouds) -> object:
        os.environ["POINTALIGN_CUDA_POINT_OPS"] = name
        try:
            return call(clouds)
        finally:
            del os.environ["POINTALIGN_CUDA_POINT_OPS"]

    return run


def with_variants(device: torch.device, call: Callable[[Clouds], object]) -> dict[str, Callable[[Clouds], object]]:
    """The native op as it chooses to run and, on a GPU, in both variants."""
    names = ("scan", "buckets") if device.type == "cuda" else ()
    return {"native": call} | {f"native, {name}": cuda_variant(name, call) for name in names}


def row_of(name: str, shape: tuple[int, int, int, int], device: torch.device) -> dict:
    batch, points, samples, neighbours = shape
    row = {"race": name, "batch": batch, "points": points, "samples": samples, "neighbours": neighbours}
    row["threads"] = torch.get_num_threads()
    if device.type == "cpu":
        row["instruction_set"] = torch.ops.pointalign_kernels.instruction_set()
    return row


def run_race(race, record_race, row: dict, calls: dict[str, Callable[[], object]], check: Callable) -> None:
    """Checks every contender's result, then times those that fit into memory."""
    usable, too_large = {}, []
    for name, call in calls.items():
        try:
            check(name, call())
        except torch.OutOfMemoryError:
            too_large.append(name)
            torch.cuda.empty_cache()
        else:
            usable[name] = call
    timing = race(usable)
    if timing is not None:
        record_race("point_ops", row | timing | {"out_of_memory": too_large})


def check_sampler(sets: list[Clouds], name: str, result) -> None:
    """The first call of a contender reads the first set."""
    points = sets[0].points.cpu()
    for place in {0, len(points) - 1}:
        index = torch.as_tensor(np.asarray(result[place].cpu() if torch.is_tensor(result) else result[place]))
        assert contenders.is_farthest_throughout(points[place], index.long()), f"{name} is not exact"


def samplers(sets: list[Clouds], samples: int, executor: ThreadPoolExecutor) -> dict[str, Callable[[], object]]:
    native = partial(farthest_point_sample, num_samples=samples, impl="native")
    calls = with_variants(sets[0].points.device, lambda clouds: native(clouds.points))
    calls |= contenders.sampling_peers(sets[0], samples, executor)
    return {name: rotating(call, sets) for name, call in calls.items()}


def test_sampling(device, race, record_race, executor, shape):
    sets = input_sets(device, shape)
    samples = shape[2]
    truth = reference.farthest_point_sample(sets[0].points[:2].cpu(), samples)
    assert torch.equal(sets[0].index[:2].cpu(), truth)
    calls = samplers(sets, samples, executor)
    calls["python loop"] = rotating(lambda clouds: reference.farthest_point_sample(clouds.points, samples), sets)
    run_race(race, record_race, row_of("sampling", shape, device), calls, partial(check_sampler, sets))


def test_scaling(device, race, record_race, executor, shape):
    """One cloud, more points or more samples: native and the peers."""
    sets = input_sets(device, shape)
    calls = samplers(sets, shape[2], executor)
    run_race(race, record_race, row_of("scaling", shape, device), calls, partial(check_sampler, sets))


def groupers(sets: list[Clouds], k: int) -> dict[str, Callable[[], object]]:
    def native(clouds: Clouds, dtype: torch.dtype | None = None) -> torch.Tensor:
        return group_points(clouds.coloured, clouds.index, k, dtype=dtype, impl="native")

    batch, device = len(sets[0].points), sets[0].points.device
    calls = with_variants(device, native) | {"native, bf16 result": partial(native, dtype=torch.bfloat16)}
    if device.type == "cuda":
        calls["torch distance + topk + gather"] = lambda clouds: contenders.topk_group(clouds.coloured, clouds.index, k)
        if batch == 16:  # one compilation, at the size that the table shows
            compiled = torch.compile(contenders.topk_group)
            calls["the same, torch.compile"] = lambda clouds: compiled(clouds.coloured, clouds.index, k)
    else:
        calls["torch distance + topk + gather"] = lambda clouds: contenders.topk_group_one_by_one(
            clouds.coloured, clouds.index, k
        )
        calls["scipy KDTree, without the gather"] = lambda clouds: contenders.kdtree_neighbours(
            clouds.coloured, clouds.index, k
        )
    return {name: rotating(call, sets) for name, call in calls.items()}


def check_grouper(clouds: Clouds, k: int, name: str, result) -> None:
    """Against the reference on the first cloud: its groups, or for scipy its neighbours."""
    points, index = clouds.coloured[:1].cpu(), clouds.index[:1].cpu()
    if name.startswith("scipy"):
        centres = points[:, index[0], :3]
        same = result[0] == knn(centres, points, k, impl="reference")[1][0].numpy()
        assert same.mean() > 0.999, f"{name}: {same.mean():.4f} of the neighbours are right"
        return
    truth = reference.group_points(points, index, k)
    groups = result[0].cpu().view(truth.shape)
    if name in ("native", "native, scan", "native, buckets"):
        assert torch.equal(groups, truth)
    elif groups.dtype == torch.bfloat16:
        assert torch.equal(groups, truth.bfloat16())
    else:  # equal distances may come in another order
        torch.testing.assert_close(groups.sum(2), truth.sum(2), msg=lambda text: f"{name}: {text}")


def test_grouping(device, race, record_race, shape):
    sets = input_sets(device, shape)
    calls = groupers(sets, shape[3])
    check = partial(check_grouper, sets[0], shape[3])
    run_race(race, record_race, row_of("grouping", shape, device), calls, check)


def test_latency(device, race, record_race, shape):
    """A single cloud as a chat has it: sampled, grouped and waited for."""
    sets = input_sets(device, shape)
    _, _, samples, k = shape

    def tokens(clouds: Clouds) -> torch.Tensor:
        index = farthest_point_sample(clouds.points, samples, impl="native")
        groups = group_points(clouds.coloured, index, k, impl="native")
        synchronize(device)
        return groups

    calls = {name: rotating(call, sets) for name, call in with_variants(device, tokens).items()}
    check = partial(check_grouper, sets[0], k)
    run_race(race, record_race, row_of("latency", shape, device), calls, check)


def test_pointnet(device, race, record_race, shape):
    clouds = input_sets(device, shape)[0]
    groups = group_points(clouds.coloured, clouds.index, shape[3], impl="native")
    first, second = (module.to(device) for module in contenders.mini_pointnet())
    folded = fold_pointnet(first, second)

    def check(name: str, result: torch.Tensor) -> None:
        torch.testing.assert_close(result, contenders.plain_pointnet(first, second, groups), rtol=1e-3, atol=1e-3)

    with torch.inference_mode():
        calls = {
            "folded": lambda: folded_pointnet(groups, folded),
            "plain": lambda: contenders.plain_pointnet(first, second, groups),
        }
        run_race(race, record_race, row_of("pointnet", shape, device), calls, check)

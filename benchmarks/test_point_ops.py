"""Benchmarks of the point ops against the reference and the wheels a user could install instead.

    pytest benchmarks/test_point_ops.py            # writes benchmarks/results/point_ops_{cpu,cuda}.json, plot and table

Contenders take turns within every round, so that what else the machine does falls on all of them alike. Nothing is
timed before every contender's result was checked: the index set of the reference, or, for samplers that choose their
own first point, that every sample is a farthest point.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pointalign.models.point_encoder import fold_pointnet
from pointalign_kernels import farthest_point_sample, group_points, point_ops, reference

RESULTS = Path(__file__).parent / "results"
BATCH, POINTS, SAMPLES, NEIGHBOURS, THREADS = 16, 8192, 512, 32, 2
ROUNDS = 31
SCALING_N = (1024, 4096, 8192, 16384, 32768, 65536)
SCALING_K = (64, 256, 1024, 4096)


def clouds(batch: int, num_points: int, seed: int = 0) -> Tensor:
    """Surfaces: ellipsoids and boxes of random proportions, in the unit ball, rows in random order. `[B, N, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    points = nn.functional.normalize(torch.randn(batch, num_points, 3, generator=generator), dim=-1)
    box = points / points.abs().amax(dim=-1, keepdim=True)
    points = torch.where((torch.arange(batch) % 2 == 0)[:, None, None], points, box)
    points = points * (0.2 + torch.rand(batch, 1, 3, generator=generator))
    return points / points.norm(dim=-1).amax(dim=-1)[:, None, None]


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def race(contenders: Mapping[str, Callable], device: str, rounds: int = ROUNDS, slow: tuple = ()) -> dict:
    """Milliseconds per call (p20, p50, p80, minimum); the `slow` ones run in three rounds only."""
    for name, call in contenders.items():
        if name not in slow:
            call()
    times = {name: [] for name in contenders}
    for number in range(rounds):
        for name, call in contenders.items():
            if name not in slow or number < 3:
                times[name].append(timed(call, device))
    rows = {}
    for name, values in times.items():
        p20, p50, p80 = np.percentile(values, (20, 50, 80)).tolist()
        rows[name] = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "min_ms": min(values), "rounds": len(values)}
    return rows


def farthest_throughout(points: Tensor, index: Tensor) -> bool:
    nearest = torch.full((len(points),), float("inf"))
    for previous, newest in pairwise(index):
        nearest = torch.minimum(nearest, reference.squared_distance(points, points[previous]))
        if nearest[newest] < nearest.max() * (1 - 1e-5):
            return False
    return True


def fps_peers(points: Tensor, num_samples: int, executor: ThreadPoolExecutor) -> dict[str, Callable]:
    """Every exact mode of the installed CPU wheels; fpsample takes one cloud at a time, so threads share the clouds."""
    peers: dict[str, Callable] = {}
    arrays = list(points.numpy())
    if importlib.util.find_spec("fpsample"):
        import fpsample  # pyright: ignore[reportMissingImports]

        def modes(array):
            yield "fps_sampling", lambda a: fpsample.fps_sampling(a, num_samples, start_idx=0)
            yield "kdtree", lambda a: fpsample.bucket_fps_kdtree_sampling(a, num_samples, start_idx=0)
            for h in (3, 5, 7, 9):
                if 2**h <= len(array):
                    yield (
                        f"kdline h={h}",
                        lambda a, h=h: fpsample.bucket_fps_kdline_sampling(a, num_samples, h, start_idx=0),
                    )

        for name, sample in modes(arrays[0]):
            peers[f"fpsample {name}"] = lambda sample=sample: list(executor.map(sample, arrays))
    if importlib.util.find_spec("torch_quickfps"):
        import torch_quickfps  # pyright: ignore[reportMissingImports]

        for h in (3, 5, 7, 9):
            if 2**h <= points.shape[1]:
                peers[f"torch-quickfps h={h}"] = lambda h=h: torch_quickfps.sample_idx(
                    points, num_samples, h=h, start_idx=0
                )
    return peers


def topk_group(points: Tensor, centre_index: Tensor) -> Tensor:
    """What point encoders usually do: all distances, topk, gather."""
    batch = torch.arange(len(points), device=points.device)[:, None]
    centres = points[batch, centre_index]
    distance = reference.squared_distance(centres[:, :, None], points[:, None])
    index = distance.topk(NEIGHBOURS, dim=-1, largest=False).indices
    groups = points[batch[..., None], index]
    return torch.cat([groups[..., :3] - centres[:, :, None, :3], groups[..., 3:]], dim=-1)


def kdtree_neighbours(points: Tensor, centre_index: Tensor) -> list:
    from scipy.spatial import KDTree

    found = []
    for cloud, index in zip(points[..., :3].numpy(), centre_index.numpy(), strict=True):
        found.append(KDTree(cloud).query(cloud[index], NEIGHBOURS, workers=THREADS)[1])
    return found


def mini_pointnet(channels: int = 6, width: int = 256) -> tuple[nn.Sequential, nn.Sequential]:
    def block(columns, hidden, out):
        return nn.Sequential(
            nn.Conv1d(columns, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Conv1d(hidden, out, 1)
        ).eval()

    torch.manual_seed(0)
    return block(channels, width // 2, width), block(2 * width, 2 * width, width)


def plain_pointnet(first: nn.Sequential, second: nn.Sequential, groups: Tensor) -> Tensor:
    batch, num_groups, neighbours, _ = groups.shape
    features = first(groups.flatten(0, 1).transpose(1, 2))
    shared = features.amax(dim=2, keepdim=True).expand(-1, -1, neighbours)
    return second(torch.cat([shared, features], dim=1)).amax(dim=2).view(batch, num_groups, -1)


def machine(device: str) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    versions = {}
    for name in ("torch", "numpy", "scipy", "fpsample", "torch-quickfps", "torch-fps", "triton"):
        if importlib.util.find_spec(name.replace("-", "_")):
            versions[name] = importlib.metadata.version(name)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit.stdout.strip() + ("+" if dirty.stdout else ""),
        "cpu": model,
        "instruction_set": torch.ops.pointalign_kernels.instruction_set(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }
    if device == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        record |= {"gpu": torch.cuda.get_device_name(), "driver": driver.stdout.strip(), "cuda": torch.version.cuda}
    return record


def write(name: str, record: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f"{name}.json.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(RESULTS / f"{name}.json")


@pytest.mark.skipif("cpu" not in point_ops.NATIVE_DEVICES, reason="no native CPU point ops")
def test_cpu():
    torch.set_num_threads(THREADS)
    points = clouds(BATCH, POINTS)
    coloured = torch.cat([points, torch.rand(BATCH, POINTS, 3)], dim=-1).contiguous()
    index = farthest_point_sample(points, SAMPLES, impl="native")
    assert torch.equal(index[:2], reference.farthest_point_sample(points[:2], SAMPLES))
    groups = group_points(coloured, index, NEIGHBOURS, impl="native")
    assert torch.equal(groups[:2], reference.group_points(coloured[:2], index[:2], NEIGHBOURS))

    with ThreadPoolExecutor(THREADS) as executor:
        peers = fps_peers(points, SAMPLES, executor)
        for name, sample in peers.items():
            result = sample()
            first = torch.as_tensor(np.asarray(result[0]).astype("int64"))
            assert farthest_throughout(points[0], first), f"{name} is not exact"
        sampling = {
            "native": lambda: farthest_point_sample(points, SAMPLES, impl="native"),
            **peers,
            "python loop": lambda: reference.farthest_point_sample(points, SAMPLES),
        }
        fps_rows = race(sampling, "cpu", slow=("python loop",))

        grouping = {
            "native": lambda: group_points(coloured, index, NEIGHBOURS, impl="native"),
            "native, bf16 result": lambda: group_points(coloured, index, NEIGHBOURS, dtype=torch.bfloat16),
            "scipy cKDTree, without the gather": lambda: kdtree_neighbours(coloured, index),
            "torch distance + topk + gather": lambda: [
                topk_group(coloured[b : b + 1], index[b : b + 1]) for b in range(BATCH)
            ],
        }
        assert np.mean(kdtree_neighbours(coloured[:1], index[:1])[0] == nearest_index(points, index)) > 0.999
        torch.testing.assert_close(topk_group(coloured[:1], index[:1]).sum(2), groups[:1].sum(2))
        group_rows = race(grouping, "cpu", slow=("torch distance + topk + gather",))

        first, second = mini_pointnet()
        folded = fold_pointnet(first, second)
        with torch.no_grad():
            torch.testing.assert_close(folded.forward(groups[:1]), plain_pointnet(first, second, groups[:1]))
            pointnet_rows = race(
                {
                    "folded": lambda: folded.forward(groups[:1]),
                    "plain": lambda: plain_pointnet(first, second, groups[:1]),
                },
                "cpu",
                rounds=9,
            )

        scaling = []
        for num_points, num_samples in [(n, SAMPLES) for n in SCALING_N] + [(POINTS, k) for k in SCALING_K]:
            cloud = clouds(1, num_points, seed=num_points)
            contenders = {"native": lambda c=cloud, k=num_samples: farthest_point_sample(c, k, impl="native")}
            contenders |= fps_peers(cloud, num_samples, executor)
            scaling.append({"points": num_points, "samples": num_samples, "rows": race(contenders, "cpu", rounds=7)})
    record = {
        **machine("cpu"),
        "configuration": f"{BATCH} clouds of {POINTS} points, {SAMPLES} samples, {NEIGHBOURS} neighbours, fp32",
        "sampling": fps_rows,
        "grouping": group_rows,
        "pointnet": {"configuration": "1 cloud, 512 groups of 32, width 256, fp32", **pointnet_rows},
        "scaling": scaling,
    }
    write("point_ops_cpu", record)
    table("cpu", record)
    plot("cpu", record)


def nearest_index(points: Tensor, index: Tensor) -> np.ndarray:
    queries = points[:1][torch.arange(1)[:, None], index[:1]]
    return point_ops.knn(queries, points[:1], NEIGHBOURS, impl="native")[1][0].numpy()


@pytest.mark.skipif(
    "cuda" not in point_ops.NATIVE_DEVICES or not torch.cuda.is_available(), reason="needs a CUDA build and a GPU"
)
def test_cuda():
    sets = [clouds(BATCH, POINTS, seed).cuda() for seed in range(8)]  # rotating inputs: the L2 cache does not flatter
    coloured = [torch.cat([points, torch.rand_like(points)], dim=-1).contiguous() for points in sets]
    indices = [farthest_point_sample(points, SAMPLES, impl="native") for points in sets]
    expected = farthest_point_sample(sets[0].cpu(), SAMPLES)
    assert torch.equal(indices[0].cpu(), expected)
    groups = group_points(coloured[0], indices[0], NEIGHBOURS, impl="native")
    assert torch.equal(groups.cpu(), group_points(coloured[0].cpu(), expected, NEIGHBOURS))
    turn = iter(range(10**9))

    def rotating(call):
        return lambda: call(next(turn) % len(sets))

    sampling = {
        "native": rotating(lambda i: farthest_point_sample(sets[i], SAMPLES, impl="native")),
        "python loop": rotating(lambda i: reference.farthest_point_sample(sets[i], SAMPLES)),
    }
    if importlib.util.find_spec("torch_quickfps"):
        import torch_quickfps  # pyright: ignore[reportMissingImports]

        sampling["torch-quickfps"] = rotating(lambda i: torch_quickfps.sample_idx(sets[i], SAMPLES, start_idx=0))
    if importlib.util.find_spec("torch_fps"):
        import torch_fps  # pyright: ignore[reportMissingImports]  (a CUDA-only wheel)

        everything = torch.ones(BATCH, POINTS, dtype=torch.bool, device="cuda")
        sampling["torch-fps"] = rotating(
            lambda i: torch_fps.farthest_point_sampling(
                sets[i], everything, SAMPLES, random_start=False, validate=False, assume_finite=True
            )
        )
    for name, sample in sampling.items():
        index = sample()[0].cpu()
        cloud = sets[(next(turn) - 1) % len(sets)][0].cpu()
        assert farthest_throughout(cloud, index), f"{name} is not exact"
    fps_rows = race(sampling, "cuda", slow=("python loop",))
    compiled = torch.compile(topk_group)
    group_rows = race(
        {
            "native": rotating(lambda i: group_points(coloured[i], indices[i], NEIGHBOURS, impl="native")),
            "native, bf16 result": rotating(
                lambda i: group_points(coloured[i], indices[i], NEIGHBOURS, dtype=torch.bfloat16, impl="native")
            ),
            "torch distance + topk + gather": rotating(lambda i: topk_group(coloured[i], indices[i])),
            "the same, torch.compile": rotating(lambda i: compiled(coloured[i], indices[i])),
        },
        "cuda",
    )
    first, second = (module.cuda() for module in mini_pointnet())
    folded = fold_pointnet(first, second)
    with torch.no_grad():
        pointnet_rows = race(
            {
                "folded": lambda: folded.forward(groups),
                "plain": lambda: plain_pointnet(first, second, groups),
            },
            "cuda",
        )
    scaling = []
    for num_points, num_samples in [(n, SAMPLES) for n in SCALING_N] + [(POINTS, k) for k in SCALING_K]:
        cloud = clouds(1, num_points, seed=num_points).cuda()
        contenders = {"native": lambda c=cloud, k=num_samples: farthest_point_sample(c, k, impl="native")}
        scaling.append({"points": num_points, "samples": num_samples, "rows": race(contenders, "cuda", rounds=15)})
    record = {
        **machine("cuda"),
        "configuration": f"{BATCH} clouds of {POINTS} points, {SAMPLES} samples, {NEIGHBOURS} neighbours, fp32",
        "sampling": fps_rows,
        "grouping": group_rows,
        "pointnet": {"configuration": f"{BATCH} clouds, 512 groups of 32, width 256, fp32", **pointnet_rows},
        "scaling": scaling,
    }
    write("point_ops_cuda", record)
    table("cuda", record)
    plot("cuda", record)


def table(device: str, record: dict) -> None:
    """A Markdown fragment: median milliseconds and how many times the native op is faster."""
    where = (
        f"{record['gpu']}, driver {record['driver']}"
        if device == "cuda"
        else (f"{record['cpu']}, {record['instruction_set']}, {record['threads']} threads")
    )
    lines = [f"{record['configuration']}; {where}; torch {record['versions']['torch']}; commit {record['commit']}, "]
    lines[0] += f"{record['date']}. Medians of {ROUNDS} rounds in turns; load average {record['load_average']:.1f}."
    for title, key, best in (
        ("Sampling", "sampling", "native"),
        ("Grouping", "grouping", "native"),
        ("Mini-PointNet", "pointnet", "folded"),
    ):
        rows = {name: row for name, row in record[key].items() if name != "configuration"}
        lines += [
            "",
            f"| {title} | median ms | p20-p80 | native is faster by |".replace("native", best),
            "|---|---|---|---|",
        ]
        for name, row in sorted(rows.items(), key=lambda item: item[1]["p50_ms"]):
            ratio = row["p50_ms"] / rows[best]["p50_ms"]
            lines.append(f"| {name} | {row['p50_ms']:.3g} | {row['p20_ms']:.3g}-{row['p80_ms']:.3g} | {ratio:.3g} x |")
    (RESULTS / f"point_ops_{device}_table.md").write_text("\n".join(lines) + "\n")


def plot(device: str, record: dict) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, key, fixed, value in ((left, "points", "samples", SAMPLES), (right, "samples", "points", POINTS)):
        entries = sorted((e for e in record["scaling"] if e[fixed] == value), key=lambda e: e[key])
        for family in ("native", "fpsample", "torch-quickfps"):
            best = [[r["p50_ms"] for n, r in e["rows"].items() if n.startswith(family)] for e in entries]
            if all(best):
                label = family if family == "native" else f"{family}, best exact mode"
                axis.loglog([e[key] for e in entries], [min(values) for values in best], marker="o", label=label)
        axis.set_xlabel(f"{key} ({value} {fixed})")
        axis.grid(True, which="both", alpha=0.3)
    left.set_ylabel("ms per cloud")
    left.legend()
    name = record.get("gpu", f"{record['cpu']}, {record['instruction_set']}")
    figure.suptitle(f"Farthest-point sampling, one cloud: {name}, {record['commit']}, {record['date']}")
    figure.tight_layout()
    figure.savefig(RESULTS / f"point_ops_{device}.svg", metadata={"Date": None})

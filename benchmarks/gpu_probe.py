"""Where the microseconds go on this card: its ceilings, every tile of every launch beside cuBLAS, kernels of one step.

    PYTHONPATH=.:kernels python benchmarks/gpu_probe.py --output FOLDER
        [--sections ceilings,launches,alignment,points,step]

Each section is written to FOLDER/gpu_probe_<card>.json as it ends; a section that fails is recorded with its error and
does not stop the next, but the exit status says so. Times are microseconds, medians of CUDA graph replays unless the
name says otherwise. `--rehearse` starts everything in small on a CPU: kernels of the alignment loss are then compiled
for compute capability 90 and not run.
"""

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alignment_candidates import BACKWARD, LINEAR, under
from alignment_model import words
from alignment_tma import by_tma
from torch import Tensor

from pointalign.storage import device_name, provenance
from pointalign_kernels import alignment_triton as kernels
from pointalign_kernels import farthest_point_sample, group_points
from pointalign_kernels.alignment_tiles import BackwardTile, Tile, Tiles

ROWS, HIDDEN, WIDTH, FEATURES = 512, 2560, 1664, 768
CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CARD else torch.device("cpu")
TOP_KERNELS = 25


def median_us(call: Callable[[], object]) -> float:
    """Microseconds of one call; on a CPU, where nothing is to be measured, the wall clock of the first."""
    if CARD:
        import triton

        milliseconds: Any = triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median")
        return 1e3 * milliseconds
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def measured_ceilings() -> dict[str, float]:
    """FLOP/s of a large bf16 product on random data, bytes/s (read + written) of a large copy, and two small ones."""
    size, numbers, cached = (8192, 2**28, 2**22) if CARD else (256, 2**20, 2**16)
    matrix = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    source = torch.randn(numbers, device=DEVICE)
    target = torch.empty_like(source)
    small = torch.randn(cached, device=DEVICE)  # 16 MB: stays in the L2 cache
    return {
        "flops": 2e6 * size**3 / median_us(lambda: matrix @ matrix),
        "bytes": 2e6 * source.nbytes / median_us(lambda: target.copy_(source)),
        "l2_bytes": 1e6 * small.nbytes / median_us(lambda: small.sum()),
        "empty_launch_us": median_us(lambda: torch.zeros(1, device=DEVICE)),
    }


def draw(*shape: int) -> Tensor:
    """One group `[1, *shape]` of random numbers in bf16, scaled by the width."""
    return torch.randn(1, *shape, device=DEVICE, dtype=torch.bfloat16) * shape[-1] ** -0.5


def launches() -> dict[str, dict[str, float | str]]:
    """Each launch of the alignment loss at M = 512 in bf16 under every tile, and the same products by cuBLAS."""
    x, a, y = draw(ROWS, HIDDEN), draw(ROWS, WIDTH), draw(ROWS, FEATURES)
    w1, w2, w3 = draw(WIDTH, HIDDEN), draw(WIDTH, WIDTH), draw(FEATURES, WIDTH)
    b1, db3 = draw(WIDTH), draw(FEATURES)
    z, out = a.clone(), torch.empty_like(a)
    dx1, dw1, dw2, dw3 = (torch.empty_like(tensor) for tensor in (x, w1, w2, w3))
    db1, upstream = torch.empty_like(b1), torch.ones(1, device=DEVICE)
    # launch -> (ours, the products alone by cuBLAS); names as in pointalign_kernels/alignment_triton.py
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "F1": (lambda: kernels.linear(x, w1, b1, z, out), lambda: torch.addmm(b1[0], x[0], w1[0].mT)),
        "F2": (lambda: kernels.linear(a, w2, b1, z, out), lambda: torch.addmm(b1[0], a[0], w2[0].mT)),
        "F3": (lambda: kernels.linear(a, w3, None, None, None), lambda: a[0] @ w3[0].mT),
        "B3": (
            lambda: kernels.backward(y, w3, a, z, upstream, out, dw3, db3),
            lambda: (y[0] @ w3[0], y[0].mT @ a[0]),
        ),
        "B2": (lambda: kernels.backward(a, w2, a, z, None, out, dw2, db1), lambda: (a[0] @ w2[0], a[0].mT @ a[0])),
        "B1": (
            lambda: kernels.backward(a, w1, x, None, None, dx1, dw1, db1),
            lambda: (a[0] @ w1[0], a[0].mT @ x[0]),
        ),
    }
    table, capability = kernels._tiles(x.device, x.dtype), kernels._capability(x.device)
    linear = dict.fromkeys([*table.linear, *LINEAR.get(capability, ())])
    backward = dict.fromkeys([*table.backward, *BACKWARD.get(capability, ())])
    measured = {}
    for name, (ours, cublas) in calls.items():
        times: dict[str, float | str] = {"table": median_us(ours), "cuBLAS, no epilogue": median_us(cublas)}
        for tile in linear if name.startswith("F") else backward:
            times[words(tile)] = _under_tile(tile, ours)
        if capability == 90:
            with by_tma():
                times["TMA"] = median_us(ours)
        measured[name] = times
    return measured


def _under_tile(tile: Tile | BackwardTile, launch: Callable[[], object]) -> float | str:
    """Microseconds of a launch that takes this tile, or what a tile too large for the card raises."""
    from triton.runtime.errors import OutOfResources

    linear, backward = ((), (tile,)) if isinstance(tile, BackwardTile) else ((tile,), ())
    try:
        with under(Tiles(linear, 0, backward, 0)):
            return median_us(launch)
    except (OutOfResources, RuntimeError) as error:  # one tile that fails must not lose the others' times
        return str(error)[:200]


def by_kernel(call: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Microseconds of one call on the wall clock and on the device, the number of kernels, the longest kernels.

    Launching is the limit where `wall_us` is far above `busy_us`. The profiler itself slows the wall clock, so that is
    taken without it.
    """
    from torch.profiler import ProfilerActivity, profile

    call()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    wall = 1e6 * (time.perf_counter() - start) / repeats
    with profile(activities=[ProfilerActivity.CUDA if CARD else ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            call()
        synchronize()
    events = profiler.key_averages()
    times = {
        event.key[:90]: (event.self_device_time_total if CARD else event.self_cpu_time_total) / repeats
        for event in events
    }
    longest = sorted(times.items(), key=lambda item: -item[1])[:TOP_KERNELS]
    return {
        "wall_us": wall,
        "busy_us": sum(times.values()),
        "kernels": sum(event.count for event in events) / repeats,
        "longest_us": dict(longest),
    }


def synchronize() -> None:
    if CARD:
        torch.cuda.synchronize()


def alignment() -> dict[str, dict[str, Any]]:
    """Forward and backward at M = 512 as one CUDA graph, in both precisions, by kernel."""
    from test_alignment_loss import Case, passes

    implementation, rows, repeats = ("fused-graph", ROWS, 50) if CARD else ("reference", 8, 1)
    measured = {}
    for precision in ("bf16", "autocast"):
        _, steps = passes(Case(rows, HIDDEN, precision), implementation)
        measured[precision] = by_kernel(lambda steps=steps: steps["both"](0), repeats)
    return measured


def points() -> dict[str, float]:
    """Sampling and grouping of 8192 points at batches that leave the card empty, fill it in part and fill it."""
    batches, num_points, samples, neighbours = ((1, 16, 132), 8192, 512, 32) if CARD else ((1, 2), 256, 16, 8)
    measured = {}
    for batch in batches:
        clouds = torch.nn.functional.normalize(torch.randn(batch, num_points, 3), dim=-1).to(DEVICE)
        coloured = torch.cat([clouds, torch.rand_like(clouds)], dim=-1).contiguous()
        index = farthest_point_sample(clouds, samples, impl="native")
        expected = farthest_point_sample(clouds[:2].cpu(), samples)
        if not torch.equal(index[:2].cpu(), expected):
            raise AssertionError(f"farthest-point sampling of {batch} clouds differs from the CPU's")
        measured[f"sampling, {batch} clouds"] = median_us(
            lambda clouds=clouds: farthest_point_sample(clouds, samples, impl="native")
        )
        measured[f"grouping, {batch} clouds"] = median_us(
            lambda clouds=coloured, index=index: group_points(
                clouds, index, neighbours, dtype=torch.bfloat16, impl="native"
            )
        )
    return measured


def step() -> dict[str, dict[str, Any]]:
    """A training step of the common stack (row b3) and of everything (row e), by kernel."""
    import train_step_rows as train

    measured = {}
    for row in (train.E, train.B3):
        config = train.text_config()
        batch = train.make_batch(train.whole_config(config), 16 if CARD else 2, 0)
        with train.prepared(row, config, train.RANK) as (aligned, loss):
            optimizer = torch.optim.AdamW([p for p in aligned.parameters() if p.requires_grad], lr=3e-6)

            def train_once(loss=loss, batch=batch, optimizer=optimizer) -> None:
                loss(batch)
                optimizer.step()
                optimizer.zero_grad()

            train_once()
            measured[row.name] = by_kernel(train_once, 3 if CARD else 1)
        if CARD:
            torch.cuda.empty_cache()
    return measured


SECTIONS: dict[str, Callable[[], dict]] = {
    "ceilings": measured_ceilings,
    "launches": launches,
    "alignment": alignment,
    "points": points,
    "step": step,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas; ceilings always run")
    parser.add_argument("--rehearse", action="store_true", help="in small on a CPU, where nothing is measured")
    options = parser.parse_args()
    sections = options.sections.split(",")
    if unknown := sorted(set(sections) - set(SECTIONS)):
        parser.error(f"unknown sections {', '.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    if CARD == options.rehearse:
        parser.error("--rehearse is for machines without a GPU" if CARD else "needs a GPU (or --rehearse)")
    if options.rehearse:
        from warm_triton import compile_only

        compile_only()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"gpu_probe_{re.sub(r'[^a-z0-9]+', '_', device_name(DEVICE).lower())}.json"
    content: dict[str, Any] = {
        "benchmark": "gpu_probe",
        "provenance": provenance(DEVICE) | {"rehearsal": options.rehearse},
    }
    failed = 0
    for name, section in SECTIONS.items():
        if name not in {"ceilings", *sections}:
            continue
        start = time.monotonic()
        try:
            content[name] = section()
        except Exception:  # recorded with its trace: what the next sections measure is still wanted
            failed = 1
            content[name] = {"error": traceback.format_exc()[-3000:]}
        content.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(name, json.dumps(content[name], indent=1).replace("\\n", "\n"), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Shared by all benchmarks: the device and its ceilings, timing, results as JSON.

    pytest benchmarks/ --benchmark-only        time everything that can run here, write benchmarks/results/*.json
    pytest benchmarks/ --benchmark-disable     run everything once, write nothing

A run replaces the result files of the benchmarks that it ran.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from provenance import ROOT, device_name, provenance


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON files")


CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """CPU seconds on a CPU: unlike the wall clock they do not count what other processes take."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> dict[str, float]:
    """The device as found: FLOP/s of a large bf16 product on random data, bytes/s (read + written) of a large copy."""
    size, numbers = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    source = torch.randn(numbers // 4, device=device)
    target = torch.empty_like(source)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            synchronize(device)
            start = CLOCK()
            work()
            synchronize(device)
            times.append(CLOCK() - start)
        return min(times[2:])

    return {
        "flops": 2 * size**3 / best(lambda: matrix @ matrix),
        "bytes": 2 * source.nbytes / best(lambda: target.copy_(source)),
    }


@pytest.fixture
def timed(benchmark, device: torch.device) -> Callable[[Callable[[int], object]], dict[str, float] | None]:
    """`timed(step)` runs `step(0)`, `step(1)`, ... and returns the seconds of one step; None under --benchmark-disable.

    A GPU gets many steps per synchronisation, so that neither its latency nor the host clock shows.
    """

    def measure(step: Callable[[int], object]) -> dict[str, float] | None:
        repeats, rounds = (20, 30) if device.type == "cuda" else (1, 11)

        def call() -> None:
            for index in range(repeats):
                step(index)
            synchronize(device)

        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is None:
            return None
        seconds = sorted(value / repeats for value in benchmark.stats.stats.data)
        place = {"min": 0.0, "p20": 0.2, "p50": 0.5, "p80": 0.8}
        return {name: seconds[round(share * (len(seconds) - 1))] for name, share in place.items()}

    return measure


@pytest.fixture(scope="session")
def origin(device: torch.device) -> dict:
    return provenance(device)


_results: dict[str, list[dict]] = {}


@pytest.fixture
def record(
    request: pytest.FixtureRequest, device: torch.device, ceilings: dict, origin: dict
) -> Callable[[str, dict], None]:
    """`record(name, row)` adds a row to `<results>/<name>_<device>.json`, written at once and renamed into place."""

    def write(name: str, row: dict) -> None:
        rows = _results.setdefault(name, [])
        rows.append(row)
        folder = Path(str(request.config.getoption("--results")))
        folder.mkdir(parents=True, exist_ok=True)
        slug = "cpu" if device.type == "cpu" else re.sub(r"\W+", "_", device_name(device).lower())
        path = folder / f"{name}_{slug}.json"
        content = {"benchmark": name, "clock": CLOCK.__name__, "provenance": origin, "ceilings": ceilings, "rows": rows}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)

    return write

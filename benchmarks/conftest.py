"""Shared by all benchmarks: the device and its ceilings, timing, results as JSON.

    pytest benchmarks/ --benchmark-only                      time everything that can run here, write nothing
    pytest benchmarks/ --benchmark-only --results FOLDER     the same, write FOLDER/*.json
    pytest benchmarks/ --benchmark-disable                   run everything once, write nothing
    pytest benchmarks/ --benchmark-only --small              sizes that only show that everything runs

With `--results` a run replaces the result files of the benchmarks that it ran; `make benchmark` gives the folder that
the tables are made from. Everything about the machine is gathered before anything is timed.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from turns import Race, measured_ceilings, quantiles, synchronize, timer_of

from pointalign.storage import device_name, provenance


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for the JSON files; without it nothing is written")
    parser.addoption("--small", action="store_true", help="tiny sizes and few rounds: a rehearsal, not a measurement")


CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """CPU seconds on a CPU: unlike the wall clock they do not count what other processes take."""
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def small(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--small"))


@pytest.fixture(scope="session")
def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """What the device reaches, by the clock of `timed`."""
    return measured_ceilings(device, small, CLOCK)


@pytest.fixture(scope="session")
def wall_ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """What the device reaches with all threads of this process, by the wall clock that races use."""
    return measured_ceilings(device, small, time.perf_counter)


@pytest.fixture
def timed(benchmark, device: torch.device, small: bool) -> Callable[[Callable[[int], object]], dict[str, float] | None]:
    """`timed(step)` runs `step(0)`, `step(1)`, ... and returns the seconds of one step; None under --benchmark-disable.

    A GPU gets many steps per synchronisation, so that neither its latency nor the host clock shows.
    """

    def measure(step: Callable[[int], object]) -> dict[str, float] | None:
        repeats, rounds = (20, 30) if device.type == "cuda" else (1, 11)
        if small:
            repeats, rounds = min(repeats, 2), 3

        def call() -> None:
            for index in range(repeats):
                step(index)
            synchronize(device)

        benchmark.pedantic(call, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is None:
            return None
        return quantiles([value / repeats for value in benchmark.stats.stats.data])

    return measure


_raced: dict[str, dict[str, dict]] = {}


@pytest.fixture
def race(
    benchmark, request: pytest.FixtureRequest, device: torch.device, small: bool
) -> Callable[[Mapping[str, Callable[[], object]]], dict[str, Any] | None]:
    """`race(contenders)` lets calls take turns; a round of all of them is what pytest-benchmark's own table shows.

    Returns:
        `timing`, in words, and `contenders`: the seconds of one call of each. None under --benchmark-disable.
    """

    def run(contenders: Mapping[str, Callable[[], object]]) -> dict[str, Any] | None:
        rounds = 3 if small else 21 if device.type == "cuda" else 31
        racing = Race(contenders, timer_of(device), rounds)
        if benchmark.enabled:
            racing.start()
        benchmark.pedantic(racing.round, rounds=rounds)
        if benchmark.stats is None:
            return None
        results = racing.results()
        _raced[request.node.name] = results
        return {"timing": racing.timer.method, "contenders": results}

    return run


@pytest.fixture(scope="session")
def origin(device: torch.device, small: bool) -> dict:
    return provenance(device) | {"rehearsal": small}


_rows: dict[str, list[dict]] = {}
_unwritten: list[str] = []


class Recorder:
    """`record(name, row)` adds a row to `<results>/<name>_<device>.json`, written at once and renamed into place."""

    def __init__(self, folder: Path | None, device: torch.device, shared: dict):
        self.folder, self.shared = folder, shared
        self.slug = "cpu" if device.type == "cpu" else re.sub(r"\W+", "_", device_name(device).lower())

    def __call__(self, name: str, row: dict) -> None:
        rows = _rows.setdefault(name, [])
        rows.append(row)
        file = f"{name}_{self.slug}.json"
        if self.folder is None:
            if file not in _unwritten:
                _unwritten.append(file)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": name,
            **self.shared,
            "load_average_at_end": round(os.getloadavg()[0], 2),
            "rows": rows,
        }
        temporary = self.folder / f"{file}.tmp"
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.folder / file)


@pytest.fixture
def record(request: pytest.FixtureRequest, device: torch.device, ceilings: dict, origin: dict) -> Recorder:
    """For rows that `timed` or pytest-benchmark timed."""
    shared = {"clock": CLOCK.__name__, "provenance": origin, "ceilings": ceilings}
    return Recorder(request.config.getoption("--results"), device, shared)


@pytest.fixture
def record_race(request: pytest.FixtureRequest, device: torch.device, wall_ceilings: dict, origin: dict) -> Recorder:
    """For rows that `race` timed, or any other wall clock."""
    shared = {"clock": time.perf_counter.__name__, "provenance": origin, "ceilings": wall_ceilings}
    return Recorder(request.config.getoption("--results"), device, shared)


def pytest_terminal_summary(terminalreporter) -> None:
    """The medians of every race, and what was not written."""
    for name, results in _raced.items():
        terminalreporter.section(name)
        for contender, result in sorted(results.items(), key=lambda item: item[1]["seconds"]["p50"]):
            median = result["seconds"]["p50"] * 1e3
            terminalreporter.write_line(f"{median:12.3f} ms  {contender} ({result['turns']} turns)")
    if _unwritten:
        names = ", ".join(_unwritten)
        terminalreporter.write_line(f"Not written, since --results FOLDER was not given: {names}")

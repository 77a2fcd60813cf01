"""Contenders take turns, so that whatever else the machine does falls on all of them alike.

A turn is one call by the wall clock on a CPU, and ten calls back to back between two events on a GPU, where a single
call between events would count the launch, 15 to 25 us, as time of the kernels.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

MINIMUM_TURNS = 3


class Timer(NamedTuple):
    """How a turn is timed.

    Attributes:
        method: in words, for the result file.
        seconds: `seconds(call)` runs `call` and returns the seconds of one call.
        calls: how often a turn runs the call.
        budget: seconds that a contender may take in a race; a slower one gets fewer turns.
    """

    method: str
    seconds: Callable[[Callable[[], object]], float]
    calls: int
    budget: float


def wall_timer(budget: float = 6.0) -> Timer:
    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return Timer("wall clock of one call", seconds, 1, budget)


def event_timer(new_event: Callable[[], Any], calls: int = 10, budget: float = 0.4) -> Timer:
    """Times with device events.

    Args:
        new_event: makes an event with `record()`, `synchronize()` and `elapsed_time(end)` in milliseconds.
    """

    def seconds(call: Callable[[], object]) -> float:
        start, end = new_event(), new_event()
        call()  # keeps the device busy until the first timed call is enqueued
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return Timer(f"{calls} calls back to back between two CUDA events, after one untimed call", seconds, calls, budget)


def timer_of(device: torch.device) -> Timer:
    if device.type == "cuda":
        return event_timer(lambda: torch.cuda.Event(enable_timing=True))
    return wall_timer()


def turns_of(seconds: float, timer: Timer, rounds: int) -> set[int]:
    """The rounds in which a contender takes its turn: all of them, or fewer, evenly spread, where it is slow."""
    affordable = int(timer.budget / max(seconds * timer.calls, 1e-9))
    turns = min(rounds, max(MINIMUM_TURNS, affordable))
    return {number * rounds // turns for number in range(turns)}


class Race:
    """Contenders by name, timed in turns: call `start` once, then `round` as many times as there are rounds."""

    def __init__(self, contenders: Mapping[str, Callable[[], object]], timer: Timer, rounds: int):
        self.contenders, self.timer, self.rounds = contenders, timer, rounds
        self.times: dict[str, list[float]] = {name: [] for name in contenders}
        self.turns = {name: set(range(rounds)) for name in contenders}
        self.number = 0

    def start(self) -> None:
        """Warms every contender up and decides how many turns it can have."""
        for name, call in self.contenders.items():
            call()
            self.turns[name] = turns_of(self.timer.seconds(call), self.timer, self.rounds)

    def round(self) -> None:
        for name, call in self.contenders.items():
            if self.number in self.turns[name]:
                self.times[name].append(self.timer.seconds(call))
        self.number += 1

    def results(self) -> dict[str, dict[str, Any]]:
        """Per contender, the `seconds` of one call (min, p20, p50, p80) and the number of `turns`."""
        return {name: {"seconds": quantiles(times), "turns": len(times)} for name, times in self.times.items()}


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    shares = {"min": 0.0, "p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_ceilings(device: torch.device, small: bool, clock: Callable[[], float]) -> dict[str, float]:
    """By `clock`: FLOP/s of a large product of random data in bf16 and in fp32, bytes/s (read + written) of a copy."""
    size, numbers = (8192, 2**30) if device.type == "cuda" else (1024, 2**26)
    if small:
        size, numbers = 256, 2**20

    def best(work: Callable[[], object]) -> float:
        """The least of 20 runs; fewer, at least two, where they take long: a CPU may have no bf16 instructions."""
        times = []
        while len(times) < 22 and not (len(times) >= 3 and sum(times) > 2):
            synchronize(device)
            start = clock()
            work()
            synchronize(device)
            times.append(clock() - start)
        return min(times[1:])

    rates = {}
    for name, dtype in (("flops", torch.bfloat16), ("flops_fp32", torch.float32)):
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        rates[name] = 2 * size**3 / best(lambda matrix=matrix: matrix @ matrix)
    source = torch.randn(numbers // 4, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    return rates

"""What a launch of the alignment loss moves and how long it takes, from its tiles alone.

The programs of a launch start in order on multiprocessors x blocks per multiprocessor. A step of a program's
loop takes the longest of: its operations at the attainable matrix rate, its bytes at an equal share of L2's rate, the
latency of L2 over the stages in flight, and on sm_90 the reads of wgmma from shared memory. A block alone on its
multiprocessor adds a wait per step. A launch takes at least its bytes from device memory, which follow from the tensors
that an L2 of the card's size still holds (the least recently used leave it; the second of two passes over different
weights counts). All rates are assumptions, recorded in the result.
"""

from collections import OrderedDict
from typing import Any, NamedTuple

from pointalign_kernels.alignment_tiles import BackwardTile, Tile, Tiles, choose_backward, choose_linear

FEATURES = 768
MAX_PARTS = 4  # K-slices of the last linear, as in alignment_triton.py
BIAS_ROWS, BIAS_COLS = 128, 64
LATENCY_US = 0.8  # from a load's start to its data, under load
START_US, END_US = 1.0, 0.6  # of a program: first loads; epilogue without its bytes
LAUNCH_US = 1.0  # between two launches of a CUDA graph
ROW_KERNEL_US, MEAN_KERNEL_US = 2.0, 1.5


class Card(NamedTuple):
    """Rates per second, assumed attainable; `l2` is a range (low, high)."""

    capability: int
    multiprocessors: int
    flops: float
    memory: float
    l2: tuple[float, float]
    l2_bytes: float
    clock: float
    wait_us: float  # per step of a block that is alone on its multiprocessor


CARDS = {
    "H100": Card(90, 132, 790e12, 3.0e12, (5.5e12, 7.5e12), 50e6, 1.755e9, 0.06),
    "H200": Card(90, 132, 790e12, 4.3e12, (5.5e12, 7.5e12), 50e6, 1.755e9, 0.06),
    "RTX 4090": Card(89, 128, 165e12, 1.0e12, (4.0e12, 5.0e12), 72e6, 2.52e9, 0.02),
    "RTX 3090": Card(86, 82, 71e12, 0.94e12, (2.0e12, 2.5e12), 6e6, 1.7e9, 0.02),
}
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228}  # of a multiprocessor; each block takes 1 KiB more than it asks for
L2_BYTES_PER_CLOCK = 64  # most that one multiprocessor reads from L2
SHARED_BYTES_PER_CLOCK = 128


class Resources(NamedTuple):
    registers: int
    spilled_bytes: int
    shared_kib: float


class Programs(NamedTuple):
    """Equal programs of a launch. tile: None for those that sum db. rows: of the tile that lie inside the matrix."""

    name: str
    count: int
    tile: Tile | None
    rows: int
    steps: int
    written: int  # bytes of a program's epilogue

    @property
    def step_bytes(self) -> int:
        return (self.rows + self.tile.cols) * self.tile.depth * 2 if self.tile else BIAS_ROWS * BIAS_COLS * 2

    @property
    def l2_bytes(self) -> int:
        return self.count * (self.steps * self.step_bytes + self.written)


class Launch(NamedTuple):
    """A launch: its programs in order, and the tensors that it reads and writes, name -> bytes."""

    name: str
    programs: tuple[Programs, ...]
    reads: dict[str, int]
    writes: dict[str, int]
    choice: Tile | BackwardTile | None = None


Known = dict[tuple[str, str], Resources]  # (kernel, tile in words) -> what the compiler says


def words(tile: Tile | BackwardTile) -> str:
    if isinstance(tile, BackwardTile):
        return f"{words(tile.dx)} | {words(tile.dw)}"
    return "x".join(map(str, tile))


def linear_programs(rows: int, outputs: int, inputs: int, tile: Tile, parts: int, silu: bool) -> Programs:
    count = _ceil(rows, tile.rows) * _ceil(outputs, tile.cols) * parts
    inside = min(tile.rows, rows)
    return Programs("linear", count, tile, inside, _ceil(_ceil(inputs, tile.depth), parts), inside * tile.cols * 4)


def backward_programs(
    rows: int, outputs: int, inputs: int, tile: BackwardTile, silu: bool, weight_bytes: int
) -> tuple[Programs, ...]:
    dx, dw = tile
    inside = min(dx.rows, rows)
    return (
        Programs(
            "dx",
            _ceil(rows, dx.rows) * _ceil(inputs, dx.cols),
            dx,
            inside,
            _ceil(outputs, dx.depth),
            inside * dx.cols * (4 if silu else 2),
        ),
        Programs("db", _ceil(outputs, BIAS_COLS), None, BIAS_ROWS, _ceil(rows, BIAS_ROWS), 4 * BIAS_COLS),
        Programs(
            "dW",
            _ceil(outputs, dw.rows) * _ceil(inputs, dw.cols),
            dw,
            dw.rows,
            _ceil(rows, dw.depth),
            dw.rows * dw.cols * weight_bytes,
        ),
    )


def blocks_per_multiprocessor(card: Card, tile: Tile, resources: Resources) -> int:
    shared = int(SHARED_KIB[card.capability] // (resources.shared_kib + 1))
    registers = 65536 // (-(-resources.registers // 8) * 8 * 32 * tile.warps)
    return max(1, min(shared, registers, 2048 // (32 * tile.warps)))


def step_us(card: Card, l2: float, programs: Programs, active: int) -> float:
    """A step of one of `active` programs."""
    resident = _ceil(active, card.multiprocessors)
    most = L2_BYTES_PER_CLOCK * card.clock / resident
    moved = programs.step_bytes / min(l2 / active, most)
    if programs.tile is None:
        return 1e6 * moved + LATENCY_US
    _, cols, depth, _, stages = programs.tile
    rows = programs.tile.rows  # the tensor cores work on the whole tile
    limits = [moved, 2 * rows * cols * depth * card.multiprocessors * resident / card.flops]
    limits.append(LATENCY_US * 1e-6 / max(1, stages - 1))
    if card.capability == 90:  # each 64 rows of the tile read all columns
        shared = _ceil(rows, 64) * (64 + cols) * depth * 2 * resident
        limits.append(shared / (SHARED_BYTES_PER_CLOCK * card.clock))
    return 1e6 * max(limits) + (card.wait_us if resident == 1 else 0)


def makespan_us(card: Card, l2: float, programs: tuple[Programs, ...], blocks: int) -> float:
    """Programs start in order where a slot is free; rates follow the number of active ones."""
    waiting = [[group, group.count] for group in programs if group.count]
    running: list[list[Any]] = []  # programs, count, share that is left
    free, time = card.multiprocessors * blocks, 0.0
    while waiting or running:
        while waiting and free:
            group, count = waiting[0]
            started = min(count, free)
            running.append([group, started, 1.0])
            free -= started
            waiting[0][1] -= started
            if not waiting[0][1]:
                waiting.pop(0)
        active = sum(count for _, count, _ in running)
        most = L2_BYTES_PER_CLOCK * card.clock / _ceil(active, card.multiprocessors)
        durations = [
            START_US
            + group.steps * step_us(card, l2, group, active)
            + END_US
            + 1e6 * group.written / min(l2 / active, most)
            for group, _, _ in running
        ]
        elapsed = min(left * duration for (_, _, left), duration in zip(running, durations, strict=True))
        time += elapsed
        still = []
        for (group, count, left), duration in zip(running, durations, strict=True):
            left -= elapsed / duration
            if left < 1e-9:
                free += count
            else:
                still.append([group, count, left])
        running = still
    return time


def launches(card: Card, tiles: Tiles, rows: int, hidden: int, precision: str) -> list[Launch]:
    """Forward and backward with the tiles that the library chooses from `tiles`."""
    width = (hidden + FEATURES) // 2
    shapes = {1: (width, hidden), 2: (width, width), 3: (FEATURES, width)}
    weight_bytes = 4 if precision == "autocast" else 2
    activations = 2 * rows * width
    tokens = {1: ("x", 2 * rows * hidden), 2: ("a1", activations), 3: ("a2", activations)}
    steps = []
    if precision == "autocast":
        masters = {f"master{place}": 4 * n * k for place, (n, k) in shapes.items()}
        steps.append(Launch("cast", (), masters, {f"w{place}": 2 * n * k for place, (n, k) in shapes.items()}))
    parts = 1
    for place, (outputs, inputs) in shapes.items():
        last = place == 3
        tile = choose_linear(tiles, card.multiprocessors, MAX_PARTS if last else 1, rows, outputs)
        if last:
            count = _ceil(rows, tile.rows) * _ceil(outputs, tile.cols)
            parts = max(1, min(MAX_PARTS, _ceil(inputs, tile.depth), card.multiprocessors // count))
        name, size = tokens[place]
        writes = (
            {"partial": 4 * parts * rows * outputs} if last else {f"z{place}": activations, f"a{place}": activations}
        )
        programs = linear_programs(rows, outputs, inputs, tile, parts, not last)
        reads = {name: size, f"w{place}": 2 * outputs * inputs}
        steps.append(Launch(f"F{place}", (programs,), reads, writes, tile))
    gradient = 2 * rows * FEATURES
    steps.append(Launch("L", (), {"partial": 4 * parts * rows * FEATURES, "target": gradient}, {"dz3": gradient}))
    steps.append(Launch("S", (), {}, {}))
    for place, (outputs, inputs) in sorted(shapes.items(), reverse=True):
        silu = place > 1
        tile = choose_backward(tiles, card.multiprocessors, 1, rows, outputs, inputs, True)
        reads = {
            f"dz{place}": 2 * rows * outputs,
            f"w{place}": 2 * outputs * inputs,
            tokens[place][0]: tokens[place][1],
        }
        if silu:
            reads[f"z{place - 1}"] = activations
        writes = {f"dz{place - 1}": 2 * rows * inputs, f"dw{place}": weight_bytes * outputs * inputs}
        steps.append(
            Launch(
                f"B{place}",
                backward_programs(rows, outputs, inputs, tile, silu, weight_bytes),
                reads,
                writes,
                tile,
            )
        )
    return steps


def device_memory_bytes(steps: list[Launch], capacity: float) -> list[int]:
    """Bytes of each launch between L2 and device memory, in the second of two passes over different tensors."""
    held: OrderedDict[str, tuple[int, bool]] = OrderedDict()  # name -> bytes, whether they must be written back
    moved = []
    for number in range(2):
        moved = []
        for launch in steps:
            total = 0
            for tensors, written in ((launch.reads, False), (launch.writes, True)):
                for name, size in tensors.items():
                    key = f"{number}/{name}"
                    present = held.pop(key, None)
                    if present is None and not written:
                        total += size
                    held[key] = size, written or bool(present and present[1])
                    while sum(entry for entry, _ in held.values()) > capacity and len(held) > 1:
                        _, (evicted, dirty) = held.popitem(last=False)
                        total += evicted if dirty else 0
            moved.append(total)
    return moved


def predict(card: Card, known: Known, tiles: Tiles, rows: int, hidden: int, precision: str) -> list[dict[str, Any]]:
    """Each launch: tiles, programs, waves, bytes, microseconds at L2's low and high rate."""
    steps = launches(card, tiles, rows, hidden, precision)
    predicted = []
    for launch, moved in zip(steps, device_memory_bytes(steps, card.l2_bytes), strict=True):
        floor = 1e6 * moved / card.memory
        row: dict[str, Any] = {"launch": launch.name, "memory_mb": moved / 1e6}
        if launch.choice is None:
            size = sum((launch.reads | launch.writes).values())
            base = {"cast": START_US, "L": ROW_KERNEL_US, "S": MEAN_KERNEL_US}[launch.name]
            row |= {"l2_mb": size / 1e6, "us": [LAUNCH_US + max(floor, base + 1e6 * size / rate) for rate in card.l2]}
        else:
            row |= {"l2_mb": sum(group.l2_bytes for group in launch.programs) / 1e6, "tile": words(launch.choice)}
            resources = known["backward" if isinstance(launch.choice, BackwardTile) else "linear", words(launch.choice)]
            tile = launch.choice.dx if isinstance(launch.choice, BackwardTile) else launch.choice
            blocks = blocks_per_multiprocessor(card, tile, resources)
            row |= {
                "programs": {group.name: group.count for group in launch.programs},
                "blocks_per_multiprocessor": blocks,
                "waves": sum(group.count for group in launch.programs) / (card.multiprocessors * blocks),
                "us": [LAUNCH_US + max(floor, makespan_us(card, rate, launch.programs, blocks)) for rate in card.l2],
            }
        predicted.append(row)
    return predicted


def _ceil(size: int, block: int) -> int:
    return -(-size // block)

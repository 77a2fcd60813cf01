"""What the CUDA point ops do per cloud, counted on a CPU, and the time on an H100 that the counts predict.

    python benchmarks/simulate_point_ops.py [--output benchmarks/results/point_ops_simulated.json]

Both forms of each op are walked through step by step on real clouds: "scan" reads every point, "buckets" sorts the
cloud along a Morton curve and opens only buckets of 32 points whose bounding box can hold something nearer. Counted
are, of sampling, the buckets that each warp opens per sample, and of grouping, the steps that reach the selection and
the merges of 32 candidates into the 32 neighbours. `MODEL` says how counts become time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from point_op_contenders import surfaces

from pointalign.embedded import procedural
from pointalign.storage import provenance
from pointalign_kernels import farthest_point_sample

BUCKET = 32  # points: one of each lane
GROUP = 32  # buckets, which grouping tests only where the box around all of them is near enough
NEIGHBOURS = 32
SCAN_CENTRES = 4  # that a warp of the scan searches for at once
CELL_BITS = (4, 5, 7)  # cells per axis that the sort tells apart: 16 in the CUDA kernels, 128 on the CPU
WARPS = (8, 16, 32)  # of a block, buckets dealt out in turn
CHOSEN = {"cell_bits": 4, "warps": 16}  # as in csrc/sorted_clouds.cuh and point_ops_buckets.cuh
SIZES = (8192, 2048, 4096, 16384)
BATCHES = (1, 16)

# Estimates: instructions of the sampling loop were counted in machine code, the rest from the sources; latencies are
# those that are published for sm_80 and sm_90. No device has confirmed them.
MODEL = {
    "clock_hz": [1.755e9, 1.98e9],  # sustained, boosted
    "multiprocessors": 132,
    "launch_us": 2.0,  # of a kernel that follows another in the same stream
    "sort_cycles": 9000,  # one block, 8,192 points; in proportion to the points above that
    "sampling_setup_cycles": 4500,  # reading the sorted cloud, likewise
    # Sampling: cycles per sample = serial + what the busiest warp of the block adds.
    "scan_serial": 270,
    "scan_instructions_per_point": 12.2,  # of a lane; two warps share a scheduler
    "streamed_bytes_per_cycle": 64,  # from L2 to one multiprocessor, 16 bytes a point
    # Of buckets: the warp's offer (three reductions), barrier, the bound (one); then per sample two reductions, the
    # coordinates from their lane, the box test; then per pair of buckets, whose latencies overlap, three reductions.
    "bucket_round": 270,
    "bucket_sample": 140,
    "bucket_box_instructions": 22,  # for each box that a lane holds
    "bucket_pair": 200,
    "l2_latency": 250,
    # Grouping: instructions, of which a scheduler issues this share of one a cycle.
    "issue_rate": 0.65,
    "scan_step": 45,  # 32 points against 4 centres
    "scan_push": 56,  # the slow path of 4 centres
    "merge": 200,
    "merge_cycles": 700,
    "search_setup": 120,  # source, sink: reading the centre, writing 32 rows of 6
    "search_group": 40,
    "search_bucket": 45,
    "search_bucket_cycles": 385,
}


def normalised(points: np.ndarray) -> np.ndarray:
    points = points - points.mean(axis=0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def clouds_of(points: int) -> dict[str, list[np.ndarray]]:
    """Clouds `[points, 3]` by kind: the benchmark's, objects of many parts, and noise that has no surface."""
    rng = np.random.default_rng(0)
    nouns = sorted(procedural.MAKERS)[:: len(procedural.MAKERS) // 2][:2]
    return {
        "ellipsoids and boxes": list(surfaces(2, points).numpy()),
        "procedural objects": [normalised(procedural.procedural_object(noun, rng, points)[1][:, :3]) for noun in nouns],
        "uniform in a cube": [rng.random((points, 3), dtype=np.float32)],
    }


def morton_order(points: np.ndarray, bits: int) -> np.ndarray:
    """Rows in the order of their cells along the curve; rows of one cell in the order of the file."""
    low = points.min(axis=0)
    cells = ((points - low) * (2**bits / (points.max(axis=0) - low).max())).clip(0, 2**bits - 1).astype(np.int64)
    code = np.zeros(len(points), np.int64)
    for bit in range(bits):
        for axis in range(3):
            code |= (cells[:, axis] >> bit & 1) << (3 * bit + axis)
    return np.argsort(code, kind="stable")


def boxes_of(points: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest coordinates `[N / size, 3]` of every `size` consecutive points."""
    parts = points.reshape(-1, size, 3)
    return parts.min(axis=1), parts.max(axis=1)


def box_distance(boxes: tuple[np.ndarray, np.ndarray], query: np.ndarray) -> np.ndarray:
    low, high = boxes
    return np.square(np.maximum(np.maximum(low - query, query - high), 0)).sum(axis=-1)


def opened_buckets(points: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Which buckets each sample opens. `[N, 3]` in bucket order, `[K, 3]` -> bool `[K - 1, N / 32]`."""
    boxes = boxes_of(points, BUCKET)
    nearest = np.full(len(points), np.inf, np.float32)
    opened = np.empty((len(samples) - 1, len(points) // BUCKET), bool)
    for step, sample in enumerate(samples[:-1]):
        opened[step] = box_distance(boxes, sample) < nearest.reshape(-1, BUCKET).max(axis=1)
        np.minimum(nearest, np.square(points - sample).sum(axis=1), out=nearest)
    return opened


def rounds_of(points: np.ndarray, samples: np.ndarray, opened: np.ndarray, warps: int) -> dict[str, float]:
    """How many samples share a round, and pairs of buckets that a round's busiest warp opens.

    Each warp offers the farthest of its points. A sample needs no new round while it is among those offered and farther
    than any point that was not. `[N, 3]` in bucket order, `[K, 3]`, bool `[K - 1, N / 32]`.
    """
    of_warps = np.arange(len(points)).reshape(-1, warps, BUCKET).swapaxes(0, 1).reshape(warps, -1)
    nearest, starts = np.square(points - samples[0]).sum(axis=1), [0]
    offered, others = np.empty(0, int), np.float32(np.inf)
    for step, sample in enumerate(samples[1:], start=1):
        farthest = int(nearest.argmax())
        if not (farthest in offered and nearest[farthest] > others):
            starts.append(step)
            distances = nearest[of_warps]
            offered = of_warps[np.arange(warps), distances.argmax(axis=1)]
            others = np.partition(distances, -2, axis=1)[:, -2].max()
        np.minimum(nearest, np.square(points - sample).sum(axis=1), out=nearest)
    pairs = np.ceil(opened.reshape(len(opened), -1, warps).sum(axis=1) / 2)
    busiest = [part.sum(axis=0).max() for part in np.split(pairs, starts[1:]) if len(part)]
    return {"samples": len(samples) / len(starts), "pairs": float(np.sum(busiest)) / len(opened)}


def sampling_counts(points: np.ndarray, num_samples: int, bits: int) -> dict[str, float]:
    """Buckets opened per sample; for every number of warps, samples per round and pairs of buckets per sample."""
    index = farthest_point_sample(torch.from_numpy(points)[None], num_samples)[0].numpy()
    ordered, samples = points[morton_order(points, bits)], points[index]
    opened = opened_buckets(ordered, samples)
    counts = {"buckets": opened.shape[1], "opened": float(opened.sum(axis=1).mean())}
    warps_of_kernel = WARPS if len(points) == 8192 else (CHOSEN["warps"],)
    for warps in warps_of_kernel if bits == CHOSEN["cell_bits"] else ():
        of_warps = rounds_of(ordered, samples, opened, warps)
        counts |= {f"{name}_{warps}": value for name, value in of_warps.items()}
        counts[f"alone_{warps}"] = float(
            np.ceil(opened.reshape(len(opened), -1, warps).sum(axis=1).max(axis=1) / 2).mean()
        )
    return counts


class Selection:
    """The nearest candidates of a centre, and a buffer that is merged into them whenever it holds 32."""

    def __init__(self):
        self.best, self.buffer = np.empty(0, np.float32), np.empty(0, np.float32)
        self.limit, self.merges = np.float32(np.inf), 0

    def push(self, distances: np.ndarray) -> None:
        self.buffer = np.concatenate([self.buffer, distances])
        if len(self.buffer) >= NEIGHBOURS:
            self.merge()

    def merge(self) -> None:
        self.best = np.sort(np.concatenate([self.best, self.buffer[:NEIGHBOURS]]))[:NEIGHBOURS]
        self.buffer = self.buffer[NEIGHBOURS:]
        self.merges += 1
        if len(self.best) == NEIGHBOURS:
            self.limit = self.best[-1]


def scattering_step(count: int) -> int:
    """As the scan's: a step that visits every one of `count` places and scatters them."""
    step = count * 5 // 8 + 1
    while np.gcd(step, count) != 1:
        step += 1
    return step % count


def scan_counts(points: np.ndarray, centres: np.ndarray) -> dict[str, float]:
    """Steps with a candidate, and merges, per warp of 4 centres. `[N, 3]`, `[G, 3]`."""
    steps, warps = len(points) // BUCKET, len(centres) // SCAN_CENTRES
    selections = [Selection() for _ in centres]
    limits = np.full(len(centres), np.inf, np.float32)
    slow = place = 0
    for _ in range(steps):
        near = points[place * BUCKET : (place + 1) * BUCKET]
        place = (place + scattering_step(steps)) % steps
        distances = np.square(near[None] - centres[:, None]).sum(axis=-1)
        wanted = distances <= limits[:, None]
        slow += wanted.reshape(warps, -1).any(axis=1).sum()
        for centre in wanted.any(axis=1).nonzero()[0]:
            selections[centre].push(distances[centre][wanted[centre]])
            limits[centre] = selections[centre].limit
    for selection in selections:
        selection.merge()
    merges = sum(selection.merges for selection in selections)
    return {"steps": steps, "slow_steps": float(slow / warps), "merges": merges / warps}


def search_counts(points: np.ndarray, centres: np.ndarray) -> dict[str, float]:
    """Groups and buckets visited, and merges, per warp of one centre. `[N, 3]` in bucket order, `[G, 3]`."""
    buckets, groups = boxes_of(points, BUCKET), boxes_of(points, BUCKET * GROUP)
    totals = np.zeros(3)
    for centre in centres:
        selection, visited = Selection(), np.zeros(2)
        of_groups, of_buckets = box_distance(groups, centre), box_distance(buckets, centre).reshape(-1, GROUP)
        home = int(of_groups.argmin())
        for group in (home, *(number for number in range(len(of_groups)) if number != home)):
            if of_groups[group] > selection.limit:
                continue
            visited[0] += 1
            for bucket in of_buckets[group].argsort(kind="stable"):
                if of_buckets[group][bucket] > selection.limit:
                    break
                visited[1] += 1
                first = (group * GROUP + bucket) * BUCKET
                distances = np.square(points[first : first + BUCKET] - centre).sum(axis=1)
                selection.push(distances[distances <= selection.limit])
        selection.merge()
        exact = np.sort(np.square(points - centre).sum(axis=1))[:NEIGHBOURS]
        assert np.array_equal(selection.best, exact), "a skipped bucket held a neighbour"
        totals += (*visited, selection.merges)
    return dict(zip(("groups", "buckets", "merges"), (totals / len(centres)).tolist(), strict=True))


def sampling_us(counts: dict[str, Any], points: int, samples: int, clock: float) -> dict[str, float]:
    """Microseconds of both forms, whatever the batch, up to a cloud for every multiprocessor."""
    in_shared_memory = points <= 8192
    if in_shared_memory:
        scan = MODEL["scan_serial"] + 2 * MODEL["scan_instructions_per_point"] * points / 256
    else:
        scan = MODEL["scan_serial"] + MODEL["l2_latency"] + 16 * points / MODEL["streamed_bytes_per_cycle"]
    warps, latency = CHOSEN["warps"], 0 if in_shared_memory else MODEL["l2_latency"]
    boxes = -(-counts["buckets"] // (32 * warps)) * MODEL["bucket_box_instructions"] * warps / 4
    buckets = (MODEL["bucket_round"] + latency) / counts[f"samples_{warps}"] + MODEL["bucket_sample"] + boxes
    buckets += counts[f"pairs_{warps}"] * (MODEL["bucket_pair"] + latency)
    setup = (MODEL["sort_cycles"] + MODEL["sampling_setup_cycles"]) * max(1, points / 8192)
    return {
        "scan": scan * samples / clock * 1e6,
        "buckets": (buckets * samples + setup) / clock * 1e6 + MODEL["launch_us"],
    }


def grouping_us(counts: dict[str, Any], points: int, centres: int, batch: int, clock: float) -> dict[str, float]:
    """Microseconds of both forms: what the schedulers issue, but no less than a single warp takes."""
    schedulers = 4 * MODEL["multiprocessors"]
    scan, buckets = counts["scan"], counts["buckets"]
    of_warp = scan["steps"] * MODEL["scan_step"] + scan["slow_steps"] * MODEL["scan_push"]
    of_warp += scan["merges"] * MODEL["merge"] + SCAN_CENTRES * MODEL["search_setup"]
    warps = max(batch * centres / SCAN_CENTRES / schedulers, 1)
    of_centre = MODEL["search_setup"] + buckets["groups"] * MODEL["search_group"]
    of_centre += buckets["buckets"] * MODEL["search_bucket"] + buckets["merges"] * MODEL["merge"]
    alone = buckets["buckets"] * MODEL["search_bucket_cycles"] + buckets["merges"] * MODEL["merge_cycles"]
    issued = of_centre * batch * centres / schedulers / MODEL["issue_rate"]
    sort = MODEL["sort_cycles"] * max(1, points / 8192) / clock * 1e6 + MODEL["launch_us"]
    return {
        "scan": of_warp * warps / MODEL["issue_rate"] / clock * 1e6,
        "buckets": max(issued, alone) / clock * 1e6 + sort,
    }


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}


def simulate(points: int, samples: int) -> list[dict[str, Any]]:
    """Counts of every kind of cloud, means over its clouds, and the microseconds they predict."""
    rows = []
    for kind, clouds in clouds_of(points).items():
        cell_bits = CELL_BITS if points == 8192 else (CHOSEN["cell_bits"],)
        sampling = {
            str(bits): mean_of([sampling_counts(cloud, samples, bits) for cloud in clouds]) for bits in cell_bits
        }
        row: dict[str, Any] = {"clouds": kind, "points": points, "samples": samples, "sampling": sampling}
        chosen = sampling[str(CHOSEN["cell_bits"])]
        row["sampling_us"] = [sampling_us(chosen, points, samples, clock) for clock in MODEL["clock_hz"]]
        if points == 8192:
            row["grouping"] = grouping(clouds, samples)
            row["grouping_us"] = {
                str(batch): [grouping_us(row["grouping"], points, samples, batch, clock) for clock in MODEL["clock_hz"]]
                for batch in BATCHES
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def grouping(clouds: list[np.ndarray], samples: int) -> dict[str, dict[str, float]]:
    scans, searches = [], []
    for cloud in clouds:
        centres = cloud[farthest_point_sample(torch.from_numpy(cloud)[None], samples)[0].numpy()]
        scans.append(scan_counts(cloud, centres))
        searches.append(search_counts(cloud[morton_order(cloud, CHOSEN["cell_bits"])], centres))
    return {"scan": mean_of(scans), "buckets": mean_of(searches)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/point_ops_simulated.json")
    output = parser.parse_args().output
    rows = [row for points in SIZES for row in simulate(points, min(512, points // 4))]
    content = {"model": MODEL, "chosen": CHOSEN, "rows": rows, "provenance": provenance(torch.device("cpu"))}
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

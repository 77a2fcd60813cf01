"""The sections point_ops, encoder and chat of benchmarks/report.py: tables and plots from the result files."""

import errno
import json
from pathlib import Path
from typing import Any

import matplotlib
from tables import stamp, table

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
CARDS = ("H100", "H200", "RTX 4090", "RTX 3090")
GOALS = {"sampling": "150", "grouping": "45"}  # microseconds of a native op on 16 clouds of 8192 points on an H100
PREDICTED_BATCHES = (16, 1)
VARIANTS = ("scan", "buckets")  # of the CUDA ops: every point read, or buckets of a sorted cloud
BENCHMARKED = "ellipsoids and boxes"  # the clouds that the benchmarks time
TITLES = {
    "sampling": "Sampling",
    "grouping": "Grouping",
    "latency": "Sampling, grouping and waiting",
    "pointnet": "Mini-PointNet",
    "encoder": "Point encoder",
}


def _results(name: str) -> list[dict[str, Any]]:
    """Contents of every device's file of a benchmark, with the stem of the `file`."""
    paths = [path for path in sorted(RESULTS.glob(f"{name}_*.json")) if not path.stem.endswith("_simulated")]
    return [{**json.loads(path.read_text()), "file": path.stem} for path in paths]


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(row: dict[str, Any], title: str) -> str:
    """One race: milliseconds of every contender, and how many times the first contender is faster."""
    contenders = row["contenders"]
    first = next(iter(contenders))
    lines = []
    for name, result in sorted(contenders.items(), key=lambda item: item[1]["seconds"]["p50"]):
        p20, p50, p80 = (result["seconds"][quantile] * 1e3 for quantile in ("p20", "p50", "p80"))
        ratio = result["seconds"]["p50"] / contenders[first]["seconds"]["p50"]
        lines.append(
            [name, _number(p50), f"{_number(p20)} to {_number(p80)}", str(result["turns"]), f"{_number(ratio)} x"]
        )
    lines += [[name, "out of memory", "", "", ""] for name in row.get("out_of_memory", [])]
    return table([title, "median ms", "p20 to p80", "turns", f"{first} is faster by"], lines)


def _clouds(row: dict[str, Any]) -> str:
    return f"{row['batch']} cloud{'' if row['batch'] == 1 else 's'} of {row['points']} points"


def _ceilings(result: dict[str, Any]) -> str:
    """The measured ceilings in words; empty where the file has none."""
    if not result["ceilings"]:
        return ""
    bf16, fp32, moved = (result["ceilings"][name] for name in ("flops", "flops_fp32", "bytes"))
    return (
        f" Measured ceilings: {_number(bf16 / 1e12)} TFLOP/s in bf16, {_number(fp32 / 1e12)} in fp32, "
        f"{_number(moved / 1e9)} GB/s (copy)."
    )


def _measured(result: dict[str, Any]) -> str:
    """One device: a table for every race but the scaling."""
    parts = [f"{stamp(result['provenance'])}{_ceilings(result)} Timed in turns: {result['rows'][0]['timing']}.\n"]
    for name in ("sampling", "grouping", "latency", "pointnet"):
        for row in (row for row in result["rows"] if row["race"] == name):
            of = f", {row['samples']} samples" if name == "sampling" else ""
            if name != "sampling":
                of = f", {row['samples']} groups of {row['neighbours']}"
            parts.append(_times(row, f"{TITLES[name]}, {_clouds(row)}{of}"))
    return "\n".join(parts)


def _simulated() -> dict[str, Any] | None:
    """Counts and predictions of benchmarks/simulate_point_ops.py; None where there are none."""
    path = RESULTS / "point_ops_simulated.json"
    return json.loads(path.read_text()) if path.exists() else None


def _range(predictions: list[dict[str, float]], variant: str) -> str:
    """Predictions at several clocks, in microseconds; from 100 on, to the nearest 5."""
    values = sorted(prediction[variant] for prediction in predictions)
    low, high = (5 * round(value / 5) if value >= 100 else round(value) for value in (values[0], values[-1]))
    return f"{low}-{high}"


def _predicted(simulated: dict[str, Any] | None, race: str, batch: int) -> list[str]:
    """Predictions for 8192 points, of every variant."""
    for row in simulated["rows"] if simulated else ():
        if (row["clouds"], row["points"]) == (BENCHMARKED, 8192):
            predictions = row["sampling_us"] if race == "sampling" else row["grouping_us"][str(batch)]
            return [_range(predictions, variant) for variant in VARIANTS]
    return ["not predicted"] * len(VARIANTS)


def predicted_us(race: str, batch: int) -> float:
    """Microseconds on an H100 of the form that the ops choose, the faster one; the upper end of the prediction."""
    ranges = _predicted(_simulated(), race, batch)
    return min(float(text.rpartition("-")[2]) for text in ranges)


def _predictions(results: list[dict[str, Any]], simulated: dict[str, Any] | None) -> str:
    """Goals and predictions of the native ops beside what was measured, if anything was."""
    lines = []
    for batch in PREDICTED_BATCHES:
        for name, goal in GOALS.items():
            title = f"{TITLES[name]}, {_clouds({'batch': batch, 'points': 8192})}"
            line = [title, goal if batch == PREDICTED_BATCHES[0] else "", *_predicted(simulated, name, batch)]
            for card in CARDS:
                medians = [
                    row["contenders"]["native"]["seconds"]["p50"] * 1e6
                    for result in results
                    for row in result["rows"]
                    if card in result["provenance"]["device"] and not result["provenance"].get("rehearsal")
                    if (row["race"], row["batch"], row["points"]) == (name, batch, 8192)
                ]
                line.append(_number(medians[0]) if medians else "not measured")
            lines.append(line)
    predicted = [f"predicted, H100, {variant}" for variant in VARIANTS]
    return table(["native op, us", "goal, H100", *predicted, *(f"measured, {card}" for card in CARDS)], lines)


def _counts(simulated: dict[str, Any]) -> str:
    """What the CUDA ops open and merge, per kind of cloud, and the time on an H100 that this predicts."""
    warps = simulated["chosen"]["warps"]
    sampling, grouping = [], []
    for row in simulated["rows"]:
        counts = row["sampling"][str(simulated["chosen"]["cell_bits"])]
        of_buckets = [counts["opened"], counts[f"samples_{warps}"], counts[f"pairs_{warps}"]]
        title = f"{row['clouds']}, {row['points']} points, {row['samples']} samples"
        predicted = [_range(row["sampling_us"], variant) for variant in VARIANTS]
        sampling.append([title, f"{counts['buckets']:.0f}", *map(_number, of_buckets), *predicted])
        if "grouping" in row:
            scan, buckets = row["grouping"]["scan"], row["grouping"]["buckets"]
            cells = [scan["slow_steps"], scan["merges"], buckets["buckets"], buckets["merges"]]
            predicted = [_range(row["grouping_us"]["16"], variant) for variant in VARIANTS]
            grouping.append([row["clouds"], *map(_number, cells), *predicted])
    us = [f"{variant}, us" for variant in VARIANTS]
    header = ["sampling", "buckets", "opened a sample", "samples a round", "pairs of the busiest warp", *us]
    text = [
        "Counted on a CPU (`python benchmarks/simulate_point_ops.py`, which also holds the model of the time); "
        f"{stamp(simulated['provenance'])} The scan reads every point for every sample. Buckets are 32 points of a "
        f"sorted cloud, dealt out to {warps} warps.\n",
        table(header, sampling),
    ]
    header = ["grouping, 16 x 512 centres of 8192 points", "scan: steps of 256 with a candidate", "merges (4 centres)"]
    text.append(table([*header, "buckets: opened a centre", "merges (1 centre)", *us], grouping))
    return "\n".join(text)


def _plot_scaling(result: dict[str, Any]) -> None:
    """Milliseconds of one cloud over its points and over its samples, the best exact mode of every package."""
    rows = [row for row in result["rows"] if row["race"] == "scaling"]
    if not rows:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, varied, fixed in ((axes[0], "points", "samples"), (axes[1], "samples", "points")):
        values = [row[fixed] for row in rows]
        common = max(set(values), key=values.count)
        chosen = {row[varied]: row["contenders"] for row in rows if row[fixed] == common}
        for package in ("native", "fpsample", "torch-quickfps", "torch-fps"):
            best = {}
            for size, contenders in sorted(chosen.items()):
                medians = [one["seconds"]["p50"] for name, one in contenders.items() if name.startswith(package)]
                if medians:
                    best[size] = min(medians) * 1e3
            if best:
                modes = package in ("fpsample", "torch-quickfps")
                label = f"{package}, best exact mode" if modes else package
                axis.loglog(list(best), list(best.values()), marker="o", label=label)
        axis.set_xlabel(f"{varied} ({common} {fixed})")
        axis.grid(True, which="both", alpha=0.3)
    axes[0].set_ylabel("ms per cloud")
    axes[0].legend()
    origin = result["provenance"]
    title = f"Farthest-point sampling, one cloud: {origin['device']}, {origin['commit']}, {origin['date']}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    with pyplot.rc_context({"svg.hashsalt": "pointalign"}):  # the same picture, the same bytes
        figure.savefig(RESULTS / f"{result['file']}.svg", metadata={"Date": None})
    pyplot.close(figure)


def point_ops() -> str:
    """Sampling, grouping and the mini-PointNet on every device measured; goals and predictions of the others."""
    results = _results("point_ops")
    for result in results:
        _plot_scaling(result)
    simulated = _simulated()
    parts = [*(_measured(result) for result in results), _predictions(results, simulated)]
    return "\n".join([*parts, *([_counts(simulated)] if simulated else [])])


def _required(name: str) -> list[dict[str, Any]]:
    """As `_results`. Raises FileNotFoundError where nothing was measured."""
    results = _results(name)
    if not results:
        raise FileNotFoundError(errno.ENOENT, "not measured", str(RESULTS / f"{name}_cpu.json"))
    return results


def encoder() -> str:
    """The point encoder end to end on every device measured."""
    parts = []
    for result in _required("encoder"):
        parts.append(f"{stamp(result['provenance'])}{_ceilings(result)}\n")
        for row in result["rows"]:
            dtype = row["dtype"].removeprefix("torch.")
            parts.append(_times(row, f"{TITLES[row['race']]}, {_clouds(row)}, {row['groups']} groups, {dtype}"))
    return "\n".join([*parts, _pointnet_traffic()])


def _pointnet_traffic() -> str:
    """What the mini-PointNet moves as one kernel and by PyTorch, and what the kernel needs of a card."""
    content = json.loads((RESULTS / "folded_pointnet_resources.json").read_text())
    lines = []
    for row in content["traffic"]:
        weights = "not counted" if row["l2_weight_bytes"] is None else _number(row["l2_weight_bytes"] / 1e6)
        lines.append([row["form"], str(row["launches"]), _number(row["memory_bytes"] / 1e6), weights])
    needs = []
    for row in content["rows"]:
        if row["points"] == content["points"]:
            spilled = str(row["stack_bytes"] + row["local_bytes"])
            shared = f"{_number(row['shared_kib'])} of {row['shared_limit_kib']}"
            needs.append([str(row["capability"]), str(row["rows"]), str(row["registers"]), spilled, shared])
    origin = content["provenance"]
    shape = f"{content['clouds']} clouds, {content['groups']} groups of {content['points']}, bfloat16"
    return "\n".join(
        [
            f"Mini-PointNet, {shape}: counted and compiled, not measured (`python "
            f"benchmarks/compile_folded_pointnet.py`; triton {origin['triton']}, commit {origin['commit']}, "
            f"{origin['date']}).\n",
            table(["form", "launches", "device memory, MB", "weights from L2, MB"], lines),
            table(["compute capability", "points a program", "registers", "spilled bytes", "shared KiB"], needs),
        ]
    )


def chat() -> str:
    """First token of an answer about one cloud with the shipped model, on every device measured."""
    parts = []
    for result in _required("chat"):
        parts.append(f"{stamp(result['provenance'])}{_ceilings(result)}\n")
        for row in result["rows"]:
            if "steps" not in row:
                what = f"an answer of {row['tokens']} tokens" if "tokens" in row else "first token"
                parts.append(_times(row, f"{what}, {row['model']} loaded"))
                continue
            lines = []
            for name, seconds in row["steps"].items():
                lines.append([name, *(_number(seconds[quantile]) for quantile in ("p50", "min"))])
            peak = f"{row['peak_bytes'] / 1e9:.2f} GB" if row["peak_bytes"] else "not measured"
            parts.append(table([f"`python -m pointalign.chat`, {row['model']}", "median s", "least s"], lines))
            parts.append(f"Peak host memory of the process, over {row['rounds']} runs: {peak}.\n")
    return "\n".join(parts)

"""The section `train_step` of benchmarks/report.py: rows measured, and predictions beside what is not measured yet."""

import json
from pathlib import Path
from typing import Any

from tables import table

RESULTS = Path(__file__).parent / "results"
STAGE_SAMPLES = 67_500  # 10,000 steps at batches of 6, 10 and 4, drawn 2:3:3
GOALS = {"b": 4, "b3": 2, "c": 1.5}  # times as many samples a second, on an H100 under a cap of 24 GB
PEAK_GOAL_GB = 12
CPU_ROWS = ("a", "b", "b3", "e")  # c generates code on a GPU only

# Predicted milliseconds of one step of 16 samples (+-40 %), by what bounds them: products, or bytes moved. The two
# columns of each card are the common stack (row b) and everything (rows e and f; launches are not in it).
PREDICTED = {
    "frozen products": {"H100": (78, 34), "RTX 4090": (345, 150)},
    "4-bit dequantisation": {"H100": (8, 0), "RTX 4090": (22, 0)},
    "LoRA": {"H100": (44, 10), "RTX 4090": (132, 27)},
    "tanh-GELU": {"H100": (43, 2), "RTX 4090": (128, 7)},
    "attention, norms, residual, dropout": {"H100": (28, 4), "RTX 4090": (84, 12)},
    "head and cross-entropy": {"H100": (5, 1), "RTX 4090": (20, 4)},
    "point encoder": {"H100": (27, 0), "RTX 4090": (36, 0)},
    "optimizer, projector": {"H100": (3, 1), "RTX 4090": (9, 3)},
}
PRODUCTS = ("frozen products", "LoRA", "head and cross-entropy", "point encoder")
# Milliseconds of row e, from the launches, bytes and instructions counted in what torch 2.11 and transformers 5.17 run:
# frozen products 42, LoRA 9, dropout 19, the rest 14, AdamW 4; 5 to 6 thousand launches take 50 to 70 of a CPU.
COUNTED = {"H100": (85, 100)}
WAYS = (  # column of a prediction, row
    (0, "b:", "transformers + peft + bitsandbytes"),
    (1, "e:", "everything"),
    (1, "f:", "everything, filled batches, CUDA graphs"),
)
# A card from another of its kind: times as long for products and for bytes moved, from attainable rates, assumed.
SCALED = {"H200": ("H100", 1.0, 3.0 / 4.3), "RTX 3090": ("RTX 4090", 165 / 71, 1.0 / 0.94)}


def predicted(card: str, column: int) -> float:
    """Milliseconds of a step, column 0 the common stack, 1 everything."""
    source, products, transfers = SCALED.get(card, (card, 1.0, 1.0))
    return sum(part[source][column] * (products if name in PRODUCTS else transfers) for name, part in PREDICTED.items())


def _measured(result: dict[str, Any]) -> str:
    shape = result["rows"][0]["shape"]
    rows = [row for row in result["rows"] if shape != "small" or row["name"].partition(":")[0] in CPU_ROWS]
    baseline = next((row for row in rows if row["name"].startswith("b:") and row["seconds"]), None)
    lines, said = [], ""
    for row in rows:
        name = row["name"] + (f" ({row['note']})" if row["note"] not in ("", said) else "")
        if row.get("filled_to"):
            name += f", {row['tokens']:.0f} tokens filled up to {row['filled_to']}"
        said = row["note"]  # of what a row does less than those above, once
        if not row["seconds"]:
            lines.append([name, *["out of memory"] * 5])
            continue
        gain = f"{row['samples_per_second'] / baseline['samples_per_second']:.2f} x" if baseline else ""
        peak = f"{row['peak_gb']:.1f}" if row["peak_gb"] else "not measured"
        lines.append(
            [
                name,
                f"{row['samples_per_second']:.1f}",
                gain,
                f"{row['supervised_tokens_per_second']:.0f}",
                f"{row['tokens_per_second']:.0f}",
                peak,
            ]
        )
    where = result["provenance"]
    samples = rows[0]["samples"]
    sizes = ", ".join(f"{question}+{answer}" for question, answer in rows[0]["lengths"])
    targets = "all linear layers" + ("" if shape == "small" else " but in e2")
    title = (
        f"{where['device']}; torch {where['torch']}, commit {where['commit']}, {where['date']}. Shape {shape}, LoRA "
        f"r = {rows[0]['rank']} on {targets}, dropout 0.05, {samples:g} samples a step, question + "
        f"answer tokens {sizes}."
    )
    if shape == "small":
        title += (
            " A small shape on a CPU shows that the rows run and agree, not how fast a GPU is. torch.compile (row c) "
            "and the parts of a step (b2, d1 to d11, e2, e3) are measured on a GPU only: on a CPU core they differ by "
            "noise. CUDA graphs (row f) need a GPU."
        )
    header = ["row", "samples/s", "against b", "supervised tokens/s", "all tokens/s", "peak GB"]
    return title + "\n\n" + table(header, lines) + _goals(rows)


def _goals(rows: list[dict[str, Any]]) -> str:
    """On a GPU: everything against the rows that it was to beat."""
    timed = {row["name"].partition(":")[0]: row for row in rows if row["seconds"] and row["shape"] == "Phi-2"}
    if "e" not in timed:
        return ""
    gains = [
        f"{timed['e']['samples_per_second'] / timed[name]['samples_per_second']:.2f} x ({name}; goal {goal} x)"
        for name, goal in GOALS.items()
        if name in timed
    ]
    return f"\nEverything against {', '.join(gains)}; peak {timed['e']['peak_gb']:.1f} GB, goal {PEAK_GOAL_GB} GB.\n"


def _stage(steps: list[dict[str, Any]], stages: list[dict[str, Any]]) -> str:
    """Minutes of the paper's stage, from measured steps in its own batches and in batches of 16."""
    lines = []
    for result in [*stages, *steps]:
        for row in result["rows"]:
            if not row["name"].startswith("e:") or not row["seconds"] or row["shape"] != "Phi-2" or row["steps"] < 200:
                continue
            minutes = STAGE_SAMPLES / row["samples_per_second"] / 60
            sizes = "6, 10 and 4" if "batches" in row else f"{row['samples']:g}"
            device = result["provenance"]["device"]
            lines.append([device, sizes, str(row["steps"]), f"{minutes:.1f}"])
    if not lines:
        low, high = (STAGE_SAMPLES / 16 * 1e-3 * milliseconds / 60 for milliseconds in COUNTED["H100"])
        lines = [
            ["H100, goal under 6 minutes", "6, 10 and 4", "0", "not measured"],
            ["H100, goal under 6 minutes", "16", "0", f"not measured; predicted {low:.1f} to {high:.1f}"],
        ]
    title = f"The alignment stage of the paper, {STAGE_SAMPLES:,} samples, extrapolated from measured steps.\n\n"
    return title + table(["device", "samples a step", "steps measured", "minutes"], lines)


def _predictions(results: list[dict[str, Any]]) -> str:
    lines = []
    for card in ("H100", "H200", "RTX 4090", "RTX 3090"):
        for column, letter, what in WAYS:
            measured = [
                row
                for result in results
                if card in result["provenance"]["device"]
                for row in result["rows"]
                if row["name"].startswith(letter) and row["seconds"]
            ]
            done = f"{1e3 * measured[0]['seconds']['p50']:.0f}" if measured else "not measured"
            low, high = COUNTED.get(card, (None, None)) if letter == "e:" else (None, None)
            counted = "" if low is None else f"{low} to {high}"
            lines.append([card, what, f"{predicted(card, column):.0f}", counted, done])
    title = (
        "Phi-2, 16 samples a step, milliseconds. The estimate from operations and bytes is good to 40 % and knows "
        "neither launches nor tokens that fill batches up; the prediction counts the kernels that torch 2.11 and "
        "transformers 5.17 launch.\n\n"
    )
    return title + table(["card", "way", "estimate", "prediction", "measured"], lines)


def _plot(results: list[dict[str, Any]]) -> None:
    from matplotlib import pyplot

    for result in results:
        points = sorted((row["tokens"], row["seconds"]["p50"] * 1e3) for row in result["rows"] if row["seconds"])
        figure, axes = pyplot.subplots(figsize=(4.5, 3.5))
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set(xlabel="tokens a step", ylabel="ms a step", xlim=(0, None), ylim=(0, None))
        axes.set_title(f"{result['provenance']['device']}, {result['rows'][0]['shape']} shape", fontsize=9)
        figure.tight_layout()
        figure.savefig(RESULTS / f"{result['file']}.png", dpi=120)
        pyplot.close(figure)


def load(name: str) -> list[dict[str, Any]]:
    """Result files of a benchmark, one a device."""
    paths = sorted(RESULTS.glob(f"{name}_*.json"))
    contents = [json.loads(path.read_text()) | {"file": path.stem} for path in paths]
    return [content for content in contents if content["benchmark"] == name]


def train_step() -> str:
    results = load("train_step")
    _plot(load("train_step_tokens"))
    sections = [*(_measured(result) for result in results), _predictions(results)]
    sections.append(_stage(results, load("train_step_stage")))
    return "\n".join(section for section in sections if section)


def launches() -> str:
    """Operators that launch a kernel: before adapters were cast, scaled and dropped together, and after."""
    before, after = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("step_launches_before", "step_launches")
    )
    lines = [
        [row["name"], str(earlier["layer"]), str(row["layer"]), f"{earlier['step']:,}", f"{row['step']:,}"]
        for earlier, row in zip(before["rows"], after["rows"], strict=True)
    ]
    commits = [content["provenance"]["commit"][:12] for content in (before, after)]
    head = ["row", "a layer, before", "a layer", f"a step of {after['layers']} layers, before", "a step"]
    return (
        "Operators that launch a kernel, counted on a CPU (`python benchmarks/step_launches.py`); commits "
        f"{commits[0]} (before) and {commits[1]}. LoRA's dropout counts as its kernels; on CUDA liger-kernel's rotary "
        "embedding replaces about thirty of a layer's.\n\n" + table(head, lines)
    )


def parity() -> str:
    from parity import table

    return "\n".join(table(content) for content in load("parity"))

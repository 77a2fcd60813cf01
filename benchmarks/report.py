"""Turn benchmarks/results/*.json into tables and plots.

    python benchmarks/report.py

Writes results/<section>_table.md and plots, and replaces what stands in README.md between the lines
`<!-- <section>:begin -->` and `<!-- <section>:end -->`, where it has them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from test_alignment_loss import Case
from train_step_table import parity, train_step

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
COLUMNS = {
    "reference": "eager",
    "compile": "torch.compile",
    "compile-graph": "torch.compile, CUDA graph",
    "explicit": "explicit",
    "fused": "fused, launched",
    "fused-graph": "fused, CUDA graph",
}
# name in the device's own name, compute capability, dense bf16 FLOP/s, bytes/s: attainable rates, assumed
CARDS = {
    "NVIDIA H100": ("H100", 90, 790e12, 3.0e12),
    "RTX 4090": ("4090", 89, 165e12, 1.0e12),
    "RTX 3090": ("3090", 86, 71e12, 0.94e12),
}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def stamp(provenance: dict) -> str:
    versions = ", ".join(f"{name} {provenance[name]}" for name in ("driver", "torch", "triton") if provenance[name])
    return f"{provenance['device']}; {versions}; commit {provenance['commit']}, {provenance['date']}."


def _measured(result: dict) -> str:
    """One device: forward + backward (forward alone) of every implementation, and the share of the floor."""
    rows = result["rows"]
    unit, factor = ("us", 1e6) if result["provenance"]["driver"] else ("CPU ms", 1e3)
    names = [name for name in COLUMNS if any(row["implementation"] == name for row in rows)]
    lines = []
    for key in dict.fromkeys((row["precision"], row["hidden"], row["rows"]) for row in rows):
        same = [row for row in rows if (row["precision"], row["hidden"], row["rows"]) == key]
        median = {(row["implementation"], row["pass"]): row["seconds"]["p50"] for row in same}
        cells = [
            f"{median[name, 'both'] * factor:.0f} ({median[name, 'forward'] * factor:.0f})"
            if {(name, "both"), (name, "forward")} <= median.keys()
            else "not measured"
            for name in names
        ]
        best = min((seconds, name) for (name, which), seconds in median.items() if which == "both")
        floor = same[0]["floor"]
        share = f"{floor * factor:.0f} ({100 * floor / best[0]:.0f} %)"
        lines.append([key[0], f"{key[1]}-{Case(key[2], key[1], key[0]).width}", str(key[2]), *cells, share])
    header = ["precision", "hidden-width", "M", *(COLUMNS[name] for name in names), "floor (share of the fastest)"]
    text = f"{stamp(result['provenance'])} Median {unit} of forward + backward (forward alone).\n\n" + table(
        header, lines
    )
    memory = [row for row in rows if row["memory"]]
    if memory:
        header = ["MB at the peak", "saved + scratch", "gradients", "bf16 weight copies"]
        lines = [
            [f"{row['implementation']}, {row['precision']}, {row['hidden']}, M = {row['rows']}"]
            + [f"{row['memory'][name] / 1e6:.1f}" for name in ("saved_and_scratch", "gradients", "weight_copies")]
            for row in memory
        ]
        text += "\n" + table(header, lines)
    return text


def _cards(results: list[dict]) -> str:
    """Roofline of forward + backward beside what was measured, if anything was."""
    lines = []
    for card, (name, _, flops, moved) in CARDS.items():
        rows = [row for result in results if name in result["provenance"]["device"] for row in result["rows"]]
        for precision in ("autocast", "bf16"):
            for tokens in (128, 256, 512, 1024):
                case = Case(tokens, 2560, precision)
                times = [
                    row["seconds"]["p50"]
                    for row in rows
                    if Case(row["rows"], row["hidden"], row["precision"]) == case
                    and (row["implementation"], row["pass"]) == ("fused-graph", "both")
                ]
                floor = case.floor({"flops": flops, "bytes": moved})
                done = f"{1e6 * times[0]:.0f}" if times else "not measured"
                lines.append([card, precision, str(tokens), f"{1e6 * floor:.0f}", done])
    header = ["card", "precision", "M", "roofline, us (prediction)", "fused, CUDA graph, us"]
    return table(header, lines)


def _resources() -> str:
    content = json.loads((RESULTS / "alignment_resources.json").read_text())
    lines = []
    for card, (_, capability, _, _) in CARDS.items():
        for row in content["rows"]:
            if row["capability"] == capability and "fp32" not in row["kernel"]:
                tile = "x".join(map(str, row["tile"])) or "row"
                shared = f"{row['shared_kib']:.1f} of {row['shared_limit_kib']}"
                warps = f"{row['num_warps']} x {row['registers']}"
                spills = str(row["stack_bytes"] + row["local_bytes"])
                lines.append([card, row["kernel"], tile, warps, spills, shared, row["matrix_instruction"] or "none"])
    header = ["card", "kernel", "tile", "warps x registers", "spilled bytes", "shared KiB", "matrix instruction"]
    return f"Compiled ahead of time with triton {content['provenance']['triton']}.\n\n" + table(header, lines)


def _plot(results: list[dict]) -> None:
    for result in results:
        rows = [row for row in result["rows"] if (row["pass"], row["precision"]) == ("both", "autocast")]
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
        for hidden, axis in zip(sorted({row["hidden"] for row in rows}), axes, strict=False):
            for name, label in COLUMNS.items():
                points = [row for row in rows if (row["hidden"], row["implementation"]) == (hidden, name)]
                if points:
                    seconds = [row["seconds"]["p50"] * 1e3 for row in points]
                    axis.plot([row["rows"] for row in points], seconds, marker="o", label=label)
            floors = sorted({(row["rows"], row["floor"] * 1e3) for row in rows if row["hidden"] == hidden})
            axis.plot(*zip(*floors, strict=True), color="grey", linestyle=":", label="floor")
            axis.set(title=f"hidden {hidden}", xlabel="rows M", ylabel="forward + backward, ms", ylim=(0, None))
        axes[0].legend(fontsize=8)
        figure.suptitle(f"{result['provenance']['device']}, bf16 autocast", fontsize=10)
        figure.tight_layout()
        figure.savefig(RESULTS / f"{result['file']}.png", dpi=120)
        pyplot.close(figure)


def alignment() -> str:
    results = []
    for path in sorted(RESULTS.glob("alignment_loss_*.json")):
        results.append({**json.loads(path.read_text()), "file": path.stem})
    _plot(results)
    parts = [_measured(result) for result in results]
    return "\n".join([*parts, _cards(results), _resources()])


SECTIONS: dict[str, Callable[[], str]] = {"alignment": alignment, "train_step": train_step, "parity": parity}


def main() -> None:
    readme = README.read_text() if README.exists() else ""
    updated = readme
    for name, section in SECTIONS.items():
        text = section()
        (RESULTS / f"{name}_table.md").write_text(text)
        marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        updated = marked.sub(lambda match, text=text: f"{match[1]}{text}{match[2]}", updated)
    if updated != readme:
        README.write_text(updated)


if __name__ == "__main__":
    main()

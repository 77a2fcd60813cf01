"""Turn benchmarks/results/*.json into tables and plots.

    python benchmarks/report.py

Writes results/<section>_table.md and plots, and replaces what stands in README.md between the lines
`<!-- <section>:begin -->` and `<!-- <section>:end -->`, where it has them. A section whose file is missing says
"not measured".
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from evidence_tables import ablation, evaluation, probe
from point_ops_report import chat, encoder, point_ops
from tables import stamp, table
from test_alignment_loss import Case
from train_step_table import parity, train_step

from pointalign.evaluation import naming
from pointalign.evaluation.statistics import minimum_detectable_effect

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COLUMNS = {
    "reference": "eager",
    "compile": "torch.compile",
    "compile-graph": "torch.compile, CUDA graph",
    "explicit": "explicit",
    "fused": "fused, launched",
    "fused-graph": "fused, CUDA graph",
}
# part of the device's own name: compute capability, dense bf16 FLOP/s, bytes/s: attainable rates, assumed
CARDS = {
    "H100": (90, 790e12, 3.0e12),
    "H200": (90, 790e12, 4.3e12),
    "RTX 4090": (89, 165e12, 1.0e12),
    "RTX 3090": (86, 71e12, 0.94e12),
}

EXPLICIT = (
    '"explicit" is the same forward and backward as one autograd function in plain tensor operations: on a CPU, where '
    "the matrix products dominate, this is all that fusing could be, so `auto` keeps the reference there.\n"
)


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
    measured = {
        (card, row["rows"], row["hidden"], row["precision"]): f"{1e6 * row['seconds']['p50']:.0f}"
        for result in results
        for card in CARDS
        if card in result["provenance"]["device"]
        for row in result["rows"]
        if (row["implementation"], row["pass"]) == ("fused-graph", "both")
    }
    lines = []
    for precision in ("autocast", "bf16"):
        for tokens in (128, 256, 512, 1024):
            case = Case(tokens, 2560, precision)
            line = [precision, str(tokens)]
            for card, (_, flops, moved) in CARDS.items():
                floor = case.floor({"flops": flops, "bytes": moved})
                line += [f"{1e6 * floor:.0f}", measured.get((card, tokens, 2560, precision), "not measured")]
            lines.append(line)
    header = ["precision", "M", *(title for card in CARDS for title in (f"{card}: roofline (prediction)", "measured"))]
    intro = "Forward + backward, 2560-1664-1664-768, us; measured: the fused kernels as a CUDA graph.\n\n"
    return intro + table(header, lines)


def _resources() -> str:
    """The most that any tile of each kernel needs."""
    content = json.loads((RESULTS / "alignment_resources.json").read_text())
    lines = []
    for card, (capability, _, _) in CARDS.items():
        rows = [row for row in content["rows"] if row["capability"] == capability]
        for kernel in dict.fromkeys(row["kernel"] for row in rows):
            same = [row for row in rows if row["kernel"] == kernel]
            registers, spills, shared = (
                max(row[name] for row in same) for name in ("registers", "stack_bytes", "shared_kib")
            )
            limit, instruction = same[0]["shared_limit_kib"], same[0]["matrix_instruction"] or "none"
            lines.append([f"{card}, {kernel}", str(registers), str(spills), f"{shared:.1f} of {limit}", instruction])
    header = ["kernel", "registers", "spilled bytes", "shared KiB", "matrix instruction"]
    origin = content["provenance"]
    intro = f"Compiled ahead of time, most over all tiles; triton {origin['triton']}, commit {origin['commit']}.\n\n"
    return intro + table(header, lines)


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
            axis.set(title=f"hidden {hidden}", xlabel="rows M", ylabel="forward + backward, ms")
        axes[0].set_ylim(bottom=0)
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
    return "\n".join([*parts, EXPLICIT, _cards(results), _resources()])


def _percent(estimate: dict, sign: str = "") -> str:
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _naming(content: dict, which: str) -> str:
    """Head-noun accuracies of every method, and the paired tests."""
    counts = next(iter(content["accuracy"].values()))
    seen, total = counts["noun in training"]["count"], counts["all"]["count"]
    rows = [
        [name, _percent(one["noun in training"]), _percent(one["all"])] for name, one in content["accuracy"].items()
    ]
    header = ["head-noun accuracy, %", f"noun occurs in training (n={seen})", f"all {which} objects (n={total})"]
    tests = [f"- {name}: {_percent(one, '+')} points, p = {one['p']:.4f}\n" for name, one in content["tests"].items()]
    return f"{table(header, rows)}\n{''.join(tests)}"


def _power(objects: list[dict]) -> str:
    """What the first paired test could have found, and how unevenly families fill its objects."""
    ours, theirs = naming.PAIRS[0]
    known = [one for one in objects if one["noun_in_training"]]
    differences = np.array([float(ours in one["right"]) - float(theirs in one["right"]) for one in known])
    families = Counter(one["family"] for one in known)
    least = minimum_detectable_effect(differences, [one["family"] for one in known])
    largest = sum(count for _, count in families.most_common(4)) / len(known)
    return (
        f"The first test finds a true difference of {100 * least:.1f} points four times out of five (80 % power): of "
        f"the {len(families)} families, the four largest hold {100 * largest:.0f} % of its objects.\n"
    )


def _under(run: dict) -> str:
    return f"{run['device']}, torch {run['versions']['torch']}, commit {run['commit']}"


def demo() -> str:
    """Held-out accuracy of a demo run, the paired tests and the sample answers."""
    content = json.loads((RESULTS / "demo.json").read_text())
    note = f"{_under(content['run'])}; 95 % intervals clustered by family."
    answers = (RESULTS / "demo_answers.md").read_text()
    tables = _naming(content, content["split"])
    tables += "\n" + _power(content["objects"])
    return "\n".join([note, "", tables, "Ten answers, objects drawn at random:", "", answers])


def held_out_naming() -> str:
    """Every object held out once: accuracy in five folds and the paired tests; the test part's objects alone."""
    content = json.loads((RESULTS / "held_out_naming.json").read_text())
    note = (
        f"{_under(content['run'])}. Intervals (95 %) and tests are over families, given these five models of one seed; "
        "p-values are not corrected for their number."
    )
    alone = content["objects of the test part"]
    tested = alone["tests"][" against ".join(naming.PAIRS[0])]
    turned, nearest = (alone["accuracy"][name]["noun in training"] for name in naming.PAIRS[0])
    last = (
        f"Of these, the objects of the test part alone (n={tested['count']}), under random yaw: model "
        f"{_percent(turned)}, 1-NN Chamfer {_percent(nearest)}, difference {_percent(tested, '+')} points, "
        f"p = {tested['p']:.4f}.\n"
    )
    tables = _naming(content["all folds"], "embedded")
    return "\n".join([note, "", tables, _power(content["objects"]), last])


def alignment_check() -> str:
    """Cosine of projected hidden states and targets, with LoRA training and frozen."""
    content = json.loads((RESULTS / "alignment_check.json").read_text())
    columns = list(content["results"]["before training"])
    rows = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in content["results"].items()]
    note = (
        f"{content['objects']} {content['split']} objects, {content['steps']} steps, commit {content['run']['commit']}."
    )
    return f"{note}\n\n{table(['cosine to targets', *columns], rows)}\n"


def files() -> str:
    """One line per source file: the first sentence of its docstring."""
    rows = []
    for pattern in ("pointalign/**/*.py", "kernels/**/*.py", "benchmarks/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            if docstring:
                rows.append([f"`{path.relative_to(ROOT)}`", docstring.split("\n\n")[0].replace("\n", " ")])
    return table(["file", "what it is"], rows).replace("---:", "---")


SECTIONS: dict[str, Callable[[], str]] = {
    "ablation_folds": partial(ablation, "ablation_folds"),
    "ablation_objects": partial(ablation, "ablation_objects"),
    "ablation_shapes": partial(ablation, "ablation_shapes"),
    "alignment": alignment,
    "alignment_check": alignment_check,
    "chat": chat,
    "demo": demo,
    "encoder": encoder,
    "evaluation": evaluation,
    "files": files,
    "held_out_naming": held_out_naming,
    "parity": parity,
    "point_ops": point_ops,
    "probe": probe,
    "train_step": train_step,
}


def main() -> None:
    readme = README.read_text() if README.exists() else ""
    updated = readme
    for name, section in SECTIONS.items():
        try:
            text = section()
        except FileNotFoundError as missing:
            print(f"{name}: {Path(missing.filename).name} is missing")
            text = "Not measured.\n"
        else:
            (RESULTS / f"{name}_table.md").write_text(text)
        marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        updated = marked.sub(lambda match, text=text: f"{match[1]}{text}{match[2]}", updated)
    if updated != readme:
        README.write_text(updated)


if __name__ == "__main__":
    main()

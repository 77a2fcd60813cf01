"""Turn benchmarks/results/*.json into the tables and plots of README.md and of the pages in docs/ that have them, and
into the model card of the shipped checkpoints.

    python benchmarks/report.py

Each section replaces the text between the lines `<!-- <section>:begin -->` and `<!-- <section>:end -->` of the document
that has them. A section whose result file is missing says "Not measured."
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
from alignment_tables import alignment_cards, alignment_resources, alignment_traffic
from demo_tables import demo, held_out_naming, repeats, summary
from evidence_tables import (
    ablation,
    alignment_check,
    audit,
    audit_card,
    evaluation,
    lambdas,
    probe,
    procedural_neighbours,
    token_words,
)
from fading_tables import fading, fading_advice, fading_answer, fading_longer
from feature_cache_table import feature_cache
from point_ops_report import chat, encoder, point_ops
from reliability_tables import chaos, fuzz, long_run, resume_matrix
from short_tables import bounds, cloud, in_short, learned, not_measured, studies
from tables import stamp, table
from test_alignment_loss import Case
from train_step_table import launches, parity, train_step

from pointalign import model_card
from pointalign.storage import file_hash

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "pointalign" / "checkpoints"
PAGES = ("results", "results_demo", "results_fading", "results_ablations", "performance", "reliability", "audit")
DOCUMENTS = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in PAGES))
SHIPPED = ("furniture", "furniture-stage1")
COLUMNS = {
    "reference": "eager",
    "compile": "torch.compile",
    "compile-graph": "torch.compile, CUDA graph",
    "explicit": "explicit",
    "fused": "fused, launched",
    "fused-graph": "fused, CUDA graph",
    "fused-earlier-graph": "earlier tiles, CUDA graph",
    "fused-tma-graph": "TMA, CUDA graph",
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
    return "\n".join([*parts, EXPLICIT, alignment_cards(results), alignment_traffic(), alignment_resources()])


def conversion() -> str:
    """Time and memory of a conversion of the published weights."""
    content = json.loads((RESULTS / "convert_full_size.json").read_text())
    where = stamp({**content, "load_average": None})
    columns = {
        "seconds": "seconds",
        "cpu_seconds": "CPU seconds",
        "peak_resident_gb": "peak memory, GB",
        "written_gb": "written, GB",
    }
    rows = [[name, *(str(run[column]) for column in columns)] for name, run in content["runs"].items()]
    return f"{where}\n\n{table(['conversion', *columns.values()], rows)}"


SECTIONS: dict[str, Callable[[], str]] = {
    "ablation_language_model": partial(ablation, "ablation_language_model"),
    "ablation_language_model_full": partial(ablation, "ablation_language_model_full"),
    "ablation_objects": partial(ablation, "ablation_objects"),
    "ablation_shapes": partial(ablation, "ablation_shapes"),
    "alignment": alignment,
    "alignment_check": alignment_check,
    "audit": audit,
    "bounds": bounds,
    "chaos": chaos,
    "chat": chat,
    "cloud": cloud,
    "demo": demo,
    "encoder": encoder,
    "evaluation": evaluation,
    "fading": fading,
    "fading_advice": fading_advice,
    "fading_answer": fading_answer,
    "fading_longer": fading_longer,
    "feature_cache": feature_cache,
    "fuzz": fuzz,
    "held_out_naming": held_out_naming,
    "in_short": in_short,
    "lambdas": lambdas,
    "language_model_folds": partial(ablation, "language_model_folds"),
    "language_model_full_folds": partial(ablation, "language_model_full_folds"),
    "launches": launches,
    "learned": learned,
    "long_run": long_run,
    "not_measured": not_measured,
    "objects_folds": partial(ablation, "objects_folds"),
    "parity": parity,
    "point_ops": point_ops,
    "probe": probe,
    "repeats": repeats,
    "resume_matrix": resume_matrix,
    "studies": studies,
    "summary": summary,
    "procedural_neighbours": procedural_neighbours,
    "token_words": token_words,
    "train_step": train_step,
    "conversion": conversion,
}


def shipped_card() -> str:
    """The model card of the shipped checkpoints, with the evaluation and the audit if they are of these weights."""
    described, stage1 = (json.loads((CHECKPOINTS / f"{name}.json").read_text()) for name in SHIPPED)
    path = RESULTS / "evaluation.json"
    evaluated = json.loads(path.read_text()) if path.exists() else {"weights": None}
    weights = file_hash(CHECKPOINTS / "furniture.safetensors")[:16]
    audited = audit_card(weights)
    return model_card.shipped_card(described, stage1, evaluated if evaluated["weights"] == weights else None, audited)


def render() -> dict[Path, str]:
    """The documents with every section up to date, and the model card of the shipped checkpoints.

    Raises: ValueError: a section has no place, or two.
    """
    texts = {path: path.read_text() for path in DOCUMENTS if path.exists()}
    for name, section in SECTIONS.items():
        marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        places = [path for path, text in texts.items() for _ in marked.finditer(text)]
        if len(places) != 1:
            names = ", ".join(path.name for path in DOCUMENTS)
            raise ValueError(f"section {name}: expected its begin and end lines once in {names}, found {len(places)}")
        try:
            content = section()
        except FileNotFoundError as missing:
            print(f"{name}: {Path(missing.filename).name} is missing")
            content = "Not measured.\n"
        texts[places[0]] = marked.sub(lambda match, text=content: f"{match[1]}{text}{match[2]}", texts[places[0]])
    return texts | {CHECKPOINTS / "README.md": shipped_card()}


def main() -> None:
    for path, text in render().items():
        if not path.exists() or text != path.read_text():
            path.write_text(text)
            print(f"updated: {path.name}")


if __name__ == "__main__":
    main()

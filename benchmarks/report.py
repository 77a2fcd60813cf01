"""Turn benchmarks/results/*.json into the tables and plots of README.md and of the pages in docs/ that have them, and
into the model card of the shipped checkpoints.

    python benchmarks/report.py

Each section replaces the text between the lines `<!-- <section>:begin -->` and `<!-- <section>:end -->` of the document
that has them. A section whose result file is missing says "Not measured."
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from alignment_tables import alignment_cards, alignment_resources, alignment_traffic
from evidence_tables import ablation, audit, audit_card, evaluation, lambdas, probe, procedural_neighbours, token_words
from fading_tables import fading, fading_answer, fading_longer
from feature_cache_table import feature_cache
from point_ops_report import chat, encoder, point_ops
from reliability_tables import chaos, fuzz, long_run, resume_matrix
from tables import stamp, table
from test_alignment_loss import Case
from train_step_table import launches, parity, train_step

from pointalign import model_card
from pointalign.evaluation.statistics import minimum_detectable_effect
from pointalign.storage import file_hash

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "pointalign" / "checkpoints"
PAGES = ("results", "performance", "reliability", "audit")
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


def _percent(estimate: dict, sign: str = "") -> str:
    mean, low, high = (f"{100 * estimate[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _difference(test: dict) -> str:
    return f"{_percent(test, '+')} points, p = {test['p']:.4f}"


def _asked(name: str, count: int, of_others: int) -> str:
    """A method's name, with its number of objects where that is not the others'."""
    return name if count == of_others else f"{name} (n={count})"


def _naming(content: dict, which: str) -> str:
    """Head-noun accuracies of every method, and the paired tests."""
    accuracies = content["accuracy"]
    most = max(accuracies.values(), key=lambda parts: parts["all"]["count"])
    counts = {key: estimate["count"] for key, estimate in most.items()}
    titles = {"noun in training": f"noun occurs in training (n={counts['noun in training']})"}
    for part, title in {"procedural nouns": "nouns with a generator", "other nouns": "other nouns"}.items():
        if counts.get(part, 0) not in (0, counts["noun in training"]):
            titles[part] = f"{title} (n={counts[part]})"
    if counts["all"] != counts["noun in training"]:
        titles["all"] = f"all {which} objects (n={counts['all']})"
    rows = [
        [
            _asked(name, parts["all"]["count"], counts["all"]),
            *(_percent(parts[column]) if column in parts else "none of them" for column in titles),
        ]
        for name, parts in accuracies.items()
    ]
    tests = [f"- {name}: {_difference(test)}\n" for name, test in content["tests"].items()]
    return (
        f"{table(['head-noun accuracy, %', *titles.values()], rows)}\nPaired differences of the first column:\n\n"
        f"{''.join(tests)}"
    )


def _kinds(kinds: dict[str, dict]) -> str:
    """Right answers to every kind of question that offers its answers."""
    rows = [
        [
            kind,
            _percent(row),
            f"{100 * row['chance']:.0f}",
            *(f"{100 * row[rate]:.0f}" if rate in row else "" for rate in ("yes_rate", "balanced")),
            str(row["count"]),
        ]
        for kind, row in kinds.items()
    ]
    header = ["kind of question, % right", "model", "guessing", "answered Yes, %", "balanced", "questions"]
    return table(header, rows)


def _first_test(content: dict) -> tuple[str, str]:
    """The two methods that the first paired test compares."""
    ours, _, theirs = next(iter(content["tests"])).partition(" against ")
    return ours, theirs


def _power(objects: list[dict], ours: str, theirs: str) -> str:
    """The smallest difference that the first paired test detects, and how unevenly families fill its objects."""
    known = [row for row in objects if row["noun_in_training"]]
    differences = np.array([float(ours in row["right"]) - float(theirs in row["right"]) for row in known])
    families = Counter(row["family"] for row in known)
    least = minimum_detectable_effect(differences, [row["family"] for row in known])
    largest = sum(count for _, count in families.most_common(4)) / len(known)
    return (
        f"The first test detects a true difference of {100 * least:.1f} points with a power of 80 %. The objects "
        f"belong to {len(families)} families; the four largest hold {100 * largest:.0f} % of them.\n"
    )


def _stamp_of_run(run: dict, date: str | None) -> str:
    """Device, versions, commit and date of a training run, from the description that it left."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"{run['device']}; {versions}; commit {run['commit']}, {date or 'date not recorded'}."


def summary() -> str:
    """The README's one table: naming of held-out objects by the model and by methods that need no language model."""
    content = json.loads((RESULTS / "demo.json").read_text())
    accuracy = content["accuracy"]
    count = accuracy["model"]["noun in training"]["count"]
    rows = [
        [_asked(name, parts["noun in training"]["count"], count), _percent(parts["noun in training"])]
        for name, parts in accuracy.items()
    ]
    kinds = ", ".join(
        f"{kind} {100 * row['mean']:.0f} ({100 * row['chance']:.0f})" for kind, row in content["kinds"].items()
    )
    hedged = ", ".join(f"{name} {100 * share:.0f}" for name, share in content["hedging"].items())
    return (
        f"{table([f'held-out objects named right, % (n={count})', '`make train`'], rows)}\n"
        "Of objects whose noun occurs in training, with 95 % intervals over families. Shuffled: asked with another "
        "object's cloud. 1-NN: the name of the nearest training cloud, in the best of 16 turns about the vertical. "
        "Random yaw: clouds turned about the vertical.\n\n"
        f'Right answers to other questions, %, beside guessing: {kinds}. Names hedged ("It looks like ..."), %: '
        f"{hedged}. {_stamp_of_run(content['run'], content.get('date'))}\n"
    )


def demo() -> str:
    """Held-out accuracy of a demo run, the paired tests, the kinds of questions and the sample answers."""
    content = json.loads((RESULTS / "demo.json").read_text())
    note = f"{_stamp_of_run(content['run'], content.get('date'))} Intervals: 95 %, clustered by family."
    answers = (RESULTS / "demo_answers.md").read_text()
    tables = _naming(content, content["split"])
    tables += "\n" + _power(content["objects"], *_first_test(content))
    return "\n".join([note, "", tables, _kinds(content["kinds"]), "Ten questions drawn at random:", "", answers])


def held_out_naming() -> str:
    """Every object held out once: accuracy in five folds and the paired tests; the test part's objects alone."""
    if not (RESULTS / "held_out_naming.json").exists():
        return (
            "Not measured since the recipe changed. `make held-out-naming` measures it, in some hours on two cores.\n"
        )
    content = json.loads((RESULTS / "held_out_naming.json").read_text())
    note = (
        f"{_stamp_of_run(content['run'], content['provenance']['date'])} Intervals (95 %) and tests are over families, "
        "for these five models of one seed. The p-values are not corrected for their number."
    )
    alone, methods = content["objects of the test part"], _first_test(content["all folds"])
    tested = alone["tests"][" against ".join(methods)]
    ours, theirs = (_percent(alone["accuracy"][name]["noun in training"]) for name in methods)
    last = (
        f"The objects of the test part alone (n={tested['count']}): {methods[0]} {ours}, {methods[1]} {theirs}, "
        f"difference {_difference(tested)}.\n"
    )
    tables = _naming(content["all folds"], "embedded")
    return "\n".join([note, "", tables, _power(content["objects"], *methods), last])


def alignment_check() -> str:
    """Cosine of projected hidden states and targets, with LoRA training and frozen."""
    if not (RESULTS / "alignment_check.json").exists():
        return "Not measured since the recipe changed. `make alignment-check` measures it.\n"
    content = json.loads((RESULTS / "alignment_check.json").read_text())
    columns = list(content["results"]["before training"])
    rows = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in content["results"].items()]
    where = _stamp_of_run(content["run"], content.get("date"))
    note = f"{content['objects']} {content['split']} objects, {content['steps']} steps; {where}"
    return f"{note}\n\n{table(['cosine to targets', *columns], rows)}\n{content['answer']}\n"


SECTIONS: dict[str, Callable[[], str]] = {
    "ablation_folds": partial(ablation, "ablation_folds"),
    "ablation_objects": partial(ablation, "ablation_objects"),
    "ablation_shapes": partial(ablation, "ablation_shapes"),
    "alignment": alignment,
    "alignment_check": alignment_check,
    "audit": audit,
    "chaos": chaos,
    "chat": chat,
    "demo": demo,
    "encoder": encoder,
    "evaluation": evaluation,
    "fading": fading,
    "fading_answer": fading_answer,
    "fading_longer": fading_longer,
    "feature_cache": feature_cache,
    "fuzz": fuzz,
    "held_out_naming": held_out_naming,
    "lambdas": lambdas,
    "launches": launches,
    "long_run": long_run,
    "parity": parity,
    "point_ops": point_ops,
    "probe": probe,
    "resume_matrix": resume_matrix,
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

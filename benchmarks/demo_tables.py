"""Sections of README and of docs/results_demo.md about runs of `make train`, from their result files alone.

python benchmarks/record_run.py RUN    writes results/demo.json, demo_repeats.json, demo_answers.md and the pictures
make held-out-naming                   writes results/held_out_naming.json
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from tables import difference, percent, stamp_of_run, table

from pointalign.evaluation.statistics import minimum_detectable_effect

RESULTS = Path(__file__).parent / "results"


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
            *(percent(parts[column]) if column in parts else "none of them" for column in titles),
        ]
        for name, parts in accuracies.items()
    ]
    tests = [f"- {name}: {difference(test)}\n" for name, test in content["tests"].items()]
    return (
        f"{table(['head-noun accuracy, %', *titles.values()], rows)}\nPaired differences of the first column:\n\n"
        f"{''.join(tests)}"
    )


def kinds_table(kinds: dict[str, dict]) -> str:
    """Right answers to every kind of question that offers its answers."""
    rows = [
        [
            kind,
            percent(row),
            f"{100 * row['chance']:.0f}",
            *(f"{100 * row[rate]:.0f}" if rate in row else "" for rate in ("yes_rate", "balanced")),
            str(row["count"]),
        ]
        for kind, row in kinds.items()
    ]
    header = ["kind of question, % right", "model", "guessing", "answered Yes, %", "balanced", "questions"]
    return table(header, rows)


def first_test(content: dict) -> tuple[str, str]:
    """The two methods that the first paired test compares."""
    ours, _, theirs = next(iter(content["tests"])).partition(" against ")
    return ours, theirs


def power(test: str, objects: list[dict], ours: str, theirs: str) -> str:
    """The smallest difference that a paired test detects, and how unevenly families fill its objects."""
    known = [row for row in objects if row["noun_in_training"]]
    differences = np.array([float(ours in row["right"]) - float(theirs in row["right"]) for row in known])
    families = Counter(row["family"] for row in known)
    least = minimum_detectable_effect(differences, [row["family"] for row in known])
    largest = sum(count for _, count in families.most_common(4)) / len(known)
    return (
        f"{test} detects a true difference of {100 * least:.1f} points with a power of 80 %. The objects "
        f"belong to {len(families)} families; the four largest hold {100 * largest:.0f} % of them.\n"
    )


def summary() -> str:
    """The README's one table: naming of held-out objects by the model and by methods that need no language model."""
    content = json.loads((RESULTS / "demo.json").read_text())
    accuracy = content["accuracy"]
    count = accuracy["model"]["noun in training"]["count"]
    rows = [
        [_asked(name, parts["noun in training"]["count"], count), percent(parts["noun in training"])]
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
        f"{hedged}. {stamp_of_run(content['run'], content.get('date'))}\n"
    )


def demo() -> str:
    """Held-out accuracy of a demo run, the paired tests, the kinds of questions and the sample answers."""
    content = json.loads((RESULTS / "demo.json").read_text())
    note = f"{stamp_of_run(content['run'], content.get('date'))} Intervals: 95 %, clustered by family."
    answers = (RESULTS / "demo_answers.md").read_text()
    tables = _naming(content, content["split"])
    tables += "\n" + power("The first test", content["objects"], *first_test(content))
    return "\n".join([note, "", tables, kinds_table(content["kinds"]), "Ten questions drawn at random:", "", answers])


def read_repeats() -> list[dict]:
    """The runs of the recorded recipe; empty where none is recorded."""
    path = RESULTS / "demo_repeats.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def repeats_line() -> str:
    """How far the runs of one recipe lie apart."""
    runs = read_repeats()
    shares = [100 * run["named right"]["model"]["mean"] for run in runs]
    if len(shares) < 2:
        return "The recipe is recorded once, so the spread of repeated runs is not known."
    seeds = len({run["seed"] for run in runs})
    return f"{len(shares)} runs of the recipe (seeds: {seeds}) name {min(shares):.1f} to {max(shares):.1f} %."


def repeats() -> str:
    """Every recorded run of the recipe: where it ran, and what it answers right."""
    runs = read_repeats()
    if not runs:
        return "Not measured.\n"
    kinds = list(runs[0]["kinds"])
    rows = [
        [
            f"{run['device']}, {run['dtype']}",
            str(run["seed"]),
            *(percent(run["named right"][method]) for method in ("model", "model, random yaw")),
            *(f"{100 * run['kinds'][kind]:.0f}" for kind in kinds),
            f"{run['commit']}{', uncommitted changes' if run['uncommitted_changes'] else ''}, {run['date']}",
        ]
        for run in runs
    ]
    header = ["device, precision", "seed", "named right", "random yaw", *kinds, "commit, date"]
    return f"{repeats_line()}\n\n{table(header, rows)}"


def held_out_naming() -> str:
    """Every object held out once: accuracy in five folds and the paired tests; the test part's objects alone."""
    if not (RESULTS / "held_out_naming.json").exists():
        return (
            "Not measured since the recipe changed. `make held-out-naming` measures it, in some hours on two cores.\n"
        )
    content = json.loads((RESULTS / "held_out_naming.json").read_text())
    note = (
        f"{stamp_of_run(content['run'], content['provenance']['date'])} Intervals (95 %) and tests are over families, "
        "for these five models of one seed. The p-values are not corrected for their number."
    )
    alone, methods = content["objects of the test part"], first_test(content["all folds"])
    tested = alone["tests"][" against ".join(methods)]
    ours, theirs = (percent(alone["accuracy"][name]["noun in training"]) for name in methods)
    last = (
        f"The objects of the test part alone (n={tested['count']}): {methods[0]} {ours}, {methods[1]} {theirs}, "
        f"difference {difference(tested)}.\n"
    )
    tables = _naming(content["all folds"], "embedded")
    return "\n".join([note, "", tables, power("The first test", content["objects"], *methods), last])

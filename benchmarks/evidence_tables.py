"""Sections of the result pages: held-out evaluation, ablations and probes, from their result files alone.

pointalign evaluate                    writes evaluation.json, to be copied to results/
python -m experiments.ablation objects           writes results/ablation_objects/, and so on
pointalign probe --output benchmarks/results/probe
pointalign audit furniture             writes audit.json, to be copied to results/
python -m experiments.token_words --output benchmarks/results/token_words.json
python -m experiments.compare          writes compare.json and pictures, to be copied to results/compare/
python -m experiments.procedural_neighbours --output benchmarks/results/procedural_neighbours.json
make alignment-check                   writes alignment.json, which benchmarks/record_run.py copies to results/
"""

import json
import sys
from pathlib import Path

from tables import stamp_of_run, table

sys.path.append(str(Path(__file__).parents[1]))  # experiments/ is not installed
from experiments import compare as comparing
from experiments import procedural_neighbours as neighbours
from experiments import token_words as words
from experiments.ablation import comparison, conclusion
from experiments.ablation.measure import PRIMARY
from experiments.ablation.train_arm import Arm
from pointalign.audit import summary as auditing
from pointalign.evaluation import probe as probing
from pointalign.evaluation import results, statistics

RESULTS = Path(__file__).parent / "results"
# metrics in the short table; the folded one has all
SHOWN = {
    "classification": ("head noun", "head noun, closed set", "closed-set accuracy", "likelihood margin"),
    "captioning": ("rouge-l", "meteor", "MiniLM cosine"),
    "geometry": ("accuracy",),
    "yesno": ("accuracy",),
}
PICTURES = {"held-out losses with and without alignment": "losses.png", "what each layer knows": "layers.png"}


def evaluation() -> str:
    """Held-out accuracy of a model with intervals, and what its answers owe to the cloud."""
    content = json.loads((RESULTS / "evaluation.json").read_text())
    asked, tasks = content["asked"], content["tasks"]
    note = (
        f"{content['model']} (weights {content['weights']}) on the {asked['split']} objects, protocol "
        f"{asked.get('protocol', 'greedy')}; {_stamp(content['versions'])}. Intervals are clustered by family. Values "
        "are percentages, except the likelihood margin, which is in nats."
    )
    short = {
        name: {"metrics": {key: value for key, value in task["metrics"].items() if _is_shown(task["kind"], key)}}
        for name, task in tasks.items()
    }
    parts = [note, results.table(content | {"tasks": short})]
    parts += [_against_shuffled(tasks, name) for name in tasks if f"{name}-shuffled" in tasks]
    parts.append(_folded("Every metric of every task", results.table(content)))
    return "\n\n".join(parts) + "\n"


def token_words() -> str:
    """What the point tokens say without a language model."""
    content = json.loads((RESULTS / "token_words.json").read_text())
    note = f"{content['checkpoint']} on the {content['split']} objects; {_stamp(content['provenance'])}."
    return f"{note} Intervals are clustered by family.\n\n{words.table(content)}\n"


def lambdas() -> str:
    """The alignment stage with lambda 0 and 0.1 side by side, from `results/compare/`."""
    folder = RESULTS / "compare"
    if not (folder / "compare.json").exists():
        return "Not measured (`make compare`).\n"
    content = json.loads((folder / "compare.json").read_text())
    pictures = [f"![{title}]({_link(folder / name)})" for title, name in PICTURES.items()]
    note = f"One pair of runs of `make train`; {_stamp(content['provenance'])}."
    return "\n\n".join([note, comparing.table(content), *pictures]) + "\n"


def procedural_neighbours() -> str:
    """The nearest neighbour with and without the kind of clouds that stage 1 saw too."""
    content = json.loads((RESULTS / "procedural_neighbours.json").read_text())
    note = f"{content['per_noun']} procedural objects of each noun, {content['split']} objects"
    return (
        f"{note}; {_stamp(content['provenance'])}. Intervals are clustered by family.\n\n{neighbours.table(content)}\n"
    )


def audit() -> str:
    """The certificate of the shipped model."""
    content = json.loads((RESULTS / "audit.json").read_text())
    return f"{auditing.summary(content)}\n\n{_origin_of_audit(content)}\n"


def audit_card(weights: str) -> str | None:
    """The same in short, for the card of the shipped model: what it looks for, and what speaks against it; None where
    no audit of these weights is on record.
    """
    path = RESULTS / "audit.json"
    if not path.exists() or (content := json.loads(path.read_text()))["weights"] != weights:
        return None
    return f"{auditing.good_and_bad(content)}\n\n{_origin_of_audit(content)}"


def _origin_of_audit(content: dict) -> str:
    seconds = content["seconds"]
    return (
        f"{content['questions']} questions in {seconds['wall']:.0f} s, {seconds['cpu']:.0f} s of CPU time; weights "
        f"{content['weights']}; {_stamp(content['provenance'])}. In %, with 95 % intervals over families."
    )


def _is_shown(kind: str, metric: str) -> bool:
    return metric in SHOWN.get(kind, ()) or metric.startswith("accuracy, ")


def _against_shuffled(tasks: dict, name: str) -> str:
    """Paired difference of a task from the same questions about other objects' clouds."""
    others = {row["id"]: row for row in tasks[f"{name}-shuffled"]["questions"]}
    rows = tasks[name]["questions"]
    values = [(row["values"]["head noun"], others[row["id"]]["values"]["head noun"], row["family"]) for row in rows]
    estimate, p = statistics.paired_difference(*(list(column) for column in zip(*values, strict=True)))
    mean, low, high = (f"{100 * value:+.1f}" for value in (estimate.mean, estimate.low, estimate.high))
    return (
        f"The object's cloud against another object's cloud, {name}: head noun {mean} [{low}, {high}] points, "
        f"p = {p:.4f}."
    )


def ablation(name: str) -> str:
    """The conclusion, tables and plots of an ablation, from `results/<name>/`.

    The conclusion is drawn here and not read from the file, so that what counts as shown is decided in one place.
    """
    folder = RESULTS / name
    content = json.loads((folder / "ablation.json").read_text())
    recipe, rows = content["recipe"], content["arms"]
    schedule = recipe["schedule"]
    note = (
        f"{schedule['steps']} steps of {schedule['batch_size']} samples, lambda {recipe['weight']:g} unless an arm "
        f"names its own; {_stamp(content['versions'])}. Intervals are over seeds and families."
    )
    arms = {arm: Arm(**values) for arm, values in recipe["arms"].items()}
    primary = recipe.get("primary", [PRIMARY])
    parts = [note, *conclusion.conclusion(rows, recipe["baseline"], arms, primary)]
    parts += conclusion.missing_runs(content["missing"])
    parts.append(
        _folded("Arms, controls and probes", "\n\n".join(comparison.tables(rows, recipe["baseline"], primary)))
    )
    plots = {"layers.png": "Probes by layer", "differences.png": "Every arm against the baseline"}
    parts += [f"![{title}]({_link(folder / file)})" for file, title in plots.items() if (folder / file).exists()]
    return "\n\n".join(parts) + "\n"


def probe() -> str:
    """Probe accuracy and similarity to the Q-Former tokens by layer, from `results/probe/`."""
    folder = RESULTS / "probe"
    content = json.loads((folder / "probe.json").read_text())
    note = f"{content['model']} (weights {content['weights']}), {content['data']}; {_stamp(content['versions'])}."
    picture = f"![Probes and similarity by layer]({_link(folder / 'layers.png')})"
    return "\n\n".join([note, picture, _folded("By layer", probing.layer_table(content))]) + "\n"


def alignment_check() -> str:
    """Cosine of projected hidden states and targets, with LoRA training and frozen."""
    path = RESULTS / "alignment_check.json"
    if not path.exists():
        return "Not measured since the recipe changed. `make alignment-check` measures it.\n"
    content = json.loads(path.read_text())
    columns = list(content["results"]["before training"])
    rows = [[name, *(f"{row[column]:.3f}" for column in columns)] for name, row in content["results"].items()]
    changes = content["differences"]
    rows.append(["LoRA trains less LoRA frozen", *(conclusion.SIGNED.format(**changes[column]) for column in columns)])
    where = stamp_of_run(content["run"], content.get("date"))
    note = f"{content['objects']} {content['split']} objects, {content['steps']} steps; {where}"
    return f"{content['answer']}\n\n{table(['cosine to targets', *columns], rows)}\n{note}\n"


def _stamp(versions: dict) -> str:
    date = versions.get("date") or "date not recorded"
    return f"{versions['device']}, torch {versions['torch']}, commit {versions['commit']}, {date}"


def _link(file: Path) -> str:
    """The path of a result as a page in docs/ names it."""
    return f"../{file.relative_to(RESULTS.parents[1])}"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"

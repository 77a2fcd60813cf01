"""Sections of docs/results.md, the two pages for a first reader, from files in benchmarks/results/ alone.

What fades in a small decoder is in `fading_tables.py`. The detail pages have the full tables.
"""

import json
import sys
from pathlib import Path
from typing import Any

from demo_tables import first_test, power, repeats_line
from tables import difference, percent, stamp_of_run, table

sys.path.append(str(Path(__file__).parents[1]))  # experiments/ is not installed
from fading_tables import fading_line

from experiments import compare as comparing
from experiments.ablation.conclusion import METHOD, direction, is_share
from experiments.ablation.measure import PRIMARY, SECOND
from experiments.alignment_check import DECISIVE
from pointalign.evaluation import markdown_table
from pointalign.evaluation.probe import QFORMER
from pointalign.storage import file_hash

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parents[1] / "pointalign" / "checkpoints"
NEIGHBOUR = "1-NN Chamfer, best of 16 yaws"
ONE_SIDED = 0.15  # share of Yes below which, or of No, answers are called hardly varied
QUESTIONS = {  # kind of question -> its title, and the fact of token_words.json that answers it
    "colour": ("colour", "colour"),
    "longest side": ("longest side", "longest side"),
    "taller or wider": ("taller than wide, yes or no", "height and width"),
    "wider or deeper": ("wider than deep, yes or no", "width and depth"),
    "symmetric": ("symmetric, yes or no", None),
    "aspect bucket": ("proportions, four choices", None),
    "two clouds": ("which of two is taller for its width", None),
    "noun": ("is this a ..., yes or no", None),
    "main colour": ("is it mostly ..., yes or no", None),
}
EDITS = {"flip": "right before and after", "stay": "same answer"}  # what an edit must do -> the share that counts
ABLATIONS = {  # folder -> what trains
    "ablation_objects": "SmolLM2 (LoRA), embedded objects",
    "ablation_shapes": "a new decoder, procedural stools",
    "ablation_language_model": "SmolLM2 (LoRA), names and geometry",
    "ablation_language_model_full": "SmolLM2 (all weights), names and geometry",
    "language_model_folds": "SmolLM2 (LoRA), names and geometry in five folds",
    "language_model_full_folds": "SmolLM2 (all weights), names and geometry in five folds",
}
UNMEASURED = {  # file -> question, command, time
    "alignment_check.json": (
        "Does the language model move, or only the projector?",
        "make alignment-check",
        "an hour or two on two cores",
    ),
    "probe/probe.json": (
        "What does each layer of the shipped model hold?",
        "pointalign probe --output benchmarks/results/probe",
        "minutes on two cores",
    ),
    "held_out_naming.json": (
        "Naming of every embedded object, held out once",
        "make held-out-naming",
        "hours on two cores",
    ),
    "objects_folds/ablation.json": (
        "The ablation on embedded objects, every object held out once",
        "python -m experiments.folds",
        "a GPU",
    ),
    "ablation_language_model/ablation.json": (
        "Does the alignment loss help SmolLM2 with LoRA to name and to answer about geometry, and more than a wrong "
        "target does?",
        "python -m experiments.ablation language_model",
        "20 runs, a GPU",
    ),
    "ablation_language_model_full/ablation.json": (
        "The same, with all weights of SmolLM2 training",
        "python -m experiments.ablation language_model_full",
        "20 runs, a GPU",
    ),
    "language_model_folds/ablation.json": (
        "With LoRA, every object held out once",
        "python -m experiments.folds --recipe language_model",
        "100 runs, a GPU",
    ),
    "language_model_full_folds/ablation.json": (
        "With all weights, every object held out once",
        "python -m experiments.folds --recipe language_model_full",
        "100 runs, a GPU",
    ),
}


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def learned() -> str:
    """Naming by the model of `make train` beside its baselines, and what the comparison can tell."""
    content = _read("demo.json")
    run, accuracy = content["run"], content["accuracy"]
    count = accuracy["model"]["noun in training"]["count"]
    neighbours = _read("procedural_neighbours.json")
    titles = {
        "model before training": "the same model before training",
        "model": "**model after `make train`**",
        "model, random yaw": "the same, clouds turned at random",
        "majority class": "always the most frequent noun",
        NEIGHBOUR: "nearest neighbour, best of 16 turns",
    }
    values = {title: accuracy[name]["noun in training"] for name, title in titles.items() if name in accuracy}
    values["the same, also among procedural clouds"] = neighbours["accuracy"]["with procedural clouds"][
        "noun in training"
    ]
    rows = [[title, percent(value), str(value["count"])] for title, value in values.items()]
    ours, theirs = first_test(content)
    test = content["tests"][f"{ours} against {theirs}"]
    told = "cannot be told apart" if test["low"] <= 0 <= test["high"] else "differ"
    return (
        f"The run has {run['training']['max_steps']} steps. It is asked about {count} held-out objects whose noun "
        "occurs in training. An answer is right when its head noun is.\n\n"
        f"{table(['named right', '%', 'objects'], rows)}\n"
        f"Model less nearest neighbour: {difference(test)}. The two {told} here. "
        f"{power('This test', content['objects'], ours, theirs)}{_in_folds()}\n"
        f"From `demo.json` and `procedural_neighbours.json`; {stamp_of_run(run, content.get('date'))} Intervals (95 %) "
        f"are over families of near-duplicate objects, of this single run. {repeats_line()}\n"
    )


def _in_folds() -> str:
    """The same comparison over all embedded objects, each held out once; "" where it is not measured."""
    if not (RESULTS / "held_out_naming.json").exists():
        return ""
    content = _read("held_out_naming.json")["all folds"]
    ours, theirs = first_test(content)
    test = content["tests"][f"{ours} against {theirs}"]
    model, neighbour = (percent(content["accuracy"][name]["noun in training"]) for name in (ours, theirs))
    return (
        f"\nWith every embedded object held out once, in five folds with a shorter stage 1 each (n={test['count']}): "
        f"model {model} %, nearest neighbour {neighbour} %, difference {difference(test)} (`held_out_naming.json`).\n"
    )


def bounds() -> str:
    """Right answers by kind of question: without a model, the tokens without a language model, the shipped model."""
    demo, words, shipped = _read("demo.json"), _read("token_words.json"), _read("evaluation.json")
    naming = shipped["tasks"]["classification-prompt0"]["metrics"]["head noun, closed set"]
    metrics = shipped["tasks"]["geometry"]["metrics"] | shipped["tasks"]["yesno"]["metrics"]
    kinds = {kind: metrics[f"accuracy, {kind}"] for kind in QUESTIONS}
    facts = words["poses"]["fixed"]
    neighbour = f"{100 * demo['accuracy'][NEIGHBOUR]['noun in training']['mean']:.0f} (nearest neighbour)"
    rows = [["name", neighbour, percent(facts["noun"]), percent(naming), str(naming["count"])]]
    for kind, (title, fact) in QUESTIONS.items():
        said = percent(facts[fact]) if fact else ""
        row = kinds[kind]
        rows.append([title, f"{100 * row['majority']:.0f}", said, percent(row), str(row["count"])])
    header = ["right answers, %", "without a model", "tokens alone", "`furniture`", "questions"]
    one_sided = [
        f"{QUESTIONS[kind][0].partition(',')[0]} {100 * row['yes_rate']:.0f} %"
        for kind, row in kinds.items()
        if "yes_rate" in row and not ONE_SIDED < row["yes_rate"] < 1 - ONE_SIDED
    ]
    said_yes = f"`furniture` hardly varies some answers; it says Yes to: {', '.join(one_sided)}. "
    probed = ""
    if (RESULTS / "probe/probe.json").exists():
        probed = f"{_probed(_read('probe/probe.json'))} "
    return (
        f"{table(header, rows)}\n"
        '"Without a model" is the nearest neighbour above for names, else always the most frequent answer. "Tokens '
        'alone" is the word nearest to the point token of that fact; empty where no token stands for it. '
        f"{said_yes if one_sided else ''}{probed}From `token_words.json` and `evaluation.json` (weights "
        f"{shipped['weights']}).\n"
    )


def _probed(content: dict) -> str:
    """What a linear probe reads at the input of the language model and after the last layer."""
    read = []
    for name, places in content["probes"].items():
        layers = sorted((place for place in places if place != QFORMER), key=int)
        first, last = (f"{places[place]:.2f}" for place in (layers[0], layers[-1]))
        read.append(f"{name} ({content['kinds'][name]}) {first} to {last}")
    return (
        f"A linear probe of {content['model']}'s point tokens reads, from the input of the language model to its last "
        f"layer: {'; '.join(read)} (`probe/probe.json`)."
    )


def cloud() -> str:
    """How much of the answers is lost with another object's cloud, after `make train` and in the audit."""
    demo, audited = _read("demo.json"), _read("audit.json")
    test = demo["tests"]["model against model, shuffled clouds"]
    right, shuffled = (demo["accuracy"][name]["noun in training"] for name in ("model", "model, shuffled clouds"))
    rows = [["names", percent(right), percent(shuffled), "", _owed(test, test["p"]), str(right["count"])]]
    kinds = audited["inputs"]["kinds"]
    for kind, title, owed in (
        ("name", "names, audit", kinds["name"]["owed to the cloud"]),
        ("all", "five kinds of questions, audit", audited["criteria"]["own cloud against another object's"]),
    ):
        said = kinds[kind]["said"]
        shares = [percent(said[name]) for name in ("true", "shuffled", "blind")]
        rows.append([title, *shares, _owed(owed, owed["p_holm"]), str(said["true"]["count"])])
    header = ["right answers, %", "own cloud", "another's cloud", "no cloud", "own less another's, points", "questions"]
    edits = audited["counterfactuals"]["cells"]
    (changed, flips), (same, stays) = (_weakest(edits, must, share) for must, share in EDITS.items())
    return (
        f"{table(header, rows)}\n"
        "Clouds are also stretched and recoloured. Where the true answer changes, `furniture` is right before and "
        f"after in {percent(flips)} % of pairs at worst ({changed}). Where it stays, the reply stays in "
        f"{percent(stays)} % at worst ({same}). From `demo.json` and `audit.json` (weights {audited['weights']}).\n"
    )


def _weakest(cells: dict[str, dict], must: str, share: str) -> tuple[str, dict]:
    """Question and edit with the least `share`, among those whose answer must flip or stay."""
    shares = {
        f"{kind} of {edit} clouds": cell[share]
        for edit, kinds in cells.items()
        for kind, cell in kinds.items()
        if cell["must"] == must
    }
    worst = min(shares, key=lambda title: shares[title]["mean"])
    return worst, shares[worst]


def _owed(estimate: dict, p: float) -> str:
    return f"{percent(estimate, '+')} (p = {p:.4f})"


def studies() -> str:
    """The alignment loss in the other studies: a row for each measure."""
    rows, notes, files = [], [], []
    for folder, title in ABLATIONS.items():
        if (RESULTS / folder / "ablation.json").exists():
            content = _read(f"{folder}/ablation.json")
            rows += _ablation_rows(content, title)
            files.append(f"`{folder}/ablation.json`")
            if (weights := content["recipe"].get("weights")) and weights != _shipped_stage1():
                notes.append(title)
    if (RESULTS / "compare/compare.json").exists():
        content = _read("compare/compare.json")
        named, weight = content["names"]["model"], comparing.ARMS["with"]
        rows.append(
            ["SmolLM2 (LoRA), `make train`", f"{weight:g}", "1", "named right, points", percent(named, "+"),
             f"{named['p']:.3f}", "", "one pair of runs"]
        )  # fmt: skip
        files.append("`compare/compare.json`")
    if not rows:
        return "Not measured.\n"
    header = ["what trains", "lambda", "seeds", "measure", "alignment less none", "p (Holm)", "detectable", "shown"]
    text = f"{markdown_table(header, rows, 'lrrlrrrl')}\n\n"
    if notes:
        text += f"Recorded with an earlier point branch than the shipped one: {'; '.join(notes)}. "
    if (RESULTS / "alignment_check.json").exists():
        check = _read("alignment_check.json")
        before, frozen, trains = (
            f"{check['results'][name][DECISIVE]:.3f}" for name in ("before training", "LoRA frozen", "LoRA trains")
        )
        text += f"Does the language model itself move? {check['answer']} In front of a frozen language model the "
        text += f"projector alone brings this cosine from {before} to {frozen}; with LoRA it is {trains}. "
        files.append("`alignment_check.json`")
    return f"{text}From {', '.join(files)}.\n"


def _ablation_rows(content: dict, title: str) -> list[list[str]]:
    method = next((row for row in content["arms"] if row["arm"] == METHOD and "differences" in row), None)
    if method is None:
        return []
    rows = []
    for metric in content["recipe"].get("primary", [SECOND, PRIMARY]):
        estimate, seeds = method["differences"][metric], len(method["differences"]["seeds"])
        unit, scale, digits = ("points", 100, 1) if is_share(metric) else ("nats", 1, 3)
        mean, low, high = (f"{scale * estimate[key]:+.{digits}f}" for key in ("mean", "low", "high"))
        shown = {1: "a gain", 0: "no", -1: "a loss"}[direction(estimate, seeds)]
        rows.append(
            [title, f"{content['recipe']['weight']:g}", str(seeds), f"{metric}, {unit}", f"{mean} [{low}, {high}]",
             f"{estimate['p_holm']:.3f}", f"{scale * estimate['detectable']:.{digits}f}", shown]
        )  # fmt: skip
    return rows


def _shipped_stage1() -> str:
    return file_hash(CHECKPOINTS / "furniture-stage1.safetensors")[:16]


def in_short() -> str:
    """The answers in a few lines."""
    content = _read("demo.json")
    accuracy = {name: parts["noun in training"]["mean"] for name, parts in content["accuracy"].items()}
    test = content["tests"][" against ".join(first_test(content))]
    told = "These two cannot be told apart here." if test["low"] <= 0 <= test["high"] else "The two differ."
    lines = [
        f"A language model that never saw a point token names {100 * accuracy['model']:.1f} % of held-out objects "
        "after `make train`. The fair baseline, a nearest neighbour that searches over turns, names "
        f"{100 * accuracy[NEIGHBOUR]:.1f} %. {told}",
        "The answers come from the cloud: with another object's cloud it names "
        f"{100 * accuracy['model, shuffled clouds']:.1f} %.",
        fading_line(),
    ]
    shown = [
        title
        for folder, title in ABLATIONS.items()
        if (RESULTS / folder / "ablation.json").exists()
        and any(row[-1] == "a gain" for row in _ablation_rows(_read(f"{folder}/ablation.json"), title))
    ]
    lines.append(
        f"A gain from the alignment loss is {'shown in: ' + '; '.join(shown) if shown else 'shown in none'}"
        f"{' of' if not shown else ' among'} the other studies."
    )
    return "".join(f"- {line}\n" for line in lines)


def not_measured() -> str:
    """The studies whose result file is missing, with their commands."""
    rows = [
        [question, f"`{command}`", time]
        for name, (question, command, time) in UNMEASURED.items()
        if not (RESULTS / name).exists()
    ]
    if not rows:
        return "Every study that has a command here is measured.\n"
    return markdown_table(["question", "command", "time"], rows, "lll") + "\n"

"""Sections of docs/results.md, the two pages for a first reader, from files in benchmarks/results/ alone.

What fades in a small decoder is in `fading_tables.py`. The detail pages have the full tables.
"""

import json
import sys
from pathlib import Path
from typing import Any

from demo_tables import first_test, power
from tables import difference, percent, stamp_of_run, table

sys.path.append(str(Path(__file__).parents[1]))  # experiments/ is not installed
from fading_tables import fading_line

from experiments import compare as comparing
from experiments.ablation.conclusion import METHOD, direction
from experiments.ablation.measure import PRIMARY, SECOND
from pointalign.evaluation import markdown_table
from pointalign.storage import file_hash

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parents[1] / "pointalign" / "checkpoints"
NEIGHBOUR = "1-NN Chamfer, best of 16 yaws"
QUESTIONS = {  # kind of question -> what the tokens would have to say for it, as token_words.json names it
    "colour": "colour",
    "main colour": None,
    "longest side": "longest side",
    "taller or wider": "height and width",
    "wider or deeper": "width and depth",
    "aspect bucket": None,
    "symmetric": None,
    "two clouds": None,
    "noun": None,
}
YES_NO = {"taller or wider", "wider or deeper", "symmetric", "noun", "main colour"}
ABLATIONS = {  # folder -> what trains
    "ablation_objects": "SmolLM2 (LoRA), embedded objects",
    "ablation_shapes": "a new decoder, procedural stools",
    "language_model_folds": "SmolLM2 (LoRA), embedded objects in five folds",
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
    "language_model_folds/ablation.json": (
        "Does the alignment loss help SmolLM2 in 600 steps, and more than a wrong target?",
        "python -m experiments.folds --recipe language_model",
        "a GPU; on two cores about 18 hours",
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
        f"{power('This test', content['objects'], ours, theirs)}\n"
        f"From `demo.json` and `procedural_neighbours.json`; {stamp_of_run(run, content.get('date'))} Intervals (95 %) "
        "are over families of near-duplicate objects, of this single run.\n"
    )


def bounds() -> str:
    """Right answers by kind of question: guessing, the tokens without a language model, both models."""
    demo, words, shipped = _read("demo.json"), _read("token_words.json"), _read("evaluation.json")
    metrics = {
        kind: values["metrics"][f"accuracy, {kind}"]
        for values in (shipped["tasks"][name] for name in ("geometry", "yesno"))
        for kind in QUESTIONS
        if f"accuracy, {kind}" in values["metrics"]
    }
    naming = shipped["tasks"]["classification-prompt0"]["metrics"]["head noun, closed set"]
    rows = [
        [
            "name",
            f"{100 * demo['accuracy']['majority class']['noun in training']['mean']:.0f}",
            percent(words["poses"]["fixed"]["noun"]),
            _with_count(demo["accuracy"]["model"]["noun in training"]),
            _with_count(naming),
        ]
    ]
    for kind, fact in QUESTIONS.items():
        if kind in demo["kinds"] and kind in metrics:
            ours, theirs = demo["kinds"][kind], metrics[kind]
            said = percent(words["poses"]["fixed"][fact]) if fact else ""
            guess = max(ours["chance"], theirs.get("majority", 0))
            yes = ", yes or no" if kind in YES_NO else ""
            rows.append([f"{kind}{yes}", f"{100 * guess:.0f}", said, _with_count(ours), _with_count(theirs)])
    header = ["right answers, %", "guessing", "tokens alone", "`make train`", "shipped `furniture`"]
    always = [kind for kind in demo["kinds"] if max(_yes(demo, kind), 1 - _yes(demo, kind)) > 0.85]
    return (
        f"{table(header, rows)}\n"
        '"Guessing" is the most frequent answer, or chance where that is more. "Tokens alone" is the word nearest to '
        "the point token of that fact, without a language model; empty where no token stands for it. "
        f"{_one_sided(demo, always)}"
        f"From `token_words.json`, `demo.json` and `evaluation.json` (weights {shipped['weights']}).\n"
    )


def _with_count(estimate: dict) -> str:
    return f"{percent(estimate)} (n={estimate['count']})"


def _yes(demo: dict, kind: str) -> float:
    return demo["kinds"][kind].get("yes_rate", 0.5)


def _one_sided(demo: dict, kinds: list[str]) -> str:
    """Kinds of yes/no questions that the model answers with one word almost always."""
    if not kinds:
        return ""
    told = ", ".join(f"{kind} {100 * _yes(demo, kind):.0f} %" for kind in kinds)
    return f"After `make train` some answers are nearly always the same; share of Yes: {told}. "


def cloud() -> str:
    """How much of the answers is lost with another object's cloud, for both models."""
    demo, audited = _read("demo.json"), _read("audit.json")
    test = demo["tests"]["model against model, shuffled clouds"]
    own, other = (demo["accuracy"][name]["noun in training"] for name in ("model", "model, shuffled clouds"))
    rows = [["`make train`, names", percent(own), percent(other), "", _owed(test, test["p"]), str(own["count"])]]
    kinds = audited["inputs"]["kinds"]
    for kind, title, owed in (
        ("name", "names", kinds["name"]["owed to the cloud"]),
        ("all", "five kinds of questions", audited["criteria"]["own cloud against another object's"]),
    ):
        said = kinds[kind]["said"]
        shares = [percent(said[name]) for name in ("true", "shuffled", "blind")]
        rows.append([f"`furniture`, {title}", *shares, _owed(owed, owed["p_holm"]), str(said["true"]["count"])])
    header = ["right answers, %", "own cloud", "another's cloud", "no cloud", "own less another's, points", "questions"]
    edits = audited["counterfactuals"]["cells"]
    flips = [f"{kind} {percent(cell['right before and after'])} %" for kind, cell in _edited(edits, "flip")]
    stays = [f"{kind} {percent(cell['same answer'])} %" for kind, cell in _edited(edits, "stay")]
    return (
        f"{table(header, rows)}\n"
        f"When a cloud is stretched or recoloured, some answers must change; `furniture` is right before and after: "
        f"{'; '.join(flips)}. Others must stay; it repeats its answer: {'; '.join(stays)}. "
        f"From `demo.json` and `audit.json` (weights {audited['weights']}).\n"
    )


def _owed(estimate: dict, p: float) -> str:
    return f"{percent(estimate, '+')} (p = {p:.4f})"


def _edited(cells: dict[str, dict], must: str) -> list[tuple[str, dict]]:
    """Edit and question of the counterfactual pairs whose answer must flip or stay, with their figures."""
    return [
        (f"{kind} of {edit} clouds", cell)
        for edit, kinds in cells.items()
        for kind, cell in kinds.items()
        if cell["must"] == must
    ]


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
    header = ["what trains", "lambda", "seeds", "measure", "alignment less none", "p", "detectable", "shown"]
    text = f"{markdown_table(header, rows, 'lrrlrrrl')}\n\n"
    if notes:
        text += f"Recorded with an earlier point branch than the shipped one: {'; '.join(notes)}. "
    if (RESULTS / "alignment_check.json").exists():
        text += f"Does the language model itself move? {_read('alignment_check.json')['answer']} "
        files.append("`alignment_check.json`")
    return f"{text}From {', '.join(files)}. p-values are corrected by Holm over the arms of a study.\n"


def _ablation_rows(content: dict, title: str) -> list[list[str]]:
    method = next((row for row in content["arms"] if row["arm"] == METHOD and "differences" in row), None)
    if method is None:
        return []
    rows = []
    for metric, unit in {SECOND: "points", PRIMARY: "nats"}.items():
        estimate, seeds = method["differences"][metric], len(method["differences"]["seeds"])
        scale, digits = (100, 1) if unit == "points" else (1, 3)
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

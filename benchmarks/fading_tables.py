"""Sections of docs/results.md about what captions never mention, from results/fading.json and fading_longer.json alone.

python -m experiments.fading [--study fading_longer]     writes results/<study>.json and results/<study>.png
"""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # experiments/ is not installed
from experiments.ablation.comparison import seed_text
from experiments.fading import conclusion
from experiments.fading.grid import BASELINE, FIRST, LAYERS, LONGER, METHOD
from pointalign.evaluation import markdown_table

RESULTS = Path(__file__).parent / "results"
MIDDLE = str((LAYERS - 1) // 2)  # the layer that is aligned by default


def _content(study: str) -> dict | None:
    path = RESULTS / f"{study}.json"
    return json.loads(path.read_text()) if path.exists() else None


def fading_answer() -> str:
    """The answers of both studies as an item of a list."""
    first, longer = _content(FIRST), _content(LONGER)
    text = (
        "- Does what captions never mention fade in a small decoder, and does the alignment loss keep it usable? "
        f"{_answer(first)}"
    )
    if longer:
        text += f" With longer fine-tuning, a second study: {_answer(longer)}"
    return f"{text}\n"


def _answer(content: dict | None) -> str:
    if content is None:
        return "Not measured."
    verdict = conclusion.verdict(content)
    if verdict == "unfinished":
        return conclusion.ANSWERS[verdict]
    rows = conclusion.by_name(content)
    difference = rows[METHOD]["difference"]
    measured = f" Few-shot accuracy with {METHOD}: {conclusion.points(difference['few-shot'])} points."
    elsewhere = [
        f"{setting}, {conclusion.points(other['few-shot'])} points"
        for setting, other in conclusion.differences_by_setting(rows).items()
        if other is not difference and conclusion.shown(other) > 0
    ]
    gains = f" A gain is shown in a setting beside the main one: {'; '.join(elsewhere)}." if elsewhere else ""
    return f"{conclusion.ANSWERS[verdict]}{measured}{conclusion.floor_warning(rows)}{gains}"


def fading_longer() -> str:
    """The second study, as `fading`."""
    return fading(LONGER)


def fading(study: str = FIRST) -> str:
    """The conclusion, the figure and the tables of a study.

    The conclusion is drawn here and not read from the file, so that the rules are in one place.
    """
    content = _content(study)
    if content is None:
        return f"Not measured (`make fading ARGS='--study {study}'`).\n"
    rows = content["arms"]
    read = ", ".join(f"{name} {value:.3f}" for name, value in content["gate"]["read"].items())
    origin = content["versions"]
    schedule = content["definition"]["sizes"]["captions"]
    steps = " / ".join(map(str, content["definition"]["sizes"]["few_shot_steps"].values()))
    note = (
        f"{schedule['steps']} steps of {schedule['batch_size']} captions, then fine-tuning on k objects for {steps} "
        f"steps; {origin['device']}, torch {origin['torch']}, transformers {origin['transformers']}, "
        f"commit {origin['commit']}, {origin['date']}. The gate, read linearly from the mean Q-Former token: {read}. "
        "Intervals (95 %) of differences are over seeds and objects, all others over seeds."
    )
    unsettled = [row["arm"] for row in rows if not row["next-token loss"]["converged"]]
    parts = [note, *conclusion.paragraphs(content)]
    if missing := content["missing"]:
        arms = dict.fromkeys(name.rpartition(", seed ")[0] for name in missing)
        parts.append(f"{len(missing)} runs of the plan are missing (`make fading` continues): {'; '.join(arms)}.")
    if unsettled:
        parts.append(f"The next-token loss still fell at the end in: {', '.join(unsettled)}.")
    parts.append(f"![B by layer, and few-shot accuracy on B](../benchmarks/results/{study}.png)")
    parts.append(_arms(rows))
    parts.append(_differences(rows))
    return "\n\n".join(parts) + "\n"


def _arms(rows: list[dict]) -> str:
    counts = list(rows[0]["few-shot"])
    header = ["arm", "seeds", *(f"few-shot, k = {count}, %" for count in counts), "captions, %", "B at layer 0",
              MIDDLE, str(LAYERS), f"all tokens, {LAYERS}", f"retrieval, {LAYERS}"]  # fmt: skip
    lines = [
        [
            row["arm"],
            seed_text(row["seeds"]),
            *(f"{100 * row['few-shot'][count]['mean']:.1f}" for count in counts),
            f"{100 * row['captions']['mean']:.1f}",
            *(f"{row['B by layer'][layer]['mean']:.2f}" for layer in ("0", MIDDLE, str(LAYERS))),
            f"{row['B on all tokens'][str(LAYERS)]['mean']:.2f}",
            f"{row['retrieval at equal A'][str(LAYERS)]['mean']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _differences(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = []
        for key in ("difference", "difference from the method"):
            difference = row.get(key)
            if difference:
                estimate = difference["few-shot"]
                detectable = f"{100 * estimate['detectable']:.1f}" if len(difference["seeds"]) > 1 else ""
                cells += [conclusion.points(estimate), f"{estimate['p_holm']:.3f}", detectable]
            else:
                cells += [""] * 3
        if any(cells):
            lines.append([row["arm"], *cells])
    header = ["few-shot accuracy, points", f"less {BASELINE}", "p (Holm)", "detectable", f"less {METHOD}", "p (Holm)",
              "detectable"]  # fmt: skip
    table = markdown_table(header, lines)
    return f"<details><summary>Differences of every arm</summary>\n\n{table}\n\n</details>"

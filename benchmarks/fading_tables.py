"""Sections of the result pages about what captions never mention, from fading.json and fading_longer.json alone.

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
STUDIES = {"first": FIRST, "second": LONGER}


def _content(study: str) -> dict | None:
    path = RESULTS / f"{STUDIES[study]}.json"
    return json.loads(path.read_text()) if path.exists() else None


def fading_answer() -> str:
    """Both studies in short: every setting with and without alignment, and the answers in words."""
    contents = {study: content for study in STUDIES if (content := _content(study))}
    if not contents:
        return "Not measured (`make fading`).\n"
    parts = [_settings(contents)]
    parts.append(
        "\n".join(f"- {study.capitalize()} study, main setting: {_short(contents[study])}" for study in contents)
    )
    content = list(contents.values())[-1]
    rows = conclusion.by_name(content)
    if conclusion.verdict(content) != "unfinished":
        parts += [conclusion.elsewhere(rows), conclusion.readable(rows), conclusion.captions(rows[METHOD])]
    parts.append(f"From {' and '.join(f'`{STUDIES[study]}.json`' for study in contents)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _short(content: dict) -> str:
    """The verdict, what could be detected, and a warning; the figures are in the table above it."""
    rows = conclusion.by_name(content)
    text = f"**{conclusion.ANSWERS[conclusion.verdict(content)]}**"
    if conclusion.verdict(content) == "unfinished":
        return text
    detectable = rows[METHOD]["difference"]["few-shot"]["detectable"]
    text += f" A true difference of {100 * detectable:.1f} points would be detected with 80 % power."
    return text + conclusion.floor_warning(rows)


def fading_line() -> str:
    """The answers of both studies in a sentence or two."""
    contents = {study: content for study in STUDIES if (content := _content(study))}
    if not contents:
        return "Whether the alignment loss keeps what captions never mention is not measured."
    answers = {study: conclusion.ANSWERS[conclusion.verdict(content)] for study, content in contents.items()}
    if len(answers) > 1 and len(set(answers.values())) == 1:
        answers = {"both": answers["first"]}
    told = " ".join(f"Main setting, {study} {'studies' if study == 'both' else 'study'}: {text[0].lower()}{text[1:]}"
                    for study, text in answers.items())  # fmt: skip
    gains = [
        f"{setting} ({conclusion.points(difference['few-shot'])} points)"
        for setting, difference in conclusion.differences_by_setting(
            conclusion.by_name(list(contents.values())[-1])
        ).items()
        if setting != conclusion.MAIN and conclusion.shown(difference) > 0
    ]
    text = f"Does the alignment loss keep usable what captions never mention? {told}"
    return f"{text} A secondary setting of the last study shows a gain: {'; '.join(gains)}." if gains else text


def fading_advice() -> str:
    """What follows from the last study that is there, as a list."""
    content = next((content for study in reversed(STUDIES) if (content := _content(study))), None)
    if content is None or conclusion.verdict(content) == "unfinished":
        return "Nothing is recommended: the study of fading is not finished.\n"
    return "\n".join(f"- {line}" for line in conclusion.recommendation(conclusion.by_name(content))) + "\n"


def fading_longer() -> str:
    """The second study, as `fading`."""
    return fading("second")


def fading(study: str = "first") -> str:
    """The conclusion, the figure and the tables of a study.

    The conclusion is drawn here and not read from the file, so that the rules are in one place.
    """
    name, content = STUDIES[study], _content(study)
    if content is None:
        return f"Not measured (`make fading ARGS='--study {name}'`).\n"
    rows = content["arms"]
    read = ", ".join(f"{name} {value:.3f}" for name, value in content["gate"]["read"].items())
    schedule = content["definition"]["sizes"]["captions"]
    steps = " / ".join(map(str, content["definition"]["sizes"]["few_shot_steps"].values()))
    note = (
        f"{schedule['steps']} steps of {schedule['batch_size']} captions, then fine-tuning on k objects for {steps} "
        f"steps. A probe of the mean Q-Former token reads: {read}. From `{name}.json`; {_origin(content)}."
    )
    parts = [*conclusion.paragraphs(content), f"![B by layer, and few-shot accuracy on B]({_picture(name)})"]
    if missing := content["missing"]:
        arms = dict.fromkeys(entry.rpartition(", seed ")[0] for entry in missing)
        parts.append(f"{len(missing)} runs of the plan are missing (`make fading` continues): {', '.join(arms)}.")
    if unsettled := [row["arm"] for row in rows if not row["next-token loss"]["converged"]]:
        parts.append(f"The next-token loss still fell at the end in: {', '.join(unsettled)}.")
    parts += [_arms(rows), _folded("By k and by layer", _by_layer(rows))]
    parts += [_folded("Differences of every arm, and what could be detected", _differences(rows)), note]
    return "\n\n".join(parts) + "\n"


def _origin(content: dict) -> str:
    origin = content["versions"]
    return (
        f"{origin['device']}, torch {origin['torch']}, transformers {origin['transformers']}, commit "
        f"{origin['commit']}, {origin['date']}"
    )


def _picture(name: str) -> str:
    return f"../benchmarks/results/{name}.png"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _percent(estimate: dict[str, float]) -> str:
    return f"{100 * estimate['mean']:.1f}"


def _shown(difference: dict) -> str:
    return {1: "a gain", 0: "no", -1: "a loss"}[conclusion.shown(difference)]


def _settings(contents: dict[str, dict]) -> str:
    """A row for each setting of each study, without alignment and with it."""
    header = [
        "setting",
        "study",
        "few-shot accuracy, %",
        "difference, points",
        "p (Holm)",
        "shown",
        f"B at layer {LAYERS}",
    ]
    lines = []
    for study, content in contents.items():
        rows = conclusion.by_name(content)
        for arm, setting in conclusion.SETTINGS.items():
            both = [rows.get(name, {}) for name in (arm, arm.replace(BASELINE, METHOD))]
            difference = both[1].get("difference")
            if difference:
                accuracy = " to ".join(_percent(row["few-shot, mean over k"]) for row in both)
                read = " to ".join(f"{row['B by layer'][str(LAYERS)]['mean']:.2f}" for row in both)
                estimate = difference["few-shot"]
                cells = [conclusion.points(estimate), f"{estimate['p_holm']:.3f}", _shown(difference)]
                lines.append([setting, study, accuracy, *cells, read])
    return markdown_table(header, lines, "llrrrlr")


def _arms(rows: list[dict]) -> str:
    """A row for each arm: the primary measure, its difference from no alignment, and what the last layer holds."""
    header = ["arm", "seeds", "few-shot, %", "less no alignment, points", "p (Holm)", "shown", f"B at layer {LAYERS}",
              "retrieved, %", "captions, %"]  # fmt: skip
    lines = []
    for row in rows:
        difference = row.get("difference")
        cells = [""] * 3
        if difference:
            estimate = difference["few-shot"]
            cells = [conclusion.points(estimate), f"{estimate['p_holm']:.3f}", _shown(difference)]
        lines.append(
            [
                row["arm"],
                seed_text(row["seeds"]),
                _percent(row["few-shot, mean over k"]),
                *cells,
                f"{row['B by layer'][str(LAYERS)]['mean']:.2f}",
                f"{100 * row['retrieval at equal A'][str(LAYERS)]['mean']:.0f}",
                _percent(row["captions"]),
            ]
        )
    return markdown_table(header, lines)


def _by_layer(rows: list[dict]) -> str:
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
    return markdown_table(header, lines)

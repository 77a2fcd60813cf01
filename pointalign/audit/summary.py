"""The result of an audit in Markdown: in full, and in short for a model's card."""

from typing import Any

from pointalign.audit.charts import percent
from pointalign.audit.measures import LEVEL
from pointalign.audit.plan import INPUTS
from pointalign.evaluation import markdown_table
from pointalign.evaluation.probe import QFORMER

INPUT_NAMES = {"true": "its cloud", "shuffled": "another's", "zeroed": "zeros", "blind": "no cloud"}


def points(test: dict[str, Any]) -> str:
    """ "+12 points [3, 20]"."""
    mean, low, high = (f"{100 * test[key]:+.0f}" for key in ("mean", "low", "high"))
    return f"{mean} points [{low}, {high}]"


def summary(result: dict[str, Any]) -> str:
    """Verdict, criteria and the main figures of an audit, in %, with 95 % intervals."""
    kinds = result["inputs"]["kinds"]
    header = ["right answers, %", *INPUT_NAMES.values(), "guess", "n"]
    rows = [
        [
            kind,
            *(percent(entry["said"][name]) for name in INPUTS),
            "" if entry["guess"] is None else f"{100 * entry['guess']:.0f}",
            str(entry["said"]["true"]["count"]),
        ]
        for kind, entry in kinds.items()
    ]
    criteria = [
        f"- {name}: {points(test)}, p = {test['p_holm']:.4f}, {'met' if test['met'] else 'not met'}"
        for name, test in result["criteria"].items()
    ]
    return "\n\n".join(
        [
            f"**{result['model']}: {result['verdict']}**",
            "\n".join(criteria),
            markdown_table(header, rows),
            markdown_table(
                ["edit: question", "must", "right before and after", "same answer", "pairs"],
                [
                    [f"{edit}: {kind}", cell["must"], percent(cell["right before and after"]),
                     percent(cell["same answer"]), str(cell["same answer"]["count"])]
                    for edit, cells in result["counterfactuals"]["cells"].items()
                    for kind, cell in cells.items()
                ],
                "llrrr",
            ),
            markdown_table(["what else, %", "estimate"], _further(result)),
        ]
    )  # fmt: skip


def _further(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for group, levels in result["invariances"].items():
        changed = {level: row for level, row in levels.items() if level != "unchanged"}
        worst = min(changed, key=lambda level: changed[level]["same answer"]["mean"])
        rows.append([f"same answer under {group}, worst at {worst}", percent(changed[worst]["same answer"])])
    for part, content in result["calibration"].items():
        if content is not None:
            title = {"names": "names", "options": "likeliest options"}[part]
            rows.append([f"confidence less accuracy, {title}", percent(content["confidence less accuracy"])])
            rows.append([f"AUROC of confidence, {title}", percent(content["AUROC"])])
    noise = result["noise"]
    rows.append(["abstains on noise", percent(noise["noise"])])
    rows.append(["abstains on objects", percent(noise["objects"])])
    if noise["told apart"] is not None:
        rows.append(["AUROC of probability, objects against noise", percent(noise["told apart"])])
    for name, places in (result["retention"] or {"probes": {}})["probes"].items():
        first, *_, last = [place for place in places if place != QFORMER]
        kind = {"accuracy": "accuracy", "R2": "R²"}[result["retention"]["kinds"][name]]
        rows += [[f"probe of {name} after layer {place}, {kind}", percent(places[place])] for place in (first, last)]
    return rows


def good_and_bad(result: dict[str, Any]) -> str:
    """The verdict in two lists: for which questions the model looks, and what speaks against it."""
    kinds = {kind: entry for kind, entry in result["inputs"]["kinds"].items() if kind != "all"}
    good, bad = [], []
    for kind, entry in kinds.items():
        owed = entry["owed to the cloud"]
        looks = owed["p_holm"] < LEVEL and owed["mean"] > 0
        own, other = (percent(entry["said"][name]) for name in ("true", "shuffled"))
        told = f"{kind}: {own} right with its cloud, {other} with another's"
        (good if looks else bad).append(told)
    for edit, cells in result["counterfactuals"]["cells"].items():
        for kind, cell in cells.items():
            must = cell["must"]
            share = cell["right before and after" if must == "flip" else "same answer"]
            told = f"{kind} {'flips' if must == 'flip' else 'stays'} when the cloud is {edit}: {percent(share)}"
            (good if share["mean"] >= 0.75 else bad).append(told)
    noise = result["noise"]
    told = f"hedges or refuses on noise: {percent(noise['noise'])}, on objects: {percent(noise['objects'])}"
    (good if noise["noise"]["low"] > noise["objects"]["high"] else bad).append(told)
    calibrated = {"names": "names", "options": "likeliest options"}
    for part, content in result["calibration"].items():
        if content is not None:
            sure = content["confidence less accuracy"]
            told = f"confidence less accuracy, {calibrated[part]}: {percent(sure)}"
            (good if sure["low"] <= 0 <= sure["high"] else bad).append(told)
    for name, places in (result["retention"] or {"probes": {}})["probes"].items():
        first, *_, last = [places[place] for place in places if place != QFORMER]
        kind = {"accuracy": "accuracy", "R2": "R²"}[result["retention"]["kinds"][name]]
        told = f"probe of {name}, {kind}, at the input and after the last layer: {percent(first)}, {percent(last)}"
        (bad if last["high"] < first["low"] else good).append(told)
    lists = [(f"**{result['verdict']}**. Good:", good), ("Bad:", bad)]
    return "\n\n".join(
        f"{title}\n\n" + ("\n".join(f"- {line}" for line in lines) or "- none") for title, lines in lists
    )

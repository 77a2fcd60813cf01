"""From replies to measures with intervals, and the verdict.

Objects of one family count as one observation, as everywhere in the evaluation. Shares are between 0 and 1.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pointalign.audit.plan import EDITS, KINDS, Ask, Item, Pair, Plan
from pointalign.certainty import is_hedged
from pointalign.evaluation.choices import chosen
from pointalign.evaluation.naming import head_noun
from pointalign.evaluation.statistics import cluster_mean, cluster_statistic, holm, paired_difference

Reply = dict[str, Any]
# (name of the cloud, question) -> reply, its scores by sentence
Replies = dict[tuple[str, str], Reply]

LEVEL = 0.05  # of the tests behind the verdict, after Holm's correction
BINS = 5  # of equal size, in the reliability diagram
CRITERIA = {
    "own cloud against another object's": "shuffled",
    "own cloud against no cloud": "blind",
    "answers follow the edit of a cloud": "counterfactual",
}
REFUSAL = re.compile(
    r"\b(?:not sure|unsure|uncertain|unclear|unknown|cannot|can't|can not|unable|do not know|don't know|"
    r"no object|noise|nothing|unrecogni[sz]able|hard to (?:say|tell)|difficult to (?:say|tell)|not possible)\b",
    re.IGNORECASE,
)


def stated(item: Item, text: str) -> str | None:
    """What an answer states: a label of the question's options where there is one, of a name else its head noun."""
    if item.kind != "name":
        return chosen(text, tuple(item.options))
    noun = head_noun(text)
    if noun in item.options:
        return noun
    return chosen(text, tuple(item.options)) or noun or None


def abstains(text: str) -> bool:
    """Whether an answer to "What is this?" hedges, refuses, or says nothing."""
    return not text.strip() or is_hedged(text) or REFUSAL.search(text) is not None


def preferred(item: Item, reply: Reply) -> str | None:
    """The option of the highest likelihood; None where it is not known."""
    if reply["scores"] is None:
        return None
    return max(item.options, key=lambda label: reply["scores"][item.options[label]])


def measure(plan: Plan, replies: Replies) -> dict[str, Any]:
    """Every measure of the replies, and the verdict: see `docs/audit.md`."""
    inputs = controls(plan, replies)
    pairs = counterfactuals(plan.pairs, replies)
    criteria = inputs.pop("tests") | pairs.pop("tests")
    return {
        "verdict": verdict(criteria),
        "criteria": criteria,
        "inputs": inputs,
        "counterfactuals": pairs,
        "invariances": invariances(plan, replies),
        "calibration": calibration(plan.inputs["true"], replies),
        "noise": noise(plan, replies),
    }


def verdict(criteria: dict[str, dict[str, Any]]) -> str:
    """`grounded` where every criterion of `CRITERIA` is met, `not grounded` where none is, else `partly grounded`.

    Adds to each criterion its corrected p-value and whether it is met.
    """
    for test, p in zip(criteria.values(), holm([test["p"] for test in criteria.values()]), strict=True):
        test["p_holm"], test["met"] = p, bool(p < LEVEL and test["mean"] > 0)
    met = [test["met"] for test in criteria.values()]
    return "grounded" if met and all(met) else "partly grounded" if any(met) else "not grounded"


# -- own, other, zeroed and no cloud -----------------------------------------------------------------------------------


def controls(plan: Plan, replies: Replies) -> dict[str, Any]:
    """Right answers under each input, by kind of question and together; `tests` holds the paired differences."""
    items = [ask.item for ask in plan.inputs["true"]]
    said, likely = (
        {kind: _right(asks, replies, by_likelihood) for kind, asks in plan.inputs.items()}
        for by_likelihood in (False, True)
    )
    kinds = {kind: [row for row, item in enumerate(items) if item.kind == kind] for kind in KINDS}
    kinds = {kind: rows for kind, rows in kinds.items() if rows}
    families = [item.family for item in items]
    table: dict[str, Any] = {}
    for kind, rows in (kinds | {"all": list(range(len(items)))}).items():
        row_families = [families[row] for row in rows]
        labels = Counter(items[row].label for row in rows)
        entry: dict[str, Any] = {"guess": None if kind in ("all", "name") else max(labels.values()) / len(rows)}
        entry["said"] = {name: cluster_mean(values[rows], row_families).as_dict() for name, values in said.items()}
        if not np.isnan(likely["true"]).any():
            entry["likelihood"] = {
                name: cluster_mean(values[rows], row_families).as_dict() for name, values in likely.items()
            }
        difference, p = paired_difference(said["true"][rows], said["shuffled"][rows], row_families)
        entry["owed to the cloud"] = difference.as_dict() | {"p": p}
        table[kind] = entry
    single = [kind for kind in table if kind != "all"]
    for kind, p in zip(single, holm([table[kind]["owed to the cloud"]["p"] for kind in single]), strict=True):
        table[kind]["owed to the cloud"]["p_holm"] = p
    tests = {}
    for title, control in list(CRITERIA.items())[:2]:
        difference, p = paired_difference(said["true"], said[control], families)
        tests[title] = difference.as_dict() | {"p": p}
    return {"kinds": table, "tests": tests}


def _right(asks: Sequence[Ask], replies: Replies, by_likelihood: bool) -> np.ndarray:
    """`[N]`, 1 where an answer is right; NaN where likelihoods are not known."""
    values = []
    for ask in asks:
        reply = replies[ask.cloud, ask.item.text]
        answer = preferred(ask.item, reply) if by_likelihood else stated(ask.item, reply["text"])
        unknown = by_likelihood and answer is None
        values.append(float("nan") if unknown else float(answer == ask.item.label))
    return np.array(values)


# -- counterfactual pairs ----------------------------------------------------------------------------------------------


def counterfactuals(pairs: Sequence[Pair], replies: Replies) -> dict[str, Any]:
    """By edit and kind of question: how often the answer is right before and after, flips, or stays as it was.

    The test compares how often the answer says what is true after the edit, after it and before: a model that does not
    look says it equally often.
    """
    cells: dict[str, dict[str, Any]] = {}
    moved: dict[str, list[float]] = {"after": [], "before": []}
    families = []
    for edit in EDITS:
        for kind in KINDS:
            rows = [pair for pair in pairs if pair.edit == edit and pair.item.kind == kind]
            if not rows:
                continue
            states = [
                [stated(pair.item, replies[name, pair.item.text]["text"]) for name in (pair.item.object_id, pair.cloud)]
                for pair in rows
            ]
            pair_families = [pair.item.family for pair in rows]
            both = [state == [pair.item.label, pair.after] for pair, state in zip(rows, states, strict=True)]
            cells.setdefault(edit, {})[kind] = {
                "must": "flip" if rows[0].flips else "stay",
                "right before and after": cluster_mean(np.array(both, dtype=float), pair_families).as_dict(),
                "same answer": cluster_mean(
                    [float(before == after) for before, after in states], pair_families
                ).as_dict(),
            }
            if rows[0].flips:
                moved["after"] += [float(after == pair.after) for pair, (_, after) in zip(rows, states, strict=True)]
                moved["before"] += [float(before == pair.after) for pair, (before, _) in zip(rows, states, strict=True)]
                families += pair_families
    if not families:
        return {"cells": cells, "tests": {}}
    difference, p = paired_difference(moved["after"], moved["before"], families)
    return {"cells": cells, "tests": {list(CRITERIA)[2]: difference.as_dict() | {"p": p}}}


# -- what must not change an answer ------------------------------------------------------------------------------------


def invariances(plan: Plan, replies: Replies) -> dict[str, Any]:
    """By group and level: how often the answer is that of the unchanged cloud, and how often it is right."""
    table: dict[str, Any] = {}
    for group, levels in plan.perturbed.items():
        rows: dict[str, Any] = {}
        for level, asks in levels.items():
            families = [ask.item.family for ask in asks]
            before = [stated(ask.item, replies[ask.item.object_id, ask.item.text]["text"]) for ask in asks]
            after = [stated(ask.item, replies[ask.cloud, ask.item.text]["text"]) for ask in asks]
            labels = [ask.item.label for ask in asks]
            if "unchanged" not in rows:
                rows["unchanged"] = {"right": _share(zip(before, labels, strict=True), families)}
            rows[level] = {
                "same answer": _share(zip(before, after, strict=True), families),
                "right": _share(zip(after, labels, strict=True), families),
            }
        table[group] = rows
    return table


def _share(pairs: Any, families: Sequence[str]) -> dict[str, float]:
    """Share of equal pairs, with its interval."""
    return cluster_mean([float(a == b) for a, b in pairs], families).as_dict()


# -- whether a model knows what it knows -------------------------------------------------------------------------------


def calibration(asks: Sequence[Ask], replies: Replies) -> dict[str, Any]:
    """Confidence against right answers: of generated names, and of the likeliest option of all other questions.

    Confidence is the probability of the generated text, or the share of the likeliest option in the probabilities of
    the options. None where the adapter knows neither.
    """
    parts: dict[str, list[tuple[float, float, str]]] = {"names": [], "options": []}
    for ask in asks:
        reply = replies[ask.cloud, ask.item.text]
        if ask.item.kind == "name" and reply["probability"] is not None:
            right = stated(ask.item, reply["text"]) == ask.item.label
            parts["names"].append((reply["probability"], float(right), ask.item.family))
        elif ask.item.kind != "name" and reply["scores"] is not None:
            scores = np.array([reply["scores"][sentence] for sentence in ask.item.options.values()])
            shares = np.exp(scores - scores.max())
            right = preferred(ask.item, reply) == ask.item.label
            parts["options"].append((float(shares.max() / shares.sum()), float(right), ask.item.family))
    return {part: _calibrated(rows) if rows else None for part, rows in parts.items()}


def _calibrated(rows: list[tuple[float, float, str]]) -> dict[str, Any]:
    confidence, right = (np.array(column) for column in list(zip(*rows, strict=True))[:2])
    families = [family for _, _, family in rows]
    both = np.stack([confidence, right], axis=1)
    order = np.argsort(confidence, kind="stable")
    bins = []
    for members in np.array_split(order, BINS):
        if len(members):
            accuracy = cluster_mean(right[members], [families[row] for row in members])
            bins.append({"confidence": float(confidence[members].mean()), "right": accuracy.as_dict()})
    return {
        "confidence less accuracy": cluster_mean(confidence - right, families).as_dict(),
        "Brier score": cluster_mean((confidence - right) ** 2, families).as_dict(),
        "calibration error": cluster_statistic(calibration_error, both, families).as_dict(),
        "AUROC": cluster_statistic(auroc, both, families).as_dict(),
        "bins": bins,
    }


def calibration_error(rows: np.ndarray) -> float:
    """Mean distance of confidence and accuracy, rows `[N, 2]`, over `BINS` bins of equal size."""
    bins = np.array_split(rows[np.argsort(rows[:, 0], kind="stable")], BINS)
    return float(sum(len(part) * abs(part[:, 0].mean() - part[:, 1].mean()) for part in bins if len(part)) / len(rows))


def auroc(rows: np.ndarray) -> float:
    """How often a right answer, rows `[N, 2]` of value and 0 or 1, has the higher value; 0.5 where all are alike."""
    high, low = rows[rows[:, 1] > 0.5, 0], rows[rows[:, 1] <= 0.5, 0]
    if not len(high) or not len(low):
        return 0.5
    return float((high[:, None] > low).mean() + (high[:, None] == low).mean() / 2)


def noise(plan: Plan, replies: Replies) -> dict[str, Any]:
    """How often "What is this?" is answered without a name, of clouds that show nothing and of objects.

    `told apart` is the AUROC of the answers' probability between objects and noise; None where it is not known.
    """
    named = [ask for ask in plan.inputs["true"] if ask.item.kind == "name"]
    table: dict[str, Any] = {}
    rows, families = [], []
    for title, asks in (("noise", plan.noise), ("objects", named)):
        found = [replies[ask.cloud, ask.item.text] for ask in asks]
        question_families = [ask.item.family for ask in asks]
        table[title] = cluster_mean([float(abstains(reply["text"])) for reply in found], question_families).as_dict()
        rows += [(reply["probability"], float(title == "objects")) for reply in found]
        families += question_families
    known = all(value is not None for value, _ in rows)
    table["told apart"] = cluster_statistic(auroc, np.array(rows), families).as_dict() if known else None
    table["examples"] = Counter(replies[ask.cloud, ask.item.text]["text"] for ask in plan.noise).most_common(3)
    return table

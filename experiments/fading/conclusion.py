"""The result of the study in words, drawn from the numbers by the rules that `grid.py` fixed in advance."""

from typing import Any

from experiments.ablation.conclusion import FEWEST, direction
from experiments.fading.grid import BASELINE, LAYERS, MARGIN, METHOD, PRIMARY_ARMS, WRONG_TARGETS
from pointalign.evaluation.probe import QFORMER

FLOOR = 0.6  # few-shot accuracy of the best arm below which the primary measure is called insensitive; set afterwards
Row = dict[str, Any]  # an arm in `summary.summarise`

SETTINGS = {  # arm without alignment -> the setting in words
    BASELINE: "width 48, frozen projector, word-sized tokens",
    "width 96, no alignment": "width 96",
    "trained projector, no alignment": "a projector that trains",
    "large tokens, no alignment": "tokens 30 times as large",
}
ANSWERS = {
    "untested": "No answer: nothing is shown to fade without alignment, so the setting cannot test the method.",
    "unfinished": "No answer yet: the cells that decide are not all there.",
    "yes": "Yes, in this setting: alignment keeps usable what captions never mention, and its target does so.",
    "price": "At a price: alignment helps, and more than wrong targets, but captions are not shown to stay as exact.",
    "not the target": "Not by its target: alignment helps, but is not shown to help more than wrong targets.",
    "no": "No gain is shown.",
    "worse": "No: alignment is shown to lower few-shot accuracy.",
}


def by_name(content: dict[str, Any]) -> dict[str, Row]:
    return {row["arm"]: row for row in content["arms"]}


def shown(difference: dict[str, Any] | None, measure: str = "few-shot") -> int:
    """1, -1 or 0 as `ablation.conclusion.direction`; 0 where there is no difference."""
    if not difference:
        return 0
    estimate = difference[measure]
    return direction(estimate, len(difference["seeds"]))


def fades(row: Row) -> bool:
    """Whether B at the last layer is shown to be lower than at layer 0."""
    lost = row["lost over the layers"]
    return "low" in lost and direction(lost, len(row["seeds"])) < 0


def beaten(content: dict[str, Any]) -> list[str]:
    """The wrong targets that the method is shown to beat."""
    rows = by_name(content)
    return [arm for arm in WRONG_TARGETS if shown(rows.get(arm, {}).get("difference from the method")) < 0]


def not_inferior(row: Row) -> bool:
    """Whether captions are shown to be at most `MARGIN` less exact."""
    difference = row["difference"]
    return len(difference["seeds"]) >= FEWEST and difference["captions"]["low"] > -MARGIN


def verdict(content: dict[str, Any]) -> str:
    """A key of `ANSWERS`."""
    rows = by_name(content)
    if "difference" not in rows.get(METHOD, {}) or len(rows[METHOD]["difference"]["seeds"]) < FEWEST:
        return "unfinished"
    if not fades(rows[BASELINE]):
        return "untested"
    outcome = shown(rows[METHOD]["difference"])
    if outcome <= 0:
        return "worse" if outcome else "no"
    if len(beaten(content)) < len(WRONG_TARGETS):
        return "not the target"
    return "yes" if not_inferior(rows[METHOD]) else "price"


def paragraphs(content: dict[str, Any]) -> list[str]:
    """The answer, what fades, the wrong targets, set A, other arms, and what to do with it."""
    rows = by_name(content)
    key = verdict(content)
    parts = [f"**{ANSWERS[key]}**"]
    if "difference" in rows.get(METHOD, {}):
        parts[0] += f" {_primary(rows)}"
        parts.append(_fading(rows))
    if key == "unfinished":
        return [*parts, f"With fewer than {FEWEST} seeds nothing counts as shown, and nothing is recommended."]
    detectable = rows[METHOD]["difference"]["few-shot"]["detectable"]
    parts[0] += f" For {METHOD}, a true difference of {100 * detectable:.1f} points is detected with 80 % power."
    parts[0] += floor_warning(rows)
    parts += [_states(rows), _wrong_targets(rows), _captions(rows[METHOD]), _other_arms(rows)]
    parts.append(_recommendation(content))
    return [part for part in parts if part]


def points(estimate: dict[str, float]) -> str:
    """`+1.2 [+0.3, +2.1]`, in points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * estimate[key] for key in ("mean", "low", "high")))


def _primary(rows: dict[str, Row]) -> str:
    texts = []
    for arm in PRIMARY_ARMS:
        if difference := rows.get(arm, {}).get("difference"):
            estimate = difference["few-shot"]
            seeds = len(difference["seeds"])
            number = f"{seeds} seed{'s' if seeds > 1 else ''}"
            texts.append(f"{arm} {points(estimate)} (p = {estimate['p_holm']:.3f}, {number})")
    return f"Few-shot accuracy on B, less no alignment, in points: {'; '.join(texts)}."


def floor_warning(rows: dict[str, Row]) -> str:
    """A warning where few-shot learning hardly works in any arm, so that no difference could be large."""
    best = max(rows.values(), key=lambda row: row["few-shot, mean over k"]["mean"])
    accuracy = best["few-shot, mean over k"]["mean"]
    if accuracy >= FLOOR:
        return ""
    return (
        f" But few-shot learning hardly works here: the best arm, {best['arm']}, tells {100 * accuracy:.1f} % of the "
        "words right, and guessing 50 %. So near its floor the primary measure says little for or against the method."
    )


def _states(rows: dict[str, Row]) -> str:
    """The secondary measures that show what alignment does to the hidden states."""
    digits = "{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    texts = []
    for arm in (METHOD, *WRONG_TARGETS):
        difference = rows.get(arm, {}).get("difference", {})
        if "B at the last layer" in difference:
            read, found = (digits.format(**difference[key]) for key in ("B at the last layer", "retrieval at equal A"))
            texts.append(f"{arm} {read} and {found}")
    return (
        f"Secondary, without correction, changes from {BASELINE} in what a linear probe reads of B at layer {LAYERS} "
        f"(R2), and in retrieval of an object among those of equal A: {'; '.join(texts)}."
    )


def _fading(rows: dict[str, Row]) -> str:
    sentences = []
    for arm, setting in SETTINGS.items():
        if arm not in rows:
            continue
        layers = rows[arm]["B by layer"]
        read = f"{layers['0']['mean']:.2f} at layer 0 and {layers[str(LAYERS)]['mean']:.2f} at layer {LAYERS}"
        with_it = rows.get(arm.replace(BASELINE, METHOD))
        if with_it:
            read += f" (with {METHOD} {with_it['B by layer'][str(LAYERS)]['mean']:.2f})"
        sentences.append(f"{setting}: R2 {read}{'' if fades(rows[arm]) else ', fading not shown'}")
    level = rows[BASELINE]["B by layer"][QFORMER]["mean"]
    return (
        f"What a linear probe reads of B from the mean point token without alignment (at the Q-Former {level:.2f}): "
        f"{'; '.join(sentences)}."
    )


def _wrong_targets(rows: dict[str, Row]) -> str:
    texts = []
    for arm in WRONG_TARGETS:
        row = rows.get(arm, {})
        if row.get("difference") and row.get("difference from the method"):
            against = row["difference from the method"]
            texts.append(
                f"{arm} {points(row['difference']['few-shot'])} against {BASELINE}, "
                f"{points(against['few-shot'])} against {METHOD}"
                f" ({'shown to be worse' if shown(against) < 0 else 'not shown to be worse'})"
            )
    return f"Wrong targets at the same lambda: {'; '.join(texts)}." if texts else ""


def _captions(row: Row) -> str:
    estimate = row["difference"]["captions"]
    word = "Not inferior" if not_inferior(row) else "Non-inferiority is not shown"
    return (
        f"Set A, exact captions of held-out objects: {points(estimate)} points with {row['arm']}. {word}, with a "
        f"margin of {100 * MARGIN:.0f} points."
    )


def _other_arms(rows: dict[str, Row]) -> str:
    words = {1: "better", -1: "worse", 0: "not told apart"}
    texts = []
    for name, row in rows.items():
        against = row.get("difference from the method")
        if against and name not in (*PRIMARY_ARMS, *WRONG_TARGETS):
            texts.append(f"{name} {points(against['few-shot'])} ({words[shown(against)]})")
    return f"Other arms at lambda 1 less {METHOD}, few-shot accuracy: {'; '.join(texts)}." if texts else ""


def differences_by_setting(rows: dict[str, Row]) -> dict[str, Row]:
    """Setting in words -> the difference that alignment makes there, for the settings that were run."""
    methods = {setting: rows.get(arm.replace(BASELINE, METHOD), {}) for arm, setting in SETTINGS.items()}
    return {setting: method["difference"] for setting, method in methods.items() if "difference" in method}


def _recommendation(content: dict[str, Any]) -> str:
    """Lambda, layer, and when alignment can help."""
    rows = by_name(content)
    sentences = []
    better = [arm for arm in PRIMARY_ARMS if shown(rows.get(arm, {}).get("difference")) > 0]
    if better:
        best = max(better, key=lambda arm: rows[arm]["few-shot, mean over k"]["mean"])
        others = [arm for arm in PRIMARY_ARMS if arm in rows and arm not in better]
        rest = f"; not shown to help: {', '.join(others)}" if others else ""
        sentences.append(f"lambda: shown to help are {', '.join(better)}, most of all {best}{rest}")
    else:
        sentences.append("lambda: none of those tried is shown to help")
    layers = [arm for arm in ("three layers", "learned layers") if arm in rows]
    more = [arm for arm in layers if shown(rows[arm].get("difference from the method")) > 0]
    if layers:
        choice = f"{' and '.join(more)}, shown to beat the single one" if more else "the single default one"
        sentences.append(f"layer: {choice} (tried: {', '.join(layers)})")
    where = {True: [], False: []}
    for setting, difference in differences_by_setting(rows).items():
        where[shown(difference) > 0].append(setting)
    sentences.append(f"alignment is shown to help with {'; '.join(where[True]) or 'no setting tried'}")
    if where[False]:
        sentences.append(f"it is not shown to help with {'; '.join(where[False])}")
    return f"Recommendation from these runs. {'. '.join(text[0].upper() + text[1:] for text in sentences)}."

"""The result of the study in words, drawn from the numbers by the rules that `grid.py` fixed in advance."""

from typing import Any

from experiments.ablation.conclusion import FEWEST, direction
from experiments.fading.grid import BASELINE, LAYERS, MARGIN, METHOD, PRIMARY_ARMS, WRONG_TARGETS

FLOOR = 0.6  # few-shot accuracy of the best arm below which the primary measure is called insensitive; set afterwards
Row = dict[str, Any]  # an arm in `summary.summarise`

MAIN = "the main setting"  # width 48, a frozen projector, tokens the size of words
SETTINGS = {  # arm without alignment -> the setting in words; all but the main one are secondary
    BASELINE: MAIN,
    "trained projector, no alignment": "a projector that trains",
    "width 96, no alignment": "width 96",
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
    """The answer, the settings beside the main one, what a probe reads, captions, other arms, and what to do."""
    rows = by_name(content)
    parts = [answer(content)]
    if verdict(content) == "unfinished":
        return [*parts, f"With fewer than {FEWEST} seeds nothing counts as shown, and nothing is recommended."]
    parts += [elsewhere(rows), readable(rows), captions(rows[METHOD]), _other_arms(rows)]
    parts.append("\n".join(f"- {line}" for line in recommendation(rows)))
    return [part for part in parts if part]


def points(estimate: dict[str, float]) -> str:
    """`+1.2 [+0.3, +2.1]`, in points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * estimate[key] for key in ("mean", "low", "high")))


def answer(content: dict[str, Any]) -> str:
    """The verdict and the primary measure of the method in the main setting."""
    rows = by_name(content)
    text = f"**{ANSWERS[verdict(content)]}**"
    difference = rows.get(METHOD, {}).get("difference")
    if not difference:
        return text
    estimate, seeds = difference["few-shot"], len(difference["seeds"])
    text += (
        f" In the main setting, {METHOD} changes few-shot accuracy by {points(estimate)} points "
        f"(p = {estimate['p_holm']:.3f}, {seeds} seed{'s' if seeds > 1 else ''})."
    )
    if verdict(content) == "unfinished":
        return text
    text += f" A true difference of {100 * estimate['detectable']:.1f} points would be detected with 80 % power."
    return text + floor_warning(rows)


def floor_warning(rows: dict[str, Row]) -> str:
    """A warning where few-shot learning hardly works in any arm, so that no difference could be large."""
    best = max(rows.values(), key=lambda row: row["few-shot, mean over k"]["mean"])
    accuracy = best["few-shot, mean over k"]["mean"]
    if accuracy >= FLOOR:
        return ""
    return (
        f" But few-shot learning hardly works in this study: the best arm, {best['arm']}, has {100 * accuracy:.1f} % "
        "of the words right, and guessing has 50 %. So this result says little for or against the method."
    )


def elsewhere(rows: dict[str, Row]) -> str:
    """The gain of alignment in the settings beside the main one; empty where none was run."""
    texts: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for setting, difference in differences_by_setting(rows).items():
        if setting != MAIN:
            estimate = difference["few-shot"]
            texts[shown(difference)].append(f"{setting} ({points(estimate)} points, p = {estimate['p_holm']:.3f})")
    if not any(texts.values()):
        return ""
    told = {1: "a gain is shown with", 0: "no gain is shown with", -1: "a loss is shown with"}
    sentences = [f"{told[outcome]} {' and with '.join(settings)}" for outcome, settings in texts.items() if settings]
    return (
        f"Beside the main setting, {'; '.join(sentences)}. These settings are secondary, and the study that has them "
        "was planned after the first study was seen. No wrong target was run in them, so these runs do not say whether "
        "the target is what helps."
    )


def readable(rows: dict[str, Row]) -> str:
    """What alignment does to the hidden states: B by linear probes, and retrieval. Empty without the differences."""
    difference = rows[METHOD]["difference"]
    if "B at the last layer" not in difference:
        return ""
    last = str(LAYERS)
    plain, method = rows[BASELINE], rows[METHOD]
    verb = "B fades" if fades(plain) else "that B fades is not shown"
    text = (
        f"What a probe reads: without alignment, B has R2 {plain['B by layer']['0']['mean']:.2f} at layer 0 and "
        f"{plain['B by layer'][last]['mean']:.2f} at layer {LAYERS}, so {verb}. With {METHOD} it has "
        f"{method['B by layer'][last]['mean']:.2f} there ({_change(difference['B at the last layer'])})."
    )
    if difference["B at the last layer"]["low"] > 0 and shown(difference) <= 0:
        text += " So more of B stays readable, although few-shot accuracy is not shown to gain."
    wrong = WRONG_TARGETS[0]
    other = rows.get(wrong, {})
    against = other.get("difference", {}).get("B at the last layer")
    if against and against["low"] > 0:
        text += f" But {wrong} does that as well ({_change(against)})."
    told = {"without alignment": plain, f"with {METHOD}": method} | ({f"with {wrong}": other} if other else {})
    shares = ", ".join(f"{100 * row['retrieval at equal A'][last]['mean']:.0f} % {name}" for name, row in told.items())
    return (
        f"{text} By its states at layer {LAYERS} an object is retrieved among objects with the same caption: {shares}. "
        "These are secondary measures, without correction."
    )


def _change(estimate: dict[str, float]) -> str:
    return "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**estimate)


def captions(row: Row) -> str:
    """Whether captions stay as exact."""
    estimate = row["difference"]["captions"]
    word = "not inferior" if not_inferior(row) else "non-inferiority is not shown"
    return (
        f"Exact captions of held-out objects change by {points(estimate)} points with {row['arm']}: {word}, with a "
        f"margin of {100 * MARGIN:.0f} points."
    )


def _other_arms(rows: dict[str, Row]) -> str:
    """The arms beside the lambdas that are shown to differ from the method, or that none is."""
    compared = {
        name: row["difference from the method"]
        for name, row in rows.items()
        if name not in PRIMARY_ARMS and row.get("difference from the method")
    }
    if not compared:
        return ""
    words = {1: "better", -1: "worse"}
    told = [
        f"{name} is shown to be {words[shown(against)]} ({points(against['few-shot'])} points)"
        for name, against in compared.items()
        if shown(against)
    ]
    if not told:
        return f"None of these arms is shown to be better or worse than {METHOD}: {', '.join(compared)}."
    return f"Against {METHOD}: {'; '.join(told)}."


def differences_by_setting(rows: dict[str, Row]) -> dict[str, Row]:
    """Setting in words -> the difference that alignment makes there, for the settings that were run."""
    methods = {setting: rows.get(arm.replace(BASELINE, METHOD), {}) for arm, setting in SETTINGS.items()}
    return {setting: method["difference"] for setting, method in methods.items() if "difference" in method}


def recommendation(rows: dict[str, Row]) -> list[str]:
    """Lambda, layer, and when alignment can help: a line each."""
    return [line for line in (_lambda(rows), _layer(rows), _when(rows)) if line]


def _lambda(rows: dict[str, Row]) -> str:
    tried = [arm for arm in PRIMARY_ARMS if arm in rows]
    better = [arm for arm in tried if shown(rows[arm].get("difference")) > 0]
    text = f"Lambda: none of those tried ({', '.join(tried)}) is shown to raise few-shot accuracy in the main setting."
    if better:
        best = max(better, key=lambda arm: rows[arm]["few-shot, mean over k"]["mean"])
        text = f"Lambda: shown to raise few-shot accuracy are {', '.join(better)}, most of all {best}."
    read = {arm: rows[arm]["B by layer"][str(LAYERS)]["mean"] for arm in (BASELINE, *tried)}
    most = max(read, key=lambda arm: read[arm])
    values = ", ".join(f"{arm} {value:.2f}" for arm, value in read.items())
    return f"{text} Most of B stays readable at layer {LAYERS} with {most} (R2: {values})."


def _layer(rows: dict[str, Row]) -> str:
    others = [arm for arm in ("three layers", "learned layers") if rows.get(arm, {}).get("difference from the method")]
    if not others:
        return ""
    more = [arm for arm in others if shown(rows[arm]["difference from the method"]) > 0]
    told = ", ".join(f"{arm} {points(rows[arm]['difference from the method']['few-shot'])} points" for arm in others)
    if more:
        return f"Layer: {' and '.join(more)}, shown to beat the single default layer ({told})."
    return f"Layer: the single default layer in the middle. More layers are not shown to be better ({told})."


def _when(rows: dict[str, Row]) -> str:
    helped = [setting for setting, difference in differences_by_setting(rows).items() if shown(difference) > 0]
    secondary = "" if MAIN in helped or not helped else ", which is a secondary setting"
    text = f"When: alignment is shown to help with {' and with '.join(helped) or 'no setting tried'}{secondary}."
    left = {setting: rows[arm]["B by layer"][str(LAYERS)]["mean"] for arm, setting in SETTINGS.items() if arm in rows}
    if len(left) > 1:
        safest = max(left, key=lambda setting: left[setting])
        text += (
            f" It has least to keep with {safest}: there B has R2 {left[safest]:.2f} at layer {LAYERS} without "
            "alignment."
        )
    return text

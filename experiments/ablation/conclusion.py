"""The result of an ablation in words: what is shown and what is not. With fewer than `FEWEST` seeds nothing is."""

from collections.abc import Sequence
from typing import Any

from experiments.ablation.measure import GEOMETRY, MEASURES, PRIMARY
from experiments.ablation.train_arm import Arm
from pointalign.evaluation.probe import SIMILARITY

METHOD = "alignment"  # the arm that is the paper's method
LEVEL = 0.05
FEWEST = 5  # paired seeds for a difference to count as shown
SIGNED = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

Row = dict[str, Any]  # see `comparison.compare_arms`


def is_share(metric: str) -> bool:
    """Whether a measure is a share of right answers, written in points; the other measure is in nats."""
    return metric != PRIMARY


def signed(metric: str, difference: dict[str, float]) -> str:
    """A difference with its interval and unit."""
    if not is_share(metric):
        return f"{SIGNED.format(**difference)} nats"
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def size(metric: str, effect: float) -> str:
    """An effect without a sign."""
    return f"{100 * effect:.1f} points" if is_share(metric) else f"{effect:.3f}"


def direction(difference: dict[str, float], seeds: int) -> int:
    """1 or -1 where a difference is shown: at least `FEWEST` paired seeds, an interval without zero, and a corrected
    p-value below 5 %; else 0. For a difference without a corrected p-value, seeds and interval decide.
    """
    if seeds < FEWEST or difference.get("p_holm", 0) >= LEVEL:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def _too_few(seeds: int) -> str:
    return f" ({seeds} seeds; with fewer than {FEWEST} nothing counts as shown)" if seeds < FEWEST else ""


def conclusion(rows: list[Row], baseline: str, arms: dict[str, Arm], primary: Sequence[str] = (PRIMARY,)) -> list[str]:
    """A paragraph for each question that the runs answer; none if the method was not compared with the baseline."""
    by_name = {row["arm"]: row for row in rows}
    method = by_name.get(METHOD, {})
    if "differences" not in method:
        return []
    controls = [row for row in rows if row["arm"] in arms and arms[row["arm"]].is_control]
    paragraphs = []
    for metric in primary:
        paragraphs += [
            _method(method, baseline, metric, primary),
            _controls(method, controls, baseline, metric),
            _other_arms(rows, baseline, metric),
        ]
    paragraphs += [_what_alignment_asks_for(method, baseline), _what_captions_omit(method, baseline)]
    return [paragraph for paragraph in paragraphs if paragraph]


def missing_runs(arms: list[str]) -> list[str]:
    """A paragraph about the runs of a plan that are not there, an arm for each; none if there are none."""
    return [f"{len(arms)} runs of the plan are missing: {', '.join(dict.fromkeys(arms))}."] if arms else []


def _method(method: Row, baseline: str, metric: str, primary: Sequence[str]) -> str:
    """The verdict of one primary measure; the last paragraph of these also has the secondary measures."""
    difference = method["differences"][metric]
    seeds = len(difference["per_seed"])
    verdict = {
        1: f"Shown: {METHOD} raises the {metric}.",
        -1: f"Shown: {METHOD} lowers the {metric}.",
        0: f"Not shown: these runs cannot tell {METHOD} from {baseline}{_too_few(seeds)}.",
    }
    counted = "questions" if metric == GEOMETRY else "objects"
    text = (
        f"{METHOD.capitalize()} against {baseline}, {seeds} paired seeds, {difference['count']} {counted}: "
        f"{metric} {signed(metric, difference)}, p = {difference['p']:.3f} ({difference['p_holm']:.3f} after "
        f"Holm's correction); a true effect of {size(metric, difference['detectable'])} is detected with 80 % power. "
    )
    if metric == primary[-1]:
        for name in MEASURES:
            if name in method["differences"] and name not in primary:
                second = method["differences"][name]
                text += f"{name.capitalize()} {signed(name, second)}, p = {second['p_holm']:.3f} after correction. "
    return text + verdict[direction(difference, seeds)]


def _controls(method: Row, controls: list[Row], baseline: str, metric: str) -> str:
    if not controls:
        return ""
    if direction(method["differences"][metric], len(method["differences"]["seeds"])) <= 0:
        names = ", ".join(row["arm"] for row in controls)
        return f"No gain of {METHOD} is shown, so there is none that its controls ({names}) could explain."
    return " ".join(_against_control(row, baseline, metric) for row in controls)


def _against_control(row: Row, baseline: str, metric: str) -> str:
    name = row["arm"]
    from_method, from_baseline = (row.get(key) for key in (f"differences from {METHOD}", "differences"))
    if from_method and direction(from_method[metric], len(from_method["seeds"])) < 0:
        return f"{METHOD.capitalize()} beats {name}."
    seeds = len(from_baseline["seeds"]) if from_baseline else 0
    shown = direction(from_baseline[metric], seeds) if from_baseline else 0
    if shown > 0:
        return f"{name.capitalize()} helps too, and is not shown to help less: plain regularisation may explain both."
    if shown < 0:
        return f"{name.capitalize()} is shown to be worse than {baseline}, but not to be worse than {METHOD}."
    return f"{name.capitalize()} cannot be told from {METHOD} or from {baseline}{_too_few(seeds)}."


def _other_arms(rows: list[Row], baseline: str, metric: str) -> str:
    shown = []
    for row in rows:
        differences = row.get("differences", {})
        seeds = len(differences.get("seeds", []))
        if row["arm"] != METHOD and seeds and direction(differences[metric], seeds):
            shown.append(f"{row['arm']} {signed(metric, differences[metric])} over {seeds} seeds")
    return f"Shown for other arms, {metric} less {baseline}: {', '.join(shown)}." if shown else ""


def _what_alignment_asks_for(method: Row, baseline: str) -> str:
    differences = method["differences"]
    if SIMILARITY[0] not in differences:
        return ""
    change = {
        1: "more of the held-out objects' Q-Former tokens than",
        -1: "less of the held-out objects' Q-Former tokens than",
        0: "no more of the held-out objects' Q-Former tokens, as far as is shown, than",
    }
    seeds = len(differences["seeds"])
    measured = ", ".join(f"{measure} {SIGNED.format(**differences[measure])}" for measure in SIMILARITY)
    return (
        f"What {METHOD} asks for: at layer {method['layer']}, a projector fitted after training reads "
        f"{change[direction(differences[SIMILARITY[0]], seeds)]} it reads after {baseline}. {METHOD.capitalize()} less "
        f"{baseline} over {seeds} seeds, without correction: {measured}."
    )


def _what_captions_omit(method: Row, baseline: str) -> str:
    difference = method["differences"].get("set B")
    if not difference:
        return ""
    verdict = {
        1: f"Shown, for these objects: {METHOD} keeps more of it.",
        -1: f"Shown, for these objects: {METHOD} keeps less of it.",
        0: f"Not shown: that {METHOD} keeps more of it{_too_few(difference['count'])}.",
    }
    return (
        f"What captions never mention (set B), read by linear probes at the last layer: {METHOD} less {baseline} "
        f"{SIGNED.format(**difference)} on average over properties (accuracy or R2), an interval over "
        f"{difference['count']} seeds. {verdict[direction(difference, difference['count'])]}"
    )

"""The result of an ablation in words: what is shown and what is not. With fewer than `FEWEST` seeds nothing is."""

from typing import Any

from experiments.ablation.measure import PRIMARY, SECOND
from experiments.ablation.train_arm import Arm
from pointalign.evaluation.probe import SIMILARITY

METHOD = "alignment"  # the arm that is the paper's method
LEVEL = 0.05
FEWEST = 5  # paired seeds for a difference to count as shown
SIGNED = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]"

Row = dict[str, Any]  # see `comparison.compare_arms`


def direction(difference: dict[str, float], seeds: int) -> int:
    """1 or -1 where a difference is shown: at least `FEWEST` paired seeds, an interval without zero, and a corrected
    p-value below 5 %; else 0. For a difference without a corrected p-value, seeds and interval decide.
    """
    if seeds < FEWEST or difference.get("p_holm", 0) >= LEVEL:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def _too_few(seeds: int) -> str:
    return f" ({seeds} seeds; with fewer than {FEWEST} nothing counts as shown)" if seeds < FEWEST else ""


def conclusion(rows: list[Row], baseline: str, arms: dict[str, Arm]) -> list[str]:
    """A paragraph for each question that the runs answer; none if the method was not compared with the baseline."""
    by_name = {row["arm"]: row for row in rows}
    method = by_name.get(METHOD, {})
    if "differences" not in method:
        return []
    controls = [row for row in rows if row["arm"] in arms and arms[row["arm"]].is_control]
    paragraphs = [
        _method(method, baseline),
        _controls(method, controls, baseline),
        _other_arms(rows, baseline),
        _what_alignment_asks_for(method, baseline),
        _what_captions_omit(method, baseline),
    ]
    return [paragraph for paragraph in paragraphs if paragraph]


def missing_runs(arms: list[str]) -> list[str]:
    """A paragraph about the runs of a plan that are not there, an arm for each; none if there are none."""
    return [f"{len(arms)} runs of the plan are missing: {', '.join(dict.fromkeys(arms))}."] if arms else []


def _method(method: Row, baseline: str) -> str:
    primary, second = method["differences"][PRIMARY], method["differences"][SECOND]
    seeds = len(primary["per_seed"])
    verdict = {
        1: f"Shown: {METHOD} raises the {PRIMARY}.",
        -1: f"Shown: {METHOD} lowers the {PRIMARY}.",
        0: f"Not shown: these runs cannot tell {METHOD} from {baseline}{_too_few(seeds)}.",
    }
    return (
        f"{METHOD.capitalize()} against {baseline}, {seeds} paired seeds, {primary['count']} "
        f"objects: {PRIMARY} {SIGNED.format(**primary)} nats, p = {primary['p']:.3f} ({primary['p_holm']:.3f} after "
        f"Holm's correction); a true effect of {primary['detectable']:.3f} is detected with 80 % power. "
        f"{SECOND.capitalize()} {100 * second['mean']:+.1f} points "
        f"[{100 * second['low']:+.1f}, {100 * second['high']:+.1f}], "
        f"p = {second['p_holm']:.3f} after correction. {verdict[direction(primary, seeds)]}"
    )


def _controls(method: Row, controls: list[Row], baseline: str) -> str:
    if not controls:
        return ""
    if direction(method["differences"][PRIMARY], len(method["differences"]["seeds"])) <= 0:
        names = ", ".join(row["arm"] for row in controls)
        return f"No gain of {METHOD} is shown, so there is none that its controls ({names}) could explain."
    return " ".join(_against_control(row, baseline) for row in controls)


def _against_control(row: Row, baseline: str) -> str:
    name = row["arm"]
    from_method, from_baseline = (row.get(key) for key in (f"differences from {METHOD}", "differences"))
    if from_method and direction(from_method[PRIMARY], len(from_method["seeds"])) < 0:
        return f"{METHOD.capitalize()} beats {name}."
    seeds = len(from_baseline["seeds"]) if from_baseline else 0
    shown = direction(from_baseline[PRIMARY], seeds) if from_baseline else 0
    if shown > 0:
        return f"{name.capitalize()} helps too, and is not shown to help less: plain regularisation may explain both."
    if shown < 0:
        return f"{name.capitalize()} is shown to be worse than {baseline}, but not to be worse than {METHOD}."
    return f"{name.capitalize()} cannot be told from {METHOD} or from {baseline}{_too_few(seeds)}."


def _other_arms(rows: list[Row], baseline: str) -> str:
    shown = []
    for row in rows:
        differences = row.get("differences", {})
        seeds = len(differences.get("seeds", []))
        if row["arm"] != METHOD and seeds and direction(differences[PRIMARY], seeds):
            shown.append(f"{row['arm']} {SIGNED.format(**differences[PRIMARY])} over {seeds} seeds")
    return f"Shown for other arms, {PRIMARY} less {baseline}: {', '.join(shown)}." if shown else ""


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

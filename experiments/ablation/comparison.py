"""The finished runs of an ablation compared: rows, tables, plots, and in words what is shown and what is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.arms import Arm
from experiments.ablation.measure import PRIMARY, SECOND
from experiments.ablation.recipe import Recipe
from pointalign import storage
from pointalign.evaluation import statistics
from pointalign.evaluation.probe import QFORMER

METHOD = "alignment"  # the arm that is the paper's method
SIMILARITY = ("centred cosine", "retrieval@1", "CKA")  # of a layer's states with the Q-Former tokens
LEVEL = 0.05
FEWEST = 3  # seeds for an interval over seeds

Runs = dict[int, dict[str, Any]]  # seed -> what `ablation.run_arm` returned


def run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm.replace(' ', '-').replace(':', '')}-{seed}.json"


def read_runs(folder: Path, recipe: Recipe) -> dict[str, Runs]:
    """Finished runs: arm -> seed -> result."""
    runs: dict[str, Runs] = {}
    for arm, seed in recipe.plan():
        if (path := run_file(folder, arm, seed)).exists():
            runs.setdefault(arm, {})[seed] = json.loads(path.read_text())
    return runs


def summarise(folder: Path, recipe: Recipe) -> str:
    """Compare every arm with the baseline and with the method; writes `ablation.json`, `ablation.md` and two plots."""
    from pointalign.evaluation.plots import layer_curves

    runs = read_runs(folder, recipe)
    ceiling = json.loads((folder / "ceiling.json").read_text())
    rows = [_row(name, results, ceiling) for name, results in runs.items()]
    _compare(rows, runs, recipe.baseline, "differences")
    if METHOD in runs:
        _compare([row for row in rows if row["arm"] != recipe.baseline], runs, METHOD, f"differences from {METHOD}")
    said = conclusion(rows, recipe.baseline, recipe.arms)
    if missing := sum(not run_file(folder, arm, seed).exists() for arm, seed in recipe.plan()):
        said.append(f"{missing} runs of the plan are missing.")
    described = {
        "recipe": json.loads((folder / "recipe.json").read_text()),
        "versions": _versions([one for results in runs.values() for one in results.values()]),
        "ceiling": ceiling,
        "arms": rows,
        "conclusion": said,
    }
    storage.write_json(folder / "ablation.json", described)
    text = "\n\n".join(["\n\n".join(tables(rows, recipe.baseline)), *said])
    (folder / "ablation.md").write_text(text + "\n")
    arm_differences(rows, PRIMARY, recipe.baseline, folder / "differences.png")
    layer_curves({name: average(results) for name, results in list(runs.items())[:4]}, folder / "layers.png")
    return text


def _versions(runs: list[dict[str, Any]]) -> dict[str, str]:
    """What the runs ran under, and when: every value that occurs."""
    return {key: ", ".join(sorted({str(one["versions"][key]) for one in runs})) for key in runs[0]["versions"]}


def _row(name: str, results: Runs, ceiling: dict[str, float]) -> dict[str, Any]:
    """What one arm measured, averaged over its seeds."""
    everything = list(results.values())
    first = everything[0]
    row: dict[str, Any] = {"arm": name, "seeds": sorted(results), "metrics": {}}
    for metric in first["scores"]:
        values = np.array([one["scores"][metric] for one in everything])
        row["metrics"][metric] = statistics.cluster_mean(values.mean(axis=0), first["families"]).as_dict()
    layer = str(first["layer"])  # the default one, for every arm alike
    row["layer"] = int(layer)
    for measure in first["similarity"][layer]:
        row[measure] = float(np.mean([one["similarity"][layer][measure] for one in everything]))
    row["retention"] = row["metrics"][SECOND]["mean"] / ceiling["noun"] if ceiling.get("noun") else None
    places = {"the Q-Former": QFORMER, "the last layer": _last_layer(first)}
    for said, place in places.items():
        row[f"probes at {said}"] = {
            prop: float(np.mean([one["probes"][prop][place] for one in everything])) for prop in first["probes"]
        }
    row["few_shot"] = {
        name: {count: float(np.mean([one["few_shot"][name][count] for one in everything])) for count in counts}
        for name, counts in first["few_shot"].items()
    }
    return row


def _last_layer(run: dict[str, Any]) -> str:
    return [place for place in next(iter(run["probes"].values())) if place != QFORMER][-1]


def _compare(rows: list[dict[str, Any]], runs: dict[str, Runs], other: str, key: str) -> None:
    """Paired differences of every arm from the arm `other`, under `key` of its row, corrected over arms.

    Metrics: estimate, `p`, `p_holm`, `detectable`, and the mean of each seed. With `FEWEST` seeds also, with an
    interval over seeds, for these objects: `SIMILARITY` at the default layer, and, where there is a `set B`, its probes
    at the last layer, averaged.
    """
    compared = []
    for row in rows:
        ours, theirs = runs[row["arm"]], runs[other]
        shared = sorted(set(ours) & set(theirs))
        if row["arm"] == other or not shared:
            continue
        compared.append(row)
        row[key] = {}
        families = ours[shared[0]]["families"]
        for metric in (PRIMARY, SECOND):
            difference = np.array([ours[s]["scores"][metric] for s in shared])
            difference -= np.array([theirs[s]["scores"][metric] for s in shared])
            estimate, p = statistics.paired_runs(difference, families)
            row[key][metric] = estimate.as_dict() | {
                "p": p,
                "detectable": statistics.minimum_detectable_effect(difference, families),
                "per_seed": difference.mean(axis=1).tolist(),
            }
        if len(shared) < FEWEST:
            continue
        for measure in SIMILARITY:
            found = [_similar(ours[s], measure) - _similar(theirs[s], measure) for s in shared]
            row[key][measure] = statistics.over_runs(found).as_dict()
        if _set_b(ours[shared[0]]):
            kept = [np.mean(_set_b(ours[s])) - np.mean(_set_b(theirs[s])) for s in shared]
            row[key]["set B"] = statistics.over_runs(kept).as_dict()
    for metric in (PRIMARY, SECOND):
        corrected = statistics.holm([row[key][metric]["p"] for row in compared])
        for row, p in zip(compared, corrected, strict=True):
            row[key][metric]["p_holm"] = p


def _similar(run: dict[str, Any], measure: str) -> float:
    return run["similarity"][str(run["layer"])][measure]


def _set_b(run: dict[str, Any]) -> list[float]:
    """Probes at the last layer of what captions never mention; empty for objects without such a set."""
    return [values[_last_layer(run)] for prop, values in run["probes"].items() if prop.startswith("B: ")]


def average(results: Runs) -> dict[str, Any]:
    """Probes and similarity of an arm, averaged over its seeds."""
    first, *_ = everything = list(results.values())
    merged = dict(first)
    for part in ("probes", "similarity"):
        merged[part] = {
            key: {place: float(np.mean([one[part][key][place] for one in everything])) for place in places}
            for key, places in first[part].items()
        }
    return merged


# -- in words ----------------------------------------------------------------------------------------------------------


def direction(difference: dict[str, float]) -> int:
    """1 or -1 where a difference is shown: its interval leaves out zero and its corrected p-value is below 5 %; else 0.

    Of what was not corrected, the interval alone decides.
    """
    if difference.get("p_holm", 0) >= LEVEL:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def conclusion(rows: list[dict[str, Any]], baseline: str, arms: dict[str, Arm]) -> list[str]:
    """What the arms show and what they do not, one paragraph each; nothing where the method was not compared."""
    by_name = {row["arm"]: row for row in rows}
    found = by_name.get(METHOD, {}).get("differences")
    if not found:
        return []
    one, second = found[PRIMARY], found[SECOND]
    shown = direction(one)
    verdict = {
        1: f"Shown: {METHOD} raises the {PRIMARY}.",
        -1: f"Shown: {METHOD} lowers the {PRIMARY}.",
        0: f"Not shown: these runs cannot tell {METHOD} from {baseline}.",
    }
    paragraphs = [
        f"{METHOD.capitalize()} against {baseline}, {len(one['per_seed'])} paired seeds, {one['count']} objects: "
        f"{PRIMARY} {_signed(one)} nats, p = {one['p']:.3f} ({one['p_holm']:.3f} after Holm's correction); an effect "
        f"of {one['detectable']:.3f} would have been found four times in five. {SECOND.capitalize()} "
        f"{100 * second['mean']:+.1f} points [{100 * second['low']:+.1f}, {100 * second['high']:+.1f}], "
        f"p = {second['p_holm']:.3f} after correction. {verdict[shown]}"
    ]
    controls = [name for name in by_name if name in arms and arms[name].is_control]
    if shown <= 0 and controls:
        paragraphs.append(f"No gain of {METHOD} is shown, so its controls ({', '.join(controls)}) explain none.")
    elif controls:
        paragraphs.append(" ".join(_against_control(by_name[name], baseline) for name in controls))
    others = [row for row in rows if row["arm"] != METHOD and len(row["seeds"]) > 1 and "differences" in row]
    if told := [_shown(row) for row in others if direction(row["differences"][PRIMARY])]:
        paragraphs.append(f"Shown of other arms, {PRIMARY} less {baseline}: {', '.join(told)}.")
    if SIMILARITY[0] in found:
        read = {1: "more", -1: "less", 0: "no more, as far as is shown,"}[direction(found[SIMILARITY[0]])]
        measured = ", ".join(f"{measure} {_signed(found[measure])}" for measure in SIMILARITY)
        paragraphs.append(
            f"What {METHOD} asks for: at layer {by_name[METHOD]['layer']}, a projector fitted afterwards reads {read} "
            f"of the held-out objects' Q-Former tokens off their point tokens. {METHOD.capitalize()} less {baseline} "
            f"over {found[SIMILARITY[0]]['count']} seeds, none of it corrected: {measured}."
        )
    if kept := found.get("set B"):
        words = {
            1: f"Shown, for these objects: {METHOD} keeps more of it.",
            -1: f"Shown, for these objects: {METHOD} keeps less of it.",
            0: f"Not shown: that {METHOD} keeps more of it.",
        }
        paragraphs.append(
            f"What captions never mention (set B), read by linear probes at the last layer: {METHOD} less {baseline} "
            f"{_signed(kept)} on average over properties (accuracy or R2), an interval over {kept['count']} seeds. "
            f"{words[direction(kept)]}"
        )
    return paragraphs


def _against_control(row: dict[str, Any], baseline: str) -> str:
    name = row["arm"]
    below = row.get(f"differences from {METHOD}", {}).get(PRIMARY)
    if below and direction(below) < 0:
        return f"{METHOD.capitalize()} beats {name}."
    if (shown := direction(row["differences"][PRIMARY])) > 0:
        return f"{name.capitalize()} helps too, and is not shown to help less: plain regularisation may explain both."
    if shown < 0:
        return f"{name.capitalize()} is shown to do worse than {baseline}, but not to do worse than {METHOD}."
    return f"{name.capitalize()} can be told neither from {METHOD} nor from {baseline}."


def _shown(row: dict[str, Any]) -> str:
    return f"{row['arm']} {_signed(row['differences'][PRIMARY])} over {len(row['seeds'])} seeds"


def _signed(one: dict[str, float]) -> str:
    return f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def tables(rows: list[dict[str, Any]], baseline: str) -> list[str]:
    """Markdown: means of the arms, differences from baseline and method, probes of the last layer, few-shot answers."""
    return [arm_table(rows), difference_table(rows, baseline), probe_table(rows, baseline), *few_shot_table(rows)]


def arm_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        primary, second = row["metrics"][PRIMARY], row["metrics"][SECOND]
        accuracy = f"{100 * second['mean']:.1f} [{100 * second['low']:.1f}, {100 * second['high']:.1f}]"
        retention = "" if row["retention"] is None else f"{row['retention']:.2f}"
        cells = [f"{primary['mean']:+.3f}", accuracy, *(f"{row[key]:.3f}" for key in SIMILARITY), retention]
        lines.append([row["arm"], str(len(row["seeds"])), *cells])
    layer = f"at layer {rows[0]['layer']}"
    names = [f"{SIMILARITY[0]} {layer}", *SIMILARITY[1:]]
    return _markdown(["arm", "seeds", f"{PRIMARY}, nats", f"{SECOND}, %", *names, "retention"], lines)


def difference_table(rows: list[dict[str, Any]], baseline: str) -> str:
    keys = {"differences": baseline, f"differences from {METHOD}": METHOD}
    lines = []
    for row in rows:
        if not row.keys() & keys.keys():
            continue
        cells = []
        for key in keys:
            one = row.get(key, {}).get(PRIMARY)
            cells += [_signed(one), f"{one['p_holm']:.3f}", f"{one['detectable']:.3f}"] if one else [""] * 3
        lines.append([row["arm"], *cells])
    header = [title for other in keys.values() for title in (f"less {other}", "p (Holm)", "detectable")]
    return _markdown([f"{PRIMARY}, nats", *header], lines)


def probe_table(rows: list[dict[str, Any]], baseline: str) -> str:
    shown = [row for row in rows if row["arm"] in (baseline, METHOD)]
    lines = [
        [prop, f"{value:.3f}", *(f"{row['probes at the last layer'][prop]:.3f}" for row in shown)]
        for prop, value in shown[0]["probes at the Q-Former"].items()
    ]
    return _markdown(["linear probes of", "Q-Former", *(f"last layer, {row['arm']}" for row in shown)], lines)


def few_shot_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows[0]["few_shot"]:
        return []
    counts = list(next(iter(rows[0]["few_shot"].values())))
    lines = [
        [row["arm"], *(f"{100 * np.mean([one[count] for one in row['few_shot'].values()]):.1f}" for count in counts)]
        for row in rows
    ]
    return [_markdown(["set B after so many examples, accuracy in %", *counts], lines)]


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def arm_differences(rows: list[dict], metric: str, baseline: str, path: Path) -> None:
    """Every arm's paired difference from the baseline with its interval, and each seed's as a dot."""
    from matplotlib import pyplot as plt

    compared = [row for row in rows if metric in row.get("differences", {})]
    if not compared:
        return
    figure, axis = plt.subplots(figsize=(7, 1.3 + 0.42 * len(compared)))
    for place, row in enumerate(reversed(compared)):
        one = row["differences"][metric]
        axis.plot([one["low"], one["high"]], [place, place], color="tab:blue", linewidth=2.2)
        axis.plot(one["mean"], place, "o", color="tab:blue", markersize=7)
        axis.plot(one["per_seed"], [place - 0.2] * len(one["per_seed"]), ".", color="gray", markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(compared)), [row["arm"] for row in reversed(compared)])
    axis.set_xlabel(f"{metric}, difference from {baseline} (95 % interval; dots are seeds)", fontsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

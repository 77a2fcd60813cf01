"""The comparison of an ablation's finished runs: figures of each arm, paired differences, tables and plots.

Arms have different numbers of seeds. Two arms are compared on the seeds that both have, and a table that lists the mean
of an arm also lists the baseline's and the method's means over the same seeds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.conclusion import METHOD, conclusion, is_share, missing_runs
from experiments.ablation.measure import GEOMETRY, MEASURES, PRIMARY, SECOND
from experiments.ablation.questions import by_kind
from experiments.ablation.recipe import Recipe
from pointalign import storage
from pointalign.evaluation import markdown_table, statistics
from pointalign.evaluation.probe import QFORMER, SIMILARITY, layer_curves
from pointalign.evaluation.statistics import Estimate

FEWEST = 3  # seeds for an interval over seeds; `conclusion.FEWEST` calls nothing shown with so few
PLOTTED = 4  # arms in the plot over layers

Runs = dict[int, dict[str, Any]]  # seed -> what `ablation.run_arm` returned
Row = dict[str, Any]  # an arm in `ablation.json`


def run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / "runs" / f"{arm.replace(' ', '-').replace(':', '')}-{seed}.json"


def read_runs(folder: Path, recipe: Recipe) -> dict[str, Runs]:
    """Finished runs: arm -> seed -> result.

    Raises:
        ValueError: two runs started from different weights.
    """
    runs: dict[str, Runs] = {}
    starts: dict[str, str] = {}
    for arm, seed in recipe.plan():
        if (path := run_file(folder, arm, seed)).exists():
            runs.setdefault(arm, {})[seed] = run = json.loads(path.read_text())
            if "start" in run:
                starts.setdefault(run["start"], path.name)
    if len(starts) > 1:
        raise ValueError(
            f"{folder / 'runs'}: {' and '.join(starts.values())} started from different weights and cannot be "
            "compared: remove the runs of one start, then run again"
        )
    return runs


def summarise(folder: Path, recipe: Recipe) -> str:
    """Compare every arm with the baseline and with the method; writes `ablation.json`, `ablation.md` and two plots.

    Returns:
        The content of `ablation.md`.

    Raises:
        ValueError: no run of the baseline is finished.
    """
    runs = read_runs(folder, recipe)
    if recipe.baseline not in runs:
        raise ValueError(f"{folder / 'runs'} holds no run of the baseline {recipe.baseline!r} to compare with")
    ceiling = json.loads((folder / "ceiling.json").read_text())
    rows = compare_arms(runs, recipe.baseline, ceiling, recipe.primary)
    paragraphs = conclusion(rows, recipe.baseline, recipe.arms, recipe.primary)
    missing = [arm for arm, seed in recipe.plan() if not run_file(folder, arm, seed).exists()]
    paragraphs += missing_runs(missing)
    plotted = dict(list(runs.items())[:PLOTTED])
    seeds = shared_seeds(*plotted.values())
    content = {
        "recipe": json.loads((folder / "recipe.json").read_text()),
        "versions": _versions([run for results in runs.values() for run in results.values()]),
        "ceiling": ceiling,
        "arms": rows,
        "missing": missing,
        "conclusion": paragraphs,
        "layers.png": {"arms": list(plotted), "seeds": seeds},
    }
    storage.write_json(folder / "ablation.json", content)
    text = "\n\n".join([*tables(rows, recipe.baseline, recipe.primary), *paragraphs])
    (folder / "ablation.md").write_text(text + "\n")
    plot_differences(rows, recipe.primary[0], recipe.baseline, folder / "differences.png")
    if seeds:
        layer_curves({name: average(results, seeds) for name, results in plotted.items()}, folder / "layers.png")
    return text


def _versions(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Software, device and date of the runs, with every value that occurs."""
    return {key: ", ".join(sorted({str(run["versions"][key]) for run in runs})) for key in runs[0]["versions"]}


def shared_seeds(*arms: Runs) -> list[int]:
    return sorted(set.intersection(*(set(results) for results in arms)))


def compare_arms(
    runs: dict[str, Runs], baseline: str, ceiling: dict[str, float], primary: Sequence[str] = (PRIMARY,)
) -> list[Row]:
    """A row for each arm: its figures over the seeds that it shares with the baseline, and differences on these.

    `same seeds` holds the figures of the baseline and of the method over just these seeds, where they have them all.
    """
    rows = []
    for name, results in runs.items():
        seeds = shared_seeds(results, runs[baseline])
        if not seeds:
            continue  # as yet without a partner to compare with
        beside = [other for other in (baseline, METHOD) if other in runs and set(seeds) <= set(runs[other])]
        row = {"arm": name, "seeds": seeds} | _figures(results, seeds, ceiling)
        rows.append(row | {"same seeds": {other: _figures(runs[other], seeds, ceiling) for other in beside}})
    _add_differences(rows, runs, baseline, "differences", primary)
    if METHOD in runs:
        others = [row for row in rows if row["arm"] != baseline]
        _add_differences(others, runs, METHOD, f"differences from {METHOD}", primary)
    return rows


def _families(run: dict[str, Any], metric: str) -> list[str]:
    """The family of each value in `run["scores"][metric]`."""
    return run["geometry"]["families"] if metric == GEOMETRY else run["families"]


def _figures(results: Runs, seeds: list[int], ceiling: dict[str, float]) -> dict[str, Any]:
    """What an arm measured, averaged over `seeds`."""
    selected = [results[seed] for seed in seeds]
    first = selected[0]
    figures: dict[str, Any] = {"metrics": {}}
    for metric in first["scores"]:
        values = np.array([run["scores"][metric] for run in selected])
        figures["metrics"][metric] = statistics.cluster_mean(values.mean(axis=0), _families(first, metric)).as_dict()
    if "geometry" in first:
        figures["geometry"] = by_kind([run["geometry"] for run in selected])
    layer = str(first["layer"])  # the default layer, in every arm
    figures["layer"] = int(layer)
    for measure in first["similarity"][layer]:
        figures[measure] = float(np.mean([run["similarity"][layer][measure] for run in selected]))
    figures["retention"] = figures["metrics"][SECOND]["mean"] / ceiling["noun"] if ceiling.get("noun") else None
    for title, place in {"the Q-Former": QFORMER, "the last layer": _last_layer(first)}.items():
        figures[f"probes at {title}"] = {
            name: float(np.mean([run["probes"][name][place] for run in selected])) for name in first["probes"]
        }
    figures["few_shot"] = {
        name: {count: float(np.mean([run["few_shot"][name][count] for run in selected])) for count in counts}
        for name, counts in first["few_shot"].items()
    }
    return figures


def _last_layer(run: dict[str, Any]) -> str:
    return [place for place in next(iter(run["probes"].values())) if place != QFORMER][-1]


def _add_differences(rows: list[Row], runs: dict[str, Runs], other: str, key: str, primary: Sequence[str]) -> None:
    """Add paired differences of every arm from the arm `other` to its row under `key`, corrected over arms.

    Under `seeds`, the seeds that both have. For each metric an estimate, `p`, `p_holm` and `detectable`, all of which
    resample seeds as well as families, and the mean of each seed. The primary metrics are corrected together, over arms
    and metrics, each other metric over arms. With at least `FEWEST` seeds also the following, with an interval over
    seeds, for these objects: `SIMILARITY` at the default layer and, where there is a `set B`, the mean of its probes at
    the last layer.
    """
    compared = []
    for row in rows:
        ours, theirs = runs[row["arm"]], runs[other]
        seeds = shared_seeds(ours, theirs)
        if row["arm"] == other or not seeds:
            continue
        compared.append(row)
        differences: dict[str, Any] = {"seeds": seeds}
        row[key] = differences
        first = ours[seeds[0]]
        for metric in _measured(first):
            values = np.array([ours[seed]["scores"][metric] for seed in seeds])
            values -= np.array([theirs[seed]["scores"][metric] for seed in seeds])
            estimate, p, error = statistics.crossed_difference(values, _families(first, metric))
            differences[metric] = estimate.as_dict() | {
                "p": p,
                "detectable": statistics.POWER_80 * error,
                "per_seed": values.mean(axis=1).tolist(),
            }
        if len(seeds) < FEWEST:
            continue
        for measure in SIMILARITY:
            by_seed = [_similar(ours[seed], measure) - _similar(theirs[seed], measure) for seed in seeds]
            differences[measure] = over_runs(by_seed).as_dict()
        if _set_b(ours[seeds[0]]):
            by_seed = [float(np.mean(_set_b(ours[seed])) - np.mean(_set_b(theirs[seed]))) for seed in seeds]
            differences["set B"] = over_runs(by_seed).as_dict()
    if not compared:
        return
    measured = [metric for metric in MEASURES if metric in compared[0][key]]
    for metrics in [list(primary), *([metric] for metric in measured if metric not in primary)]:
        tests = [row[key][metric] for metric in metrics for row in compared]
        for test, p in zip(tests, statistics.holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = p


def _measured(run: dict[str, Any]) -> list[str]:
    return [metric for metric in MEASURES if metric in run["scores"]]


def over_runs(differences: Sequence[float]) -> Estimate:
    """Mean of paired differences `[S]` of two or more runs, with Student's 95 % interval: these objects, other runs."""
    from scipy.stats import t

    data = np.asarray(differences, dtype=float)
    half = float(t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / len(data) ** 0.5)
    return Estimate(float(data.mean()), float(data.mean()) - half, float(data.mean()) + half, len(data))


def _similar(run: dict[str, Any], measure: str) -> float:
    return run["similarity"][str(run["layer"])][measure]


def _set_b(run: dict[str, Any]) -> list[float]:
    """Probes at the last layer of what captions never mention; empty for objects without such a set."""
    return [values[_last_layer(run)] for name, values in run["probes"].items() if name.startswith("B: ")]


def average(results: Runs, seeds: list[int]) -> dict[str, Any]:
    """Probes and similarity of an arm, averaged over `seeds`."""
    first, *_ = selected = [results[seed] for seed in seeds]
    merged = dict(first)
    for part in ("probes", "similarity"):
        merged[part] = {
            key: {place: float(np.mean([run[part][key][place] for run in selected])) for place in places}
            for key, places in first[part].items()
        }
    return merged


# -- tables and plots --------------------------------------------------------------------------------------------------


def tables(rows: list[Row], baseline: str, primary: Sequence[str] = (PRIMARY,)) -> list[str]:
    """Markdown: means of the arms, differences from baseline and method in each primary measure, geometry by kind of
    question, probes of the last layer, few-shot answers."""
    return [
        arm_table(rows, baseline),
        *(difference_table(rows, baseline, metric) for metric in primary),
        *geometry_table(rows, baseline),
        probe_table(rows, baseline),
        *few_shot_table(rows, baseline),
    ]


def seed_text(seeds: list[int]) -> str:
    """`0-4` or `0, 2`."""
    consecutive = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]}-{seeds[-1]}" if consecutive else ", ".join(map(str, seeds))


def _grouped(rows: list[Row], baseline: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Arm, seeds and figures, arms with the same seeds together, below the baseline and the method over these seeds."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["seeds"]), []).append(row)
    lines = []
    for seeds, members in groups.items():
        names = [row["arm"] for row in members]
        beside = members[0].get("same seeds", {})
        restated = [(other, beside[other]) for other in (baseline, METHOD) if other in beside and other not in names]
        for name, figures in [*restated, *((row["arm"], row) for row in members)]:
            lines.append((name, seed_text(list(seeds)), figures))
    return lines


def arm_table(rows: list[Row], baseline: str) -> str:
    shares = [metric for metric in (SECOND, GEOMETRY) if metric in rows[0]["metrics"]]
    lines = []
    for name, seeds, figures in _grouped(rows, baseline):
        accuracies = [
            f"{100 * share['mean']:.1f} [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"
            for share in (figures["metrics"][metric] for metric in shares)
        ]
        retention = "" if figures["retention"] is None else f"{figures['retention']:.2f}"
        similar = [f"{figures[measure]:.3f}" for measure in SIMILARITY]
        lines.append([name, seeds, f"{figures['metrics'][PRIMARY]['mean']:+.3f}", *accuracies, *similar, retention])
    measures = [f"{SIMILARITY[0]} at layer {rows[0]['layer']}", *SIMILARITY[1:]]
    titles = [f"{metric}, %" for metric in shares]
    return markdown_table(["arm", "seeds", f"{PRIMARY}, nats", *titles, *measures, "retention"], lines)


def difference_table(rows: list[Row], baseline: str, metric: str = PRIMARY) -> str:
    others = {"differences": baseline, f"differences from {METHOD}": METHOD}
    unit, scale, digits = ("points", 100, 1) if is_share(metric) else ("nats", 1, 3)
    lines = []
    for row in rows:
        cells = []
        for key in others:
            if metric not in row.get(key, {}):
                cells += [""] * 4
                continue
            difference = row[key][metric]
            mean, low, high = (f"{scale * difference[name]:+.{digits}f}" for name in ("mean", "low", "high"))
            tests = [f"{difference['p_holm']:.3f}", f"{scale * difference['detectable']:.{digits}f}"]
            cells += [seed_text(row[key]["seeds"]), f"{mean} [{low}, {high}]", *tests]
        if any(cells):
            lines.append([row["arm"], *cells])
    header = [title for other in others.values() for title in ("seeds", f"less {other}", "p (Holm)", "detectable")]
    return markdown_table([f"{metric}, {unit}", *header], lines)


def geometry_table(rows: list[Row], baseline: str) -> list[str]:
    """Right answers by kind of question; none where no geometry was asked. Yes/no questions also have the share of Yes,
    as a constant answer has the accuracy of the most frequent right word."""
    if "geometry" not in rows[0]:
        return []
    kinds = rows[0]["geometry"]
    lines = [["the most frequent answer", "", *(f"{100 * kind['majority']:.1f}" for kind in kinds.values())]]
    for name, seeds, figures in _grouped(rows, baseline):
        cells = []
        for kind in figures["geometry"].values():
            said_yes = f" (Yes {100 * kind['yes_rate']:.0f})" if "yes_rate" in kind else ""
            cells.append(f"{100 * kind['accuracy']:.1f}{said_yes}")
        lines.append([name, seeds, *cells])
    titles = [f"{name} (n={kind['count']})" for name, kind in kinds.items()]
    return [markdown_table(["right answers, %", "seeds", *titles], lines)]


def probe_table(rows: list[Row], baseline: str) -> str:
    """Probes of the baseline and the method, over the method's seeds."""
    by_name = {row["arm"]: row for row in rows}
    method = by_name.get(METHOD)
    compared = {baseline: by_name[baseline]}
    if method is not None:
        compared = {baseline: method.get("same seeds", {}).get(baseline, by_name[baseline]), METHOD: method}
    lines = [
        [name, f"{value:.3f}", *(f"{figures['probes at the last layer'][name]:.3f}" for figures in compared.values())]
        for name, value in compared[baseline]["probes at the Q-Former"].items()
    ]
    seeds = seed_text((method or by_name[baseline])["seeds"])
    header = [f"linear probes (seeds {seeds}) of", QFORMER, *(f"last layer, {name}" for name in compared)]
    return markdown_table(header, lines)


def few_shot_table(rows: list[Row], baseline: str) -> list[str]:
    if not rows[0]["few_shot"]:
        return []
    counts = list(next(iter(rows[0]["few_shot"].values())))
    lines = []
    for name, seeds, figures in _grouped(rows, baseline):
        by_property = figures["few_shot"].values()
        means = [100 * np.mean([accuracies[count] for accuracies in by_property]) for count in counts]
        lines.append([name, seeds, *(f"{mean:.1f}" for mean in means)])
    return [markdown_table(["set B after so many examples, accuracy in %", "seeds", *counts], lines)]


def plot_differences(rows: list[Row], metric: str, baseline: str, path: Path) -> None:
    """Write a PNG of every arm's paired difference from the baseline: mean, interval, and a dot for each seed."""
    from matplotlib.figure import Figure

    compared = [row for row in reversed(rows) if metric in row.get("differences", {})]
    if not compared:
        return
    figure = Figure(figsize=(7, 1.3 + 0.42 * len(compared)))
    axis = figure.subplots()
    for place, row in enumerate(compared):
        difference = row["differences"][metric]
        axis.plot([difference["low"], difference["high"]], [place, place], color="tab:blue", linewidth=2.2)
        axis.plot(difference["mean"], place, "o", color="tab:blue", markersize=7)
        seeds = difference["per_seed"]
        axis.plot(seeds, [place - 0.2] * len(seeds), ".", color="gray", markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    names = [f"{row['arm']} ({len(row['differences']['seeds'])} seeds)" for row in compared]
    axis.set_yticks(range(len(compared)), names)
    axis.set_xlabel(f"{metric}, difference from {baseline} (95 % interval; dots are seeds)", fontsize=9)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)

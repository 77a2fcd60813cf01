"""From the finished cells of the grid to one file: figures of each arm and paired differences. Cells may be missing."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.comparison import over_runs, shared_seeds
from experiments.fading.grid import ARMS, BASELINE, LAYERS, METHOD, PRIMARY_ARMS, TIERS
from experiments.fading.things import FACTORS_B
from experiments.fading.words import NAMING
from pointalign.evaluation import statistics
from pointalign.evaluation.probe import QFORMER

CONVERGED = 0.01  # nats that the last tenth of the training may still gain

Cells = dict[int, dict[str, Any]]  # seed -> what `cell.run_cell` returned
Row = dict[str, Any]


def cell_file(folder: Path, arm: str, seed: int) -> Path:
    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in arm)
    return folder / "cells" / f"{name}-{seed}.json"


def read_cells(folder: Path, seeds: int) -> dict[str, Cells]:
    """Finished cells: arm -> seed -> result, arms in the order of the plan."""
    cells: dict[str, Cells] = {}
    for arm in [arm for tier in TIERS for arm in tier]:
        for seed in range(seeds):
            if (path := cell_file(folder, arm, seed)).exists():
                cells.setdefault(arm, {})[seed] = json.loads(path.read_text())
    return cells


def words_right(cell: dict[str, Any]) -> np.ndarray:
    """The primary measure of every held-out object `[C]`: share of right words over all factors of B and k."""
    counts = np.array([[int(digit) for digit in digits] for digits in cell["few-shot"].values()])
    return counts.mean(axis=0) / len(FACTORS_B)


def captions(cell: dict[str, Any]) -> np.ndarray:
    """Share of exact captions of every held-out object `[C]`."""
    return np.array([int(digit) for digit in cell["captions"]]) / len(NAMING)


def b_at(cell: dict[str, Any], place: str, kind: str = "probes") -> float:
    """R2 at a place, averaged over the factors of B."""
    return float(np.mean([values[place] for name, values in cell[kind].items() if name.startswith("B: ")]))


def summarise(cells: dict[str, Cells]) -> dict[str, Any]:
    """Figures of every arm and its differences from its baseline and from the method; see `differences`.

    Raises: ValueError: no cell of the baseline is finished.
    """
    if BASELINE not in cells:
        raise ValueError(f"no cell of the arm {BASELINE!r} is finished: there is nothing to compare with")
    rows = [figures(name, results) for name, results in cells.items()]
    for row in rows:
        other = ARMS[row["arm"]].baseline
        if other != row["arm"] and other in cells:
            row["difference"] = differences(cells[row["arm"]], cells[other])
        same_setting = other == BASELINE and row["arm"] not in (BASELINE, METHOD)
        if same_setting and METHOD in cells:
            row["difference from the method"] = differences(cells[row["arm"]], cells[METHOD])
    primary = [row for row in rows if row["arm"] in PRIMARY_ARMS]
    for key, family in (
        ("difference", primary),
        ("difference", [row for row in rows if row not in primary]),
        ("difference from the method", rows),
    ):
        _correct([row[key] for row in family if row.get(key)])
    return {"arms": rows}


def figures(name: str, results: Cells) -> Row:
    """Means of an arm over its seeds, each with Student's interval over seeds where there are two or more."""
    cells = list(results.values())

    def over_seeds(value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
        values = [value(cell) for cell in cells]
        if len(values) < 2:
            return {"mean": values[0], "count": 1}
        return over_runs(values).as_dict()

    places = [QFORMER, *(str(layer) for layer in range(LAYERS + 1))]
    last = [cell["losses"]["ntp"][-2:] for cell in cells]
    return {
        "arm": name,
        "seeds": sorted(results),
        "few-shot": {
            count: over_seeds(lambda cell, count=count: _accuracy(cell["few-shot"][count]))
            for count in cells[0]["few-shot"]
        },
        "few-shot, mean over k": over_seeds(lambda cell: float(words_right(cell).mean())),
        "few-shot by factor": {
            factor: float(np.mean([k[factor] for cell in cells for k in cell["few-shot by factor"].values()]))
            for factor in FACTORS_B
        },
        "captions": over_seeds(lambda cell: float(captions(cell).mean())),
        "B by layer": {place: over_seeds(lambda cell, place=place: b_at(cell, place)) for place in places},
        "B by layer, factor by factor": {
            name: {place: float(np.mean([cell["probes"][name][place] for cell in cells])) for place in places}
            for name in cells[0]["probes"]
        },
        "B on all tokens": {
            place: over_seeds(lambda cell, place=place: b_at(cell, place, "probes on all tokens"))
            for place in next(iter(cells[0]["probes on all tokens"].values()))
        },
        "lost over the layers": over_seeds(lambda cell: b_at(cell, str(LAYERS)) - b_at(cell, "0")),
        "retrieval at equal A": {
            layer: over_seeds(lambda cell, layer=layer: cell["retrieval at equal A"][layer])
            for layer in cells[0]["retrieval at equal A"]
        },
        "layer weights": _mean_weights(cells),
        "next-token loss": {
            "last tenth": float(np.mean([end for _, end in last])),
            "converged": all(before - end <= CONVERGED for before, end in last),
        },
        "seconds": float(np.median([cell["seconds"] for cell in cells])),
    }


def _accuracy(digits: str) -> float:
    return float(np.mean([int(digit) for digit in digits])) / len(FACTORS_B)


def _mean_weights(cells: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Shares of the aligned layers in the loss after training; empty without alignment."""
    layers = cells[0].get("layer weights", {})
    return {layer: float(np.mean([cell["layer weights"][layer] for cell in cells])) for layer in layers}


def differences(ours: Cells, theirs: Cells) -> dict[str, Any] | None:
    """Paired differences of two arms on the seeds that both have; None without such a seed.

    Returns: `seeds`; of `few-shot` and `captions` an estimate that resamples seeds and objects, with `p`, the effect
        `detectable` with 80 % power, and the mean `per_seed`; with two seeds or more, intervals over seeds of
        `B at the last layer` and `retrieval at equal A` there.
    """
    seeds = shared_seeds(ours, theirs)
    if not seeds:
        return None
    result: dict[str, Any] = {"seeds": seeds}
    for name, read in (("few-shot", words_right), ("captions", captions)):
        values = np.array([read(ours[seed]) - read(theirs[seed]) for seed in seeds])
        estimate, p, error = statistics.crossed_difference(values, [str(number) for number in range(values.shape[1])])
        result[name] = estimate.as_dict() | {
            "p": p,
            "detectable": statistics.POWER_80 * error,
            "per_seed": values.mean(axis=1).tolist(),
        }
    if len(seeds) > 1:
        last = str(LAYERS)
        result["B at the last layer"] = over_runs(
            [b_at(ours[seed], last) - b_at(theirs[seed], last) for seed in seeds]
        ).as_dict()
        result["retrieval at equal A"] = over_runs(
            [ours[seed]["retrieval at equal A"][last] - theirs[seed]["retrieval at equal A"][last] for seed in seeds]
        ).as_dict()
    return result


def _correct(compared: list[dict[str, Any]]) -> None:
    """Add Holm's p-values over these comparisons."""
    for name in ("few-shot", "captions"):
        corrected = statistics.holm([difference[name]["p"] for difference in compared])
        for difference, p in zip(compared, corrected, strict=True):
            difference[name]["p_holm"] = p

"""The picture of the study: what stays readable of B over the layers, and what few examples make of it."""

from pathlib import Path
from typing import Any

from experiments.fading.conclusion import by_name
from experiments.fading.grid import BASELINE, LAYERS, METHOD
from pointalign.evaluation.probe import QFORMER

DRAWN = {  # arm -> colour
    BASELINE: "tab:red",
    "another object's target": "tab:gray",
    "alignment 0.1": "tab:cyan",
    METHOD: "tab:blue",
}


def draw(content: dict[str, Any], path: Path) -> None:
    """Write a PNG from the content of `fading.json`; bands are 95 % intervals over seeds."""
    from matplotlib.figure import Figure

    rows = by_name(content)
    figure = Figure(figsize=(10, 4.2))
    by_layer, by_count = figure.subplots(1, 2)
    counts = list(rows[BASELINE]["few-shot"])
    for arm, colour in DRAWN.items():
        if arm not in rows:
            continue
        count = len(rows[arm]["seeds"])
        label = f"{arm} ({count} seed{'s' if count > 1 else ''})"
        layers = [rows[arm]["B by layer"][str(layer)] for layer in range(LAYERS + 1)]
        _curve(by_layer, range(LAYERS + 1), layers, label, colour)
        _curve(by_count, [int(count) for count in counts], [rows[arm]["few-shot"][k] for k in counts], label, colour)
    level = rows[BASELINE]["B by layer"][QFORMER]["mean"]
    by_layer.axhline(level, color="black", linewidth=0.9, linestyle=":", label=QFORMER)
    by_layer.set(xlabel="layer of the decoder (0: its input)", ylabel="R² of a linear probe, mean over B", ylim=(0, 1))
    by_layer.set_title("What captions never mention, by layer", fontsize=11)
    by_count.axhline(0.5, color="black", linewidth=0.9, linestyle=":", label="guessing")
    by_count.set_xscale("log", base=2)
    by_count.set_xticks([int(count) for count in counts], counts)
    by_count.set(xlabel="objects of the fine-tuning (k)", ylabel="right words about B", ylim=(0.45, 1))
    by_count.set_title("What is left of it for few-shot learning", fontsize=11)
    for axis in (by_layer, by_count):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _curve(axis: Any, places: Any, estimates: list[dict[str, float]], label: str, colour: str) -> None:
    means = [estimate["mean"] for estimate in estimates]
    axis.plot(places, means, marker="o", markersize=4, linewidth=1.8, color=colour, label=label)
    if all("low" in estimate for estimate in estimates):
        low, high = ([estimate[end] for estimate in estimates] for end in ("low", "high"))
        axis.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)

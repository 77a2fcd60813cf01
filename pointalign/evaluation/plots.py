"""Pictures of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEAST_SPAN = 0.1  # of the axis of a probe or similarity, so that noise does not fill the picture


def loss_curves(history: list[dict], path: Path, weight: float) -> None:
    """Both losses over steps, from the Trainer's log, as a PNG."""
    logged = [entry for entry in history if "ntp_loss" in entry]
    if not logged:
        return
    steps = [entry["step"] for entry in logged]
    curves = {"next-token loss": ("ntp_loss", "tab:blue")}
    if weight > 0:
        curves["alignment loss, 1 - mean cos"] = ("alignment_loss", "tab:orange")
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.4), squeeze=False)
    for axis, (title, (key, colour)) in zip(axes[0], curves.items(), strict=True):
        axis.plot(steps, [entry[key] for entry in logged], color=colour, linewidth=1.6)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def layer_curves(results: dict[str, dict], path: Path) -> None:
    """What each layer knows: probes of every property, and similarity to the Q-Former tokens, one line per model.

    Args:
        results: name of a model or arm -> what `probe.probe_layers` returns.
    """
    first = next(iter(results.values()))
    similar = ("centred cosine", "retrieval@1", "CKA") if len(first["similarity"]) > 1 else ()  # one layer is no curve
    titles = [*first["probes"], *similar]
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.7 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis, title in zip(flat, titles, strict=False):
        for number, (name, result) in enumerate(results.items()):
            if title in result["probes"]:
                curve = {int(place): value for place, value in result["probes"][title].items() if place.isdigit()}
                if number == 0:
                    axis.axhline(
                        result["probes"][title]["Q-Former"],
                        color="black",
                        linewidth=0.9,
                        linestyle=":",
                        label="Q-Former",
                    )
            else:
                curve = {int(place): values[title] for place, values in result["similarity"].items()}
            places = sorted(curve)
            axis.plot(places, [curve[place] for place in places], marker="o", markersize=3, linewidth=1.4, label=name)
        low, high = axis.get_ylim()
        if high - low < LEAST_SPAN:
            axis.set_ylim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)
        kind = first["kinds"].get(title)
        axis.set_title(title + (f" ({kind.replace('R2', 'R²')})" if kind else ""), fontsize=10)
        axis.set_xlabel("layer", fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in flat[len(titles) :]:
        axis.set_visible(False)
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / (2.7 * rows), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""Pictures of a run."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


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

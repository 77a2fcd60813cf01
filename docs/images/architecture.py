"""Draw docs/images/architecture.png: `python docs/images/architecture.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).parents[2]
FROZEN, TRAINED, TOKENS, LOSS = "#dfe6ee", "#ffd9a8", "#9cc5f0", "#f7c5c5"
INK = "#22303c"


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str, colour: str, size: float = 10) -> None:
    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec=INK, lw=0.9)
    )
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> None:
    style = "--" if dashed else "-"
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, lw=1.2, ls=style, color=INK))


def draw_cloud(axis: Axes, cloud: np.ndarray, azimuth: float = 0.6, elevation: float = 0.35) -> None:
    """Draw a cloud `[N, 6]`, y up, seen from the front right and above; near points cover far ones."""
    turn = np.array([[np.cos(azimuth), 0, -np.sin(azimuth)], [0, 1, 0], [np.sin(azimuth), 0, np.cos(azimuth)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(elevation), -np.sin(elevation)], [0, np.sin(elevation), np.cos(elevation)]])
    xyz = cloud[:, :3] @ turn.T @ tilt.T
    order = np.argsort(xyz[:, 2])
    axis.scatter(xyz[order, 0], xyz[order, 1], c=np.clip(cloud[order, 3:], 0, 1), s=1.2, linewidths=0)
    axis.set_aspect("equal")
    axis.set_xlim(-1.05, 1.05)
    axis.set_ylim(-1.05, 1.05)
    axis.set_facecolor("#eef1f5")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def main() -> None:
    figure = pyplot.figure(figsize=(12, 4.1), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 12), ylim=(0, 4.1))
    axis.axis("off")
    picture = figure.add_axes((0.0, 0.32, 0.155, 0.56))
    draw_cloud(picture, np.load(ROOT / "examples/clouds/cactus.npy").astype(np.float32))
    picture.set(facecolor="white", xlim=(-1, 1), ylim=(-1, 1))
    axis.text(0.93, 3.66, "point cloud, x y z r g b", ha="center", fontsize=9, color=INK)

    # The point branch, frozen in the alignment stage
    box(axis, 2.1, 2.2, 1.25, 1.0, "point encoder\n(PointBERT)", FROZEN)
    box(axis, 3.75, 2.2, 1.25, 1.0, "MLP,\nQ-Former", FROZEN)
    box(axis, 5.4, 2.2, 1.05, 1.0, "modality\nprojector", FROZEN)
    for start, end in ((1.72, 2.08), (3.35, 3.73), (5.0, 5.38)):
        arrow(axis, (start, 2.7), (end, 2.7))

    # The language model: point tokens, then the words of the question
    axis.add_patch(
        FancyBboxPatch((6.85, 1.85), 3.45, 1.9, boxstyle="round,pad=0,rounding_size=0.08", fc="#f4f6f9", ec=INK, lw=0.9)
    )
    axis.text(8.58, 3.55, "causal language model with LoRA", ha="center", fontsize=10, color=INK)
    for number in range(4):
        axis.add_patch(Rectangle((7.0 + 0.11 * number, 2.78), 0.08, 0.5, fc=TOKENS, ec=INK, lw=0.7))
    axis.text(7.53, 3.02, '"What is this?"', va="center", fontsize=9, color=INK)
    for number in range(8):
        left = 7.0 + 0.4 * number
        axis.add_patch(Rectangle((left, 2.0), 0.33, 0.5, fc=FROZEN, ec=INK, lw=1.8 if number == 3 else 0.7))
        axis.add_patch(Rectangle((left + 0.05, 2.06), 0.23, 0.09, fc=TRAINED, ec=INK, lw=0.5))
    axis.text(8.365, 2.3, "k", ha="center", va="center", fontsize=9, color=INK)
    axis.text(8.58, 2.6, "decoder layers", ha="center", fontsize=8, color=INK)
    arrow(axis, (6.45, 2.7), (6.98, 2.95))
    arrow(axis, (10.3, 2.7), (10.62, 2.7))
    axis.text(10.68, 2.7, '"This is\n a plant."', va="center", fontsize=10.5, color=INK)

    # The alignment, in training only
    box(axis, 7.6, 0.85, 1.52, 0.62, "alignment projector", TRAINED, 9.5)
    box(axis, 5.05, 0.8, 1.55, 0.72, r"$1 - \cos$", LOSS, 12)
    arrow(axis, (8.36, 2.0), (8.36, 1.49))
    arrow(axis, (7.6, 1.16), (6.62, 1.16))
    axis.plot([4.38, 4.38], [2.2, 1.16], "--", lw=1.2, color=INK)
    arrow(axis, (4.38, 1.16), (5.03, 1.16), dashed=True)
    axis.text(4.28, 1.62, "detached target,\n32 query tokens", ha="right", va="center", fontsize=9, color=INK)
    axis.text(8.46, 1.68, "hidden states of the point tokens", fontsize=9, va="center", color=INK)
    axis.text(5.82, 0.55, "training only", ha="center", va="center", fontsize=8.5, color=INK, style="italic")
    axis.text(
        11.9, 0.28, r"$L = L_{\mathrm{next\ token}} + \lambda\,L_{\mathrm{align}}$", ha="right", fontsize=12, color=INK
    )
    legend = ((0.3, FROZEN, "frozen"), (1.35, TRAINED, "trained: LoRA, alignment projector"), (4.1, TOKENS, "tokens"))
    for left, colour, text in legend:
        axis.add_patch(Rectangle((left, 0.2), 0.22, 0.17, fc=colour, ec=INK, lw=0.7))
        axis.text(left + 0.3, 0.285, text, va="center", fontsize=8.5, color=INK)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

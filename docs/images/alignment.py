"""Draw docs/images/alignment.png: `python docs/images/alignment.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from architecture import FROZEN, INK, LOSS, ROOT, TOKENS, TRAINED, arrow, box, draw_cloud
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

WORDS = "#ffffff"
POINTS, TEXT = 4, 5  # tokens drawn


def tokens(axis: Axes, x: float, y: float, tapped: bool = False) -> None:
    """A row of point tokens, then words; the point tokens of the tapped layer have a thick edge."""
    for number in range(POINTS + TEXT):
        point = number < POINTS
        colour = TOKENS if point else WORDS
        axis.add_patch(
            Rectangle((x + 0.22 * number, y), 0.17, 0.3, fc=colour, ec=INK, lw=1.8 if point and tapped else 0.7)
        )


def main() -> None:
    figure = pyplot.figure(figsize=(10, 5.2), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 10), ylim=(0, 5.2))
    axis.axis("off")

    # Left: the point branch, from below
    picture = figure.add_axes((0.03, 0.02, 0.17, 0.3))
    draw_cloud(picture, np.load(ROOT / "examples/clouds/cactus.npy").astype(np.float32))
    picture.set(facecolor="white", xlim=(-1, 1), ylim=(-1, 1))
    box(axis, 0.4, 2.2, 1.5, 0.75, "point encoder,\nQ-Former", FROZEN)
    arrow(axis, (1.15, 1.72), (1.15, 2.18))
    for number in range(POINTS):
        axis.add_patch(Rectangle((0.74 + 0.22 * number, 3.5), 0.17, 0.3, fc=TOKENS, ec=INK, lw=0.7))
    axis.text(0.62, 3.65, "q", ha="right", va="center", fontsize=12, style="italic", color=INK)
    axis.text(1.17, 3.95, "[Q, D]", ha="center", fontsize=8.5, color=INK)
    arrow(axis, (1.15, 2.95), (1.15, 3.46))

    # Middle: layers of the language model, from below
    left = 3.3
    axis.text(left + 0.97, 0.22, "point tokens, then words", ha="center", fontsize=8.5, color=INK)
    for number, name in enumerate(("embeddings", "layer 1", "layer k", "layer L")):
        height = 0.5 + 1.15 * number
        tokens(axis, left, height, tapped=name == "layer k")
        axis.text(left + 2.12, height + 0.15, name, va="center", fontsize=9.5, color=INK)
        if number:
            below = height - 0.85
            dots = "   . . ." if number > 1 else ""
            arrow(axis, (left + 0.97, below + 0.05), (left + 0.97, height - 0.05))
            axis.text(left + 1.05, below + 0.4, dots, va="center", fontsize=9, color=INK)
    box(axis, 2.25, 0.35, 0.75, 0.6, "projector", FROZEN, size=8)
    axis.plot([1.9, 2.08, 2.08, 2.25], [2.4, 2.4, 0.65, 0.65], lw=1.2, color=INK)
    arrow(axis, (3.0, 0.65), (3.27, 0.65))
    axis.text(left + 0.97, 4.62, "LoRA trains in every layer", ha="center", fontsize=8.5, color=INK)

    # Right: both losses
    box(axis, 7.4, 2.55, 1.1, 0.75, "alignment\nprojector f", TRAINED, size=9)
    axis.plot([left + 0.43, left + 0.43, 7.1, 7.1], [2.8, 2.47, 2.47, 2.9], lw=1.2, color=INK)
    axis.text(6.35, 2.22, "h_k  [Q, H]", ha="center", fontsize=9, color=INK)
    arrow(axis, (7.1, 2.9), (7.37, 2.9))
    box(axis, 7.1, 3.75, 1.7, 0.55, "1 - mean cos(f(h_k), q)", LOSS, size=8.5)
    arrow(axis, (7.95, 3.3), (7.95, 3.72))
    axis.plot([1.62, 2.3, 2.3, 6.6], [3.65, 3.65, 4.9, 4.9], lw=1.2, ls="--", color=INK)
    axis.plot([6.6, 6.6, 6.8], [4.9, 4.02, 4.02], lw=1.2, ls="--", color=INK)
    arrow(axis, (6.8, 4.02), (7.07, 4.02), dashed=True)
    axis.text(4.3, 4.97, "no gradient", ha="center", fontsize=8.5, color=INK)
    box(axis, 8.95, 3.75, 0.9, 0.55, "total loss", LOSS, size=9)
    axis.text(8.88, 4.4, "x 0.1", ha="center", fontsize=9, color=INK)
    arrow(axis, (8.8, 4.02), (8.93, 4.02))
    box(axis, 7.1, 4.5, 1.7, 0.5, "next-token loss", LOSS, size=9)
    axis.plot([6.0, 6.9, 6.9], [4.1, 4.1, 4.75], lw=1.2, color=INK)
    arrow(axis, (6.9, 4.75), (7.07, 4.75))
    axis.plot([8.8, 9.4], [4.75, 4.75], lw=1.2, color=INK)
    arrow(axis, (9.4, 4.75), (9.4, 4.32))

    # Legend
    for number, (colour, name) in enumerate(((FROZEN, "frozen"), (TRAINED, "trained, dropped afterwards"))):
        axis.add_patch(Rectangle((7.1, 1.2 - 0.4 * number), 0.28, 0.24, fc=colour, ec=INK, lw=0.7))
        axis.text(7.48, 1.32 - 0.4 * number, name, va="center", fontsize=9, color=INK)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

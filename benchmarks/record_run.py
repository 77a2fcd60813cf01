"""Record a run: `python benchmarks/record_run.py RUN [--alignment-check FOLDER]`, or `RUN --ship`.

With `--ship`, a run of `scratch` becomes the shipped stage-1 checkpoint. Otherwise RUN is a demo run: its accuracy,
answers, loss curves and description go to benchmarks/results/, and a gallery shows held-out objects with the model's
answers. The gallery's objects are drawn at random from different families, not chosen.
"""

import argparse
import datetime
import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"
SHIPPED = Path(__file__).parents[1] / "pointalign" / "checkpoints" / "furniture-stage1.safetensors"


def draw_cloud(axis: plt.Axes, cloud: np.ndarray, azimuth: float = 0.6, elevation: float = 0.35) -> None:
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


def gallery(accuracy: dict, path: Path, count: int = 8, seed: int = 1) -> None:
    from pointalign import assets
    from pointalign.evaluation.tasks import embedded_objects

    objects = embedded_objects(assets.embedded_objects(), accuracy["split"])
    answers = {row["object_id"]: row for row in accuracy["objects"]}
    order = np.random.default_rng(seed).permutation(len(objects.records))
    _, first = np.unique([objects.families[i] for i in order], return_index=True)
    figure, axes = plt.subplots(2, count // 2, figsize=(2.9 * count / 2, 6.8))
    for axis, index in zip(axes.flat, order[np.sort(first)][:count], strict=True):
        record = objects.records[index]
        draw_cloud(axis, objects.clouds[index])
        axis.set_title(f'"{answers[record["object_id"]]["answer"]}"', fontsize=9, wrap=True)
        axis.set_xlabel(f"truth: {record['name']}", fontsize=8, color="#555555")
    figure.suptitle(f'"What is this?" Eight {accuracy["split"]} objects drawn at random', fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--alignment-check", type=Path, help="folder that experiments.alignment_check wrote")
    parser.add_argument("--ship", action="store_true", help="make it the shipped stage-1 checkpoint")
    options = parser.parse_args()
    accuracy = json.loads((options.run / "accuracy.json").read_text())
    described = json.loads((options.run / "stage.json").read_text())
    if options.ship:
        shutil.copy(options.run / "stage.safetensors", SHIPPED)
        description = {"command": "python -m pointalign.train scratch", **described, "metrics": accuracy["accuracy"]}
        SHIPPED.with_suffix(".json").write_text(json.dumps(description, indent=1) + "\n")
        return
    finished = datetime.date.fromtimestamp((options.run / "accuracy.json").stat().st_mtime).isoformat()
    (RESULTS / "demo.json").write_text(json.dumps({"date": finished, "run": described, **accuracy}, indent=1) + "\n")
    shutil.copy(options.run / "answers.md", RESULTS / "demo_answers.md")
    shutil.copy(options.run / "loss.png", RESULTS / "demo_loss.png")
    gallery(accuracy, RESULTS / "demo_gallery.png")
    if options.alignment_check:
        shutil.copy(options.alignment_check / "alignment.json", RESULTS / "alignment_check.json")


if __name__ == "__main__":
    main()

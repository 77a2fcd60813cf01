"""`make compare`: the alignment stage with lambda 0 and with lambda 0.1, side by side.

Both runs have the same data order, the same start and the same cached views; the alignment loss is the only difference.
A single pair of runs shows what the loss does to this model; it does not show that the difference would repeat with
another seed.

    runs/compare/{without,with}/     the two runs
    runs/compare/compare.json        losses, accuracies, paired differences, what can be read from each layer
    runs/compare/layers.png, losses.png

Finished runs are kept: the same command continues where it was stopped.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointalign import build, storage, train
from pointalign.evaluation import markdown_table, probe, tasks
from pointalign.evaluation.report import HELD_OUT, curve
from pointalign.evaluation.statistics import paired_difference
from pointalign.run_checkpoints import checkpoints

ARMS = {"without": 0.0, "with": 0.1}  # folder -> lambda
METHODS = ("model", "model, random yaw")
LAYERS = 7


def train_arm(folder: Path, weight: float, options: list[str]) -> int:
    """Run the demo's recipe with this lambda, unless that is done. Returns an exit status."""
    if (folder / "accuracy.json").exists():
        return 0
    features = folder.parent / "features"
    command = ["demo", "--fused", f"--alignment.weight={weight}", f"--data.feature_cache={features}"]  # as `make train`
    if saved := checkpoints(folder):
        return train.main([*command, *options, f"--training.resume_from_checkpoint={saved[-1]}"])
    return train.main([*command, *options, f"--training.output_dir={folder}"])


def history(folder: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoints(folder)[-1] / "trainer_state.json").read_text())["log_history"]


def paired_names(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Method -> accuracy of both arms on objects whose noun occurs in training, and their paired difference."""
    objects = {
        arm: [row for row in json.loads((folder / "accuracy.json").read_text())["objects"] if row["noun_in_training"]]
        for arm, folder in folders.items()
    }
    families = [row["family"] for row in objects["with"]]
    rows = {}
    for method in METHODS:
        right = {arm: np.array([method in row["right"] for row in rows_], float) for arm, rows_ in objects.items()}
        estimate, p = paired_difference(right["with"], right["without"], families)
        rows[method] = {arm: float(values.mean()) for arm, values in right.items()} | estimate.as_dict() | {"p": p}
    return rows


def probe_arms(folders: dict[str, Path], output: Path) -> dict[str, dict[str, Any]]:
    """Arm -> what `probe.probe_layers` reads from its model; draws `layers.png`."""
    curves = {}
    for arm, folder in folders.items():
        model, processor, _ = build.load(folder / "model")
        training, held_out = tasks.load(model, processor)
        layers = probe.spaced(LAYERS, model.config.get_text_config().num_hidden_layers)
        torch.manual_seed(0)
        curves[arm] = probe.probe_layers(model, processor, training, held_out, layers, layers)
    probe.layer_curves({f"{arm} alignment": result for arm, result in curves.items()}, output / "layers.png")
    return curves


def draw_losses(histories: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Held-out losses of both arms: a plot for each kind of question."""
    from matplotlib.figure import Figure

    names = sorted({name for log in histories.values() for entry in log for name in entry if name.startswith(HELD_OUT)})
    columns = min(4, len(names))
    figure = Figure(figsize=(3.4 * columns, 2.6 * -(-len(names) // columns)))
    axes = list(figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat)
    for axis, name in zip(axes, names, strict=False):
        for (arm, log), width in zip(histories.items(), (4.0, 1.5), strict=True):  # equal curves both show
            axis.plot(*curve(log, name), label=f"{arm} alignment", linewidth=width)
        axis.set_title(name.removeprefix(HELD_OUT), fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def table(result: dict[str, Any]) -> str:
    rows = [
        [f"named right, {name}, %", *(f"{100 * row[arm]:.1f}" for arm in ARMS),
         f"{100 * row['mean']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]", f"{row['p']:.3f}"]
        for name, row in result["names"].items()
    ]  # fmt: skip
    rows += [
        [
            f"held-out loss, {name}",
            f"{row['without']:.3f}",
            f"{row['with']:.3f}",
            f"{row['with'] - row['without']:+.3f}",
            "",
        ]
        for name, row in result["losses"].items()
    ]
    middle = result["layers"]["with"]["similarity"]
    for layer in middle:
        both = [result["layers"][arm]["similarity"][layer]["retrieval@1"] for arm in ARMS]
        rows.append(
            [f"retrieval@1, layer {layer}", *(f"{value:.3f}" for value in both), f"{both[1] - both[0]:+.3f}", ""]
        )
    return markdown_table(["", "lambda 0", "lambda 0.1", "difference", "p"], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="further options of pointalign.train, after --")
    settings = parser.parse_args(arguments)
    folders = {arm: settings.output / arm for arm in ARMS}
    for arm, weight in ARMS.items():
        if status := train_arm(folders[arm], weight, settings.options):
            return status
    histories = {arm: history(folder) for arm, folder in folders.items()}
    names = sorted({name for entry in histories["without"] for name in entry if name.startswith(HELD_OUT)})
    result: dict[str, Any] = {
        "provenance": storage.provenance(torch.device("cpu")),
        "names": paired_names(folders),
        "kinds": {arm: json.loads((folder / "accuracy.json").read_text())["kinds"] for arm, folder in folders.items()},
        "losses": {
            name.removeprefix(HELD_OUT): {arm: curve(log, name)[1][-1] for arm, log in histories.items()}
            for name in names
        },
        "layers": probe_arms(folders, settings.output),
    }
    draw_losses(histories, settings.output / "losses.png")
    storage.write_json(settings.output / "compare.json", result)
    print(f"\n{table(result)}\n\nwritten: {settings.output}/compare.json, losses.png, layers.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

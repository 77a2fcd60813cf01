"""Every embedded object named by a model that saw nothing of its family: `make held-out-naming`.

The families are split into five folds. For each, the demo's recipe is run on the other four, but from nothing: the
shipped checkpoint has seen most objects of any fold. The objects of all folds then count as one set, several times as
large as the test part, beside the same controls and baselines; the test part's own objects are also counted alone.

Finished folds are kept. Two processes may share the work, `ARGS="--folds 0 1 2"` and `ARGS="--folds 3 4"`: the last one
to finish writes the result.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

from pointalign import storage
from pointalign.embedded.catalogue import FOLDS, read_splits
from pointalign.evaluation import naming

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "held_out_naming.json"
# LoRA is new too, and has to learn to answer: more steps, at a higher rate.
COMMAND = ["demo", "--model.checkpoint=null", "--training.max_steps=60", "--training.learning_rate=6e-4"]
SHARED = ("model", "alignment", "versions", "commit", "device")  # what the folds must have in common


def run(fold: int, folder: Path) -> int:
    """Train and ask without the families of a fold, unless that is done. Returns the exit status."""
    if (folder / "accuracy.json").exists():
        return 0
    shutil.rmtree(folder, ignore_errors=True)  # stopped halfway
    options = [*COMMAND, f"--data.fold={fold}", f"--training.output_dir={folder}"]
    began = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "pointalign.train", *options]).returncode
    print(f"fold {fold}: {(time.perf_counter() - began) / 60:.0f} min")
    return status


def pool(folders: list[Path]) -> dict:
    """Objects of finished runs as one set: accuracies and paired tests, and every object with its answer.

    Raises ValueError if the runs differ in more than their fold.
    """
    parts = [json.loads((folder / "accuracy.json").read_text()) for folder in folders]
    runs = [json.loads((folder / "stage.json").read_text()) for folder in folders]
    for folder, part, one in zip(folders, parts, runs, strict=True):
        different = [key for key in SHARED if one[key] != runs[0][key]]
        if list(part["accuracy"]) != list(parts[0]["accuracy"]):
            different.append("accuracy")
        if different:
            raise ValueError(
                f"{folder} differs from {folders[0]} in {', '.join(different)}: remove one, then run again"
            )
    objects = [one for part in parts for one in part["objects"]]
    splits = read_splits()
    tested = [one for one in objects if splits.get(one["object_id"], {}).get("split") == "test"]
    content: dict = {"run": {key: runs[0][key] for key in SHARED}, "command": " ".join(COMMAND)}
    for name, chosen in {"all folds": objects, "objects of the test part": tested}.items():
        report = _report(chosen, list(parts[0]["accuracy"]))
        print(f"\n{name}; 95 % intervals clustered by family\n{report.table()}")
        content[name] = report.as_dict()
    return content | {"objects": objects}


def _report(objects: list[dict], methods: list[str]) -> naming.NamingReport:
    results = {name: np.array([name in one["right"] for one in objects], dtype=float) for name in methods}
    known = np.array([one["noun_in_training"] for one in objects])
    return naming.report(results, [one["family"] for one in objects], known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = range(FOLDS)
    parser.add_argument("--folds", type=int, nargs="+", choices=every, default=every, help="which to run (all)")
    parser.add_argument("--output", type=Path, default=Path("runs/held_out"), help="folder (default: %(default)s)")
    chosen = parser.parse_args()
    folders = [chosen.output / f"fold-{fold}" for fold in every]
    for fold in chosen.folds:
        if status := run(fold, folders[fold]):
            return status
    if missing := [folder.name for folder in folders if not (folder / "accuracy.json").exists()]:
        print(f"not finished: {', '.join(missing)}")
        return 0
    try:
        content = pool(folders)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    storage.write_json(RESULT, {"provenance": provenance(device)} | content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

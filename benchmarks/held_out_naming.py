"""Every embedded object named by a model that saw nothing of its family: `make held-out-naming`.

The families are split into five folds. For each, the demo is run on the other four, but from nothing: the shipped
checkpoint has seen most objects of any fold. The objects of all folds then count as one set, which is several times as
large as the test part, beside the same controls and baselines. Folds that are finished are kept; two processes may
share the work (`--folds 0 1 2` and `--folds 3 4`), the last one to finish writes the result.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from provenance import provenance

from pointalign import train
from pointalign.data.furniture import FOLDS
from pointalign.evaluation import naming

RESULT = Path(__file__).parent / "results" / "held_out_naming.json"
# In place of the checkpoint: more steps of LoRA at a higher rate, which learns to answer as well as to align.
COMMAND = ["demo", "--model.checkpoint=null", "--training.max_steps=60", "--training.learning_rate=6e-4"]


def run(fold: int, folder: Path) -> int:
    """Train and ask without the families of a fold, unless that is done. Returns the exit status."""
    if (folder / "accuracy.json").exists():
        return 0
    return train.main([*COMMAND, f"--data.fold={fold}", f"--training.output_dir={folder}"])


def pool(folders: list[Path]) -> dict:
    """The objects of finished runs as one set: accuracies and paired tests, and every object with its answer."""
    objects = [one for folder in folders for one in json.loads((folder / "accuracy.json").read_text())["objects"]]
    methods = list(dict.fromkeys(name for one in objects for name in one["right"]))
    results = {name: np.array([name in one["right"] for one in objects], dtype=float) for name in methods}
    known = np.array([one["noun_in_training"] for one in objects])
    report = naming.report(results, [one["family"] for one in objects], known)
    print(f"\nall {len(folders)} folds; 95 % intervals clustered by family\n{report.table()}")
    families = len({one["family"] for one in objects if one["noun_in_training"]})
    return report.as_dict() | {"families": families, "objects": objects}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)), help="which to run (default: all)")
    parser.add_argument("--output", type=Path, default=Path("runs/held_out"), help="folder (default: %(default)s)")
    chosen = parser.parse_args()
    for fold in chosen.folds:
        if status := run(fold, chosen.output / f"fold-{fold}"):
            return status
    folders = [chosen.output / f"fold-{fold}" for fold in range(FOLDS)]
    if missing := [folder.name for folder in folders if not (folder / "accuracy.json").exists()]:
        print(f"not finished: {', '.join(missing)}")
        return 0
    runs = [json.loads((folder / "stage.json").read_text()) for folder in folders]
    described = {"command": " ".join(COMMAND), "commits": sorted({one["commit"] for one in runs})}
    content = {"provenance": provenance(torch.device("cpu"))} | described | pool(folders)
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

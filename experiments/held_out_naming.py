"""`python -m experiments.held_out_naming`: every embedded object named by a model that saw nothing of its family.

The families of objects are split into five folds. For each fold, stage 1 and the demo's recipe are run on the other
four: the shipped checkpoint has seen most objects of any fold. The objects of all folds then count as one set,
several times as large as the test part, beside the same controls and baselines; the objects of the test part are also
counted separately.

Finished folds are kept. Two processes may share the folds, `--folds 0 1 2` and `--folds 3 4`; the last to finish writes
the result.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.folds import fold_parser, require_agreement, run_folds, train_stage
from pointalign import storage
from pointalign.embedded.catalogue import read_splits
from pointalign.evaluation import naming

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "held_out_naming.json"
STAGE1_STEPS = 2000  # of each fold; the shipped stage 1 had 6,000
COMMAND = ["demo"]
SHARED = ("model", "alignment", "versions", "commit", "device")  # what the folds must have in common


def run(fold: int, folder: Path) -> int:
    """Train without the families of a fold and name its objects, unless that is done. Returns an exit status."""
    if finished(folder):
        return 0
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    began = time.perf_counter()
    stage1 = folder.with_name(f"{folder.name}-stage1")
    if status := train_stage(fold, stage1, STAGE1_STEPS):
        return status
    options = [*COMMAND, f"--model.checkpoint={stage1}", f"--data.fold={fold}", f"--training.output_dir={folder}"]
    status = subprocess.run([sys.executable, "-m", "pointalign.train", *options]).returncode
    print(f"fold {fold}: {(time.perf_counter() - began) / 60:.0f} min")
    return status


def finished(folder: Path) -> bool:
    return (folder / "accuracy.json").exists()


def pool(folders: list[Path]) -> dict[str, Any]:
    """Objects of finished runs as one set: accuracies and paired tests, and every object with its answer.

    Raises:
        ValueError: the runs differ in more than their fold.
    """
    parts = [json.loads((folder / "accuracy.json").read_text()) for folder in folders]
    runs = [json.loads((folder / "stage.json").read_text()) for folder in folders]
    described = [{key: run[key] for key in SHARED} for run in runs]
    for run in described:  # each fold has its stage 1
        run["model"] = {key: value for key, value in run["model"].items() if key != "checkpoint"}
    methods = list(parts[0]["accuracy"])
    require_agreement(
        folders,
        [run | {"accuracy": list(part["accuracy"])} for run, part in zip(described, parts, strict=True)],
    )
    objects = [entry for part in parts for entry in part["objects"]]
    splits = read_splits()
    tested = [entry for entry in objects if splits.get(entry["object_id"], {}).get("split") == "test"]
    content: dict[str, Any] = {"run": described[0], "command": " ".join(COMMAND)}
    for name, part in {"all folds": objects, "objects of the test part": tested}.items():
        report = naming_report(part, methods)
        print(f"\n{name}; 95 % intervals clustered by family\n{report.table()}")
        content[name] = report.as_dict()
    return content | {"objects": objects}


def naming_report(objects: list[dict[str, Any]], methods: list[str]) -> naming.NamingReport:
    results = {name: np.array([naming.recorded_result(entry, name) for entry in objects]) for name in methods}
    known = np.array([entry["noun_in_training"] for entry in objects])
    return naming.report(results, [entry["truth"] for entry in objects], [entry["family"] for entry in objects], known)


def write_result(folders: list[Path]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    storage.write_json(RESULT, {"provenance": storage.provenance(device)} | pool(folders))


def main(arguments: list[str] | None = None) -> int:
    parser = fold_parser("python -m experiments.held_out_naming", __doc__, "runs/held_out")
    options = parser.parse_args(arguments)
    return run_folds(options.output, options.folds, run, finished, write_result)


if __name__ == "__main__":
    sys.exit(main())

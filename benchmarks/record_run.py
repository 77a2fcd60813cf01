"""Record results: `python benchmarks/record_run.py [RUN] [--repeat] [--alignment-check FOLDER] [--ship STAGE1]`.

Accuracy, answers, loss curves and description of RUN, a run of `make train`, go to benchmarks/results/, and so does
what `make alignment-check` left in FOLDER. `demo_repeats.json` keeps the accuracies of all runs of one recipe; with
`--repeat`, RUN is added to these and changes nothing else. With `--ship`, the stage files of STAGE1, the folder of
`python -m pointalign.embedded.stage1` that RUN started from, and of RUN become the shipped checkpoints
`furniture-stage1` and `furniture`, and nothing is recorded.
"""

import argparse
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pointalign.options import TrainingOptions

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parents[1] / "pointalign" / "checkpoints"
REPEATS = "demo_repeats.json"
NOT_DECISIVE = (  # training options that leave the model as it is, and the seed
    "output_dir", "seed", "report_to", "disable_tqdm", "accelerator_config", "debug", "include_for_metrics",
    "logging_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
)  # fmt: skip
REPEATED = ("model", "model, random yaw")  # methods that `demo_repeats.json` has
PICTURES = {"answers.md": "demo_answers.md", "answers.png": "demo_answers.png", "loss.png": "demo_loss.png"}


def without_machine_paths(value: Any) -> Any:
    """A JSON value in which only the last name of every absolute path is left."""
    if isinstance(value, dict):
        return {key: without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def read_json(path: Path) -> Any:
    return without_machine_paths(json.loads(path.read_text()))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def ship(stage1: Path, run: Path) -> None:
    """Make the stage files of both folders the shipped checkpoints.

    Raises:
        ValueError: the run did not start from this stage 1, or trained more than adapters.
    """
    before, after = (load_file(folder / "stage.safetensors") for folder in (stage1, run))
    for name, tensor in before.items():
        if name not in after or not torch.equal(tensor, after[name]):
            raise ValueError(f"{run} does not start from {stage1}, or trained its point branch: {name} differs")
    description = read_json(run / "stage.json")
    description["model"]["checkpoint"] = "furniture-stage1"
    for name, folder, content in (
        ("furniture-stage1", stage1, read_json(stage1 / "stage.json")),
        ("furniture", run, description),
    ):
        shutil.copyfile(folder / "stage.safetensors", CHECKPOINTS / f"{name}.safetensors")
        write_json(CHECKPOINTS / f"{name}.json", content)


def date_of(path: Path) -> str:
    """The day on which a file was written."""
    return datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()


def content_of(run: Path) -> dict[str, Any]:
    """What `demo.json` holds of a run."""
    description = {"date": date_of(run / "accuracy.json"), "run": read_json(run / "stage.json")}
    return description | read_json(run / "accuracy.json")


def recipe_of(run: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one recipe have in common: the data, and what decides the model, without its seed."""
    decisive = {name: value for name, value in run["training"].items() if name not in NOT_DECISIVE}
    data = {name: value for name, value in run["data"].items() if name != "feature_cache"}
    same = {name: run.get(name) for name in ("model", "alignment", "data_sha256", "fused", "fused_parts")}
    return same | {"data": data, "training": decisive}


def repeat_of(content: dict[str, Any]) -> dict[str, Any]:
    """The entry of `demo_repeats.json` for a run, from what `content_of` returns."""
    run = content["run"]
    described = {name: run.get(name) for name in ("commit", "uncommitted_changes", "device", "dtype", "versions")}
    return {
        "date": content["date"],
        **described,
        "seed": run["training"].get("seed", TrainingOptions.seed),
        "named right": {method: content["accuracy"][method]["noun in training"] for method in REPEATED},
        "kinds": {kind: row["mean"] for kind, row in content["kinds"].items()},
    }


def add_repeat(content: dict[str, Any], begin: bool = False) -> None:
    """Put a run among the runs of its recipe.

    Args:
        begin: drop the runs of another recipe.

    Raises:
        ValueError: the runs are of another recipe.
    """
    path, recipe = RESULTS / REPEATS, recipe_of(content["run"])
    repeats = json.loads(path.read_text()) if path.exists() else {"recipe": recipe, "runs": []}
    if different := [name for name in recipe if repeats["recipe"].get(name) != recipe[name]]:
        if not begin:
            raise ValueError(
                f"the run differs from those of {path.name} in {', '.join(different)}: record a run of its recipe "
                "first, without --repeat"
            )
        repeats = {"recipe": recipe, "runs": []}
    entry = repeat_of(content)
    repeats["runs"] = [run for run in repeats["runs"] if run != entry] + [entry]
    write_json(path, repeats)


def record(run: Path) -> None:
    """Write what a run left into benchmarks/results/."""
    content = content_of(run)
    write_json(RESULTS / "demo.json", content)
    add_repeat(content, begin=True)
    for name, recorded in PICTURES.items():
        shutil.copyfile(run / name, RESULTS / recorded)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of a finished run")
    parser.add_argument("--repeat", action="store_true", help="add the run to the repeated ones, and nothing else")
    parser.add_argument("--alignment-check", type=Path, help="folder that experiments.alignment_check wrote")
    parser.add_argument("--ship", type=Path, metavar="STAGE1", help="ship this stage 1 and the run")
    options = parser.parse_args(arguments)
    if options.run is None and (options.ship or options.repeat or not options.alignment_check):
        parser.error("expected the folder of a run, or --alignment-check FOLDER alone")
    if options.ship:
        ship(options.ship, options.run)
        return
    if options.run and options.repeat:
        add_repeat(content_of(options.run))
    elif options.run:
        record(options.run)
    if options.alignment_check:
        path = options.alignment_check / "alignment.json"
        write_json(RESULTS / "alignment_check.json", {"date": date_of(path)} | read_json(path))


if __name__ == "__main__":
    main()

"""The five-fold driver, and `python -m experiments.folds`: an ablation in which every embedded object is held out once.

The families of objects are split into five folds. For each fold, stage 1 is trained on the other four, so that encoder
and Q-Former never see a family of the fold, and the ablation runs from that stage; then the held-out objects of all
folds are compared as one set: paired by seed, clustered by family, corrected over arms. The interval treats families as
independent, although those of a fold share a stage 1, of which there are five.

Finished work is kept: the same command continues where it was stopped. Two processes may share the work: with
`--folds 0 1 2` and `--folds 3 4`, or by the same command twice. The last to finish writes the result into the folder
where `benchmarks/report.py` looks for it. The repository holds the pooled runs and their result, not `fold-<k>`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ablation.ablation import fields_of, run_ablation
from experiments.ablation.comparison import run_file, summarise
from experiments.ablation.recipe import Recipe, read_recipe
from pointalign import stage_file, storage
from pointalign.embedded import catalogue, stage1

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
ENCODER_SHARE = 0.75  # share of the steps of stage 1 that train the encoder
FOLDER_OF_RECIPE = "benchmarks/results/RECIPE_folds"
DIFFERENT = ("fold", "weights")  # keys of `recipe.json` that differ between folds: each has its stage 1


def fold_parser(program: str, description: str | None, output: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every study in folds has."""
    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = range(catalogue.FOLDS)
    parser.add_argument(
        "--folds", type=int, nargs="+", choices=every, default=every, help="folds to run (default: all)"
    )
    default = None if output is None else Path(output)
    parser.add_argument("--output", type=Path, default=default, help=f"folder (default: {output or FOLDER_OF_RECIPE})")
    return parser


def fold_folders(output: Path) -> list[Path]:
    return [output / f"fold-{fold}" for fold in range(catalogue.FOLDS)]


def run_folds(
    output: Path,
    folds: Sequence[int],
    run: Callable[[int, Path], int],
    finished: Callable[[Path], bool],
    pool: Callable[[list[Path]], None],
) -> int:
    """Run a study for each of `folds`, and pool the folds once all of them are finished.

    Args:
        run: trains and measures without the families of a fold, in a folder; returns an exit status.
        finished: whether a fold's folder holds the result of a complete run.
        pool: writes the result from the folders of all folds.

    Returns:
        An exit status: that of a failed run; 1 after an error, which is printed; 130 after Ctrl-C; else 0.
    """
    folders = fold_folders(output)
    try:
        for fold in folds:
            if status := run(fold, folders[fold]):
                return status
        if missing := [folder.name for folder in folders if not finished(folder)]:
            print(f"not finished: {', '.join(missing)}")
            return 0
        pool(folders)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def require_agreement(folders: Sequence[Path], descriptions: Sequence[dict[str, Any]]) -> None:
    """Refuse to pool folds that differ in more than their objects.

    Raises:
        ValueError: two descriptions differ; names the folders and the keys.
    """
    for folder, description in zip(folders, descriptions, strict=True):
        keys = sorted({*description, *descriptions[0]})
        different = [key for key in keys if description.get(key) != descriptions[0].get(key)]
        if different:
            raise ValueError(
                f"{folder} differs from {folders[0]} in {', '.join(different)}: remove one, then run again"
            )


# -- the ablation ------------------------------------------------------------------------------------------------------


def train_stage(fold: int, folder: Path, steps: int) -> int:
    """Train stage 1 without the families of a fold, unless that is done. Returns an exit status."""
    with storage.lock(folder.with_name(f"{folder.name}.lock")):  # another process that shares the fold waits
        if (folder / stage_file.STAGE_FILE).exists():
            return 0
        encoder_steps = round(ENCODER_SHARE * steps)
        return stage1.main(
            [
                f"--output={folder}",
                f"--fold={fold}",
                f"--encoder-steps={encoder_steps}",
                f"--query-steps={steps - encoder_steps}",
            ]
        )


def pool(recipe: Recipe, folder: Path) -> str:
    """Write the runs of all folds as the runs of one ablation into `folder`, and compare its arms.

    Scores and families of the held-out objects are concatenated; probes and similarities are averaged over folds,
    weighted by the number of objects.

    Args:
        recipe: of the runs in `folder/fold-<k>`.

    Returns:
        Tables and conclusion, as Markdown.
    """
    folders = fold_folders(folder)
    recipes = [json.loads((fold / "recipe.json").read_text()) for fold in folders]
    require_agreement(folders, [{key: fold[key] for key in fold if key not in DIFFERENT} for fold in recipes])
    counts: list[int] = []
    for arm, seed in recipe.plan():
        parts = [json.loads(run_file(fold, arm, seed).read_text()) for fold in folders]
        counts = [len(part["families"]) for part in parts]
        storage.write_json(run_file(folder, arm, seed), join_runs(parts, counts))
    ceilings = [json.loads((fold / "ceiling.json").read_text()) for fold in folders]
    storage.write_json(folder / "ceiling.json", weighted_mean(ceilings, counts))
    described = {key: value for key, value in fields_of(recipe).items() if key not in ("output", "fold")}
    described["model"]["checkpoint"] = "stage 1 of each fold"
    storage.write_json(folder / "recipe.json", described | {"folds": catalogue.FOLDS})
    return summarise(folder, recipe)


def join_runs(parts: list[dict[str, Any]], counts: list[int]) -> dict[str, Any]:
    """The runs of one arm and seed in all folds, with `counts` held-out objects, as one run."""
    scores = {key: [value for part in parts for value in part["scores"][key]] for key in parts[0]["scores"]}
    same = {key: parts[0][key] for key in ("arm", "versions", "seed", "layer", "few_shot", "kinds")}
    means = {key: weighted_mean([part[key] for part in parts], counts) for key in ("probes", "similarity", "majority")}
    if "geometry" in parts[0]:
        asked = [part["geometry"] for part in parts]
        same["geometry"] = {key: [value for part in asked for value in part[key]] for key in asked[0]}
    if "start" in parts[0]:
        same["start"] = " ".join(part["start"] for part in parts)  # every fold has its own
    return (
        same
        | {
            "scores": scores,
            "families": [family for part in parts for family in part["families"]],
            "mean": {key: float(np.mean(values)) for key, values in scores.items()},
        }
        | means
    )


def weighted_mean(values: list[Any], weights: list[int]) -> Any:
    """The weighted mean of numbers, or of nested dictionaries of numbers, key by key."""
    if isinstance(values[0], dict):
        return {key: weighted_mean([value[key] for value in values], weights) for key in values[0]}
    return float(np.average(values, weights=weights))


def main(arguments: list[str] | None = None) -> int:
    parser = fold_parser("python -m experiments.folds", __doc__, None)
    parser.add_argument("--recipe", default="objects", help="ablation on the embedded objects (default: %(default)s)")
    parser.add_argument("--stage1-steps", type=int, default=1000, help="of each fold's stage 1 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="paired seeds (default: the recipe's)")
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    recipe.seeds = options.seeds or recipe.seeds
    output = options.output or RESULTS / f"{Path(options.recipe).stem}_folds"

    def run(fold: int, folder: Path) -> int:
        if status := train_stage(fold, folder / "stage1", options.stage1_steps):
            return status
        table = run_ablation(options.recipe, options.seeds, str(folder), fold, str(folder / "stage1"))
        print(f"fold {fold}:\n{table}\n")
        return 0

    def finished(folder: Path) -> bool:
        return all(run_file(folder, arm, seed).exists() for arm, seed in recipe.plan())

    def pool_folds(_folders: list[Path]) -> None:
        print(f"all folds:\n{pool(recipe, output)}")

    return run_folds(output, options.folds, run, finished, pool_folds)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m experiments.folds`: an ablation on the embedded objects in which every object is held out once.

The families are split into five folds. For each fold, stage 1 is trained on the other four, so that encoder and
Q-Former never see a family of it, and the ablation runs from that stage; then the held-out objects of all folds are
compared as one set: paired by seed, clustered by family, corrected over arms. An interval takes families for
independent: what the families of a fold share is the stage 1 that they meet, of which there are five.

What is finished is kept, and the same command goes on where it was stopped.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from experiments.ablation.recipe import Recipe


def train_stage(recipe: str, fold: int, folder: Path) -> int:
    """Train stage 1 without the families of a fold, unless that is done. Returns the exit status."""
    from pointalign import stage_file, train
    from pointalign.trainer import checkpoints

    if (folder / stage_file.STAGE_FILE).exists():
        return 0
    command = [recipe, f"--data.fold={fold}", "--data.evaluate=none", f"--training.output_dir={folder}"]
    if found := checkpoints(folder):
        command.append(f"--training.resume_from_checkpoint={found[-1]}")
    elif folder.exists():  # stopped before its first checkpoint
        shutil.rmtree(folder)
    return train.main(command)


def blend(values: list[Any], weights: list[int]) -> Any:
    """The weighted mean of numbers, or of nested dictionaries of them, key by key."""
    if isinstance(values[0], dict):
        return {key: blend([one[key] for one in values], weights) for key in values[0]}
    return float(np.average(values, weights=weights))


def pool(recipe: "Recipe", folder: Path) -> str:
    """Write the runs of all folds as one ablation's into `folder`, and compare its arms. Returns tables, as Markdown.

    Scores and families of the held-out objects are laid end to end; probes and similarities are averaged over folds,
    each by its number of objects.

    Args:
        recipe: whose runs `folder/fold-<k>` hold.
    """
    from experiments.ablation.comparison import run_file, summarise
    from pointalign import storage
    from pointalign.embedded.catalogue import FOLDS

    folders = [folder / f"fold-{fold}" for fold in range(FOLDS)]
    counts: list[int] = []
    for arm, seed in recipe.plan():
        files = [run_file(one, arm, seed) for one in folders]
        if missing := [one for one in files if not one.exists()]:
            raise ValueError(f"{missing[0]} is missing: another process may still be at it, then run this again")
        parts = [json.loads(one.read_text()) for one in files]
        counts = [len(one["families"]) for one in parts]
        scores = {key: [value for one in parts for value in one["scores"][key]] for key in parts[0]["scores"]}
        joined = {
            "scores": scores,
            "families": [family for one in parts for family in one["families"]],
            "mean": {key: float(np.mean(values)) for key, values in scores.items()},
        }
        means = {key: blend([one[key] for one in parts], counts) for key in ("probes", "similarity", "majority")}
        kept = {key: parts[0][key] for key in ("arm", "versions", "seed", "layer", "few_shot", "kinds")}
        storage.write_json(run_file(folder, arm, seed), kept | joined | means)
    ceilings = [json.loads((one / "ceiling.json").read_text()) for one in folders]
    storage.write_json(folder / "ceiling.json", blend(ceilings, counts))
    described = {key: value for key, value in asdict(recipe).items() if key not in ("output", "fold")}
    storage.write_json(folder / "recipe.json", described | {"folds": FOLDS})
    return summarise(folder, recipe)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.folds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="objects", help="ablation on the embedded objects (default: %(default)s)")
    parser.add_argument("--stage1", default="scratch", help="recipe of `pointalign.train` (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="paired seeds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/folds"), help="folder (default: %(default)s)")
    chosen = parser.parse_args(arguments)

    from experiments.ablation.ablation import run_ablation
    from experiments.ablation.recipe import read_recipe
    from pointalign.embedded.catalogue import FOLDS

    try:
        recipe = read_recipe(chosen.recipe)
        recipe.seeds = chosen.seeds
        for fold in range(FOLDS):
            folder = chosen.output / f"fold-{fold}"
            if status := train_stage(chosen.stage1, fold, folder / "stage1"):
                return status
            table = run_ablation(chosen.recipe, chosen.seeds, str(folder), fold, str(folder / "stage1"))
            print(f"fold {fold}:\n{table}\n")
        print(f"all folds:\n{pool(recipe, chosen.output)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

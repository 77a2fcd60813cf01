"""`python -m experiments.ablation RECIPE [--seeds N] [--steps N] [--fold K --checkpoint STAGE] [--output FOLDER]`"""

import argparse
import sys

from experiments.ablation.ablation import run_ablation
from pointalign.allocator import keep_freed_memory


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.ablation")
    parser.add_argument("recipe", help="a YAML file, or the name of a recipe in experiments/recipes")
    parser.add_argument("--seeds", type=int, help="number of paired seeds of the arms that name none")
    parser.add_argument("--steps", type=int, help="a shorter or longer training of every arm; needs --output")
    parser.add_argument("--output", help="folder of the results (default: the recipe's)")
    parser.add_argument("--fold", type=int, help="hold out this fold of the embedded families, 0 to 4")
    parser.add_argument("--checkpoint", help="where every arm starts; with --fold, trained under that fold")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    try:
        text = run_ablation(
            options.recipe, options.seeds, options.output, options.fold, options.checkpoint, options.steps
        )
        print(text)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

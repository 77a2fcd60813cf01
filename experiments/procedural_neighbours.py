"""`python -m experiments.procedural_neighbours`: the nearest neighbour, given the kind of clouds that stage 1 saw too.

Stage 1 trains the encoder on the training part and on endless procedural objects. A nearest neighbour on the training
part alone has less to go by, so here procedural objects are among its neighbours. It searches over the same turns.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pointalign import assets, storage
from pointalign.embedded.procedural import MAKERS, procedural_object
from pointalign.evaluation import markdown_table, naming
from pointalign.evaluation.statistics import paired_difference
from pointalign.evaluation.tasks import ObjectSet, embedded_objects

PER_NOUN = 20  # procedural objects of each noun that has a generator
METHODS = ("training clouds", "with procedural clouds")  # what a neighbour may be


def with_procedural(training: ObjectSet, per_noun: int, seed: int = 0) -> ObjectSet:
    """The objects of `training`, and `per_noun` procedural objects of every noun that both it and `MAKERS` have."""
    clouds = dict(zip(training.ids, training.clouds, strict=True))
    labels = list(training.labels)
    for noun in sorted(MAKERS.keys() & set(training.labels)):
        rng = np.random.default_rng([seed, *noun.encode()])
        for number in range(per_noun):
            clouds[f"procedural {noun} {number}"] = procedural_object(noun, rng)[1]
            labels.append(noun)
    return replace(
        training, ids=list(clouds), cloud=clouds.__getitem__, truths=labels, labels=labels, families=[], records=[]
    )


def compare(held_out: ObjectSet, training: ObjectSet, per_noun: int) -> dict:
    """Accuracies of both nearest neighbours, by kind of noun, and their paired difference over all known nouns."""
    known = np.isin(held_out.labels, training.labels)
    neighbours = dict(zip(METHODS, (training, with_procedural(training, per_noun)), strict=True))
    right = {}
    for method, references in neighbours.items():
        nearest = naming.nearest_by_chamfer(held_out.clouds, references.clouds, naming.YAWS)
        right[method] = naming.correct([references.labels[row] for row in nearest], held_out)
    accuracy = naming.report(right, held_out.labels, held_out.families, known).as_dict()["accuracy"]
    families = np.array(held_out.families)[known].tolist()
    difference, p = paired_difference(right[METHODS[1]][known], right[METHODS[0]][known], families)
    clouds = {method: len(references.ids) for method, references in neighbours.items()}
    return {"clouds": clouds, "accuracy": accuracy, "difference": difference.as_dict() | {"p": p}}


def table(result: dict) -> str:
    parts = {"noun in training": "noun in training", "procedural nouns": "with a generator", "other nouns": "without"}
    header = ["1-NN Chamfer, best of 16 yaws, % right", "clouds"]
    header += [f"{title} (n={result['accuracy'][METHODS[0]][part]['count']})" for part, title in parts.items()]
    rows = [
        [
            method,
            str(result["clouds"][method]),
            *("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * estimates[part][key] for key in ("mean", "low", "high")))
              for part in parts),
        ]
        for method, estimates in result["accuracy"].items()
    ]  # fmt: skip
    difference = "{:+.1f} [{:+.1f}, {:+.1f}]".format(
        *(100 * result["difference"][key] for key in ("mean", "low", "high"))
    )
    return f"{markdown_table(header, rows)}\n\nDifference: {difference} points, p = {result['difference']['p']:.4f}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.procedural_neighbours", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--split", default="test", choices=("validation", "test"), help="default: %(default)s")
    parser.add_argument("--per_noun", type=int, default=PER_NOUN, help="procedural objects (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/procedural_neighbours.json"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    folder = assets.embedded_objects()
    held_out, training = embedded_objects(folder, options.split), embedded_objects(folder, "train")
    print(f"{len(held_out.ids)} objects, minutes on a CPU", flush=True)
    result = {"provenance": storage.provenance(torch.device("cpu")), "split": options.split}
    result |= {"per_noun": options.per_noun, **compare(held_out, training, options.per_noun)}
    storage.write_json(options.output, result)
    print(f"{table(result)}\n\nwritten: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How well a teacher's features name objects of unseen families: `python -m experiments.teacher_check features.npz`.

The objects of the training and validation splits are divided into five folds by their families. For each fold, a ridge
map from the features (averaged over the turns, standardised) to sentence embeddings of the head nouns is fitted to the
other folds, and an object is named after the nearest of their nouns. Beside it stands the noun of the most similar
objects. Accuracies count the objects whose noun is among those of the other folds; intervals are clustered by family.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.teacher import DIMENSIONS, principal_axes
from pointalign import assets
from pointalign.embedded.catalogue import FOLDS, fold_of
from pointalign.evaluation.caption_metrics import embed
from pointalign.evaluation.statistics import Estimate, cluster_mean

STRENGTHS = (1.0, 3.0, 10.0)  # ridge penalty, times the number of features per training object's squared length

Namer = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def ridge(
    features: np.ndarray, nouns: np.ndarray, queries: np.ndarray, words: np.ndarray, strength: float
) -> np.ndarray:
    """The noun `[Q]` whose embedding is nearest to the map of each query.

    Args:
        features, queries: `[N, D]` and `[Q, D]`, standardised.
        nouns: `[N]` indices into `words`.
        words: unit embeddings `[W, E]`; only those of `nouns` are answered.
        strength: the penalty over the mean squared length of a feature.
    """
    gram = features @ features.T
    penalty = strength * np.trace(gram) / len(gram)
    mean = words[nouns].mean(axis=0)
    mapped = queries @ features.T @ np.linalg.solve(gram + penalty * np.eye(len(gram)), words[nouns] - mean) + mean
    known = np.unique(nouns)
    return known[(mapped @ words[known].T).argmax(axis=1)]


def nearest(features: np.ndarray, nouns: np.ndarray, queries: np.ndarray, count: int = 1) -> np.ndarray:
    """The noun `[Q]` with the largest sum of cosines among the `count` most similar objects."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ unit.T
    closest = np.argsort(-cosines, axis=1)[:, :count]
    votes = np.zeros((len(queries), nouns.max() + 1))
    np.add.at(votes, (np.arange(len(queries))[:, None], nouns[closest]), np.take_along_axis(cosines, closest, axis=1))
    return votes.argmax(axis=1)


def check(object_ids: np.ndarray, features: np.ndarray) -> dict[str, Estimate]:
    """Accuracy of every way of naming from `features [N, D]`."""
    folder = assets.embedded_objects()
    records = {r["object_id"]: r for r in json.loads((folder / "objects.json").read_text(encoding="utf-8"))}
    chosen = [records[name] for name in object_ids]
    if any(record["split"] == "test" for record in chosen):
        raise ValueError("expected objects of the training and validation splits, got some of the test split")
    words, nouns = np.unique([record["head_noun"] for record in chosen], return_inverse=True)
    vectors = embed(assets.sentence_encoder(), list(words)).numpy()
    families = np.array([record["family"] for record in chosen])
    folds = np.array([fold_of(family) for family in families])
    right: dict[str, list[float]] = {}
    clusters: list[str] = []
    for fold in range(FOLDS):
        training, held_out = folds != fold, folds == fold
        held_out &= np.isin(nouns, nouns[training])
        clusters += list(families[held_out])
        mean, std, axes = principal_axes(features[training])
        scaled = (features - mean) / std
        for space, values in {"all": scaled, f"PCA {DIMENSIONS}": scaled @ axes.T}.items():
            given, queries = values[training], values[held_out]
            answers = {f"ridge {s:g}": ridge(given, nouns[training], queries, vectors, s) for s in STRENGTHS}
            answers |= {f"{k} nearest": nearest(given, nouns[training], queries, k) for k in (1, 5)}
            for name, answer in answers.items():
                right.setdefault(f"{name}, {space}", []).extend((answer == nouns[held_out]).astype(float))
    return {name: cluster_mean(values, clusters) for name, values in right.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.teacher_check", description=__doc__)
    parser.add_argument("features", type=Path)
    options = parser.parse_args(arguments)
    with np.load(options.features) as file:
        names, features = file["object_ids"], file["features"].astype(np.float32)
    for label, values in {"first yaw": features[:, 0], f"mean of {features.shape[1]}": features.mean(axis=1)}.items():
        for name, estimate in check(names, values).items():
            print(f"{label}, {name}: {estimate} of {estimate.count}")


if __name__ == "__main__":
    main()

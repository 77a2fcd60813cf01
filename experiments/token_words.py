"""`python -m experiments.token_words`: what the point tokens say of held-out objects, read without a language model.

Stage 1 teaches each query to come near the word for one kind of facts. The word nearest to the mean of a kind's tokens
is what a language model could at best repeat, so these accuracies are the ceiling of its answers about these facts.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pointalign import assets, build, storage
from pointalign.embedded.views import TrainingViews, view_facts
from pointalign.embedded.words import FactWords
from pointalign.evaluation import markdown_table
from pointalign.evaluation.naming import random_yaw
from pointalign.evaluation.statistics import cluster_mean
from pointalign.evaluation.tasks import ObjectSet, embedded_objects
from pointalign.model_options import DataOptions, ModelOptions
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

BATCH = 32


@torch.inference_mode()
def projected_tokens(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, clouds: Sequence[np.ndarray]
) -> Tensor:
    """Point tokens `[N, Q, H]` of clouds `[N, 6]` in the language model's space."""
    extractor = processor.feature_extractor
    assert extractor is not None
    batches = (extractor(list(clouds[start : start + BATCH])) for start in range(0, len(clouds), BATCH))
    tokens = [model.encode_point_clouds(batch["point_values"], batch["point_lengths"]).projected for batch in batches]
    return torch.cat(tokens).float()


def read_words(
    tokens: Tensor, kinds: dict[str, FactWords], objects: ObjectSet, clouds: Sequence[np.ndarray]
) -> dict[str, dict]:
    """Kind of facts -> share of objects, with its interval, whose tokens are nearest to the right word.

    Objects whose fact is not clear, or whose word no training object has, do not count.
    """
    facts = [
        view_facts(record, np.ptp(cloud[:, :3], axis=0)) for record, cloud in zip(objects.records, clouds, strict=True)
    ]
    rows = {}
    for number, (name, kind) in enumerate(kinds.items()):
        nearest = kind.logits(tokens[:, number :: len(kinds)]).mean(dim=1).argmax(dim=-1).tolist()
        known = [row for row, fact in enumerate(facts) if fact[name] in kind.indices]
        if known:
            right = np.array([kind.words[nearest[row]] == facts[row][name] for row in known], dtype=float)
            estimate = cluster_mean(right, [objects.families[row] for row in known])
            rows[name] = estimate.as_dict() | {"words": len(kind.words)}
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.token_words", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", default="furniture-stage1", help="point branch (default: %(default)s)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("runs/token_words.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    model, processor = build.build_model(ModelOptions(checkpoint=options.checkpoint, train=[]), DataOptions())
    model.eval()
    folder = assets.embedded_objects()
    training, objects = embedded_objects(folder, "train"), embedded_objects(folder, options.split)
    assert processor.feature_extractor is not None
    views = TrainingViews(training.clouds, training.records, BATCH, processor.feature_extractor, seed=0)
    embedding = model.get_input_embeddings().weight.detach()
    kinds = {
        name: FactWords(facts, processor.tokenizer, embedding)
        for name, facts in views.known_facts().items()
        if any(fact is not None for fact in facts)
    }
    result = {"provenance": storage.provenance(torch.device("cpu")), "checkpoint": options.checkpoint}
    result |= {"split": options.split, "poses": {}}
    for pose, clouds in (("fixed", objects.clouds), ("random yaw", random_yaw(objects.clouds))):
        result["poses"][pose] = read_words(projected_tokens(model, processor, clouds), kinds, objects, clouds)
    storage.write_json(options.output, result)
    print(f"{table(result)}\n\nwritten: {options.output}")
    return 0


def table(result: dict) -> str:
    """Accuracy by kind of facts, in both poses."""
    fixed, turned = (result["poses"][pose] for pose in ("fixed", "random yaw"))
    rows = []
    for kind in fixed:
        both = [
            f"{100 * row['mean']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
            for row in (fixed[kind], turned[kind])
        ]
        rows.append([kind, *both, str(fixed[kind]["words"]), str(fixed[kind]["count"])])
    return markdown_table(["fact, % right", "fixed pose", "random yaw", "words to choose from", "objects"], rows)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m experiments.alignment_check`: is the alignment real?

A projector alone can lower the alignment loss while the language model stays as it was. So the alignment stage is run
twice, with LoRA training and with LoRA frozen, and on held-out objects the projected hidden states of every object are
compared with its own target and with the targets of the others. Raw cosines are inflated by what all objects share, so
the same is printed with the mean over objects removed from each query's tokens.

The answer is the paired difference of the two runs in the object's own centred cosine, with an interval over families.
Where it holds zero, the runs give no answer: more `--steps` may. Both runs have one seed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pointalign.evaluation.naming import QUESTION
from pointalign.evaluation.statistics import paired_difference
from pointalign.models import PointAlignProcessor
from pointalign.trainer import AlignedModel

ARMS = {"LoRA trains": ["lora"], "LoRA frozen": []}
DECISIVE = "own, centred"

PerObject = dict[str, list[float]]


def measure(aligned: AlignedModel, processor: PointAlignProcessor, clouds: list, batch_size: int = 16) -> PerObject:
    """How near the projected hidden states of the first aligned layer are to targets, a value for each of N clouds.

    Returns:
        `own` and `others`, mean cosines over query tokens to the object's target and to those of the others; the same
        `centred`, with the mean over objects removed; `retrieval@1`, 1 where the object's target is the nearest.
    """
    projected, targets = [], []
    aligned.eval()
    layer, projector = aligned.alignment.layers[0], aligned.alignment.alignment_projector[0]
    for start in range(0, len(clouds), batch_size):
        conversations = [
            [{"role": "user", "content": [{"type": "point", "point": cloud}, {"type": "text", "text": QUESTION}]}]
            for cloud in clouds[start : start + batch_size]
        ]
        batch = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
        batch = batch.to(aligned.device)
        with torch.inference_mode():
            with aligned.tap.capture(batch["point_mask"]) as hidden:
                features = aligned.model(**batch, use_cache=False).point_features
            target = aligned.target(features, hidden)
            projected.append(projector(hidden[layer].float()))
            targets.append(target.float())
    queries = aligned.config.num_query_tokens
    states, tokens = (torch.cat(parts).view(len(clouds), queries, -1) for parts in (projected, targets))  # [N, Q, D]
    raw = _compare(states, tokens)
    centred = _compare(states - states.mean(0), tokens - tokens.mean(0))
    return {
        "own": raw[0],
        "others": raw[1],
        "own, centred": centred[0],
        "others, centred": centred[1],
        "retrieval@1": centred[2],
    }


def _compare(states: Tensor, targets: Tensor) -> tuple[list[float], list[float], list[float]]:
    """Of every object: the cosine to its target, the mean cosine to others, and 1 where its target is the nearest.

    Args:
        states, targets: `[N, Q, D]`.
    """
    unit_states, unit_targets = (functional.normalize(rows, dim=-1) for rows in (states, targets))
    similarity = torch.einsum("nqd,mqd->nm", unit_states, unit_targets) / states.shape[1]  # mean over query tokens
    own = similarity.diagonal()
    others = (similarity.sum(dim=1) - own) / (len(states) - 1)
    nearest = similarity.argmax(dim=1) == torch.arange(len(states), device=states.device)
    return own.tolist(), others.tolist(), nearest.float().tolist()


def compare(results: dict[str, PerObject], families: list[str]) -> dict[str, dict[str, float]]:
    """Measure -> mean, interval and p-value of the paired difference of the arms, LoRA training less LoRA frozen."""
    trains, frozen = (results[name] for name in ARMS)
    differences = {}
    for name in trains:
        estimate, p = paired_difference(trains[name], frozen[name], families)
        differences[name] = estimate.as_dict() | {"p": p}
    return differences


def answer(differences: dict[str, dict[str, float]]) -> str:
    """The result in words: whether the language model itself moves towards the targets."""
    own = differences[DECISIVE]
    verdict = "No answer: these runs cannot tell the two apart. More --steps may."
    if own["low"] > 0:
        verdict = "The language model moves: with LoRA the states of unseen objects are nearer to their own targets."
    elif own["high"] < 0:
        verdict = "Training LoRA moves the states of unseen objects away from their own targets."
    return (
        f"{DECISIVE}, LoRA trains less LoRA frozen: {own['mean']:+.4f} [{own['low']:+.4f}, {own['high']:+.4f}] over "
        f"families, one seed. {verdict}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.alignment_check", description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="steps of the alignment stage (default: %(default)s)")
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/alignment-check"), help="folder (default: %(default)s)"
    )
    parser.add_argument("options", nargs="*", help="further options of pointalign.train, after --")
    settings = parser.parse_args(arguments)

    from pointalign import assets, storage
    from pointalign.allocator import keep_freed_memory
    from pointalign.evaluation.tasks import embedded_objects
    from pointalign.options import parse
    from pointalign.train import describe, make_trainer

    keep_freed_memory()
    objects = embedded_objects(assets.embedded_objects(), settings.split)
    results: dict[str, PerObject] = {}
    options = None
    for name, parts in ARMS.items():
        folder = settings.output / name.replace(" ", "-").lower()
        options = parse(["demo", f"--training.max_steps={settings.steps}", "--training.save_strategy=no",
                         f"--training.output_dir={folder}", f"--model.train={parts}",
                         f"--data.feature_cache={settings.output / 'features'}", *settings.options])  # fmt: skip
        trainer, _, processor = make_trainer(options)
        if not results:
            results["before training"] = measure(trainer.model, processor, objects.clouds)
        trainer.train()
        if trainer.stop.number:
            print(f"stopped at step {trainer.state.global_step}: nothing is written")
            return 128 + trainer.stop.number
        results[name] = measure(trainer.model, processor, objects.clouds)
    assert options is not None
    means = {name: {key: float(np.mean(values)) for key, values in row.items()} for name, row in results.items()}
    differences = compare(results, objects.families)
    storage.write_json(
        settings.output / "alignment.json",
        {"results": means, "differences": differences, "answer": answer(differences), "steps": settings.steps}
        | {"split": settings.split, "objects": len(objects.clouds), "run": describe(options)},
    )
    columns = list(means["before training"])
    print(f"\ncosine of projected hidden states and Q-Former targets, {len(objects.clouds)} {settings.split} objects")
    print(f"{'':16}" + "".join(f"{column:>17}" for column in columns))
    for name, row in means.items():
        print(f"{name:16}" + "".join(f"{row[column]:17.3f}" for column in columns))
    print(answer(differences))
    print(f"written: {settings.output / 'alignment.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

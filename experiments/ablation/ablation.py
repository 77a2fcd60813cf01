"""`python -m experiments.ablation`: does alignment help, and is it the alignment that helps?

Arms start from one checkpoint and see the same data in the same order; seeds are paired. The primary metric is fixed
in advance: the log-likelihood margin of the true name (or caption) among a closed set, per held-out object. Every
comparison carries its interval, a p-value corrected over arms, and the minimum effect that it could have detected.
Finished runs are kept as files and never repeated, so an interrupted ablation goes on with the same command, and the
same command in several processes shares the runs out.
"""

import copy
import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments import shapes
from experiments.ablation.arms import Arm, train_arm
from experiments.ablation.comparison import run_file, summarise
from experiments.ablation.few_shot import few_shot
from experiments.ablation.measure import PRIMARY, measure
from experiments.ablation.recipe import Recipe, read_recipe
from pointalign import build, stage_file, storage
from pointalign.build import file_hash
from pointalign.evaluation import objects
from pointalign.evaluation.objects import EncodedObjects
from pointalign.evaluation.probe import probe_layers, qformer_probes, spaced
from pointalign.evaluation.results import versions
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.models.processing import PLAIN_CHAT_TEMPLATE
from pointalign.options import DataOptions
from pointalign.storage import lock


def run_ablation(
    name: str, seeds: int | None, output: str | None, fold: int | None = None, checkpoint: str | None = None
) -> str:
    """Run what is missing of an ablation, then write tables and plots. Returns the table, as Markdown.

    What is not None takes the place of the recipe's own value.
    """
    recipe = read_recipe(name)
    recipe.seeds = seeds or recipe.seeds
    recipe.fold = recipe.fold if fold is None else fold
    recipe.model.checkpoint = checkpoint or recipe.model.checkpoint
    if recipe.data == "furniture":
        stage_file.require_fold(recipe.model.checkpoint, recipe.fold)
    folder = Path(output or recipe.output)
    described = {key: value for key, value in asdict(recipe).items() if key not in ("output", "seeds")}
    if recipe.model.checkpoint is not None:  # known by its weights, wherever it lies
        described["model"]["checkpoint"] = Path(recipe.model.checkpoint).name
        described["weights"] = file_hash(stage_file.find_stage(recipe.model.checkpoint))
    definition = json.loads(json.dumps(described))
    shared = folder / "shared.lock"  # of what all processes write
    with lock(shared):
        check_definition(folder, definition)
    under = versions() | {"date": date.today().isoformat()}
    todo = [(arm, seed) for arm, seed in recipe.plan() if not run_file(folder, arm, seed).exists()]
    if todo:
        model, processor = starting_model(recipe)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        with lock(shared):
            train, held_out = load_objects(recipe, model, processor)
            if not (folder / "ceiling.json").exists():
                storage.write_json(folder / "ceiling.json", qformer_probes(train, held_out))
        start = {key: value.clone() for key, value in model.state_dict().items() if key in _trainable(model)}
        for number, (arm, seed) in enumerate(todo):
            made = run_file(folder, arm, seed)
            with lock(made.with_suffix(".lock"), wait=False) as ours:
                if not ours or made.exists():  # another process has it
                    continue
                began = time.monotonic()
                with torch.no_grad():
                    for key, value in model.state_dict().items():
                        if key in start:
                            value.copy_(start[key])
                result = run_arm(model, processor, recipe, arm, seed, train, held_out)
                storage.write_json(made, result | {"versions": under})
                spent = time.monotonic() - began
                mean = f"{PRIMARY} {result['mean'][PRIMARY]:+.3f}"
                print(f"{number + 1}/{len(todo)} {arm}, seed {seed}: {mean}, {spent:.0f} s", flush=True)
    with lock(shared):
        return summarise(folder, recipe)


def load_objects(
    recipe: Recipe, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor
) -> tuple[EncodedObjects, EncodedObjects]:
    """Training and held-out objects of `recipe.data`."""
    if recipe.data == "furniture":
        return objects.load(model, processor, recipe.train, recipe.held_out, recipe.fold)
    return (
        shapes.objects(model, processor, "train", recipe.train),
        shapes.objects(model, processor, "test", recipe.held_out),
    )


def starting_model(recipe: Recipe) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """The model that every arm starts from."""
    model, processor = build.build_model(recipe.model, DataOptions())
    if recipe.decoder is None:
        return model, processor
    processor.chat_template = PLAIN_CHAT_TEMPLATE
    return with_decoder(model, recipe.decoder, recipe.model.seed), processor


def with_decoder(
    model: PointAlignForConditionalGeneration, sizes: dict[str, int], seed: int
) -> PointAlignForConditionalGeneration:
    """The model's frozen point branch in front of a new decoder of `sizes` (of `LlamaConfig`), which trains whole."""
    from transformers import LlamaConfig

    config = copy.deepcopy(model.config)
    kept = {name: getattr(model.config.text_config, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    config.text_config = LlamaConfig(**sizes, **kept, bos_token_id=None, tie_word_embeddings=True)
    torch.manual_seed(seed)
    fresh = PointAlignForConditionalGeneration(config)
    new = ("language_model", "modality_projector")
    known = {name: one for name, one in model.state_dict().items() if not any(f".{part}." in name for part in new)}
    missing, unexpected = fresh.load_state_dict(known, strict=False)
    if unexpected or any(not any(f".{part}." in name for part in new) for name in missing):
        raise ValueError(f"the point branch does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(any(f".{part}." in name for part in new))
    return fresh.eval()


def _trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def check_definition(folder: Path, definition: dict[str, Any]) -> None:
    """Refuse to mix runs of two recipes: arms may be added to a folder, nothing else may change."""
    path = folder / "recipe.json"
    if path.exists():
        known = json.loads(path.read_text())
        arms = known["arms"] | definition["arms"]
        changed = [
            name for name, arm in known["arms"].items() if _same_run(definition["arms"].get(name, arm), arm) is False
        ]
        changed += [key for key in definition if key != "arms" and definition[key] != known.get(key)]
        if changed:
            raise ValueError(
                f"{folder} holds runs of another recipe ({', '.join(changed)} changed): choose another --output"
            )
        definition = definition | {"arms": arms}
    storage.write_json(path, definition)


def _same_run(a: dict, b: dict) -> bool:
    return {k: v for k, v in a.items() if k != "seeds"} == {k: v for k, v in b.items() if k != "seeds"}


def run_arm(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    recipe: Recipe,
    name: str,
    seed: int,
    train: EncodedObjects,
    held_out: EncodedObjects,
) -> dict[str, Any]:
    """Train one arm and measure it on the held-out objects."""
    arm = recipe.arms[name]
    weight = recipe.weight if arm.weight is None else arm.weight
    history = train_arm(model, processor, arm, weight, train, recipe.schedule, seed, f"{name}, seed {seed}")
    scores = measure(model, processor, held_out, arm.blind)
    depth = model.config.get_text_config().num_hidden_layers
    similar = sorted({*tapped(arm, depth), *tapped(Arm(), depth)})
    layers = sorted({*spaced(recipe.layers, depth), *similar})
    if recipe.decoder is not None:  # small enough for every layer
        similar = layers
    fitted = train.subset(objects.evenly(len(train.labels), recipe.probed))
    probes = probe_layers(model, processor, fitted, held_out, layers, similar)
    shots = few_shot(model, processor, train, held_out, recipe.few_shot, recipe.schedule, seed, arm.blind)
    return {
        "arm": name,
        "layer": tapped(Arm(), depth)[0],
        "few_shot": shots,
        "seed": seed,
        "steps": history,
        "scores": scores,
        "families": [f for f, label in zip(held_out.families, held_out.labels, strict=True) if label],
        "mean": {key: float(np.mean(values)) for key, values in scores.items()},
    } | probes


def tapped(arm: Arm, depth: int) -> list[int]:
    return arm.layer or [max(1, (depth - 1) // 2)]

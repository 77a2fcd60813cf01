"""`python -m experiments.ablation`: does alignment help, and is it the alignment that helps?

All arms start from one checkpoint and see the same data in the same order; seeds are paired. The primary measures are
fixed in advance in the recipe; by default the log-likelihood margin of the true name (or caption) among a closed set,
per held-out object. Each comparison has an interval, a p-value corrected over arms, and the smallest effect that it
could have detected. Finished runs are stored as files and not repeated: the same command continues an interrupted
ablation, and the same command in several processes shares the runs among them.
"""

import copy
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from experiments import shapes
from experiments.ablation.comparison import run_file, summarise
from experiments.ablation.few_shot import few_shot
from experiments.ablation.measure import GEOMETRY, PRIMARY, measure
from experiments.ablation.questions import TrainingQuestions, ask_geometry
from experiments.ablation.recipe import Recipe, read_recipe
from experiments.ablation.train_arm import Arm, restore, train_arm, trainable_state, weights_hash
from pointalign import assets, build, stage_file, storage
from pointalign.alignment import AlignmentConfig
from pointalign.evaluation import tasks
from pointalign.evaluation.probe import probe_layers, probe_property, spaced
from pointalign.evaluation.results import versions
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.model_options import DataOptions
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.models.chat_layout import PLAIN_CHAT_TEMPLATE
from pointalign.storage import lock

ADDED_LATER = {"full_fine_tuning": False, "questions": {}, "primary": [PRIMARY]}  # fields that older files lack


def run_ablation(
    name: str,
    seeds: int | None,
    output: str | None,
    fold: int | None = None,
    checkpoint: str | None = None,
    steps: int | None = None,
) -> str:
    """Run the missing runs of an ablation, then write tables and plots. Returns the tables and the conclusion.

    `name` is that of `read_recipe`. Each of the other arguments overrides the recipe's value unless None.

    Raises:
        ValueError: `steps` without `output`; the folder holds runs of another recipe; a fault in the recipe.
    """
    recipe = read_recipe(name)
    if steps is not None:
        if output is None:
            raise ValueError("--steps changes the study: name another folder for its results with --output")
        recipe.schedule.steps = steps
    recipe.seeds = seeds or recipe.seeds
    recipe.fold = recipe.fold if fold is None else fold
    recipe.model.checkpoint = checkpoint or recipe.model.checkpoint
    if recipe.data == "furniture":
        stage_file.require_fold(recipe.model.checkpoint, recipe.fold)
    folder = Path(output or recipe.output)
    shared = folder / "shared.lock"  # held while writing files that all processes of an ablation share
    with lock(shared):
        check_definition(folder, definition(recipe))
    missing = [(arm, seed) for arm, seed in recipe.plan() if not run_file(folder, arm, seed).exists()]
    if missing:
        model, processor = starting_model(recipe)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        with lock(shared):
            train, held_out = load_objects(recipe, model, processor)
            if not (folder / "ceiling.json").exists():
                storage.write_json(folder / "ceiling.json", qformer_probes(train, held_out))
        questions = training_questions(recipe, train)
        run_missing(folder, recipe, missing, model, processor, train, held_out, questions)
    with lock(shared):
        return summarise(folder, recipe)


def qformer_probes(train: EncodedObjects, held_out: EncodedObjects) -> dict[str, float]:
    """What a linear probe reads from the mean Q-Former token: all that the language model receives of a cloud."""
    means, held_means = train.features.mean(dim=1), held_out.features.mean(dim=1)
    return {
        name: probe_property(means, values, held_means, held_out.properties[name])
        for name, values in train.properties.items()
    }


def training_questions(recipe: Recipe, train: EncodedObjects) -> TrainingQuestions | None:
    """What batches are drawn from; None where they are the objects' own conversations."""
    if not recipe.questions:
        return None
    return TrainingQuestions(
        assets.embedded_objects(recipe.fold) / "annotations" / "train.json", train, recipe.questions
    )


def definition(recipe: Recipe) -> dict[str, Any]:
    """What the runs of a folder have in common, as in its `recipe.json`."""
    described = {key: value for key, value in fields_of(recipe).items() if key not in ("output", "seeds")}
    if recipe.data == "furniture":
        described["closed_set"] = "nouns of the training objects"  # earlier runs had fewer nouns, and other margins
    if recipe.model.checkpoint is not None:  # identified by its weights, not by its folder
        described["model"]["checkpoint"] = Path(recipe.model.checkpoint).name
        described["weights"] = storage.file_hash(stage_file.find_stage(recipe.model.checkpoint))[:16]
    return json.loads(json.dumps(described))


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """All fields of a recipe but those that older files lack, where they have their default."""
    return {
        key: value for key, value in asdict(recipe).items() if not (key in ADDED_LATER and value == ADDED_LATER[key])
    }


def run_missing(
    folder: Path,
    recipe: Recipe,
    missing: list[tuple[str, int]],
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    train: EncodedObjects,
    held_out: EncodedObjects,
    questions: TrainingQuestions | None = None,
) -> None:
    """Make the runs that no other process is making; every run begins with the weights that the model has now.

    Raises:
        RuntimeError: a run would begin with other weights.
    """
    environment = versions()
    start, start_hash = trainable_state(model), weights_hash(model)
    for number, (arm, seed) in enumerate(missing):
        file = run_file(folder, arm, seed)
        with lock(file.with_suffix(".lock"), wait=False) as locked:
            if not locked or file.exists():  # another process makes this run, or has made it
                continue
            began = time.monotonic()
            restore(model, start)
            if (now := weights_hash(model)) != start_hash:
                raise RuntimeError(f"{arm}, seed {seed} would start from other weights: {now}, expected {start_hash}")
            result = run_arm(model, processor, recipe, arm, seed, train, held_out, questions)
            storage.write_json(file, result | {"start": start_hash, "versions": environment})
            seconds = time.monotonic() - began
            measured = ", ".join(f"{metric} {result['mean'][metric]:+.3f}" for metric in recipe.primary)
            left = (len(missing) - number - 1) * seconds / 60
            print(
                f"{number + 1}/{len(missing)} {arm}, seed {seed}: {measured}, {seconds:.0f} s; "
                f"about {left:.0f} min for the others",
                flush=True,
            )


def load_objects(
    recipe: Recipe, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor
) -> tuple[EncodedObjects, EncodedObjects]:
    """Training and held-out objects of `recipe.data`."""
    if recipe.data == "furniture":
        return tasks.load(model, processor, recipe.train, recipe.held_out, recipe.fold)
    return (
        shapes.objects(model, processor, "train", recipe.train),
        shapes.objects(model, processor, "test", recipe.held_out),
    )


def starting_model(recipe: Recipe) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """The model that every arm starts from."""
    model, processor = build.build_model(recipe.model, DataOptions())
    if recipe.full_fine_tuning:
        model.model.language_model.requires_grad_(True)
    if recipe.decoder is None:
        return model, processor
    processor.chat_template = PLAIN_CHAT_TEMPLATE
    return with_decoder(model, recipe.decoder, recipe.model.seed), processor


def with_decoder(
    model: PointAlignForConditionalGeneration, sizes: dict[str, int], seed: int
) -> PointAlignForConditionalGeneration:
    """The model's frozen point branch in front of a new decoder of `sizes` (of `LlamaConfig`), see `behind`."""
    from transformers import LlamaConfig

    text = model.config.text_config
    tokens = {name: getattr(text, name) for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    return behind(model, LlamaConfig(**sizes, **tokens, bos_token_id=None, tie_word_embeddings=True), seed)


def behind(
    model: PointAlignForConditionalGeneration, text_config: PreTrainedConfig, seed: int
) -> PointAlignForConditionalGeneration:
    """The model's frozen point branch in front of a new decoder of `text_config`.

    The decoder and the modality projector are drawn from `seed` and all their parameters train.

    Raises:
        ValueError: the weights of the point branch do not fit.
    """
    new_parts = (".language_model.", ".modality_projector.")

    def is_new(name: str) -> bool:
        return any(part in name for part in new_parts)

    config = copy.deepcopy(model.config)
    config.text_config = text_config
    torch.manual_seed(seed)
    fresh = PointAlignForConditionalGeneration(config)
    point_branch = {name: tensor for name, tensor in model.state_dict().items() if not is_new(name)}
    missing, unexpected = fresh.load_state_dict(point_branch, strict=False)
    if unexpected or not all(is_new(name) for name in missing):
        raise ValueError(f"the point branch does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_(is_new(name))
    return fresh.eval()


def check_definition(folder: Path, definition: dict[str, Any]) -> None:
    """Refuse to mix runs of two recipes in a folder: arms may be added, nothing else may change."""
    path = folder / "recipe.json"
    if path.exists():
        known = json.loads(path.read_text())
        arms = known["arms"] | definition["arms"]
        changed = [
            name for name, arm in known["arms"].items() if not _same_runs(definition["arms"].get(name, arm), arm)
        ]
        changed += [k for k in {**known, **definition} if k != "arms" and definition.get(k) != known.get(k)]
        if changed:
            raise ValueError(
                f"{folder} holds runs of another recipe ({', '.join(changed)} changed): choose another --output"
            )
        definition = definition | {"arms": arms}
    storage.write_json(path, definition)


def _same_runs(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two definitions of an arm differ at most in their number of seeds."""
    return {key: a[key] for key in a if key != "seeds"} == {key: b[key] for key in b if key != "seeds"}


def run_arm(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    recipe: Recipe,
    name: str,
    seed: int,
    train: EncodedObjects,
    held_out: EncodedObjects,
    questions: TrainingQuestions | None = None,
) -> dict[str, Any]:
    """Train one arm and measure it on the held-out objects; with `questions`, ask it about geometry too."""
    arm = recipe.arms[name]
    weight = recipe.weight if arm.weight is None else arm.weight
    history = train_arm(model, processor, arm, weight, train, recipe.schedule, seed, f"{name}, seed {seed}", questions)
    scores = measure(model, processor, held_out, arm.blind)
    asked: dict[str, Any] = {}
    if questions is not None:
        asked = {"geometry": ask_geometry(model, processor, held_out, arm.blind)}
        scores[GEOMETRY] = asked["geometry"]["right"]
    depth = model.config.get_text_config().num_hidden_layers
    default_layer = tapped(Arm(), depth)[0]
    similar = sorted({*tapped(arm, depth), default_layer})
    layers = sorted({*spaced(recipe.layers, depth), *similar})
    if recipe.decoder is not None:  # small enough to measure every probed layer
        similar = layers
    probes = probe_layers(model, processor, train, held_out, layers, similar)
    shots = few_shot(model, processor, train, held_out, recipe.few_shot, recipe.schedule, seed, arm.blind)
    return (
        {
            "arm": name,
            "layer": default_layer,
            "few_shot": shots,
            "seed": seed,
            "steps": history,
            "scores": scores,
            "families": [f for f, label in zip(held_out.families, held_out.labels, strict=True) if label],
            "mean": {key: float(np.mean(values)) for key, values in scores.items()},
        }
        | asked
        | probes
    )


def tapped(arm: Arm, depth: int) -> list[int]:
    """The aligned layers of an arm in a decoder of `depth` layers."""
    return AlignmentConfig(layer=arm.layer).layers(depth)

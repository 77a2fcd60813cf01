"""`evaluate ablation`: does alignment help, and is it the alignment that helps?

Arms start from one checkpoint and see the same data in the same order; seeds are paired. The primary metric is fixed
in advance: the log-likelihood margin of the true name (or caption) among a closed set, per held-out object. Every
comparison carries its interval, a p-value corrected over arms, and the minimum effect that it could have detected.
Finished runs are kept as files and never repeated, so an interrupted ablation goes on with the same command, and the
same command in several processes shares the runs out.
"""

import copy
import json
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointalign import checkpointing, stages
from pointalign.evaluation import material
from pointalign.evaluation.answering import Features, Generation, prompt_batch
from pointalign.evaluation.arms import Arm, Schedule, train_arm
from pointalign.evaluation.comparison import PRIMARY, SECOND, run_file, summarise
from pointalign.evaluation.few_shot import few_shot
from pointalign.evaluation.likelihood import AnswerTree, answer_likelihoods, margins
from pointalign.evaluation.loading import file_hash
from pointalign.evaluation.material import Material
from pointalign.evaluation.metrics import naming_scores
from pointalign.evaluation.probe import probe_layers, qformer_probes, spaced
from pointalign.evaluation.runs import versions
from pointalign.evaluation.tasks import PROMPTS, Question
from pointalign.locking import lock
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor
from pointalign.models.processing import PLAIN_CHAT_TEMPLATE
from pointalign.options import RECIPES, DataOptions, ModelOptions


@dataclass
class Recipe:
    """An ablation, as its YAML file says it.

    Attributes:
        data: `furniture` or `shapes`.
        model: where every arm starts and what trains.
        decoder: sizes of a `LlamaConfig`: in place of the language model, a decoder that starts from nothing and trains
            whole, with a modality projector of its own. For a CPU, and for what language alone makes of the clouds.
        schedule: steps of every arm.
        weight: lambda of the arms that name none.
        seeds: paired seeds of the arms that name none.
        baseline: the arm that all others are compared with.
        train, held_out: the most objects of each part.
        probed: the most training objects that probes are fitted on.
        layers: layers probed after each run.
        few_shot: numbers of examples about set B of the shapes that a trained arm is fine-tuned on; none by default.
        arms: by name.
        output: folder of the results.
        fold: of the furniture's families, hold out this fold of five in place of the committed split;
            `model.checkpoint` must have been trained under the same.
    """

    data: str = "furniture"
    model: ModelOptions = field(default_factory=ModelOptions)
    decoder: dict[str, int] | None = None
    schedule: Schedule = field(default_factory=Schedule)
    weight: float = 0.1
    seeds: int = 3
    baseline: str = "no alignment"
    train: int | None = None
    held_out: int | None = None
    probed: int | None = None
    layers: int = 7
    few_shot: list[int] = field(default_factory=list)
    arms: dict[str, Arm] = field(default_factory=dict)
    output: str = "runs/ablation"
    fold: int | None = None

    def __post_init__(self) -> None:
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is none of the arms: {', '.join(self.arms)}")

    def plan(self) -> list[tuple[str, int]]:
        """Runs in the order in which they are made: arms of many seeds first, seed by seed, so that pairs are whole."""
        counts = {name: arm.seeds or self.seeds for name, arm in self.arms.items()}
        runs = [(name, seed) for name in self.arms for seed in range(counts[name])]
        return sorted(runs, key=lambda run: (-counts[run[0]], run[1]))


def read_recipe(name: str) -> Recipe:
    """A recipe from a YAML file, or a shipped one by name (`recipes/ablation/<name>.yaml`)."""
    from jsonargparse import ArgumentParser

    path = Path(name)
    if not path.suffix:
        path = RECIPES / "ablation" / f"{name}.yaml"
    if not path.exists():
        shipped = sorted(one.stem for one in (RECIPES / "ablation").glob("*.yaml"))
        raise FileNotFoundError(f"no recipe {name!r}: expected a YAML file or one of {', '.join(shipped)}")
    parser = ArgumentParser(prog="python -m pointalign.evaluate ablation")
    parser.add_class_arguments(Recipe, "recipe")
    import yaml

    values = yaml.safe_load(path.read_text())
    return parser.instantiate(parser.parse_object({"recipe": values})).recipe


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
        stages.require_fold(recipe.model.checkpoint, recipe.fold)
    folder = Path(output or recipe.output)
    described = {key: value for key, value in asdict(recipe).items() if key not in ("output", "seeds")}
    if recipe.model.checkpoint is not None:  # known by its weights, wherever it lies
        described["model"]["checkpoint"] = Path(recipe.model.checkpoint).name
        described["weights"] = file_hash(stages.find_stage(recipe.model.checkpoint))
    definition = json.loads(json.dumps(described))
    shared = folder / "shared.lock"  # of what all processes write
    with lock(shared):
        check_definition(folder, definition)
    under = versions() | {"date": date.today().isoformat()}
    todo = [(arm, seed) for arm, seed in recipe.plan() if not run_file(folder, arm, seed).exists()]
    if todo:
        model, processor = build(recipe)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        with lock(shared):
            train, held_out = material.load(
                recipe.data, model, processor, folder / "features", recipe.train, recipe.held_out, recipe.fold
            )
            if not (folder / "ceiling.json").exists():
                checkpointing.write_json(folder / "ceiling.json", qformer_probes(train, held_out))
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
                checkpointing.write_json(made, result | {"versions": under})
                spent = time.monotonic() - began
                mean = f"{PRIMARY} {result['mean'][PRIMARY]:+.3f}"
                print(f"{number + 1}/{len(todo)} {arm}, seed {seed}: {mean}, {spent:.0f} s", flush=True)
    with lock(shared):
        return summarise(folder, recipe)


def build(recipe: Recipe) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """The model that every arm starts from."""
    model, processor = stages.build(recipe.model, DataOptions())
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
    checkpointing.write_json(path, definition)


def _same_run(a: dict, b: dict) -> bool:
    return {k: v for k, v in a.items() if k != "seeds"} == {k: v for k, v in b.items() if k != "seeds"}


def run_arm(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    recipe: Recipe,
    name: str,
    seed: int,
    train: Material,
    held_out: Material,
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
    fitted = train.subset(material.evenly(len(train.labels), recipe.probed))
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


def measure(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    held_out: Material,
    blind: bool,
    question: str = PROMPTS[0],
) -> dict[str, list[float]]:
    """Margin, closed-set accuracy and generated accuracy for every held-out object that has a true candidate."""
    known = [row for row, label in enumerate(held_out.labels) if label]
    candidates = list(held_out.candidates)
    tree = AnswerTree(
        [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in held_out.candidates.values()]
    )
    features = Features(model, processor)
    for row in known:
        features.known[str(row)] = torch.zeros_like(held_out.features[row]) if blind else held_out.features[row]
    questions = [Question(str(row), (str(row),), question, held_out.labels[row]) for row in known]
    likelihoods, texts = [], []
    for start in range(0, len(known), 8):
        batch = _on(prompt_batch(processor, features, questions[start : start + 8]), model)
        likelihoods.append(answer_likelihoods(model, batch, tree))
    for start in range(0, len(known), 32):
        batch = _on(prompt_batch(processor, features, questions[start : start + 32]), model)
        with torch.inference_mode():
            options = Generation(max_new_tokens=20).arguments("classification")
            generated = model.generate(**batch, **options)  # type: ignore[operator]
        texts += processor.answers(generated, batch["input_ids"].shape[1])
    labels = [held_out.labels[row] for row in known]
    margin = margins(np.concatenate(likelihoods), [candidates.index(label) for label in labels])
    if held_out.candidates[labels[0]] == labels[0]:  # whole captions
        said = [float(text == label) for text, label in zip(texts, labels, strict=True)]
    else:
        said = [float(value or 0) for value in naming_scores(texts, labels)["head noun"]]
    return {PRIMARY: margin.tolist(), "closed-set accuracy": (margin > 0).astype(float).tolist(), SECOND: said}


def _on(batch: dict[str, Tensor], model: PointAlignForConditionalGeneration) -> dict[str, Tensor]:
    return {name: one.to(model.device) for name, one in batch.items()}

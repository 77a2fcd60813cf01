"""Do the answers name the object? Held-out objects, beside controls and baselines that a model must beat."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pointalign.data.captions import read_name
from pointalign.evaluation import baselines
from pointalign.evaluation.statistics import Estimate, cluster_mean, paired_difference
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

QUESTION = "What is this?"
PAIRS = (  # which method is tested against which, where both were run
    ("model, random yaw", "1-NN Chamfer, random yaw"),
    ("model", "1-NN Chamfer, fixed pose"),
    ("model", "model, shuffled clouds"),
    ("model", "model before training"),
)


@dataclass
class Objects:
    """Objects of one split: their records, and their clouds `[N, 6]` in the same order."""

    records: list[dict]
    clouds: list[np.ndarray]

    @property
    def nouns(self) -> list[str]:
        return [record["head_noun"] for record in self.records]

    @property
    def families(self) -> list[str]:
        return [record["family"] for record in self.records]


def load_objects(folder: Path, split: str) -> Objects:
    """The embedded objects of a split, from the folder that `pointalign.assets.furniture` returns."""
    records = [one for one in json.loads((folder / "objects.json").read_text()) if one["split"] == split]
    return Objects(records, [np.load(folder / "clouds" / f"{one['object_id']}_8192.npy") for one in records])


def ask(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[np.ndarray],
    questions: Sequence[str],
    max_new_tokens: int = 24,
    batch_size: int = 16,
    description: str = "answers",
) -> list[str]:
    """Greedy answers, one per pair of cloud and question."""
    model.eval()
    answers: list[str] = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(clouds), batch_size), desc=description, unit="batch", leave=False):
            conversations = [
                [{"role": "user", "content": [{"type": "point", "point": cloud}, {"type": "text", "text": question}]}]
                for cloud, question in zip(
                    clouds[start : start + batch_size], questions[start : start + batch_size], strict=True
                )
            ]
            batch = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
            batch = batch.to(model.device)
            generated = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
            answers += processor.answers(generated, batch["input_ids"].shape[1])
    return answers


def head_noun(answer: str) -> str:
    """The head noun of an answer such as "This is an office chair with arms." -> "chair"; "" where there is none."""
    phrase = answer.strip().split("\n")[0].split(".")[0].split(",")[0]
    for opening in ("This is ", "These are ", "It is "):
        phrase = phrase.removeprefix(opening)
    words = phrase.split()
    if words and words[0].lower() in ("a", "an", "the", "some"):
        words = words[1:]
    return read_name(" ".join(words)).head.lower() if words else ""


def correct(answers: Sequence[str], objects: Objects) -> np.ndarray:
    """`[N]`, 1 where the answer's head noun is the object's."""
    return np.array([head_noun(a) == noun.lower() for a, noun in zip(answers, objects.nouns, strict=True)], dtype=float)


def name_all(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[np.ndarray],
    description: str = "naming",
) -> list[str]:
    return ask(model, processor, clouds, [QUESTION] * len(clouds), description=description)


@dataclass
class NamingReport:
    """Accuracy per method over all objects and over those whose noun occurs in training, and paired tests."""

    accuracy: dict[str, dict[str, Estimate]]
    tests: dict[str, dict]

    def table(self) -> str:
        width = max(len(name) for name in self.accuracy)
        seen, total = (next(iter(self.accuracy.values()))[key].count for key in ("noun in training", "all"))
        lines = [f"{'head-noun accuracy':{width}}  {f'noun in training (n={seen})':28}  all (n={total})"]
        for name, parts in self.accuracy.items():
            lines.append(f"{name:{width}}  {parts['noun in training']!s:28}  {parts['all']}")
        for name, test in self.tests.items():
            lines.append(f"{name}: {100 * test['mean']:+.1f} points, p = {test['p']:.4f}")
        return "\n".join(lines)

    def as_dict(self) -> dict:
        accuracy = {name: {key: one.as_dict() for key, one in parts.items()} for name, parts in self.accuracy.items()}
        return {"accuracy": accuracy, "tests": self.tests}


def shuffled(count: int, seed: int = 0) -> np.ndarray:
    """A permutation that leaves nothing in its place: every question meets another object's cloud."""
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, dtype=int)
    other[order] = np.roll(order, 1)
    return other


def controls(held_out: Objects, training: Objects, seed: int = 0) -> dict[str, np.ndarray]:
    """`[N]` correctness of the baselines that need no model."""
    turned = baselines.random_yaw(held_out.clouds, seed)
    nouns = np.array(training.nouns)
    guesses = {
        "majority class": np.full(len(held_out.records), baselines.majority(training.nouns)),
        "1-NN Chamfer, fixed pose": nouns[baselines.nearest_by_chamfer(held_out.clouds, training.clouds)],
        "1-NN Chamfer, random yaw": nouns[baselines.nearest_by_chamfer(turned, training.clouds)],
    }
    return {name: (guess == np.array(held_out.nouns)).astype(float) for name, guess in guesses.items()}


def report(results: dict[str, np.ndarray], families: Sequence[str], known: np.ndarray) -> NamingReport:
    """Summarise `[N]` correctness per method of objects of these families `[N]`, and test `PAIRS`.

    Args:
        known: `[N]`, whether the object's noun occurs in training.
    """
    of_known = [family for family, one in zip(families, known, strict=True) if one]
    accuracy = {
        name: {"noun in training": cluster_mean(values[known], of_known), "all": cluster_mean(values, families)}
        for name, values in results.items()
    }
    tests = {}
    for ours, theirs in PAIRS:
        if ours in results and theirs in results:
            estimate, p = paired_difference(results[ours][known], results[theirs][known], of_known)
            tests[f"{ours} against {theirs}"] = estimate.as_dict() | {"p": p}
    return NamingReport(accuracy, tests)

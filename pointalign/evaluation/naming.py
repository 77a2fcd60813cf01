"""Do the answers name the object? Held-out objects, beside controls and baselines that a model must beat."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pointalign import assets, storage
from pointalign.build import load
from pointalign.data.augment import turn
from pointalign.data.point_cloud import normalise, subsample
from pointalign.embedded.facts import conversations, read_name
from pointalign.evaluation.statistics import Estimate, cluster_mean, paired_difference
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

CHAMFER_POINTS, COARSE_POINTS, SHORTLIST = 1024, 256, 32


def majority(nouns: Sequence[str]) -> str:
    """The commonest noun; the first in the alphabet among equals."""
    counts = Counter(nouns)
    return min(counts, key=lambda noun: (-counts[noun], noun))


def random_yaw(clouds: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Clouds `[N, 6]`, each turned about the vertical axis by an angle of its own."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=len(clouds))
    return [
        np.concatenate([turn(cloud[:, :3], angle), cloud[:, 3:]], axis=1)
        for cloud, angle in zip(clouds, angles, strict=True)
    ]


def nearest_by_chamfer(queries: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """Index `[Q]` of the reference cloud nearest to each query, by the symmetric Chamfer distance of 1024 points each.

    Clouds are centred and scaled to the unit sphere, as the model sees them. The 32 nearest by 256 points are compared
    by all 1024.
    """
    fine = _prepare(references)  # [R, P, 3]
    coarse = fine[:, :COARSE_POINTS]
    nearest = np.empty(len(queries), dtype=int)
    for row, points in enumerate(_prepare(queries)):
        shortlist = chamfer(points[:COARSE_POINTS], coarse).topk(min(SHORTLIST, len(fine)), largest=False).indices
        nearest[row] = int(shortlist[chamfer(points, fine[shortlist]).argmin()])
    return nearest


def chamfer(points: torch.Tensor, references: torch.Tensor, chunk: int = 8) -> torch.Tensor:
    """Symmetric Chamfer distances `[R]` of points `[P, 3]` to references `[R, P, 3]`: mean distances there and back."""
    distances = []
    right = torch.cat([points, torch.ones(len(points), 1), points.square().sum(-1, keepdim=True)], dim=1).T
    for part in references.split(chunk):  # small enough to stay in the cache
        left = torch.cat([-2 * part, part.square().sum(-1, keepdim=True), torch.ones_like(part[..., :1])], dim=-1)
        squared = (left.flatten(0, 1) @ right).view(len(part), part.shape[1], len(points))
        ways = [squared.amin(dim=dim).clamp(min=0).sqrt().mean(dim=1) for dim in (1, 2)]
        distances.append(ways[0] + ways[1])
    return torch.cat(distances)


def _prepare(clouds: Sequence[np.ndarray]) -> torch.Tensor:
    prepared = [torch.from_numpy(normalise(subsample(cloud, CHAMFER_POINTS))[:, :3].copy()) for cloud in clouds]
    # Subsampling keeps the order of the file; in random order, the first points are a sample of the others.
    order = torch.from_numpy(np.random.default_rng(0).permutation(CHAMFER_POINTS))
    return torch.stack([one.float()[order % len(one)] for one in prepared])  # [N, P, 3]


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
    turned = random_yaw(held_out.clouds, seed)
    nouns = np.array(training.nouns)
    guesses = {
        "majority class": np.full(len(held_out.records), majority(training.nouns)),
        "1-NN Chamfer, fixed pose": nouns[nearest_by_chamfer(held_out.clouds, training.clouds)],
        "1-NN Chamfer, random yaw": nouns[nearest_by_chamfer(turned, training.clouds)],
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


def ask_ten(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, objects: Objects, seed: int = 0
) -> str:
    """A Markdown table; objects from different families, every other one asked about geometry or colour."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(objects.records))
    _, first = np.unique([objects.families[i] for i in order], return_index=True)
    chosen = order[np.sort(first)][:10]
    questions, truths = [], []
    for place, index in enumerate(chosen):
        entries = conversations(objects.records[index])
        kind = "simple_description" if place % 2 == 0 else "single_round"
        turns = next(entry for entry in entries if entry["conversation_type"] == kind)["conversations"]
        questions.append(QUESTION if place % 2 == 0 else turns[0]["value"].removeprefix("<point>\n"))
        truths.append(turns[1]["value"])
    answers = ask(model, processor, [objects.clouds[i] for i in chosen], questions, description="sample answers")
    rows = ["| question | answer | truth |", "|---|---|---|"]
    rows += [f"| {q} | {a} | {t} |" for q, a, t in zip(questions, answers, truths, strict=True)]
    return "\n".join(rows) + "\n"


class HeldOutNaming:
    """Held-out embedded objects named before and after training, beside the baselines; ten questions with answers.

    Args:
        fold: see `assets.furniture`.
        split: the held-out part, `validation` or `test`.
        folder: of the run; receives `accuracy.json` and `answers.md`.
    """

    def __init__(self, fold: int | None, split: str, folder: Path):
        objects = assets.furniture(fold)
        self.split, self.folder = split, folder
        self.held_out = load_objects(objects, self.split)
        self.training = load_objects(objects, "train")
        self.results: dict[str, np.ndarray] = {}

    def before(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor) -> None:
        answers = name_all(model, processor, self.held_out.clouds, "naming before training")
        self.results["model before training"] = correct(answers, self.held_out)

    def after(self, exported: Path) -> None:
        """Evaluate the model as it was written, not as it stood in memory."""
        model, processor, _ = load(exported)
        clouds = self.held_out.clouds
        inputs = {
            "model": clouds,
            "model, random yaw": random_yaw(clouds),
            "model, shuffled clouds": [clouds[i] for i in shuffled(len(clouds))],
        }
        answers = {name: name_all(model, processor, part, name) for name, part in inputs.items()}
        self.results |= {name: correct(texts, self.held_out) for name, texts in answers.items()}
        self.results |= controls(self.held_out, self.training)
        known = np.isin(self.held_out.nouns, self.training.nouns)
        summary = report(self.results, self.held_out.families, known)
        per_object = [
            {
                "object_id": record["object_id"],
                "family": record["family"],
                "truth": record["head_noun"],
                "noun_in_training": bool(known[row]),
                "answer": answers["model"][row],
                "right": [name for name, right in self.results.items() if right[row]],
            }
            for row, record in enumerate(self.held_out.records)
        ]
        storage.write_json(
            self.folder / "accuracy.json", {"split": self.split} | summary.as_dict() | {"objects": per_object}
        )
        print(
            f"\n{self.split} objects, never seen in training; 95 % intervals clustered by family\n{summary.table()}\n"
        )
        text = ask_ten(model, processor, self.held_out)
        (self.folder / "answers.md").write_text(text)
        print(text)

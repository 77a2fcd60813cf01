"""Whether answers name the object: held-out objects, beside controls and baselines that a model must beat."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pointalign import assets, storage
from pointalign.build import load
from pointalign.data.point_cloud import normalise, subsample, turn
from pointalign.embedded import facts
from pointalign.embedded.descriptions import named
from pointalign.embedded.neighbours import chamfer
from pointalign.embedded.questions import NAME, choice_questions
from pointalign.evaluation import markdown_table
from pointalign.evaluation.statistics import Estimate, cluster_mean, paired_difference
from pointalign.evaluation.tasks import ObjectSet, embedded_objects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

CHAMFER_POINTS, COARSE_POINTS, SHORTLIST = 1024, 256, 32
CHAMFER_CHUNK = 2  # reference clouds at a time: their distances stay in the processor's cache
QUESTION = NAME
PAIRS = (  # which method is tested against which, where both were run
    ("model, random yaw", "1-NN Chamfer, random yaw"),
    ("model", "1-NN Chamfer, fixed pose"),
    ("model", "model, shuffled clouds"),
    ("model", "model before training"),
)


def majority(nouns: Sequence[str]) -> str:
    """The most frequent noun; among equals the first in the alphabet."""
    return Counter(sorted(nouns)).most_common(1)[0][0]


def random_yaw(clouds: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Clouds `[N, 6]`, each turned about the vertical axis by a different random angle."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=len(clouds))
    return [
        np.concatenate([turn(cloud[:, :3], angle), cloud[:, 3:]], axis=1)
        for cloud, angle in zip(clouds, angles, strict=True)
    ]


def nearest_by_chamfer(queries: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """Index `[Q]` of the reference cloud nearest to each query, by the symmetric Chamfer distance of 1024 points each.

    Clouds `[N, 6]` are centred and scaled to the unit sphere, as the model sees them. The 32 nearest by 256 points are
    compared by all 1024.
    """
    fine = _sample_points(references)  # [R, P, 3]
    coarse = fine[:, :COARSE_POINTS]
    nearest = np.empty(len(queries), dtype=int)
    for row, points in enumerate(_sample_points(queries)):
        by_coarse = _chamfer_to_all(points[:COARSE_POINTS], coarse)
        shortlist = by_coarse.topk(min(SHORTLIST, len(fine)), largest=False).indices
        nearest[row] = int(shortlist[_chamfer_to_all(points, fine[shortlist]).argmin()])
    return nearest


def _chamfer_to_all(points: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Chamfer distances `[R]` of points `[P, 3]` to references `[R, P, 3]`, a few references at a time."""
    return torch.cat([chamfer(points, part) for part in references.split(CHAMFER_CHUNK)])


def _sample_points(clouds: Sequence[np.ndarray]) -> torch.Tensor:
    """`[N, P, 3]` with P = CHAMFER_POINTS; any first points of a row are a sample of it."""
    samples = [torch.from_numpy(normalise(subsample(cloud, CHAMFER_POINTS))[:, :3].copy()) for cloud in clouds]
    order = torch.from_numpy(np.random.default_rng(0).permutation(CHAMFER_POINTS))  # subsampling keeps the file's order
    return torch.stack([points.float()[order % len(points)] for points in samples])


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
    """The head noun of an answer: "This is an office chair with arms." -> "chair"; "" where there is none."""
    phrase = answer.strip().split("\n")[0].split(".")[0].split(",")[0]
    for opening in ("This is ", "These are ", "It is "):
        phrase = phrase.removeprefix(opening)
    words = phrase.split()
    if words and words[0].lower() in ("a", "an", "the", "some"):
        words = words[1:]
    return facts.head_noun(" ".join(words))


def names_object(answer: str, label: str) -> bool:
    """Whether the head noun of an answer is that of an object's label: its noun, or its name."""
    return head_noun(answer) == facts.head_noun(label)


def correct(answers: Sequence[str], objects: ObjectSet) -> np.ndarray:
    """`[N]`, 1 where an answer's head noun is the object's."""
    return np.array([names_object(*pair) for pair in zip(answers, objects.labels, strict=True)], dtype=float)


@dataclass
class NamingReport:
    """Accuracy per method, over all objects and over those whose noun occurs in training; paired tests."""

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
        accuracy = {
            name: {key: estimate.as_dict() for key, estimate in parts.items()} for name, parts in self.accuracy.items()
        }
        return {"accuracy": accuracy, "tests": self.tests}


def shuffled(count: int, seed: int = 0) -> np.ndarray:
    """A permutation without fixed points: every question is asked about another object's cloud."""
    order = np.random.default_rng(seed).permutation(count)
    other = np.empty(count, dtype=int)
    other[order] = np.roll(order, 1)
    return other


def controls(held_out: ObjectSet, training: ObjectSet, seed: int = 0) -> dict[str, np.ndarray]:
    """`[N]` correctness of the baselines that need no model."""
    turned = random_yaw(held_out.clouds, seed)
    nouns = np.array(training.labels)
    guesses = {
        "majority class": np.full(len(held_out.ids), majority(training.labels)),
        "1-NN Chamfer, fixed pose": nouns[nearest_by_chamfer(held_out.clouds, training.clouds)],
        "1-NN Chamfer, random yaw": nouns[nearest_by_chamfer(turned, training.clouds)],
    }
    return {name: (guess == np.array(held_out.labels)).astype(float) for name, guess in guesses.items()}


def report(results: dict[str, np.ndarray], families: Sequence[str], noun_in_training: np.ndarray) -> NamingReport:
    """Summarise `[N]` correctness per method of objects of these families `[N]`, and test `PAIRS`.

    Args:
        noun_in_training: `[N]` booleans; the paired tests are over these objects.
    """
    trained_families = [family for family, trained in zip(families, noun_in_training, strict=True) if trained]
    accuracy = {
        name: {
            "noun in training": cluster_mean(values[noun_in_training], trained_families),
            "all": cluster_mean(values, families),
        }
        for name, values in results.items()
    }
    tests = {}
    for ours, theirs in PAIRS:
        if ours in results and theirs in results:
            estimate, p = paired_difference(
                results[ours][noun_in_training], results[theirs][noun_in_training], trained_families
            )
            tests[f"{ours} against {theirs}"] = estimate.as_dict() | {"p": p}
    return NamingReport(accuracy, tests)


def ask_ten(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, objects: ObjectSet, seed: int = 0
) -> str:
    """A Markdown table; objects from different families, every other one asked about its sides, colour or place."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(objects.ids))
    _, first = np.unique([objects.families[i] for i in order], return_index=True)
    chosen = order[np.sort(first)][:10]
    questions, truths = [], []
    for place, index in enumerate(chosen):
        record = objects.records[index]
        asked = choice_questions(record)
        item = asked[int(rng.integers(len(asked)))]
        questions.append(QUESTION if place % 2 == 0 else item.question)
        truths.append(named(record) if place % 2 == 0 else item.answer)
    answers = ask(model, processor, [objects.clouds[i] for i in chosen], questions, description="sample answers")
    rows = [list(row) for row in zip(questions, answers, truths, strict=True)]
    return markdown_table(["question", "answer", "truth"], rows, "lll") + "\n"


class HeldOutNaming:
    """Held-out embedded objects named before and after training, beside the baselines; ten questions with answers.

    Args:
        fold: see `assets.embedded_objects`.
        split: the held-out part, `validation` or `test`.
        folder: the run's folder, which receives `accuracy.json` and `answers.md`.
    """

    def __init__(self, fold: int | None, split: str, folder: Path):
        objects = assets.embedded_objects(fold)
        self.split, self.folder = split, folder
        self.held_out = embedded_objects(objects, self.split)
        self.training = embedded_objects(objects, "train")
        self.results: dict[str, np.ndarray] = {}

    def before(self, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor) -> None:
        clouds, description = self.held_out.clouds, "naming before training"
        answers = ask(model, processor, clouds, [QUESTION] * len(clouds), description=description)
        self.results["model before training"] = correct(answers, self.held_out)

    def after(self, exported: Path) -> None:
        """Evaluate the exported model, not the one in memory."""
        model, processor, _ = load(exported)
        clouds = self.held_out.clouds
        inputs = {
            "model": clouds,
            "model, random yaw": random_yaw(clouds),
            "model, shuffled clouds": [clouds[i] for i in shuffled(len(clouds))],
        }
        questions = [QUESTION] * len(clouds)
        answers = {name: ask(model, processor, part, questions, description=name) for name, part in inputs.items()}
        self.results |= {name: correct(texts, self.held_out) for name, texts in answers.items()}
        self.results |= controls(self.held_out, self.training)
        noun_in_training = np.isin(self.held_out.labels, self.training.labels)
        summary = report(self.results, self.held_out.families, noun_in_training)
        per_object = [
            {
                "object_id": record["object_id"],
                "family": record["family"],
                "truth": record["head_noun"],
                "noun_in_training": bool(noun_in_training[row]),
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

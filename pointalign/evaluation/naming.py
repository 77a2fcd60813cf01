"""Whether answers name the object: held-out objects, beside controls and baselines that a model must beat."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pointalign.certainty import HEDGES, Answer, generate_answers
from pointalign.data.point_cloud import normalise, subsample, turn
from pointalign.embedded import facts
from pointalign.embedded.neighbours import chamfer, lifted
from pointalign.embedded.procedural import MAKERS
from pointalign.embedded.questions import NAME
from pointalign.evaluation.choices import Question
from pointalign.evaluation.statistics import Estimate, cluster_mean, paired_difference
from pointalign.evaluation.tasks import ObjectSet
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

CHAMFER_POINTS, COARSE_POINTS, TURNED_COARSE_POINTS, SHORTLIST = 1024, 256, 64, 32
YAWS = 16  # of the nearest neighbour's search
QUESTION = NAME
LONGEST_NAME, LONGEST_ANSWER = 12, 24  # tokens of "This is a fire extinguisher.", of a comparison that states its facts
PAIRS = (  # which method is tested against which, where both were run
    ("model", "1-NN Chamfer, best of 16 yaws"),
    ("model, random yaw", "1-NN Chamfer, best of 16 yaws"),
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


def nearest_by_chamfer(queries: Sequence[np.ndarray], references: Sequence[np.ndarray], turns: int = 1) -> np.ndarray:
    """Index `[Q]` of the reference cloud nearest to each query, by the symmetric Chamfer distance of 1024 points each.

    Clouds `[N, 6]` are centred and scaled to the unit sphere, as the model sees them. With several `turns` each
    reference counts in the best of that many yaws, evenly spaced: our encoder is trained on turned clouds, and a
    baseline without a search over yaws would be a straw man. The `SHORTLIST` nearest by few points are compared by all
    1024.
    """
    fine = _sample_points(references)  # [R, P, 3]
    yaws = torch.arange(turns) * (2 * np.pi / turns)
    turned = torch.stack([torch.from_numpy(turn(fine.numpy(), float(yaw))) for yaw in yaws], dim=1)  # [R, turns, P, 3]
    turned = turned.flatten(0, 1)
    coarse_points = COARSE_POINTS if turns == 1 else TURNED_COARSE_POINTS
    coarse = lifted(turned[:, :coarse_points])
    nearest = np.empty(len(queries), dtype=int)
    for row, points in enumerate(_sample_points(queries)):
        by_coarse = chamfer(points[:coarse_points], coarse)
        shortlist = by_coarse.topk(min(SHORTLIST, len(turned)), largest=False).indices
        distances = chamfer(points, lifted(turned[shortlist]))
        nearest[row] = int(shortlist[distances.argmin()]) // turns
    return nearest


def _sample_points(clouds: Sequence[np.ndarray]) -> torch.Tensor:
    """`[N, P, 3]` with P = CHAMFER_POINTS; any first points of a row are a sample of it."""
    samples = [torch.from_numpy(normalise(subsample(cloud, CHAMFER_POINTS))[:, :3].copy()) for cloud in clouds]
    order = torch.from_numpy(np.random.default_rng(0).permutation(CHAMFER_POINTS))  # subsampling keeps the file's order
    return torch.stack([points.float()[order % len(points)] for points in samples])


def ask(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[Sequence[np.ndarray]],
    questions: Sequence[str],
    max_new_tokens: int = LONGEST_NAME,
    batch_size: int = 16,
    description: str = "answers",
) -> list[str]:
    """Greedy answers; uncertain names are hedged as the model's threshold says.

    Args:
        clouds: those of each question.
    """
    return [answer.text for answer in ask_certain(
        model, processor, clouds, questions, max_new_tokens, batch_size, description
    )]  # fmt: skip


def ask_certain(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[Sequence[np.ndarray]],
    questions: Sequence[str],
    max_new_tokens: int = LONGEST_NAME,
    batch_size: int = 16,
    description: str = "answers",
) -> list[Answer]:
    """As `ask`, with the probabilities of the answers."""
    model.eval()
    answers: list[Answer] = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(clouds), batch_size), desc=description, unit="batch", leave=False):
            conversations = []
            for shown, question in zip(
                clouds[start : start + batch_size], questions[start : start + batch_size], strict=True
            ):
                content = [{"type": "point", "point": cloud} for cloud in shown]
                conversations.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
            batch = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)
            batch = batch.to(model.device)
            answers += generate_answers(model, processor, batch, max_new_tokens=max_new_tokens, do_sample=False)
    return answers


def ask_names(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[np.ndarray],
    description: str,
) -> list[str]:
    """Answers to "What is this?" about each cloud."""
    return ask(model, processor, [[cloud] for cloud in clouds], [QUESTION] * len(clouds), description=description)


def ask_about(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    objects: ObjectSet,
    questions: Sequence[Question],
    description: str,
) -> list[str]:
    """Answers to questions about one object of a set or several."""
    clouds = [[objects.cloud(name) for name in question.object_ids] for question in questions]
    texts = [question.text for question in questions]
    return ask(model, processor, clouds, texts, LONGEST_ANSWER, description=description)


def head_noun(answer: str) -> str:
    """The head noun of an answer: "This is an office chair with arms." -> "chair"; "" where there is none."""
    phrase = answer.strip().split("\n")[0].split(".")[0].split(",")[0]
    for opening in (*HEDGES, *HEDGES.values(), "It is "):
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


def recorded_result(entry: dict, method: str) -> float:
    """1 where the method named an object of `accuracy.json` right, 0 where wrong, NaN where it was not asked."""
    return float("nan") if method in entry.get("not asked", ()) else float(method in entry["right"])


PARTS = {  # objects of a report -> title of its column
    "noun in training": "noun in training",
    "procedural nouns": "nouns with a generator",
    "other nouns": "other nouns",
    "all": "all",
}


@dataclass
class NamingReport:
    """Accuracy per method and part of the objects (`PARTS`, where it has objects), and paired tests."""

    accuracy: dict[str, dict[str, Estimate]]
    tests: dict[str, dict]

    def table(self) -> str:
        width = max(len(name) for name in self.accuracy)
        most = max(self.accuracy.values(), key=lambda parts: parts["all"].count)
        counts = {part: estimate.count for part, estimate in most.items()}
        if counts["all"] == counts["noun in training"]:
            del counts["all"]
        titles = [f"{PARTS[part]} (n={count})" for part, count in counts.items()]
        lines = [f"{'head-noun accuracy':{width}}  " + "  ".join(f"{title:30}" for title in titles)]
        for name, parts in self.accuracy.items():
            cells = [
                "none of them" if part not in parts
                else f"{parts[part]}" if parts[part].count == count
                else f"{parts[part]} (n={parts[part].count})"
                for part, count in counts.items()
            ]  # fmt: skip
            lines.append(f"{name:{width}}  " + "  ".join(f"{cell:30}" for cell in cells))
        for name, test in self.tests.items():
            lines.append(f"{name}: {100 * test['mean']:+.1f} points, p = {test['p']:.4f}")
        return "\n".join(line.rstrip() for line in lines)

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


def controls(held_out: ObjectSet, training: ObjectSet) -> dict[str, np.ndarray]:
    """`[N]` correctness of the baselines that need no model."""
    nouns = np.array(training.labels)
    guesses = {
        "majority class": np.full(len(held_out.ids), majority(training.labels)),
        f"1-NN Chamfer, best of {YAWS} yaws": nouns[nearest_by_chamfer(held_out.clouds, training.clouds, YAWS)],
    }
    return {name: correct(guess.tolist(), held_out) for name, guess in guesses.items()}


def report(
    results: dict[str, np.ndarray], nouns: Sequence[str], families: Sequence[str], noun_in_training: np.ndarray
) -> NamingReport:
    """Summarise `[N]` correctness per method of objects of these nouns and families `[N]`, and test `PAIRS`.

    Nouns of which stage 1 saw endless procedural objects (`procedural.MAKERS`) are counted apart from the others: they
    are named far more often.

    Args:
        results: NaN for an object that a method was not asked about.
        noun_in_training: `[N]` booleans; the paired tests, and the counts by kind of noun, are over these objects.
    """
    procedural = np.array([noun in MAKERS for noun in nouns], dtype=bool)
    masks = {
        "noun in training": noun_in_training,
        "procedural nouns": noun_in_training & procedural,
        "other nouns": noun_in_training & ~procedural,
        "all": np.ones(len(nouns), dtype=bool),
    }
    clusters = np.array(families)
    accuracy: dict[str, dict[str, Estimate]] = {}
    for name, values in results.items():
        asked = {part: mask & ~np.isnan(values) for part, mask in masks.items()}
        accuracy[name] = {
            part: cluster_mean(values[mask], clusters[mask].tolist()) for part, mask in asked.items() if mask.any()
        }
    tests = {}
    for ours, theirs in PAIRS:
        if ours in results and theirs in results:
            both = noun_in_training & ~np.isnan(results[ours]) & ~np.isnan(results[theirs])
            estimate, p = paired_difference(results[ours][both], results[theirs][both], clusters[both].tolist())
            tests[f"{ours} against {theirs}"] = estimate.as_dict() | {"p": p}
    return NamingReport(accuracy, tests)

"""Metrics of answers: a value in 0..1 for each question and metric, then means with intervals."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pointalign import assets
from pointalign.embedded.procedural import MAKERS
from pointalign.evaluation.answering import Answers, margins
from pointalign.evaluation.caption_metrics import NO_ANSWER, caption_scores, embed, similarity_name
from pointalign.evaluation.choices import YES_NO, chosen, plain_words, yes_no_rates
from pointalign.evaluation.naming import names_object
from pointalign.evaluation.statistics import cluster_mean
from pointalign.evaluation.tasks import CHOICE_TASKS, Task

Scores = dict[str, list[float | None]]  # metric -> one value per question; None where the metric does not apply
UNBOUNDED = ("likelihood margin",)  # in nats, not in 0..1


def score(task: Task, answers: Answers, sentence_models: dict[str, Path]) -> Scores:
    """Every metric that applies to a task.

    Args:
        sentence_models: name -> folder of a sentence encoder; an empty dictionary leaves them out.
    """
    if task.kind in CHOICE_TASKS:
        picked = [chosen(text, q.choices) for text, q in zip(answers.texts, task.questions, strict=True)]
        return {
            "accuracy": [float(word == q.label) for word, q in zip(picked, task.questions, strict=True)],
            "answered with a choice": [float(word is not None) for word in picked],
            "answered yes": [
                float(word == "yes") if q.choices == YES_NO else None
                for word, q in zip(picked, task.questions, strict=True)
            ],
        }
    truths = [question.truth for question in task.questions]
    scores: Scores = {}
    if all(question.label for question in task.questions):
        scores |= naming_scores(answers.texts, [question.label for question in task.questions])
    if answers.likelihoods is not None:
        scores |= closed_set_scores(answers.likelihoods, [q.label for q in task.questions], list(task.candidates))
        scores["head noun, closed set"] = [
            value if question.label in task.candidates else None
            for value, question in zip(scores["head noun"], task.questions, strict=True)
        ]  # generated text, over the objects of the closed set
        if task.kind == "classification":
            scores |= procedural_scores(scores["head noun, closed set"], [q.label for q in task.questions])
    if task.kind == "captioning":
        scores.pop("exact", None)  # a caption says more than the name
        scores |= caption_scores(answers.texts, truths)
    # The sentence embedding of a short answer is compared with the name of the object, where it has a name.
    references = truths if task.kind == "captioning" else [q.label or q.truth for q in task.questions]
    for name, folder in sentence_models.items():
        texts = [text or NO_ANSWER for text in answers.texts]
        cosines = (embed(folder, texts, name) * embed(folder, references, name)).sum(dim=1)
        scores[similarity_name(name)] = [float(value) for value in cosines]
    return scores


CAPTION_PACKAGES = ("nltk", "rouge_score", "sacrebleu")


def require_packages(kinds: Sequence[str], judge: bool = False) -> None:
    """Refuse an evaluation whose scores need a package or file that is missing.

    Args:
        kinds: of tasks, see `pointalign.evaluation.results.EvaluationOptions`.
        judge: an endpoint judges the answers.

    Raises:
        ValueError: a package is missing.
        AssetError: WordNet, which METEOR needs, could not be fetched.
    """
    captions = any(kind in ("captioning", "answers") for kind in kinds)
    needed = [*(CAPTION_PACKAGES if captions else ()), *(["openai"] if judge else [])]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"these answers are scored with {', '.join(missing)}: pip install 'pointalign[eval]'")
    if captions:
        assets.wordnet()


def procedural_scores(scores: Sequence[float | None], labels: Sequence[str]) -> Scores:
    """The same scores, of nouns that stage 1 also saw as endless procedural objects and of the other nouns apart."""
    pairs = list(zip(scores, labels, strict=True))
    return {
        "head noun, procedural nouns": [value if label in MAKERS else None for value, label in pairs],
        "head noun, other nouns": [None if label in MAKERS else value for value, label in pairs],
    }


def naming_scores(answers: Sequence[str], labels: Sequence[str]) -> Scores:
    """Head noun: the answer's head noun is the label's. Exact: the answer is the label alone. Mentioned."""
    pairs = list(zip(answers, [label.lower() for label in labels], strict=True))
    return {
        "head noun": [float(names_object(text, label)) for text, label in pairs],
        "exact": [float(_bare(text) == label) for text, label in pairs],
        "mentioned": [float(f" {label} " in f" {plain_words(text)} ") for text, label in pairs],
    }


def _bare(text: str) -> str:
    phrase = plain_words(text)
    for opening in ("this is ", "these are ", "it is ", "a ", "an ", "the "):
        phrase = phrase.removeprefix(opening)
    return phrase


def closed_set_scores(likelihoods: np.ndarray, labels: Sequence[str], candidates: Sequence[str]) -> Scores:
    """Accuracy and margin among the candidates by likelihood `[N, A]`; None for a label outside of the set."""
    known = [i for i, label in enumerate(labels) if label in candidates]
    truths = [candidates.index(labels[i]) for i in known]
    accuracy: list[float | None] = [None] * len(labels)
    margin: list[float | None] = [None] * len(labels)
    for i, value in zip(known, margins(likelihoods[known], truths), strict=True):
        accuracy[i], margin[i] = float(value > 0), float(value)
    return {"closed-set accuracy": accuracy, "likelihood margin": margin}


def summarise(task: Task, scores: Scores) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every metric, clustered by family; for tasks of choices also by kind, with the share of
    the most frequent truth (`majority`). Where every question offers Yes and No, an accuracy also has the share of
    answers Yes (`yes_rate`) and the mean of the accuracies where Yes and where No is true (`balanced`).
    """
    families = [question.family for question in task.questions]
    applicable = {name: values for name, values in scores.items() if any(value is not None for value in values)}
    summary = {name: _estimate(values, families) for name, values in applicable.items()}
    if task.kind in CHOICE_TASKS:
        rows = {"accuracy": list(range(len(task.questions)))}
        for row, question in enumerate(task.questions):
            rows.setdefault(f"accuracy, {question.kind}", []).append(row)
        for name, places in rows.items():
            labels = [task.questions[i].label for i in places]
            right = [scores["accuracy"][i] for i in places]
            summary[name] = _estimate(right, [families[i] for i in places])
            if name != "accuracy":
                summary[name]["majority"] = max(labels.count(label) for label in set(labels)) / len(labels)
            answered_yes = [scores["answered yes"][i] for i in places]
            if None not in answered_yes:
                summary[name] |= yes_no_rates(labels, answered_yes, right)
    return summary


def _estimate(values: Sequence[float | None], families: Sequence[str]) -> dict[str, float]:
    pairs = [(value, family) for value, family in zip(values, families, strict=True) if value is not None]
    return cluster_mean([value for value, _ in pairs], [family for _, family in pairs]).as_dict()

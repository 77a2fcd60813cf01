"""Metrics of answers: a value in 0..1 for each question and metric, then means with intervals.

BLEU, ROUGE and METEOR follow PointLLM's protocol (Xu et al., ECCV 2024): words split at spaces, BLEU with smoothing
method 1 of Chen and Cherry (2014), means over objects.
"""

import json
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pointalign import assets
from pointalign.evaluation.answering import Answers, margins
from pointalign.evaluation.choices import YES_NO, chosen, plain_words
from pointalign.evaluation.naming import names_object
from pointalign.evaluation.statistics import cluster_mean
from pointalign.evaluation.tasks import CHOICE_TASKS, Task


def pooling_of(folder: Path) -> str:
    """`mean` over tokens or `cls` token, as sentence-transformers' `1_Pooling/config.json` says.

    Without that file `mean`, or for SimCSE's supervised models `pooler`, the encoder's head on the `cls` token.
    """
    config = folder / "1_Pooling" / "config.json"
    if config.exists():
        return "cls" if json.loads(config.read_text(encoding="utf-8")).get("pooling_mode_cls_token") else "mean"
    return "pooler" if "simcse" in folder.name.lower() else "mean"


@torch.no_grad()
def embed(folder: Path, sentences: Sequence[str]) -> Tensor:
    """Unit embeddings `[S, D]` of sentences by the encoder in `folder`, pooled as `pooling_of` says."""
    from transformers import AutoModel, AutoTokenizer

    pooling = pooling_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    embeddings = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(list(sentences[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
        output = encoder(**batch)
        mask = batch["attention_mask"][..., None].to(output.last_hidden_state)
        if pooling == "pooler":
            embeddings.append(output.pooler_output)
        elif pooling == "cls":
            embeddings.append(output.last_hidden_state[:, 0])
        else:
            embeddings.append((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return functional.normalize(torch.cat(embeddings).float(), dim=-1)


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
    if task.kind == "captioning":
        scores.pop("exact", None)  # a caption says more than the name
        scores |= caption_scores(answers.texts, truths)
    # The sentence embedding of a short answer is compared with the name of the object, where it has a name.
    references = truths if task.kind == "captioning" else [q.label or q.truth for q in task.questions]
    for name, folder in sentence_models.items():
        cosines = (embed(folder, answers.texts) * embed(folder, references)).sum(dim=1)
        scores[f"{name} cosine"] = [float(value) for value in cosines]
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


def caption_scores(answers: Sequence[str], truths: Sequence[str]) -> Scores:
    """BLEU-1..4, ROUGE-1/2/L (F) and METEOR, each 0..1 per answer."""
    scores: Scores = {f"BLEU-{n}": [bleu(a, t, n) for a, t in zip(answers, truths, strict=True)] for n in (1, 2, 3, 4)}
    rouges = [_rouge().score(truth, text) for text, truth in zip(answers, truths, strict=True)]
    for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        scores[name] = [float(rouge[key].fmeasure) for rouge in rouges]
    scores["METEOR"] = [meteor(a, t) for a, t in zip(answers, truths, strict=True)]
    return scores


def bleu(answer: str, truth: str, order: int) -> float:
    """Sentence BLEU with uniform weights up to `order`, smoothing method 1, words split at spaces."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not answer.split():
        return 0.0
    weights = (1 / order,) * order
    smoothing = SmoothingFunction().method1
    return float(sentence_bleu([truth.split()], answer.split(), weights=weights, smoothing_function=smoothing))  # type: ignore[arg-type]


def corpus_bleu(answers: Sequence[str], truths: Sequence[str]) -> float:
    """sacreBLEU's corpus BLEU in 0..100, with sacreBLEU's tokenisation, as other papers report it."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(truths)]).score)


@cache
def _rouge():
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def meteor(answer: str, truth: str) -> float:
    """METEOR of nltk with Porter stems and WordNet synonyms (alpha 0.9, beta 3, gamma 0.5)."""
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(truth.split(), answer.split(), wordnet=_wordnet()))


@cache
def _wordnet():
    import nltk.data
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    folder = assets.wordnet()
    nltk.data.path.append(str(folder.parent.parent))  # nltk reads only from folders on its path
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")
        return WordNetCorpusReader(str(folder), None)


def summarise(task: Task, scores: Scores) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every metric, clustered by family; for tasks of choices also by kind, with the share of
    the most frequent truth (`majority`). Kinds of yes/no questions also have the share of answers Yes (`yes_rate`) and
    the mean of the accuracies where Yes and where No is true (`balanced`).
    """
    families = [question.family for question in task.questions]
    applicable = {name: values for name, values in scores.items() if any(value is not None for value in values)}
    summary = {name: _estimate(values, families) for name, values in applicable.items()}
    if task.kind in CHOICE_TASKS:
        for kind in dict.fromkeys(question.kind for question in task.questions):
            rows = [i for i, question in enumerate(task.questions) if question.kind == kind]
            labels = [task.questions[i].label for i in rows]
            estimate = _estimate([scores["accuracy"][i] for i in rows], [families[i] for i in rows])
            majority = max(labels.count(label) for label in set(labels)) / len(labels)
            summary[f"accuracy, {kind}"] = estimate | {"majority": majority}
            if set(labels) == set(YES_NO):
                right, answered = (
                    np.array([scores[name][i] for i in rows], dtype=bool)
                    for name in ("accuracy", "answered with a choice")
                )
                true = np.array(labels) == "yes"
                summary[f"accuracy, {kind}"] |= {
                    "yes_rate": float((answered & (right == true)).mean()),
                    "balanced": float((right[true].mean() + right[~true].mean()) / 2),
                }
    return summary


def _estimate(values: Sequence[float | None], families: Sequence[str]) -> dict[str, float]:
    pairs = [(value, family) for value, family in zip(values, families, strict=True) if value is not None]
    return cluster_mean([value for value, _ in pairs], [family for _, family in pairs]).as_dict()

"""How far an answer's text agrees with a reference: BLEU, ROUGE, METEOR, and sentence embeddings.

Names in lower case (`bleu-1` to `bleu-4`, `rouge-1`, `rouge-2`, `rouge-l`, `meteor`) are PointLLM's metrics (Xu et al.,
ECCV 2024) as its evaluator computes them: words split at spaces, case and punctuation as they are, BLEU with smoothing
method 1 of Chen and Cherry (2014) and weights of 0.33 for `bleu-3`, ROUGE of the Python package `rouge`, means over
objects. Metrics that other papers report and that differ from these stand beside them under names of their own.
"""

import json
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

BLEU_WEIGHTS = {"bleu-1": (1.0,), "bleu-2": (0.5, 0.5), "bleu-3": (0.33, 0.33, 0.33), "bleu-4": (0.25,) * 4}
NO_ANSWER = "##"  # PointLLM scores this text where a model answered nothing
SIMCSE = "simcse"  # name of PointLLM's second sentence encoder, sup-simcse-roberta-large, which is read at its pooler
PROTOCOL_ENCODERS = ("sbert", SIMCSE)  # their cosines have PointLLM's names


def caption_scores(answers: Sequence[str], truths: Sequence[str]) -> dict[str, list[float | None]]:
    """The protocol's metrics and ours, each 0..1 per answer."""
    pairs = [(answer or NO_ANSWER, truth) for answer, truth in zip(answers, truths, strict=True)]
    scores: dict[str, list[float | None]] = {
        name: [bleu(*pair, weights) for pair in pairs] for name, weights in BLEU_WEIGHTS.items()
    }
    rouges = [rouge(*pair) for pair in pairs]
    scores |= {name: [values[name] for values in rouges] for name in ("rouge-1", "rouge-2", "rouge-l")}
    scores["meteor"] = [meteor(*pair) for pair in pairs]
    scores["BLEU-3, equal weights"] = [bleu(*pair, (1 / 3,) * 3) for pair in pairs]
    stemmed = [_rouge_scorer().score(truth, answer) for answer, truth in pairs]
    for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        scores[f"{name}, stemmed"] = [float(values[key].fmeasure) for values in stemmed]
    return scores


def bleu(answer: str, truth: str, weights: Sequence[float]) -> float:
    """Sentence BLEU with a weight for each length of n-grams, smoothing method 1, words split at spaces."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    if not answer.split():
        return 0.0
    smoothing = SmoothingFunction().method1
    return float(sentence_bleu([truth.split()], answer.split(), weights=weights, smoothing_function=smoothing))  # type: ignore[arg-type]


def corpus_bleu(answers: Sequence[str], truths: Sequence[str]) -> float:
    """sacreBLEU's corpus BLEU in 0..100, with sacreBLEU's tokenisation, as other papers report it."""
    import sacrebleu

    return float(sacrebleu.corpus_bleu(list(answers), [list(truths)]).score)


def rouge(answer: str, truth: str) -> dict[str, float]:
    """F values of ROUGE-1, -2 and -L in 0..1, equal to those of the Python package `rouge` 1.0.1.

    That package differs from Google's: words are neither stemmed nor put in lower case, a full stop ends a sentence and
    is dropped, and n-grams are sets, so that a repeated word counts once. ROUGE-L is Lin's summary-level form on sets:
    the words that belong to a longest common subsequence of any sentence of the answer with any of the reference.
    """
    ours, theirs = _sentences(answer), _sentences(truth)
    scores = {}
    for order in (1, 2):
        grams = [_ngrams([word for sentence in text for word in sentence], order) for text in (ours, theirs)]
        scores[f"rouge-{order}"] = _f_value(len(grams[0] & grams[1]), len(grams[0]), len(grams[1]))
    common = {word for reference in theirs for sentence in ours for word in _common_words(reference, sentence)}
    words = [{word for sentence in text for word in sentence} for text in (ours, theirs)]
    return scores | {"rouge-l": _f_value(len(common), len(words[0]), len(words[1]))}


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; a part of blanks alone counts as a sentence of one empty word, as in the package."""
    return [part.split() or [""] for part in text.split(".") if part]


def _ngrams(words: list[str], order: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + order]) for start in range(len(words) - order + 1)}


def _f_value(common: int, answer: int, reference: int) -> float:
    precision = common / answer if answer else 0.0
    recall = common / reference if reference else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)  # the package adds 1e-8, which shows in the last digits


def _common_words(reference: list[str], sentence: list[str]) -> list[str]:
    """A longest common subsequence. Of several, the one that drops the last word of `sentence` first counts."""
    longest = [[0] * (len(sentence) + 1) for _ in range(len(reference) + 1)]
    for row, word in enumerate(reference):
        for column, other in enumerate(sentence):
            longest[row + 1][column + 1] = (
                longest[row][column] + 1 if word == other else max(longest[row][column + 1], longest[row + 1][column])
            )
    row, column, words = len(reference), len(sentence), []
    while row and column:
        if reference[row - 1] == sentence[column - 1]:
            words.append(reference[row - 1])
            row, column = row - 1, column - 1
        elif longest[row - 1][column] > longest[row][column - 1]:
            row -= 1
        else:
            column -= 1
    return words


@cache
def _rouge_scorer():
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

    from pointalign import assets

    folder = assets.wordnet()
    nltk.data.path.append(str(folder.parent.parent))  # nltk reads only from folders on its path
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The multilingual functions")
        return WordNetCorpusReader(str(folder), None)


# -- sentence embeddings -----------------------------------------------------------------------------------------------


def similarity_name(encoder: str) -> str:
    """The metric of a sentence encoder: PointLLM's `sbert_similarity` and `simcse_similarity`, else `NAME cosine`."""
    return f"{encoder}_similarity" if encoder in PROTOCOL_ENCODERS else f"{encoder} cosine"


def pooling_of(folder: Path, encoder: str = "") -> str:
    """How tokens become the vector of a sentence: `pooler`, the encoder's head on the `cls` token, for the encoder that
    is named `simcse`; else what sentence-transformers' `1_Pooling/config.json` says, `mean` or `cls`; else `mean`.
    """
    if encoder == SIMCSE:
        return "pooler"
    config = folder / "1_Pooling" / "config.json"
    return (
        "cls"
        if config.exists() and json.loads(config.read_text(encoding="utf-8")).get("pooling_mode_cls_token")
        else "mean"
    )


@torch.no_grad()
def embed(folder: Path, sentences: Sequence[str], encoder: str = "") -> Tensor:
    """Unit embeddings `[S, D]` of sentences by the model in `folder`, pooled as `pooling_of` says.

    Args:
        encoder: the name under which the encoder was given.

    Raises:
        ValueError: the encoder named `simcse` has no pooler.
    """
    from transformers import AutoModel, AutoTokenizer

    pooling = pooling_of(folder, encoder)
    limit = folder / "sentence_bert_config.json"  # sentence-transformers cuts longer texts
    longest = json.loads(limit.read_text(encoding="utf-8")).get("max_seq_length") if limit.exists() else None
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModel.from_pretrained(folder, trust_remote_code=False).eval()
    embeddings = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(
            list(sentences[start : start + 64]), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        output = model(**batch)
        mask = batch["attention_mask"][..., None].to(output.last_hidden_state)
        if pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ValueError(f"{folder} has no pooler, which the sentence encoder named {SIMCSE} is read at")
            embeddings.append(output.pooler_output)
        elif pooling == "cls":
            embeddings.append(output.last_hidden_state[:, 0])
        else:
            embeddings.append((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return functional.normalize(torch.cat(embeddings).float(), dim=-1)

"""Metrics, against the examples their libraries publish, and the statistics on top."""

import numpy as np
import pytest

from pointalign import assets
from pointalign.embedded.procedural import MAKERS
from pointalign.evaluation import caption_metrics, metrics, results, statistics
from pointalign.evaluation.answering import Answers
from pointalign.evaluation.tasks import Question, Task

GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"


def test_bleu_is_nltks():
    pytest.importorskip("nltk", reason="BLEU needs nltk (extra: eval)")
    assert caption_metrics.bleu(GUIDE, REFERENCE, (0.25,) * 4) == pytest.approx(
        0.4118, abs=1e-4
    )  # nltk's SmoothingFunction page
    assert caption_metrics.bleu(REFERENCE, REFERENCE, (0.25,) * 4) == pytest.approx(1.0)
    assert caption_metrics.bleu("", REFERENCE, (1,)) == 0.0
    # two of three words, and as short as the truth: precision 2/3, no brevity penalty
    assert caption_metrics.bleu("a red chair", "a red sofa", (1,)) == pytest.approx(2 / 3)


def test_rouge_is_googles():
    pytest.importorskip("rouge_score", reason="ROUGE needs rouge-score (extra: eval)")
    scores = caption_metrics._rouge_scorer().score(
        "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."
    )
    assert scores["rouge1"].precision == 0.75 and scores["rouge1"].recall == pytest.approx(2 / 3)
    assert scores["rougeL"].fmeasure == pytest.approx(2 * 0.625 * (5 / 9) / (0.625 + 5 / 9))


def test_sacrebleu_is_the_published_one():
    sacrebleu = pytest.importorskip("sacrebleu", reason="corpus BLEU needs sacrebleu (extra: eval)")
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    first = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
    second = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]
    assert sacrebleu.corpus_bleu(said, [first, second]).score == pytest.approx(48.5308, abs=1e-3)  # its README
    assert caption_metrics.corpus_bleu(said, first) == pytest.approx(sacrebleu.corpus_bleu(said, [first]).score)
    assert caption_metrics.corpus_bleu(said, said) == pytest.approx(100)


@pytest.mark.skipif(
    not (assets.home() / "nltk_data" / "corpora" / "wordnet").exists(),
    reason="METEOR needs WordNet, which `pointalign assets` fetches",
)
def test_meteor_is_nltks():
    pytest.importorskip("nltk", reason="METEOR needs nltk (extra: eval)")
    assert caption_metrics.meteor(GUIDE, REFERENCE) == pytest.approx(0.6944, abs=1e-4)  # nltk's meteor_score page
    assert caption_metrics.meteor("a red couch", "a red sofa") > caption_metrics.meteor(
        "a red tree", "a red sofa"
    )  # synonyms count
    assert caption_metrics.meteor("", "a red sofa") == 0


@pytest.mark.parametrize(
    "answer, label, head, exact, mentioned",
    [
        ("This is a chair.", "chair", 1, 1, 1),
        ("This is an office chair with arms.", "chair", 1, 0, 1),
        ("A night stand.", "night stand", 1, 1, 1),
        ("This is a tape measure.", "tape measure", 1, 1, 1),
        ("These are shelves.", "shelf", 1, 0, 0),
        ("This is a dog.", "hot dog", 0, 0, 0),
        ("This is a table. There is a chair near it.", "chair", 0, 0, 1),
        ("This is a wheelchair.", "chair", 0, 0, 0),
        ("", "chair", 0, 0, 0),
    ],
)
def test_naming_scores(answer, label, head, exact, mentioned):
    scores = metrics.naming_scores([answer], [label])
    assert [scores[name] for name in ("head noun", "exact", "mentioned")] == [[head], [exact], [mentioned]]


def test_closed_set_leaves_out_labels_outside_of_the_set():
    likelihoods = np.array([[-1.0, -3.0], [-1.0, -2.5], [np.nan, np.nan]])
    scores = metrics.closed_set_scores(likelihoods, ["chair", "bed", "lamp"], ["chair", "bed"])
    assert scores["closed-set accuracy"] == [1.0, 0.0, None]
    assert scores["likelihood margin"] == [2.0, -1.5, None]


def test_generated_names_are_counted_over_the_closed_set_too():
    labels = ["chair", "bed", "lamp"]
    questions = [Question(name, (name,), "?", "t", name) for name in labels]
    task = Task("t", "classification", "?", questions, {"chair": "This is a chair.", "bed": "This is a bed."})
    answers = Answers(["This is a chair.", "This is a sofa.", "This is a lamp."], np.zeros((3, 2)))
    scores = metrics.score(task, answers, {})
    assert scores["head noun"] == [1.0, 0.0, 1.0] and scores["head noun, closed set"] == [1.0, 0.0, None]


def test_nouns_with_a_generator_are_counted_apart():
    labels = ["chair", "chair", "samovar", "lamp"]
    assert "chair" in MAKERS and "samovar" not in MAKERS
    questions = [Question(str(i), (str(i),), "?", "t", label) for i, label in enumerate(labels)]
    task = Task("t", "classification", "?", questions, dict.fromkeys(("chair", "samovar")))
    answers = Answers(["This is a chair.", "This is a bed.", "This is a samovar.", "This is a lamp."], np.zeros((4, 2)))
    scores = metrics.score(task, answers, {})
    assert scores["head noun, procedural nouns"] == [1.0, 0.0, None, None]
    assert scores["head noun, other nouns"] == [None, None, 1.0, None], "lamps are not in the closed set"


def test_always_yes_is_no_knowledge():
    questions = [
        Question(f"{i}", (f"{i}",), "Is this a chair?", label, label, "", "noun", ("yes", "no"))
        for i, label in enumerate(("yes", "yes", "yes", "no"))
    ]
    task = Task("yesno", "yesno", "", questions)
    metric = "accuracy, noun"

    def summary(*answers):
        return metrics.summarise(task, metrics.score(task, Answers(list(answers), None), {}))[metric]

    always = summary(*["Yes, it is a chair."] * 4)
    assert (always["mean"], always["majority"]) == (0.75, 0.75)
    assert (always["yes_rate"], always["balanced"]) == (1.0, 0.5)
    assert results.shown(metric, always)[0] == "75.0 (majority 75.0, answered yes 100.0, balanced 50.0)"
    whole = metrics.summarise(task, metrics.score(task, Answers(["Yes."] * 4, None), {}))
    assert whole["accuracy"]["balanced"] == 0.5 and whole["answered yes"]["mean"] == 1.0
    some = summary("No, it is a bed.", "Yes.", "I cannot say.", "No.")
    assert (some["mean"], some["yes_rate"]) == (0.5, 0.25) and some["balanced"] == pytest.approx(2 / 3)


def test_summary_is_clustered_by_family():
    questions = [Question(str(i), (str(i),), "?", "t", "chair", family="one" if i < 9 else "two") for i in range(10)]
    task = Task("classification-prompt0", "classification", "?", questions)
    answers = ["This is a chair."] * 9 + ["This is a bed."]
    summary = metrics.summarise(task, metrics.score(task, Answers(answers, None), {}))
    assert summary["head noun"]["mean"] == 0.9 and summary["head noun"]["count"] == 10
    assert summary["head noun"]["low"] == 0 and summary["head noun"]["high"] == 1  # two families: anything may be drawn


def test_holm_is_its_definition():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_the_minimum_detectable_effect_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    clusters = [str(i) for i in range(60)]
    detectable = statistics.minimum_detectable_effect(rng.normal(0, 1, 60), clusters)
    assert detectable == pytest.approx(2.8 / 60**0.5, rel=0.25)
    found = np.mean([abs((x := rng.normal(detectable, 1, 60)).mean()) > 1.96 * x.std() / 60**0.5 for _ in range(400)])
    assert 0.65 < found < 0.95

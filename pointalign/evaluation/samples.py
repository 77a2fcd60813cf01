"""Ten sample answers about held-out objects, of every kind of question, as a table and as a picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pointalign.embedded.descriptions import named
from pointalign.evaluation import markdown_table
from pointalign.evaluation.choices import Question, chosen, geometry_questions, yes_no_questions
from pointalign.evaluation.naming import QUESTION, ask_about, names_object
from pointalign.evaluation.report import render
from pointalign.evaluation.tasks import ObjectSet
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

NAMES = 4  # of the ten questions; the others are of these kinds
KINDS = ("colour", "longest side", "taller or wider", "noun", "two clouds", "main colour")


@dataclass(frozen=True)
class Sample:
    """A question with its answer. `possible` is False where the object's noun does not occur in training."""

    question: Question
    answer: str
    right: bool
    possible: bool = True

    @property
    def verdict(self) -> str:
        return "right" if self.right else "wrong" if self.possible else "impossible: noun not in training"


def sample_questions(objects: ObjectSet, seed: int = 0) -> list[Question]:
    """Questions drawn at random, each about an object of another family: `NAMES` names, then one of each of `KINDS`."""
    rng = np.random.default_rng(seed)
    names = [
        Question(name, (name,), QUESTION, named(record), noun, family, "name")
        for name, record, noun, family in zip(
            objects.ids, objects.records, objects.labels, objects.families, strict=True
        )
    ]
    asked = geometry_questions(objects.records) + yes_no_questions(objects.records, objects.candidates)
    drawn: list[Question] = []
    for kind in ("name",) * NAMES + KINDS:
        used = {question.family for question in drawn}
        choices = [q for q in names + asked if q.kind == kind and q.family not in used]
        if choices:
            drawn.append(choices[rng.integers(len(choices))])
    return drawn


def answer_samples(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, objects: ObjectSet, seed: int = 0
) -> list[Sample]:
    questions = sample_questions(objects, seed)
    answers = ask_about(model, processor, objects, questions, description="sample answers")
    samples = []
    for question, answer in zip(questions, answers, strict=True):
        if question.choices:
            samples.append(Sample(question, answer, chosen(answer, question.choices) == question.label))
        else:
            possible = question.label in objects.candidates
            samples.append(Sample(question, answer, names_object(answer, question.label), possible))
    return samples


def samples_table(samples: list[Sample]) -> str:
    """A Markdown table, and below it how many answers are right."""
    rows = [[s.question.text, s.answer, s.question.truth, s.verdict] for s in samples]
    table = markdown_table(["question", "answer", "truth", ""], rows, "llll")
    right, possible = sum(s.right for s in samples), sum(s.possible or s.right for s in samples)
    return f"{table}\n\n{right} of {possible} right; drawn at random, every kind of question\n"


def samples_picture(samples: list[Sample], objects: ObjectSet, path: Path) -> None:
    """A PNG with the clouds, questions and answers of the samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.4))
    axes = figure.subplots(2, -(-len(samples) // 2), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, sample in zip(axes.flat, samples, strict=False):
        clouds = [objects.cloud(name) for name in sample.question.object_ids]
        size = 300 // len(clouds)
        axis.imshow(np.concatenate([render(cloud, size)[:, 2 * size :] for cloud in clouds], axis=1))
        mark, colour = ("✓", "#1a7f37") if sample.right else ("✗", "#b42318") if sample.possible else ("–", "#777777")
        axis.set_title(_wrapped(sample.question.text), fontsize=9, loc="left")
        axis.text(0, -0.06, f"{mark} {_wrapped(sample.answer)}", transform=axis.transAxes, fontsize=9, color=colour,
                  va="top")  # fmt: skip
        if not sample.right:
            axis.text(0, -0.3, f"truth: {sample.question.truth}", transform=axis.transAxes, fontsize=8, color="#555555",
                      va="top")  # fmt: skip
    figure.tight_layout(h_pad=3)
    figure.savefig(path, dpi=100)


def _wrapped(text: str, width: int = 34) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))

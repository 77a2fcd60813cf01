"""Questions that offer the words of which the answer must hold one, about the facts of embedded objects.

A model that answers always Yes is right about half of the yes/no questions, whatever their text.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from pointalign.embedded import questions
from pointalign.embedded.facts import PALETTE, longest_side, main_colour


@dataclass(frozen=True)
class Question:
    """One question about one object or several, whose clouds stand before the text in this order.

    Attributes:
        id: unique within its task.
        truth: the reference answer or caption.
        label: noun, class or word of a right answer.
        family: objects of one family count as one observation in intervals.
        kind: the kind of question in a task of `CHOICE_TASKS`, a row of its table.
        choices: the words of which an answer must hold one, in a task of `CHOICE_TASKS`.
    """

    id: str
    object_ids: tuple[str, ...]
    text: str
    truth: str
    label: str = ""
    family: str = ""
    kind: str = ""
    choices: tuple[str, ...] = ()


def evenly(count: int, limit: int | None) -> list[int]:
    """Up to `limit` of `count` rows, spread evenly: neighbouring rows are of one catalogue and look alike."""
    return np.linspace(0, count - 1, min(count, limit or count)).round().astype(int).tolist()


YES_NO = ("yes", "no")
SIDES = ("height", "width", "depth")
BUCKETS = tuple(sorted(questions.BUCKETS, key=len, reverse=True))
PER_KIND = 48  # most questions of one kind
PROPERTIES = {  # kind of yes/no question -> the properties that are asked for, in both directions where there are two
    "taller or wider": ("taller_than_wide", "wider_than_tall"),
    "wider or deeper": ("wider_than_deep", "deeper_than_wide"),
    "symmetric": ("mirror_left_right",),
}


def geometry_questions(records: list[dict], seed: int = 0) -> list[Question]:
    """Questions that the facts of the objects answer clearly, in a fixed order; pairs are drawn with `seed`.

    A kind with more than PER_KIND questions is cut to that number, evenly over the objects. Every yes/no text is asked
    about as many objects with the answer Yes as No.

    Args:
        records: of the embedded objects, see `pointalign.embedded.catalogue.describe_object`.
    """
    by_kind: dict[str, list[Question]] = {kind: _property(records, kind) for kind in PROPERTIES}
    for question in [question for record in records for question in _single(record)] + _pairs(records, seed):
        by_kind.setdefault(question.kind, []).append(question)
    return [asked[i] for asked in by_kind.values() if asked for i in evenly(len(asked), PER_KIND)]


def yes_no_questions(records: list[dict], nouns: Collection[str]) -> list[Question]:
    """ "Is this a chair?" about the objects of these nouns, and "Is it mostly red?" about those with a main colour.

    Yes is true as often as No for every noun and every colour.
    """
    families = {record["object_id"]: record["family"] for record in records}
    asked = {
        "noun": questions.noun_questions([record for record in records if record["head_noun"] in nouns]),
        "main colour": questions.colour_questions(records),
    }
    rows = []
    for kind, items in asked.items():
        for item in items:
            (name,), label = item.object_ids, "yes" if item.affirmed else "no"
            rows.append(
                Question(f"{name}/{item.question}", (name,), item.question, label, label, families[name], kind, YES_NO)
            )
    return rows


def _property(records: list[dict], kind: str) -> list[Question]:
    """The yes/no questions of one kind: of each text at most an even share of PER_KIND, half of them true."""
    rows = []
    for fact in PROPERTIES[kind]:
        prop = questions.PROPERTIES[fact]
        groups = [[record for record in records if prop.holds(record) is truth] for truth in (True, False)]
        count = min(*map(len, groups), PER_KIND // (2 * len(PROPERTIES[kind])))
        for group, label in zip(groups, YES_NO, strict=True):
            for record in [group[i] for i in evenly(len(group), count)] if count else []:
                name = record["object_id"]
                rows.append(
                    Question(f"{name}/{fact}", (name,), prop.texts[0], label, label, record["family"], kind, YES_NO)
                )
    return rows


def _single(record: dict) -> list[Question]:
    rows: list[tuple[str, str, str, tuple[str, ...]]] = []  # kind, question, label, choices
    if side := longest_side(record):
        rows.append(("longest side", questions.LONGEST, side, SIDES))
    rows.append(("aspect bucket", questions.ASPECT, questions.aspect_bucket(record), BUCKETS))
    if colour := main_colour(record):
        rows.append(("colour", questions.COLOUR, colour, tuple(PALETTE)))
    name = record["object_id"]
    return [
        Question(f"{name}/{kind}", (name,), text, label, label, record["family"], kind, choices)
        for kind, text, label, choices in rows
    ]


def _pairs(records: list[dict], seed: int) -> list[Question]:
    """Objects beside another, drawn at random, of clearly different height over width; both answers in turn."""
    rng = np.random.default_rng(seed)
    aspects = np.array([record["height"] / record["width"] for record in records])
    possible = []
    for index, aspect in enumerate(aspects):
        ratio = aspects / aspect
        others = np.flatnonzero((ratio > questions.PAIR_MARGIN) | (ratio < 1 / questions.PAIR_MARGIN))
        if len(others):
            possible.append((index, others))
    pairs = []
    for place, (index, others) in enumerate([possible[i] for i in evenly(len(possible), PER_KIND)] if possible else []):
        taller, flatter = sorted((index, int(rng.choice(others))), key=lambda i: -aspects[i])
        first, second, label = (taller, flatter, "first") if place % 2 else (flatter, taller, "second")
        ids = (records[first]["object_id"], records[second]["object_id"])
        name, family = f"{records[index]['object_id']}/two clouds", records[index]["family"]
        pairs.append(
            Question(name, ids, questions.TALLER_OF_TWO, label, label, family, "two clouds", ("first", "second"))
        )
    return pairs


def yes_no_rates(labels: Sequence[str], answered_yes: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """What tells knowledge from a habit of answering Yes, for yes/no questions `[N]`.

    Returns:
        `yes_rate`, the share of answers Yes; `balanced`, the mean of the accuracies where Yes and where No is true, 0.5
        for a constant answer. Without questions of both kinds there is no `balanced`.
    """
    rates = {"yes_rate": float(np.mean(answered_yes))}
    truths, correct = np.array(labels), np.array(right, dtype=float)
    if set(labels) == set(YES_NO):
        rates["balanced"] = float(np.mean([correct[truths == label].mean() for label in YES_NO]))
    return rates


def plain_words(text: str) -> str:
    """Lower-case words without punctuation, separated by single spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def chosen(answer: str, choices: tuple[str, ...]) -> str | None:
    """The choice that stands first in an answer, whole words only; of several in one place the longest; else None.

    An answer that concludes ("It is flat, so yes.") is read behind its last "so", where a choice stands there.
    """
    words = f" {plain_words(answer)} "
    conclusion = words[words.rfind(" so ") :]
    if " so " in words and any(f" {choice} " in conclusion for choice in choices):
        words = conclusion
    places = [(words.find(f" {choice} "), -len(choice), choice) for choice in choices if f" {choice} " in words]
    return min(places)[2] if places else None

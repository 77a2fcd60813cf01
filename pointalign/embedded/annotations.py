"""The annotation entries about the embedded objects, in the PointLLM schema: descriptions, questions, dialogues."""

from __future__ import annotations

from collections.abc import Sequence

from pointalign.embedded.descriptions import BRIEF, DETAILED, brief, describe, named
from pointalign.embedded.questions import (
    NAME,
    Asked,
    choice_questions,
    colour_questions,
    comparisons,
    draw,
    noun_questions,
    pick,
    property_questions,
)

QUIZ_ROUNDS = 2  # times that a quiz opens with each of the questions for the noun
QUIZ_KINDS = {  # kind -> questions of it after the opening
    "colour": 1, "yes-no colour": 1, "side": 1, "yes-no side": 3, "aspect": 1,
}  # fmt: skip


def _entry(object_ids: tuple[str, ...], type_name: str, kind: str, *turns: tuple[str, str], **fact: str) -> dict:
    values = [{"from": who, "value": turn[i]} for turn in turns for i, who in enumerate(("human", "gpt"))]
    values[0]["value"] = "<point>\n" * len(object_ids) + values[0]["value"]
    ids = object_ids[0] if len(object_ids) == 1 else list(object_ids)
    return {
        "object_id": ids,
        "conversation_type": type_name,
        "kind": kind,
        **fact,
        "conversations": values,
    }


def entries_of(record: dict, yes_no: Sequence[Asked] = ()) -> list[dict]:
    """The annotation entries about one object: descriptions, choices, these yes/no questions and a dialogue."""
    ids = (record["object_id"],)
    choices = choice_questions(record)
    entries = [
        _entry(ids, "simple_description", "name", (NAME, named(record))),
        _entry(ids, "simple_description", "brief", (pick(BRIEF, record, "brief"), brief(record))),
        _entry(ids, "detailed_description", "detail", (pick(DETAILED, record, "detail"), describe(record))),
    ]
    entries += [
        _entry(ids, "single_round", item.kind, (item.question, item.answer), fact=item.fact)
        for item in (*choices, *yes_no)
    ]
    turns = [(NAME, named(record))]
    for kinds in (("colour",), ("side", "aspect")):
        turns += [(item.question, item.answer) for item in choices if item.kind in kinds][:1]
    dialogues = [_entry(ids, "multi_round", "dialogue", *turns)]
    return [
        *entries,
        *dialogues,
        *(_entry(ids, "multi_round", "quiz", *quiz) for quiz in quizzes(record, [*choices, *yes_no])),
    ]


def quizzes(record: dict, asked: Sequence[Asked]) -> list[list[tuple[str, str]]]:
    """Dialogues of several of the object's questions: most of a sample's tokens are the cloud's, and are shared so.

    The name comes first where it is asked for, and a yes/no question about a noun follows. Of two dialogues that open
    with such a question, one is answered with Yes and one with No.
    """
    nouns = sorted((item for item in asked if item.kind == "yes-no name"), key=lambda item: item.affirmed)
    openings = [(NAME, named(record)), *((item.question, item.answer) for item in nouns)] * QUIZ_ROUNDS
    dialogues = []
    for number, opening in enumerate(openings):
        order = sorted(asked, key=lambda item: draw(record, f"quiz {number}/{item.question}"))
        followers: list[Asked] = []
        for kind, count in QUIZ_KINDS.items():
            followers += [item for item in order if item.kind == kind][:count]
        if opening[0] == NAME and nouns:
            followers.append(nouns[number // (1 + len(nouns)) % len(nouns)])
        turns = [(item.question, item.answer) for item in followers]
        turns.sort(key=lambda turn: draw(record, f"quiz {number}/order {turn[0]}"))
        dialogues.append([opening, *turns])
    return dialogues


def conversations(records: Sequence[dict]) -> list[dict]:
    """The annotation entries of all objects of a split, in the PointLLM schema, object by object, then the comparisons.

    Entries also say their `kind`, and those of questions their `fact`.
    """
    yes_no: dict[str, list[Asked]] = {record["object_id"]: [] for record in records}
    for item in noun_questions(records) + colour_questions(records) + property_questions(records):
        yes_no[item.object_ids[0]].append(item)
    entries = [entry for record in records for entry in entries_of(record, yes_no[record["object_id"]])]
    pairs = comparisons(records)
    return entries + [_entry(p.object_ids, "comparison", p.kind, (p.question, p.answer), fact=p.fact) for p in pairs]

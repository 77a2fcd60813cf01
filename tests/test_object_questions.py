"""Conversations about a single object: what is said of its size, colour and legs, and what is left out."""

import json

from made_records import box, record
from test_questions import turns

from pointalign.embedded import annotations, descriptions, questions


def test_a_name_is_the_noun_alone():
    named = descriptions.named
    assert named(record(box(1, 1, 1), "Office chair")) == "This is a chair."
    assert named(record(box(1, 1, 1), "Oak shelves")) == "These are shelves."
    assert named(record(box(1, 1, 1), "Scissors")) == "These are scissors."
    text = descriptions.describe(record(box(1, 1, 1), "Office chair"))
    assert text.startswith("This is an office chair. It is mostly red.")


def choices(item: dict) -> dict[str, str]:
    return {asked.fact: asked.answer for asked in questions.choice_questions(item)}


def test_answers_about_a_tall_box():
    item = record(box(2, 5, 1), size=(40, 100, 20))
    answers = choices(item)
    assert answers["longest_side"] == "The height." and answers["wider_than_deep"] == "It is wider than it is deep."
    assert answers["main_color"] == "It is mostly red." and answers["aspect"] == "It is twice as tall."
    (metric,) = [answers[fact] for fact in answers if "_from_" in fact]
    assert metric in {"About 40 cm.", "About 100 cm.", "About 20 cm."}
    holds = {fact: item_property.holds(item) for fact, item_property in questions.PROPERTIES.items()}
    assert holds == {
        "taller_than_wide": True,
        "wider_than_tall": False,
        "wider_than_deep": True,
        "deeper_than_wide": False,
        "flat": False,
        "slender": None,
        "mirror_left_right": True,
        "mirror_front_back": True,
    }


def test_nothing_is_asked_within_ten_percent_of_a_tie():
    cube = record(box(1.05, 1, 1))
    assert not choices(cube).keys() & {"longest_side", "taller_than_wide", "wider_than_deep"}
    assert {questions.PROPERTIES[fact].holds(cube) for fact in ("taller_than_wide", "wider_than_deep")} == {None}
    wide = record(box(3, 1, 2.9))
    assert "longest_side" not in choices(wide)
    assert questions.PROPERTIES["taller_than_wide"].holds(wide) is False


def test_flat_and_slender_things():
    flat, slender = (questions.PROPERTIES[fact].holds for fact in ("flat", "slender"))
    mat, board, pole = record(box(5, 0.5, 4)), record(box(4, 5, 0.5)), record(box(1, 6, 1))
    assert flat(mat) is True and flat(board) is None and flat(pole) is False
    assert slender(pole) is True and slender(mat) is False


def test_metric_answers_state_their_scale():
    assert not [fact for fact in choices(record(box(2, 5, 1), size=(40, 100, 60))) if "_from_" in fact]
    for entry in annotations.conversations([record(box(2, 5, 1), size=(40, 100, 20))]):
        assert all((" cm" in answer) == (" cm " in question) for question, answer in turns(entry))


def test_a_persons_colour_is_not_spoken_of():
    text = json.dumps(annotations.conversations([record(box(1, 4, 1), name="Sitting female")]))
    assert "a sitting woman" in text and "red" not in text and "color" not in text


def test_legs_are_counted_where_they_are_known():
    item = record(box(1, 1, 1), "Chair")
    assert questions.leg_question(item) is None
    for legs, answer in (
        (0, "It has no legs."),
        (1, "It has one leg."),
        (4, "It has four legs."),
        (14, "It has 14 legs."),
    ):
        asked = questions.leg_question(item | {"legs": legs})
        assert asked is not None and (asked.question, asked.answer) == ("How many legs does it have?", answer)

"""The entries about embedded objects: what a quiz asks."""

from collections import Counter

import pytest
from made_records import made_split

from pointalign.embedded import annotations, questions


@pytest.fixture(scope="module")
def quizzes() -> list[list[tuple[str, str]]]:
    entries = [entry for entry in annotations.conversations(made_split()) if entry["kind"] == "quiz"]
    values = [[turn["value"].replace("<point>\n", "") for turn in entry["conversations"]] for entry in entries]
    return [list(zip(texts[::2], texts[1::2], strict=True)) for texts in values]


def test_a_quiz_asks_nothing_twice_and_three_sides_at_most(quizzes):
    sides = {text for item in questions.PROPERTIES.values() if item.kind == "yes-no side" for text in item.texts}
    numbers = Counter(sum(question in sides for question, _ in quiz) for quiz in quizzes)
    assert all(len({question for question, _ in quiz}) == len(quiz) for quiz in quizzes)
    assert max(numbers) == annotations.QUIZ_KINDS["yes-no side"] == 3 and numbers[3] > len(quizzes) / 2


def test_the_name_is_followed_by_a_yes_no_question_about_a_noun(quizzes):
    named = [quiz for quiz in quizzes if quiz[0][0] == questions.NAME]
    asked = Counter()
    for quiz in named:
        nouns = [answer for question, answer in quiz[1:] if question.startswith(("Is this a", "Are these"))]
        assert len(nouns) <= 1
        asked.update(answer.rpartition(", so ")[2] for answer in nouns)
    assert sum(asked.values()) > 0.9 * len(named) and asked["yes."] == asked["no."]

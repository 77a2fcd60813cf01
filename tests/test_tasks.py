"""What an evaluation asks: objects, questions with one right answer, and how an answer is read."""

from collections import Counter

import numpy as np
import pytest
from conftest import CLOUDS, NAMES

from pointalign.evaluation.choices import PER_KIND, chosen, geometry_questions
from pointalign.evaluation.tasks import ObjectSet, annotated_objects, build_tasks, closed_set


def test_annotated_objects_take_the_first_answer():
    objects = annotated_objects(CLOUDS / "annotations.json", CLOUDS)
    assert objects.ids == NAMES and all(objects.truths)
    assert objects.cloud(NAMES[0]).shape[1] == 6
    assert objects.first(3).ids == [NAMES[0], NAMES[round(3.5)], NAMES[-1]]
    [captioning] = build_tasks("captioning", objects)
    assert (
        captioning.name == "captioning-prompt2" and captioning.questions[0].text == "Caption this 3D model in detail."
    )


def record(object_id, width, height, depth, **more):
    facts = {"colors": {"red": 0.9}, "mirror_left_right": True, "mirror_front_back": None, "head_noun": "vase"}
    return (
        {"object_id": object_id, "width": width, "height": height, "depth": depth, "family": object_id} | facts | more
    )


def test_geometry_questions_have_one_clear_answer():
    tall, wide, cube = (
        record("tall", 1.0, 2.5, 1.0),
        record("wide", 2.0, 1.0, 2.0, mirror_left_right=False),
        record("cube", 1.0, 1.05, 1.0, mirror_left_right=None, colors={"red": 0.3}),
    )
    asked = geometry_questions([tall, wide, cube])
    assert len({q.id for q in asked}) == len(asked)
    single = {(q.object_ids[0], q.text): q.label for q in asked if q.kind != "two clouds"}
    aspect = "How do height and width compare: wider, square, taller or twice as tall?"
    assert single == {
        ("tall", "Is it taller than it is wide?"): "yes",
        ("wide", "Is it taller than it is wide?"): "no",
        ("tall", "Is it wider than it is tall?"): "no",
        ("wide", "Is it wider than it is tall?"): "yes",
        ("tall", "Is it symmetric from left to right?"): "yes",
        ("wide", "Is it symmetric from left to right?"): "no",
        ("tall", "Which side is longest: height, width or depth?"): "height",
        ("tall", "What color is it mostly?"): "red",
        ("wide", "What color is it mostly?"): "red",
        ("tall", aspect): "twice as tall",
        ("wide", aspect): "wider",
        ("cube", aspect): "square",
    }
    order = ["wide", "cube", "tall"]
    pairs = [q for q in asked if q.kind == "two clouds"]
    assert len(pairs) == 3
    for pair in pairs:
        taller = max(pair.object_ids, key=order.index)
        assert len(pair.object_ids) == 2 and pair.object_ids[("first", "second").index(pair.label)] == taller
    assert geometry_questions([tall, wide, cube]) == asked


def test_no_kind_of_question_outweighs_the_others():
    records = [record(f"box {number}", 1.0, 2.5, 1.0) for number in range(PER_KIND + 7)]
    found = geometry_questions(records)
    asked = [q.object_ids[0] for q in found if q.kind == "aspect bucket"]
    assert len(asked) == len(set(asked)) == PER_KIND and asked[-1] == f"box {PER_KIND + 6}"
    assert {q.kind for q in found} == {"aspect bucket", "longest side", "colour"}, "nothing that is Yes for all objects"


def test_yes_is_true_of_half_the_objects_for_every_text():
    rng = np.random.default_rng(0)
    nouns = ["chair", "chair", "chair", "lamp", "car", "car", "tree", "unicorn"]
    records = [
        record(f"{noun} {i}", *rng.uniform(0.2, 2, 3), head_noun=noun, name=noun, plural=False)
        | {"colors": {str(rng.choice(["red", "blue", "green"])): 0.9}, "mirror_left_right": bool(rng.random() < 0.8)}
        for i, noun in enumerate(nouns * 20)
    ]
    candidates = closed_set(["chair", "lamp", "car", "tree"])
    objects = ObjectSet(
        [r["object_id"] for r in records],
        dict.get,
        ["" for _ in records],
        [r["head_noun"] for r in records],
        [r["family"] for r in records],
        candidates,
        records,
    )
    for kind in ("geometry", "yesno"):
        [task] = build_tasks(kind, objects)
        labels: dict[str, list[str]] = {}
        for question in task.questions:
            if question.choices in (("yes", "no"), ("first", "second")):
                labels.setdefault(question.text, []).append(question.label)
        assert len(labels) >= 4
        for text, answers in labels.items():
            (first, count), (_, other) = Counter(answers).most_common()
            assert count == other, (text, first)
        assert len({q.id for q in task.questions}) == len(task.questions)
    texts = {q.text: q.kind for q in task.questions}
    assert texts["Is this a chair?"] == "noun" and texts["Is it mostly red?"] == "main colour"
    assert "Is this a unicorn?" not in texts, "a noun that does not occur in training"


def test_the_first_choice_in_an_answer_counts():
    buckets = ("twice as tall", "square", "taller", "wider")
    assert chosen("No, it is not; yes and no.", ("yes", "no")) == "no"
    assert chosen("It is twice as tall.", buckets) == "twice as tall"
    assert chosen("Square, hardly taller.", buckets) == "square"
    assert chosen("Nothing of the kind, eyes.", ("yes", "no")) is None


def test_an_answer_that_concludes_is_read_at_its_conclusion():
    order = ("first", "second")
    assert chosen("The first is two, the second is six, so the second.", order) == "second"
    assert chosen("This is a first aid box, so yes.", ("yes", "no")) == "yes"
    assert chosen("The height, so it is tall.", ("height", "width")) == "height", "no choice stands behind the so"


def test_geometry_needs_facts():
    with pytest.raises(ValueError, match="objects with known facts"):
        build_tasks("geometry", annotated_objects(CLOUDS / "annotations.json", CLOUDS))
    alone = record("a", 1, 2, 3, name="chair", plural=False)
    with pytest.raises(ValueError, match="needs objects of different nouns or colours; 1 have none"):
        build_tasks("yesno", ObjectSet(["a"], dict.get, ["A chair."], ["chair"], records=[alone]))

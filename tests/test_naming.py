"""Head nouns of answers, sets of objects, controls, the report and loss curves."""

import json

import numpy as np
import pytest
from conftest import lively, tiny_model
from matplotlib.figure import Figure
from PIL import Image

from pointalign.evaluation.naming import ask, controls, correct, head_noun, names_object, report, shuffled
from pointalign.evaluation.report import loss_curves
from pointalign.evaluation.tasks import ObjectSet, embedded_objects


@pytest.mark.parametrize(
    ("answer", "noun"),
    [
        ("This is a bench.", "bench"),
        ("This is an office chair with arms.", "chair"),
        ("These are the Stairs", "stairs"),
        ("These are shelves.", "shelf"),
        ("This is a tape measure.", "tape measure"),
        ("It is a lamp, mostly white.", "lamp"),
        ("Bench\nand more", "bench"),
        ("", ""),
        ("   .", ""),
        ("This is a", ""),
    ],
)
def test_head_noun(answer, noun):
    assert head_noun(answer) == noun


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("This is a phone.", "telephone", True),
        ("These are keys.", "keys", True),
        ("This is a key.", "keys", True),
        ("This is a dog.", "hot dog", False),
        ("This is a can.", "trash can", False),
        ("This is a trash can.", "can", False),
        ("This is a night stand.", "night stand", True),
        ("", "bench", False),
    ],
)
def test_an_answer_is_right_if_its_head_noun_is_the_labels(answer, label, right):
    assert names_object(answer, label) is right


def objects(nouns, clouds) -> ObjectSet:
    files = {f"{i}": cloud for i, cloud in enumerate(clouds[: len(nouns)])}
    families = [f"{noun} {i // 2}" for i, noun in enumerate(nouns)]
    return ObjectSet(list(files), files.__getitem__, list(nouns), list(nouns), families)


def test_correct_ignores_case_and_counts_in_order(clouds):
    held_out = objects(["bench", "Cactus", "sofa"], clouds)
    assert correct(["This is a Bench.", "A cactus", "a bench"], held_out).tolist() == [1, 1, 0]


def test_baselines_are_right_by_the_rule_for_answers(clouds):
    """A baseline that says "phone" of a telephone is as right as a model."""
    training, held_out = objects(["phone", "phone"], clouds), objects(["telephone"], clouds)
    assert correct(["This is a phone."], held_out).tolist() == [1]
    assert {name: right.tolist() for name, right in controls(held_out, training).items()} == {
        "majority class": [1.0],
        "1-NN Chamfer, best of 16 yaws": [1.0],
    }


def test_nouns_with_a_generator_are_reported_apart():
    nouns = ["chair", "samovar", "chair", "unicorn"]
    right = {"model": np.array([1.0, 0.0, 0.0, 0.0])}
    summary = report(right, nouns, ["a", "b", "c", "d"], np.array([True, True, True, False]))
    shares = {part: (estimate.mean, estimate.count) for part, estimate in summary.accuracy["model"].items()}
    assert shares == {"noun in training": (pytest.approx(1 / 3), 3), "procedural nouns": (0.5, 2),
                      "other nouns": (0.0, 1), "all": (0.25, 4)}  # fmt: skip
    assert "nouns with a generator (n=2)" in summary.table() and "other nouns (n=1)" in summary.table()


@pytest.mark.parametrize("count", [2, 3, 10, 205])
def test_shuffling_leaves_nothing_in_its_place(count):
    order = shuffled(count)
    assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()


def test_controls_and_report(clouds):
    training = objects(["bench", "bench", "cactus", "lamp"], clouds)
    held_out = objects(["bench", "cactus", "sofa"], [clouds[0], clouds[2], clouds[3]])
    results = controls(held_out, training)
    assert results["majority class"].tolist() == [1, 0, 0]
    assert results["1-NN Chamfer, best of 16 yaws"].tolist() == [1, 1, 0]
    assert set(results) == {"majority class", "1-NN Chamfer, best of 16 yaws"}
    results["model"] = np.array([1.0, 1.0, 1.0])
    results["model before training"] = np.array([1.0, 0.0, 1.0])
    summary = report(results, held_out.labels, held_out.families, np.array([True, True, False]))
    model = summary.accuracy["model"]
    assert model["noun in training"].count == 2 and model["all"].count == 3, "sofas are not known from training"
    assert summary.accuracy["majority class"]["all"].mean == pytest.approx(1 / 3)
    assert list(summary.tests) == [
        "model against 1-NN Chamfer, best of 16 yaws",
        "model against model before training",
    ]
    test = summary.tests["model against model before training"]
    assert test["mean"] == 0.5 and 0 < test["p"] <= 1
    table = summary.table()
    assert "noun in training (n=2)" in table and "all (n=3)" in table
    assert "model against model before training: +50.0 points, p = " in table
    assert json.loads(json.dumps(summary.as_dict()))["accuracy"]["model"]["all"]["mean"] == 1


def test_answers_come_in_order_whatever_the_batch(processor, clouds):
    model = lively(tiny_model())
    questions = ["What is this?", "Is it taller than wide?", "Which colour?"]
    model.train()
    shown = [[clouds[0]], [clouds[1], clouds[2]], [clouds[2]]]
    batched = ask(model, processor, shown, questions, max_new_tokens=4, batch_size=2)
    assert not model.training
    single = [
        ask(model, processor, [part], [question], max_new_tokens=4)[0]
        for part, question in zip(shown, questions, strict=True)
    ]
    assert batched == single and len(batched) == 3


def written(folder, clouds, nouns):
    """Embedded objects o0, o1, ... in the splits train and test in turn."""
    (folder / "clouds").mkdir()
    facts = {"plural": False, "colors": {"red": 1.0}, "mirror_left_right": None, "width": 1, "height": 1, "depth": 1}
    records = [
        facts
        | {"object_id": f"o{i}", "split": ("train", "test")[i % 2], "head_noun": noun, "noun_phrase": f"a {noun}"}
        | {"family": f"f{i}"}
        for i, noun in enumerate(nouns)
    ]
    (folder / "objects.json").write_text(json.dumps(records))
    for i in range(len(nouns)):
        np.save(folder / "clouds" / f"o{i}_8192.npy", clouds[i])
    return records


def test_a_split_of_the_embedded_objects(tmp_path, clouds):
    records = written(tmp_path, clouds, ["bench", "sofa", "lamp", "bench"])
    test = embedded_objects(tmp_path, "test")
    assert test.ids == ["o1", "o3"] and test.records == [records[1], records[3]]
    assert test.labels == ["sofa", "bench"] and test.families == ["f1", "f3"]
    assert test.truths[1].startswith("This is a bench. It is mostly red.")
    assert list(test.candidates) == ["bench", "lamp"], "the nouns of the training part, whatever the test part has"
    assert test.candidates["bench"] == "This is a bench."
    assert (test.clouds[1] == clouds[3]).all()


def test_a_cut_set_keeps_its_lists_together(tmp_path, clouds):
    written(tmp_path, clouds, ["bench", "sofa", "lamp", "bench", "desk", "lamp"])
    everything = embedded_objects(tmp_path, "test")
    cut = everything.first(2)
    assert cut.ids == ["o1", "o5"] and cut.labels == ["sofa", "lamp"] and cut.candidates == everything.candidates
    assert [record["object_id"] for record in cut.records] == cut.ids and (cut.clouds[1] == clouds[5]).all()
    assert everything.first(None) is everything and everything.first(9) is everything


def test_a_set_without_labels_has_a_family_for_each_object():
    unlabelled = ObjectSet(["a", "b"], dict.get, ["A chair.", "A bed."])
    assert unlabelled.labels == ["", ""] and unlabelled.families == ["a", "b"]


@pytest.mark.parametrize(("weight", "panels"), [(0.0, 1), (0.1, 2)])
def test_loss_curves(weight, panels, tmp_path):
    history = [{"step": i, "ntp_loss": 1 / (i + 1), "alignment_loss": 0.5} for i in range(5)] + [{"step": 5, "x": 1}]
    loss_curves(history, tmp_path / "curves.png", weight)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (panels * 960, 600) and len(picture.convert("RGB").getcolors(10**6)) > 10
    loss_curves([{"step": 1}], tmp_path / "none.png", weight)
    assert not (tmp_path / "none.png").exists()


def test_held_out_losses_are_drawn_by_kind(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    history = [{"step": 0, "held_out/name": 3.0, "held_out/colour": 2.0, "held_out/alignment_loss": 1.0}]
    history += [{"step": 2, "ntp_loss": 1.5, "alignment_loss": 0.75}]
    history += [{"step": 2, "held_out/name": 1.0, "held_out/colour": 0.5, "held_out/alignment_loss": 0.25}]
    loss_curves(history, tmp_path / "curves.png", 0.1)
    curves = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        for axis in drawn[0].axes
    ]
    assert curves == [
        {"training batches": ([2], [1.5]), "colour": ([0, 2], [2.0, 0.5]), "name": ([0, 2], [3.0, 1.0])},
        {"training batches": ([2], [0.75]), "held-out objects": ([0, 2], [1.0, 0.25])},
    ]
    assert all(axis.get_legend() is not None for axis in drawn[0].axes)

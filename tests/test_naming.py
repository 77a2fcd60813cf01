"""Head nouns, controls, the report, pictures and sample questions."""

import json

import numpy as np
import pytest
from conftest import lively, tiny_model

from pointalign.evaluation import naming
from pointalign.evaluation.naming import Objects, ask, controls, correct, head_noun, report, shuffled
from pointalign.evaluation.report import loss_curves


@pytest.mark.parametrize(
    ("answer", "noun"),
    [
        ("This is a bench.", "bench"),
        ("This is an office chair with arms.", "chair"),
        ("These are the Stairs", "stairs"),
        ("It is a lamp, mostly white.", "lamp"),
        ("Bench\nand more", "bench"),
        ("", ""),
        ("   .", ""),
        ("This is a", ""),
    ],
)
def test_head_noun(answer, noun):
    assert head_noun(answer) == noun


def objects(nouns, clouds) -> Objects:
    records = [{"head_noun": noun, "family": f"{noun} {i // 2}"} for i, noun in enumerate(nouns)]
    return Objects(records, clouds[: len(nouns)])


def test_correct_ignores_case_and_counts_in_order(clouds):
    held_out = objects(["bench", "Cactus", "sofa"], clouds)
    assert correct(["This is a Bench.", "A cactus", "a bench"], held_out).tolist() == [1, 1, 0]


@pytest.mark.parametrize("count", [2, 3, 10, 205])
def test_shuffling_leaves_nothing_in_its_place(count):
    order = shuffled(count)
    assert sorted(order) == list(range(count)) and (order != np.arange(count)).all()


def test_controls_and_report(clouds):
    training = objects(["bench", "bench", "cactus", "lamp"], clouds)
    held_out = objects(["bench", "cactus", "sofa"], [clouds[0], clouds[2], clouds[3]])
    results = controls(held_out, training)
    assert results["majority class"].tolist() == [1, 0, 0]
    assert results["1-NN Chamfer, fixed pose"].tolist() == [1, 1, 0]
    assert set(results) == {"majority class", "1-NN Chamfer, fixed pose", "1-NN Chamfer, random yaw"}
    results["model"] = np.array([1.0, 1.0, 1.0])
    results["model before training"] = np.array([1.0, 0.0, 1.0])
    made = report(results, held_out.families, np.array([True, True, False]))
    model = made.accuracy["model"]
    assert model["noun in training"].count == 2 and model["all"].count == 3, "sofas are not known from training"
    assert made.accuracy["majority class"]["all"].mean == pytest.approx(1 / 3)
    assert list(made.tests) == ["model against 1-NN Chamfer, fixed pose", "model against model before training"]
    test = made.tests["model against model before training"]
    assert test["mean"] == 0.5 and 0 < test["p"] <= 1
    table = made.table()
    assert "noun in training (n=2)" in table and "all (n=3)" in table
    assert "model against model before training: +50.0 points, p = " in table
    assert json.loads(json.dumps(made.as_dict()))["accuracy"]["model"]["all"]["mean"] == 1


def test_answers_come_in_order_whatever_the_batch(processor, clouds):
    model = lively(tiny_model())
    questions = ["What is this?", "Is it taller than wide?", "Which colour?"]
    model.train()
    batched = ask(model, processor, clouds[:3], questions, max_new_tokens=4, batch_size=2)
    assert not model.training
    single = [
        ask(model, processor, [cloud], [question], max_new_tokens=4)[0]
        for cloud, question in zip(clouds, questions, strict=False)
    ]
    assert batched == single and len(batched) == 3


def test_load_objects_keeps_one_split(tmp_path, clouds):
    (tmp_path / "clouds").mkdir()
    records = [{"object_id": f"o{i}", "split": ("train", "test")[i % 2], "head_noun": "x"} for i in range(4)]
    (tmp_path / "objects.json").write_text(json.dumps(records))
    for i in range(4):
        np.save(tmp_path / "clouds" / f"o{i}_8192.npy", clouds[i])
    loaded = naming.load_objects(tmp_path, "test")
    assert [one["object_id"] for one in loaded.records] == ["o1", "o3"]
    assert (loaded.clouds[1] == clouds[3]).all()


@pytest.mark.parametrize(("weight", "curves"), [(0.0, 1), (0.1, 2)])
def test_loss_curves(weight, curves, tmp_path):
    from PIL import Image

    history = [{"step": i, "ntp_loss": 1 / (i + 1), "alignment_loss": 0.5} for i in range(5)] + [{"step": 5, "x": 1}]
    loss_curves(history, tmp_path / "curves.png", weight)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (curves * 750, 510) and len(picture.convert("RGB").getcolors(10**6)) > 10
    loss_curves([{"step": 1}], tmp_path / "none.png", weight)
    assert not (tmp_path / "none.png").exists()

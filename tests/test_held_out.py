"""The report at the end of a training and its ten samples, with answers that the tests choose."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from made_records import record
from PIL import Image

from experiments.held_out_naming import naming_report
from pointalign import assets
from pointalign.evaluation import held_out, naming
from pointalign.evaluation.choices import Question
from pointalign.evaluation.held_out import PER_KIND, HeldOutReport, limited
from pointalign.evaluation.samples import (
    KINDS,
    NAMES,
    answer_samples,
    sample_questions,
    samples_picture,
    samples_table,
)
from pointalign.evaluation.tasks import embedded_objects

NOUNS = ("bench", "cactus", "lamp", "sofa", "unicorn")


@pytest.fixture(scope="module")
def objects(tmp_path_factory, clouds):
    """Test and training objects of 20 families each, as many of every noun; the training part lacks unicorns."""
    folder = tmp_path_factory.mktemp("furniture")
    (folder / "clouds").mkdir()
    records = []
    for number in range(80):
        noun, split = NOUNS[number % 5], ("test", "train")[number // 40]
        if (noun, split) == ("unicorn", "train"):
            continue
        # of different proportions and two colours, so that there are questions of every kind
        height = (2.5 if number % 3 else 0.4) * (1 + number / 100)
        points = clouds[number % len(clouds)][:, :3] * [1, height, 1]
        points = np.hstack([points, np.tile([(0.9, 0.1, 0.1), (0.1, 0.2, 0.9)][number % 2], (len(points), 1))])
        extra = {"object_id": f"object-{number}", "split": split, "family": f"family {number // 2}"}
        records.append(record(points, noun, **extra))
        np.save(folder / "clouds" / f"object-{number}_8192.npy", points.astype(np.float32))
    (folder / "objects.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def answer(monkeypatch):
    """Lets the test answer: `answer.to(cloud, question)` is called in place of a model."""
    given = SimpleNamespace(to=lambda cloud, question: "Yes.")

    def ask(model, processor, clouds, questions, *_, **__):
        return [given.to(shown[0], question) for shown, question in zip(clouds, questions, strict=True)]

    monkeypatch.setattr(naming, "ask", ask)
    return given


@pytest.fixture
def report(objects, answer, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "embedded_objects", lambda fold=None: objects)
    monkeypatch.setattr(held_out, "load", lambda exported: (None, None, "hash"))
    monkeypatch.setattr(naming, "nearest_by_chamfer", lambda queries, *_: np.zeros(len(queries), dtype=int))
    return HeldOutReport(None, "test", tmp_path)


def test_objects_not_asked_before_training_are_not_counted_as_wrong(report, answer, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(held_out, "BEFORE", 2)
    answer.to = lambda cloud, question: "This is a sofa."
    report.before(None, None)
    report.after(tmp_path / "model")
    content = json.loads((tmp_path / "accuracy.json").read_text())
    objects = [entry for entry in content["objects"] if entry["noun_in_training"]]
    right = [entry["truth"] == "sofa" for entry in objects if "model before training" not in entry["not asked"]]
    assert len(right) == 2 and len(objects) > 2
    before = content["accuracy"]["model before training"]["all"]
    assert before["count"] == 2 and before["mean"] == sum(right) / 2
    assert content["accuracy"]["model"]["all"]["count"] == len(objects)
    assert "(n=2)" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("model before"))
    pooled = naming_report(objects, list(content["accuracy"])).as_dict()
    assert pooled["accuracy"]["model before training"]["all"] == before


def test_the_report_names_known_objects_beside_the_baselines(report, answer, tmp_path, capsys):
    test = report.held_out
    known = [noun for noun in test.labels if noun != "unicorn"]
    nouns = {cloud.tobytes(): noun for cloud, noun in zip(test.clouds, test.labels, strict=True)}
    answer.to = lambda cloud, question: "This is a sofa."
    report.before(None, None)
    answer.to = lambda cloud, question: f"This is a {nouns.get(cloud.tobytes(), 'sofa')}."  # turned clouds are unknown
    report.after(tmp_path / "model")
    content = json.loads((tmp_path / "accuracy.json").read_text())
    shares = {name: parts["noun in training"]["mean"] for name, parts in content["accuracy"].items()}
    assert list(shares) == [
        "model before training",
        "model",
        "model, random yaw",
        "model, shuffled clouds",
        "majority class",
        "1-NN Chamfer, best of 16 yaws",
    ]
    assert shares["model"] == 1 and shares["model before training"] == shares["model, random yaw"] == 1 / 4
    assert shares["majority class"] == 1 / 4 and shares["model, shuffled clouds"] < 1
    assert all(parts["all"]["count"] == len(known) for parts in content["accuracy"].values())
    rows = {row["object_id"]: row for row in content["objects"]}
    assert set(rows) == set(test.ids) and content["split"] == "test"
    for name, noun in zip(test.ids, test.labels, strict=True):
        row = rows[name]
        assert (row["truth"], row["noun_in_training"]) == (noun, noun != "unicorn")
        assert ("model" in row["right"]) == (noun != "unicorn")
        assert noun != "unicorn" or row["answer"] == "This is a unicorn."
    printed = capsys.readouterr().out
    assert (
        "model, shuffled clouds" in printed
        and "guessing  answered yes  balanced" in printed
        and " right; drawn" in printed
    )


def test_who_always_answers_yes_is_right_about_half_and_it_shows(report, answer, tmp_path):
    answer.to = lambda cloud, question: "Yes."
    report.after(tmp_path / "model")
    kinds = json.loads((tmp_path / "accuracy.json").read_text())["kinds"]
    asked_yes = {kind for kind, row in kinds.items() if "yes_rate" in row}
    assert {"noun", "main colour", "taller or wider"} <= asked_yes
    for kind in asked_yes:
        assert kinds[kind]["yes_rate"] == 1 and kinds[kind]["mean"] == kinds[kind]["chance"] == 0.5, kind
        assert kinds[kind]["balanced"] == 0.5, kind
    for kind, chance in {"longest side": 1 / 3, "aspect bucket": 1 / 4, "two clouds": 1 / 2}.items():
        assert kinds[kind]["mean"] == 0 and kinds[kind]["chance"] == chance, kind
    assert kinds["colour"]["chance"] < 0.2


def test_a_kind_is_cut_to_the_same_number_of_yes_and_no():
    def asked(kind, label, choices, count):
        return [Question(f"{kind} {label} {i}", ("a",), "?", label, label, "f", kind, choices) for i in range(count)]

    yes_no = ("yes", "no")
    cut = limited(
        asked("noun", "yes", yes_no, 50) + asked("noun", "no", yes_no, 50) + asked("side", "width", ("width",), 50)
    )
    counts = {(kind, label): sum((q.kind, q.label) == (kind, label) for q in cut) for kind, label in
              (("noun", "yes"), ("noun", "no"), ("side", "width"))}  # fmt: skip
    assert counts == {("noun", "yes"): PER_KIND // 2, ("noun", "no"): PER_KIND // 2, ("side", "width"): PER_KIND}
    few = asked("noun", "yes", yes_no, 3)
    assert limited(few) == few


def test_samples_are_of_every_kind_and_of_different_families(objects):
    test = embedded_objects(objects, "test")
    drawn = sample_questions(test)
    assert [question.kind for question in drawn] == ["name"] * NAMES + list(KINDS)
    assert len({question.family for question in drawn}) == len(drawn) == 10
    assert drawn == sample_questions(test) != sample_questions(test, seed=1)


def test_samples_are_counted_and_what_cannot_be_right_is_marked(objects, answer, tmp_path):
    test = embedded_objects(objects, "test")
    nouns = {test.cloud(name).tobytes(): noun for name, noun in zip(test.ids, test.labels, strict=True)}
    seed = next(s for s in range(50) if "unicorn" in {q.label for q in sample_questions(test, s)[:NAMES]})

    answer.to = lambda cloud, question: "Nothing."
    samples = answer_samples(None, None, test, seed)
    impossible = [sample for sample in samples if not sample.possible]
    assert impossible and {sample.question.label for sample in impossible} == {"unicorn"}
    table = samples_table(samples)
    assert table.count("impossible: noun not in training") == len(impossible)
    assert f"\n0 of {10 - len(impossible)} right" in table and table.count("| wrong") == 10 - len(impossible)

    answer.to = lambda cloud, question: f"This is a {nouns[cloud.tobytes()]}."
    named = answer_samples(None, None, test, seed)
    right = sum(sample.right for sample in named)
    assert [sample.right for sample in named[:NAMES]] == [True] * NAMES, "an unknown noun may be right after all"
    assert f"\n{right} of 10 right" in samples_table(named)
    assert len(re.findall(r"^\| .* \| right \|$", samples_table(named), re.MULTILINE)) == right

    samples_picture(samples, test, tmp_path / "answers.png")
    with Image.open(tmp_path / "answers.png") as picture:
        assert picture.size == (1500, 640) and len(picture.convert("RGB").getcolors(10**6)) > 100

"""Ablations on names and geometry: batches, scores of the evaluation, two primary measures, full fine-tuning."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import tiny_model
from made_records import box, record

from experiments.ablation import ablation, comparison, conclusion, questions
from experiments.ablation import train_arm as arms
from experiments.ablation.measure import GEOMETRY, PRIMARY, SECOND
from experiments.ablation.questions import TrainingQuestions, ask_geometry, by_kind
from experiments.ablation.train_arm import Arm, Schedule, target_table, train_arm, weights_hash
from pointalign import build
from pointalign.embedded.annotations import conversations
from pointalign.evaluation import metrics, statistics
from pointalign.evaluation.answering import Answers
from pointalign.evaluation.choices import chosen
from pointalign.evaluation.tasks import EncodedObjects, build_tasks
from pointalign.model_options import ModelOptions
from pointalign.models import PointAlignProcessor

SIDES = [(1, 2, 1.5), (2, 1, 1.4), (1, 3, 1.2), (3, 1, 2), (1, 1, 2), (1.6, 1, 1), (1, 2.2, 3), (2.5, 1.2, 1)]
SHARES = {"name": 1.0, "quiz": 2.0, "two clouds": 1.0}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    colours = [(0.9, 0.1, 0.1), (0.1, 0.1, 0.9)]
    return [
        record(
            box(*sides, count=512, colour=colours[place % 2]),
            ("bench", "cactus")[place // 2 % 2],
            object_id=f"object {place}",
            family=f"family {place}",
            catalogue_scale=False,
        )
        for place, sides in enumerate(SIDES)
    ]


def encoded(records: list[dict]) -> EncodedObjects:
    generator = torch.Generator().manual_seed(0)
    nouns = [item["head_noun"] for item in records]
    return EncodedObjects(
        [item["object_id"] for item in records],
        lambda name: np.zeros((1, 6), dtype=np.float32),
        nouns,
        nouns,
        [item["family"] for item in records],
        records=records,
        features=torch.randn(len(records), 4, 16, generator=generator),
        encoder=torch.randn(len(records), 4, 16, generator=generator),
        conversations=[[("What is this?", "It is there.")] for _ in records],
        properties={"noun": nouns},
    )


@pytest.fixture(scope="module")
def annotations(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("annotations") / "train.json"
    path.write_text(json.dumps(conversations(records)))
    return path


def test_batches_are_of_one_kind_and_of_different_objects(records, annotations):
    train = encoded(records)
    asked = TrainingQuestions(annotations, train, SHARES)
    rng = np.random.default_rng(0)
    batches = [asked.draw(rng, 2, range(len(records))) for _ in range(200)]
    kinds = [next(kind for kind, samples in asked.samples.items() if batch[0] in samples) for batch in batches]
    assert all(sample in asked.samples[kind] for kind, batch in zip(kinds, batches, strict=True) for sample in batch)
    for kind, share in SHARES.items():
        assert kinds.count(kind) / 200 == pytest.approx(share / 4, abs=0.1)
    for kind, batch in zip(kinds, batches, strict=True):
        rows = [row for sample in batch for row in sample.rows]
        assert len(rows) == len(set(rows)) == (4 if kind == "two clouds" else 2)
        assert not any("<point>" in text for sample in batch for turn in sample.turns for text in turn)
    [sample, _] = batches[kinds.index("name")]
    assert sample.turns == (("What is this?", f"This is a {records[sample.rows[0]]['head_noun']}."),)
    assert {row for sample in asked.draw(rng, 1, [3, 5]) for row in sample.rows} <= {3, 5}
    with pytest.raises(ValueError, match="expected 2 conversations about different objects"):
        TrainingQuestions(annotations, train, {"two clouds": 1.0}).draw(rng, 2, [0, 1, 2])
    with pytest.raises(ValueError, match="no conversation of kind 'two clouds' is about the training objects"):
        TrainingQuestions(annotations, train.subset([0]), {"two clouds": 1.0})


def full_model(seed: int = 0):
    model = tiny_model(seed=seed)
    build.set_trainable(model, [])
    model.model.language_model.requires_grad_(True)
    return model


def test_arms_of_one_seed_are_asked_the_same_and_wrong_targets_are_wrong(processor, records, annotations, monkeypatch):
    train = encoded(records)
    asked, seen = TrainingQuestions(annotations, train, SHARES), []
    targets = []
    original, target = arms.conversation_batch, arms.TargetFromBatch.target
    monkeypatch.setattr(arms, "conversation_batch", lambda *given: seen.append(original(*given)) or seen[-1])
    monkeypatch.setattr(arms.TargetFromBatch, "target", lambda *given: targets.append(target(*given)) or targets[-1])
    for arm, weight in ((Arm(weight=0.0), 0.0), (Arm(source="other"), 1.0)):
        train_arm(full_model(), processor, arm, weight, train, Schedule(6, 2, 1e-3, 900), 1, "arm", asked)
    plain, other = seen[:6], seen[6:]
    for batch, same in zip(plain, other, strict=True):
        assert batch["input_ids"].tolist() == same["input_ids"].tolist()
        assert torch.equal(batch["query_features"], same["query_features"])
    table = target_table(Arm(source="other"), train, 1)
    for batch, wrong in zip(other, (tokens.view(-1, 4, 16) for tokens in targets), strict=True):
        assert all(any(torch.equal(tokens, row) for row in table) for tokens in wrong)
        assert not any(torch.equal(*pair) for pair in zip(batch["query_features"], wrong, strict=True))
    assert {len(batch["query_features"]) for batch in plain} == {2, 4}  # also questions about two clouds


def test_geometry_is_asked_and_counted_as_in_the_evaluation(processor, records, monkeypatch):
    held_out = encoded(records)
    [task] = build_tasks("geometry", held_out)
    said = ["It is wider.", "The first is one, the second is three, so the second.", "The height.", "It is so.",
            "It is taller than it is wide, so yes.", "It is mostly red.", "It is square, so no."]  # fmt: skip
    texts = [said[place % len(said)] for place in range(len(task.questions))]
    left = iter(texts)
    monkeypatch.setattr(
        PointAlignProcessor, "answers", lambda self, generated, start: [next(left) for _ in range(len(generated))]
    )
    prompts = []
    original = questions.prompt_batch
    monkeypatch.setattr(questions, "prompt_batch", lambda *given: prompts.append(original(*given)) or prompts[-1])
    asked = ask_geometry(tiny_model(), processor, held_out, blind=False)
    expected = metrics.score(task, Answers(texts, None), {})
    assert asked["right"] == expected["accuracy"] and 0 < sum(asked["right"]) < len(texts)
    assert asked["kinds"] == [question.kind for question in task.questions]
    rows = [held_out.ids.index(name) for question in task.questions for name in question.object_ids]
    assert torch.equal(torch.cat([batch["query_features"] for batch in prompts]), held_out.features[rows])
    figures, summary = by_kind([asked, asked]), metrics.summarise(task, expected)
    assert {"taller or wider", "longest side", "aspect bucket", "colour", "two clouds"} <= set(figures)
    for kind, row in figures.items():
        theirs = summary[f"accuracy, {kind}"]
        assert (row["accuracy"], row["majority"]) == pytest.approx((theirs["mean"], theirs["majority"]))
        assert row.get("yes_rate") == pytest.approx(theirs.get("yes_rate"))
    assert chosen(texts[0], task.questions[0].choices) == asked["said"][0]


def test_every_run_of_full_fine_tuning_starts_from_the_same_weights(
    processor, records, annotations, tmp_path, monkeypatch
):
    train = encoded(records)
    asked, model = TrainingQuestions(annotations, train, {"name": 1.0}), full_model()
    trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("model.language_model.")}
    start = weights_hash(model)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".language_model." not in name}
    assert frozen
    recipe = ablation.Recipe(
        model=ModelOptions(train=[], lora_rank=0, dtype="float32"),
        full_fine_tuning=True,
        questions={"name": 1.0},
        schedule=Schedule(steps=1, batch_size=2),
        arms={"no alignment": Arm(weight=0.0), "alignment": Arm()},
        seeds=2,
    )
    starts, ends = [], []

    def run(model, processor, recipe, arm, seed, train, held_out, questions):
        starts.append(weights_hash(model))
        weight = recipe.weight if recipe.arms[arm].weight is None else 0.0
        train_arm(model, processor, recipe.arms[arm], weight, train, recipe.schedule, seed, arm, questions)
        ends.append(weights_hash(model))
        return {"mean": {PRIMARY: 0.0}}

    monkeypatch.setattr(ablation, "run_arm", run)
    ablation.run_missing(tmp_path, recipe, recipe.plan(), model, processor, train, train, asked)
    assert starts == [start] * 4 and len({start, *ends}) == 5
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in frozen.items())
    kept = [json.loads(path.read_text())["start"] for path in (tmp_path / "runs").glob("*.json")]
    assert kept == [start] * 4

    original = ablation.trainable_state
    monkeypatch.setattr(ablation, "trainable_state", lambda model: dict(list(original(model).items())[1:]))
    with pytest.raises(RuntimeError, match="would start from other weights"):
        ablation.run_missing(tmp_path / "other", recipe, recipe.plan(), model, processor, train, train, asked)
    path = comparison.run_file(tmp_path, "alignment", 1)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"start": "0" * 16}))
    with pytest.raises(ValueError, match="started from different weights"):
        comparison.read_runs(tmp_path, recipe)


def test_two_primary_measures_are_corrected_together(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    kinds = [("taller or wider", "colour")[place % 2] for place in range(80)]

    def run(gain: float, seed: int) -> dict:
        rng = np.random.default_rng(seed)
        names = (rng.random(40) < 0.5).astype(float)
        right = (rng.random(80) < 0.4 + gain).astype(float)
        said = ["yes" if value else "no" for value in right]
        geometry = {"kinds": kinds, "families": [str(place // 2) for place in range(80)], "right": right.tolist()}
        labels = ["yes" if kind == "taller or wider" else "red" for kind in kinds]
        return {
            "scores": {PRIMARY: rng.normal(size=40).tolist(), SECOND: names.tolist(), GEOMETRY: right.tolist()},
            "families": [str(place) for place in range(40)],
            "geometry": geometry | {"labels": labels, "said": said},
            "layer": 1,
            "similarity": {"1": {"centred cosine": 0.1, "retrieval@1": 0.1, "CKA": 0.1}},
            "probes": {"A: colour": {"Q-Former": 0.9, "2": 0.9}},
            "few_shot": {},
        }

    gains = {"no alignment": 0.0, "alignment": 0.5, "another object's target": 0.0}
    runs = {name: {seed: run(gain, 10 * place + seed) for seed in range(5)}
            for place, (name, gain) in enumerate(gains.items())}  # fmt: skip
    primary = [SECOND, GEOMETRY]
    rows = comparison.compare_arms(runs, "no alignment", {}, primary)
    tests = [row["differences"][metric] for metric in primary for row in rows[1:]]
    assert [test["p_holm"] for test in tests] == statistics.holm([test["p"] for test in tests])
    apart = comparison.compare_arms(runs, "no alignment", {}, [PRIMARY])
    assert apart[1]["differences"][GEOMETRY]["p_holm"] < tests[2]["p_holm"] < 0.05
    shown = {name: Arm(source="other" if "target" in name else "own") for name in gains}
    text = "\n".join(conclusion.conclusion(rows, "no alignment", shown, primary))
    assert "40 objects: generated accuracy" in text and "80 questions: geometry accuracy" in text
    assert "cannot tell alignment from no alignment" in text and "Shown: alignment raises the geometry accuracy" in text
    assert "Alignment beats another object's target." in text and text.count("Likelihood margin") == 1
    tables = "\n".join(comparison.tables(rows, "no alignment", primary))
    assert "| generated accuracy, points |" in tables and "| geometry accuracy, points |" in tables
    assert "taller or wider (n=40)" in tables and "(Yes " in tables and "| the most frequent answer |" in tables


def test_both_forms_of_the_study_differ_in_what_trains_and_how_fast(tmp_path):
    lora, full = (ablation.read_recipe(name) for name in ("language_model", "language_model_full"))
    different = {key for key, value in asdict(lora).items() if value != asdict(full)[key]}
    assert different == {"model", "full_fine_tuning", "schedule", "output"}
    assert lora.primary == [SECOND, GEOMETRY] and lora.model.train == ["lora"] and full.full_fine_tuning
    for recipe in (lora, full):  # a control at another lambda would say nothing of the target
        assert recipe.arms["another object's target"] == Arm(source="other"), recipe.output
    assert lora.schedule.learning_rate > full.schedule.learning_rate
    for changes, said in (
        ({"model": ModelOptions(train=["lora"], lora_rank=0, dtype="float32")}, "needs model.train"),
        ({"model": ModelOptions(train=[], lora_rank=0)}, "needs model.dtype=float32"),
        ({"model": ModelOptions(train=[], lora_rank=0, dtype="float32"), "decoder": {"hidden_size": 8}}, "remove this"),
    ):
        with pytest.raises(ValueError, match=said):
            ablation.Recipe(full_fine_tuning=True, arms={"no alignment": Arm(weight=0.0)}, **changes)
    with pytest.raises(ValueError, match="expected of likelihood margin, generated accuracy"):
        ablation.Recipe(primary=[GEOMETRY], arms={"no alignment": Arm(weight=0.0)})
    with pytest.raises(ValueError, match="name another folder for its results with --output"):
        ablation.run_ablation("language_model", 1, None, steps=3)
    # what earlier studies meant, their files still say
    assert not {"questions", "primary", "full_fine_tuning"} & set(ablation.definition(ablation.read_recipe("objects")))
    assert {"questions", "primary"} <= set(ablation.definition(lora))

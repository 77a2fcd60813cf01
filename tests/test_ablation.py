"""Probes and ablation arms: they measure what they claim, are paired by seed, and resume."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_model

from experiments.ablation import __main__ as command
from experiments.ablation import ablation, few_shot
from experiments.ablation import train_arm as arms
from experiments.ablation.measure import PRIMARY, SECOND, measure
from experiments.ablation.train_arm import (
    Arm,
    Schedule,
    aligned_model,
    release_span,
    target_table,
    train_arm,
    training_batch,
)
from pointalign import build
from pointalign.alignment import AlignmentConfig, LayerTap
from pointalign.evaluation import probe, statistics, tasks
from pointalign.evaluation.probe import linear_cka, point_states, ridge_probe, similarity
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.model_options import ModelOptions
from pointalign.trainer import AlignedModel


def colour_objects(count: int = 12, seed: int = 0) -> EncodedObjects:
    """Objects whose Q-Former tokens hold a colour and a size; answers name the colour."""
    rng = np.random.default_rng(seed)
    colours = [("red", "blue", "green")[i % 3] for i in range(count)]
    sizes = rng.uniform(0, 1, count)
    features = torch.from_numpy(rng.normal(0, 0.3, (count, 4, 16))).float()
    for i, (colour, size) in enumerate(zip(colours, sizes, strict=True)):
        features[i, :, ("red", "blue", "green").index(colour)] += 2
        features[i, :, 5] += size
    candidates = {colour: f"It is {colour}." for colour in ("red", "blue", "green")}
    answers = [candidates[colour] for colour in colours]
    clouds = {str(i): np.zeros((1, 6), dtype=np.float32) for i in range(count)}
    return EncodedObjects(
        list(clouds),
        clouds.__getitem__,
        answers,
        colours,
        candidates=candidates,
        features=features,
        encoder=features[..., :16] + 1,
        conversations=[[("What is this?", answer)] for answer in answers],
        properties={"noun": colours, "size": sizes.tolist()},
    )


def adapted(seed: int = 0):
    model = tiny_model()
    torch.manual_seed(seed)
    build.add_adapters(model, ModelOptions(lora_rank=4, lora_alpha=8, lora_dropout=0.1))
    build.set_trainable(model, ["lora", "modality_projector"])
    return model


def test_ridge_probe_reads_what_is_there():
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(200, 10)), rng.normal(size=(100, 10))
    direction = rng.normal(size=10)
    assert ridge_probe(x, (x @ direction).tolist(), z, (z @ direction).tolist(), False) > 0.99
    kinds = lambda a: ["up" if v > 0 else "down" for v in a @ direction]  # noqa: E731
    assert ridge_probe(x, kinds(x), z, kinds(z), True) > 0.9
    noise = ridge_probe(x, rng.normal(size=200).tolist(), z, rng.normal(size=100).tolist(), False)
    assert noise < 0.1  # nothing to read: no better than the mean
    wide = rng.normal(size=(40, 500))
    few = ridge_probe(wide, wide[:, 0].tolist(), rng.normal(size=(40, 500)), rng.normal(size=40).tolist(), False)
    assert few < 0.1 and few > -1.0  # more features than rows does not break it


def test_cka_is_invariant_and_separates():
    torch.manual_seed(0)
    x = torch.randn(60, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1.0, abs=1e-6)
    assert linear_cka(x, torch.randn(60, 8)) < 0.3


def test_similarity_ignores_what_all_clouds_share():
    torch.manual_seed(0)
    shared = 5 * torch.randn(4, 16)
    own, held = torch.randn(60, 4, 16), torch.randn(20, 4, 16)
    same = similarity(own @ torch.randn(16, 16), own + shared, held, held + shared)
    linear = torch.randn(16, 24)
    good = similarity(own @ linear, own + shared, held @ linear, held + shared)
    none = similarity(torch.randn(60, 4, 24), own + shared, torch.randn(20, 4, 24), held + shared)
    assert good["retrieval@1"] > 0.9 and good["centred cosine"] > 0.6 and good["CKA"] > 0.5
    assert none["retrieval@1"] < 0.3 and abs(none["centred cosine"]) < 0.2
    assert none["raw cosine"] > none["centred cosine"] + 0.3  # high, although nothing of the clouds is there
    assert set(same) == set(good)


def test_point_states_are_the_models_hidden_states(processor):
    model, data = tiny_model(), colour_objects(5)
    means, whole = point_states(model, processor, data.features, [0, 2, 4], [2], batch_size=2)
    assert means[2].shape == (5, 32) and whole[2].shape == (5, 4, 32)
    batch = training_batch(processor, data, np.array([3]), np.random.default_rng(0), 99, False)
    batch.pop("labels")
    with torch.inference_mode():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        projected = model.model.modality_projector(data.features[3:4])
    torch.testing.assert_close(whole[2][3], hidden[2][batch["point_mask"]], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(means[0][3], projected[0].mean(0), atol=1e-5, rtol=1e-4)


ROWS = np.array([4, 1, 7])


def losses_and_gradient(model, processor, arm: Arm, weight: float) -> tuple[dict, torch.Tensor]:
    """Of one batch, with dropout from a fixed seed."""
    data = colour_objects()
    batch = training_batch(processor, data, ROWS, np.random.default_rng(0), 99, False)
    aligned = aligned_model(model, arm, weight, seed=0).train()
    if isinstance(aligned, arms.TargetFromBatch):
        batch["target_tokens"] = target_table(arm, data, 0)[np.roll(ROWS, 1) if arm.source == "other" else ROWS]
    model.zero_grad()
    torch.manual_seed(0)
    losses = aligned(**batch)
    losses["loss"].backward()
    return losses, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_method_arm_trains_with_the_products_losses(processor, monkeypatch):
    data, batches = colour_objects(), []
    original = arms.training_batch
    monkeypatch.setattr(arms, "training_batch", lambda *inputs: batches.append(original(*inputs)) or batches[-1])
    schedule = Schedule(steps=1, batch_size=4)
    history = train_arm(adapted(), processor, Arm(layer=[2, 3]), 0.5, data, schedule, 7, "alignment")
    expected = AlignedModel(adapted(), AlignmentConfig(weight=0.5, layer=[2, 3], seed=7)).train()
    torch.manual_seed(7)
    losses = expected(**batches[0])
    assert history["ntp"] == [losses["ntp_loss"].item()]
    assert history["alignment"] == [losses["alignment_loss"].item()] != [0.0]
    assert type(aligned_model(adapted(), Arm(), 0.5, 0)) is AlignedModel


def test_each_arm_is_compared_with_its_targets(processor, monkeypatch):
    data, model = colour_objects(), adapted()
    compared = []
    original = AlignedModel.target, arms.TargetFromBatch.target
    for kind, target in zip((AlignedModel, arms.TargetFromBatch), original, strict=True):
        monkeypatch.setattr(kind, "target", lambda *inputs, t=target: compared.append(t(*inputs)) or compared[-1])

    def targets(**changes) -> torch.Tensor:
        losses_and_gradient(model, processor, Arm(**changes), 0.5)
        return compared[-1].view(3, 4, -1)

    assert torch.equal(targets(), data.features[ROWS])
    assert torch.equal(targets(target="encoder"), data.encoder[ROWS])
    assert torch.equal(targets(source="other"), data.features[[7, 4, 1]])
    assert torch.equal(targets(source="mean"), data.features.mean(0).expand(3, -1, -1))
    random = targets(source="random")
    assert torch.equal(random, targets(source="random")) and not torch.allclose(random, data.features[ROWS])
    assert targets(target="llm:4").shape == (3, 4, 32) and len(compared) == 7


def test_the_release_arm_aligns_the_places_of_the_release(processor, monkeypatch):
    masks = []
    original = LayerTap.capture
    monkeypatch.setattr(LayerTap, "capture", lambda tap, mask: masks.append(mask) or original(tap, mask))
    batch = training_batch(processor, colour_objects(), ROWS, np.random.default_rng(0), 99, False)
    for span in ("points", "release"):
        losses_and_gradient(adapted(), processor, Arm(span=span), 0.5)
    assert torch.equal(masks[0], batch["point_mask"])
    assert torch.equal(masks[1], release_span(batch["labels"], 4)) and not masks[1][batch["labels"] != -100].any()


def test_arms_differ_in_the_alignment_loss_alone(processor):
    model = adapted()
    plain, plain_gradient = losses_and_gradient(model, processor, Arm(weight=0.0), 0.0)
    attached, gradient = losses_and_gradient(model, processor, Arm(), 0.5)
    detached, detached_gradient = losses_and_gradient(model, processor, Arm(states="detached"), 0.5)
    assert plain["alignment_loss"] == 0 < attached["alignment_loss"] == detached["alignment_loss"]
    assert torch.equal(detached_gradient, plain_gradient)  # a detached loss does not reach the language model
    assert (gradient - plain_gradient).norm() > 1e-3 * plain_gradient.norm()
    for changes in ({"source": "other"}, {"source": "mean"}, {"source": "random"}, {"span": "release"}, {}):
        losses, other_gradient = losses_and_gradient(model, processor, Arm(**changes), 0.5)
        assert losses["ntp_loss"] == plain["ntp_loss"]  # the same dropout: arms of a seed are paired
        assert bool(losses["alignment_loss"] == attached["alignment_loss"]) == (changes == {})
        assert torch.equal(other_gradient, gradient) == (changes == {})


def test_arms_of_one_seed_see_the_same_data(processor, monkeypatch):
    batches = []
    original = arms.training_batch

    def watched(processor, train, rows, *rest):
        batch = original(processor, train, rows, *rest)
        batches.append((rows.tolist(), batch["input_ids"].tolist()))
        return batch

    monkeypatch.setattr(arms, "training_batch", watched)
    schedule = Schedule(steps=3, batch_size=4)
    runs = ((Arm(weight=0.0), 0.0, 1), (Arm(), 0.5, 1), (Arm(source="random"), 0.5, 1), (Arm(), 0.5, 2))
    for arm, weight, seed in runs:
        train_arm(adapted(), processor, arm, weight, colour_objects(), schedule, seed, "arm")
    first, second, third, other_seed = (batches[start : start + 3] for start in range(0, 12, 3))
    assert first == second == third and all(a != b for a, b in zip(first, other_seed, strict=True))


def test_alignment_training_raises_what_can_be_read(processor, monkeypatch):
    monkeypatch.setattr(probe, "FIT_STEPS", 60)
    data, held_out = colour_objects(30), colour_objects(12, seed=1)
    aligned, plain = adapted(), adapted()
    schedule = Schedule(steps=40, batch_size=8, learning_rate=3e-3)
    history = train_arm(aligned, processor, Arm(layer=[2]), 3.0, data, schedule, 0, "aligned")
    train_arm(plain, processor, Arm(weight=0.0), 0.0, data, schedule, 0, "plain")
    assert np.mean(history["alignment"][-5:]) < 0.7 * np.mean(history["alignment"][:5])
    assert np.mean(history["ntp"][-5:]) < np.mean(history["ntp"][:5])
    cosines = [
        probe.probe_layers(model, processor, data, held_out, [2], [2])["similarity"]["2"]["centred cosine"]
        for model in (aligned, plain)
    ]
    assert cosines[0] > cosines[1] + 0.04  # without an alignment loss both are the same model
    scores = measure(aligned, processor, held_out, blind=False)
    assert len(scores[PRIMARY]) == 12 and set(scores[SECOND]) <= {0.0, 1.0}


RECIPE = """
data: furniture
model: {train: [lora]}
schedule: {steps: 2, batch_size: 4}
seeds: 2
layers: 3
arms:
  no alignment: {weight: 0.0}
  alignment: {}
  "deep target": {target: "llm:4", seeds: 1}
"""


def test_an_ablation_resumes_and_compares_pairs(processor, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(probe, "FIT_STEPS", 5)
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    monkeypatch.setattr(build, "build_model", lambda options, data: (adapted(), processor))
    monkeypatch.setattr(tasks, "load", lambda *_: (colour_objects(20), colour_objects(9, seed=1)))
    arguments = [str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]
    original, runs = ablation.run_arm, []

    def counted(*inputs):
        runs.append(inputs[3:5])
        if len(runs) == 3:
            raise KeyboardInterrupt
        return original(*inputs)

    monkeypatch.setattr(ablation, "run_arm", counted)
    assert command.main(arguments) == 130
    assert command.main(arguments) == 0
    assert runs == [("no alignment", 0), ("alignment", 0), ("no alignment", 1), ("no alignment", 1),
                    ("alignment", 1), ("deep target", 0)]  # fmt: skip
    assert command.main(arguments) == 0 and len(runs) == 6  # nothing is left to do
    result = json.loads((tmp_path / "out" / "ablation.json").read_text())
    rows = {row["arm"]: row for row in result["arms"]}
    assert "differences" not in rows["no alignment"]
    difference = rows["alignment"]["differences"][PRIMARY]
    kept = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*.json")}
    means = {name: np.mean(run["scores"][PRIMARY]) for name, run in kept.items()}
    by_hand = np.mean([means[f"alignment-{seed}"] - means[f"no-alignment-{seed}"] for seed in (0, 1)])
    assert (
        difference["mean"] == pytest.approx(by_hand) and difference["detectable"] > 0 and 0 < difference["p_holm"] <= 1
    )
    assert len(rows["deep target"]["differences"][PRIMARY]["per_seed"]) == 1
    assert (tmp_path / "out" / "layers.png").stat().st_size > 10_000 and (tmp_path / "out" / "differences.png").exists()
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("steps: 2", "steps: 3"))
    assert command.main(arguments) == 1 and "another recipe (schedule changed)" in capsys.readouterr().err


def test_processes_share_the_runs_of_an_ablation(processor, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.setattr(build, "build_model", lambda options, data: (adapted(), processor))
    monkeypatch.setattr(tasks, "load", lambda *_: (colour_objects(20), colour_objects(9, seed=1)))
    monkeypatch.setattr(ablation, "summarise", lambda folder, recipe: "")
    runs: list[tuple[str, int]] = []

    def run(model, processor, recipe, arm, seed, *_):
        runs.append((arm, seed))
        if runs == [("no alignment", 0)]:  # meanwhile another process goes through the same plan
            ablation.run_ablation(str(tmp_path / "recipe.yaml"), None, str(tmp_path / "out"))
        return {"mean": {PRIMARY: 0.0}}

    monkeypatch.setattr(ablation, "run_arm", run)
    ablation.run_ablation(str(tmp_path / "recipe.yaml"), None, str(tmp_path / "out"))
    assert sorted(runs) == sorted(ablation.read_recipe(str(tmp_path / "recipe.yaml")).plan())


def test_few_shots_teach_and_leave_no_trace(processor, monkeypatch):
    train, held = colour_objects(40), colour_objects(12, seed=1)
    for part in (train, held):
        part.properties = {"B: lopsided": [colour == "red" for colour in part.properties["noun"]]}
    monkeypatch.setattr(few_shot, "STEPS", 80)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ablation.with_decoder(tiny_model(), sizes | {"num_key_value_heads": 2}, seed=0)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    schedule = Schedule(batch_size=8, learning_rate=1e-2)
    found = few_shot.few_shot(model, processor, train, held, [36], schedule, 0)
    assert found.keys() == {"B: lopsided"} and found["B: lopsided"]["36"] > 0.9  # two thirds by always saying no
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_decoder_from_nothing_keeps_the_point_branch(clouds):
    model = tiny_model()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    fresh = ablation.with_decoder(model, sizes | {"num_key_value_heads": 2}, seed=0)
    points = torch.from_numpy(np.stack([cloud[:256] for cloud in clouds[:2]]))
    assert torch.equal(fresh.get_qformer_features(points), model.get_qformer_features(points))
    assert len(fresh.get_decoder().layers) == 3 and fresh.config.text_config.vocab_size == 259
    trained = {name.split(".")[1] for name, one in fresh.named_parameters() if one.requires_grad}
    assert trained == {"language_model", "modality_projector"}
    again = ablation.with_decoder(model, sizes | {"num_key_value_heads": 2}, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_rerun_gives_the_same_numbers(processor, monkeypatch):
    monkeypatch.setattr(probe, "FIT_STEPS", 20)
    recipe = ablation.Recipe(
        schedule=Schedule(steps=2, batch_size=4), arms={"no alignment": Arm(weight=0.0), "a": Arm()}
    )
    train, held_out = colour_objects(), colour_objects(6, 1)
    first, second = (ablation.run_arm(adapted(), processor, recipe, "a", 3, train, held_out) for _ in range(2))
    assert first == second
    recipe.decoder, recipe.layers = {"hidden_size": 32}, 5  # a small decoder: similarity is measured at every layer
    run = ablation.run_arm(adapted(), processor, recipe, "a", 3, train, held_out)
    assert list(run["similarity"]) == [*"01234"]


def test_shipped_recipes_are_readable():
    for name in ("objects", "shapes", "full", "language_model", "language_model_full"):
        recipe = ablation.read_recipe(name)
        assert recipe.arms["alignment"] == Arm() and recipe.arms["no alignment"].weight == 0
    plan = ablation.read_recipe("objects").plan()
    assert plan[:4] == [("no alignment", 0), ("alignment", 0), ("no alignment", 1), ("alignment", 1)]
    assert plan[-1][1] == 1 and len(plan) == len(set(plan)) == 2 * 5 + 3 * 3 + 5 * 2
    with pytest.raises(FileNotFoundError, match="one of full, language_model, language_model_full, objects, shapes"):
        ablation.read_recipe("nothing")
    with pytest.raises(ValueError, match="defined for the qformer target"):
        Arm(source="other", target="encoder")
    with pytest.raises(ValueError, match="blind needs weight 0"):
        Arm(blind=True)


def test_runs_measured_otherwise_are_not_mixed(tmp_path):
    recipe = ablation.read_recipe("objects")
    ours = {"data": "furniture", "arms": {}, "closed_set": "nouns of the training objects"}
    assert "closed_set" in ablation.definition(ablation.Recipe(arms={"no alignment": Arm(weight=0.0)}))
    for earlier in ({"data": "furniture", "arms": {}}, ours | {"probed": 200}):
        (tmp_path / "recipe.json").write_text(json.dumps(earlier))
        with pytest.raises(ValueError, match=r"another recipe \((closed_set|probed) changed\)"):
            ablation.check_definition(tmp_path, ours)
    assert not hasattr(recipe, "probed"), "probes are fitted on all training objects"


def test_probes_are_fitted_on_objects_from_everywhere():
    assert tasks.evenly(10, 4) == [0, 3, 6, 9] and tasks.evenly(3, None) == tasks.evenly(3, 9) == [0, 1, 2]

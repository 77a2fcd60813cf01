"""Stage 1 teaches a new point branch words without touching the language model, and goes on where it was stopped."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from pointalign.embedded import descent, stage1, views
from pointalign.embedded.stage1 import Stage1
from pointalign.embedded.views import TrainingViews, view_facts, view_pose
from pointalign.embedded.words import FactWords

SIDES = {"width": 1.0, "height": 2.0, "depth": 1.5, "category": "kitchen"}
RECORDS = [
    {"object_id": noun, "head_noun": noun, "colors": colours} | SIDES
    for noun, colours in (
        ("bench", {"brown": 1.0}),
        ("cactus", {"green": 1.0}),
        ("extinguisher", {"red": 1.0}),
        ("forklift", {"yellow": 0.5, "black": 0.5}),
    )
]


def train(processor, clouds, encoder_steps, query_steps, rate=1e-2, folder=None, teacher=None, records=RECORDS):
    torch.manual_seed(1)
    model = tiny_model()
    stage = Stage1(model, processor, clouds[: len(records)], records, 4, teacher=teacher)
    stage.train(encoder_steps, query_steps, rate, folder)
    return model, stage


def test_stage_1_learns_and_leaves_the_language_model(processor, clouds):
    before = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
    model, _ = train(processor, clouds, 12, 6)
    after = model.state_dict()
    assert after.keys() == before.keys(), "the encoder's heads stay behind"
    reference = train(processor, clouds, 0, 0)[0].state_dict()
    for name in after:
        if ".language_model." in name:
            assert torch.equal(after[name], reference[name]), name
    for part in ("point_encoder", "point_mlp", "qformer", "query_tokens", "modality_projector"):
        changed = [n for n in after if n.startswith(f"model.{part}") and not torch.equal(after[n], reference[n])]
        assert changed, part
    assert all(parameter.requires_grad for parameter in model.model.qformer.parameters()), "as before the stage"


def test_a_stopped_stage_ends_in_the_same_weights(processor, clouds, tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "SAVE_EVERY", 3)
    complete, _ = train(processor, clouds, 8, 5)

    class Stopped(Exception):
        pass

    def stopped_at(step_to_stop_at, name):
        loss = getattr(Stage1, name)

        def stop(self, step):
            if step == step_to_stop_at:
                raise Stopped
            return loss(self, step)

        return stop

    for name, step in (("encoder_loss", 4), ("query_loss", 8 + 4)):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(Stage1, name, stopped_at(step, name))
            train(processor, clouds, 8, 5, folder=tmp_path)
    resumed, _ = train(processor, clouds, 8, 5, folder=tmp_path)
    for (name, tensor), other in zip(complete.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.fixture(scope="module")
def teacher():
    targets = np.random.default_rng(0).normal(size=(len(RECORDS), 6)).astype(np.float32)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    return dict(zip((record["object_id"] for record in RECORDS), targets, strict=True))


@pytest.fixture(scope="module")
def trained(processor, clouds, teacher):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views, "PROCEDURAL_SHARE", 0.0)  # every step sees the four objects
        return train(processor, clouds, 300, 0, 3e-3, teacher=teacher)


def test_words_are_learned(trained, clouds):
    assert trained[1].predicted_nouns(clouds[:4]) == [record["head_noun"] for record in RECORDS]


def test_a_teacher_is_followed(trained, processor, clouds, teacher):
    stage = trained[1]
    points = processor.feature_extractor(clouds[:4])["point_values"]
    with torch.no_grad():
        predicted = stage.encoder.teacher_head(stage.encoder(points)[2])
    targets = torch.from_numpy(np.stack([*teacher.values()]))
    assert torch.nn.functional.cosine_similarity(predicted, targets, dim=-1).min() > 0.7


def test_queries_learn_what_the_encoder_says_in_tokens_as_long_as_words(processor, clouds):
    torch.manual_seed(1)
    model = tiny_model()
    _, losses = Stage1(model, processor, clouds[:4], RECORDS, 4).train(10, 60, 1e-2)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    with torch.no_grad():
        tokens = model.eval().encode_point_clouds(processor.feature_extractor(clouds[:4])["point_values"]).projected
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert tokens.norm(dim=-1).mean() == pytest.approx(words.item(), rel=0.3)


def test_muon_takes_equal_steps_in_every_direction_and_adamw_takes_the_rest(monkeypatch):
    monkeypatch.setattr(descent, "WEIGHT_DECAY", 0.0)
    torch.manual_seed(0)
    body, head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    slope = torch.linalg.svd(torch.randn(6, 6))[0] @ torch.diag(torch.logspace(0, -1, 6))  # ten times as steep one way
    module = torch.nn.ModuleList([body, head])
    before = [parameter.detach().clone() for parameter in module.parameters()]

    def loss(step: int) -> torch.Tensor:
        return sum((layer.weight * slope).sum() + layer.bias.sum() for layer in (body, head))

    losses = descent.descend(module, [body.weight], loss, 20, 0.01, "test")
    changes = [new.detach() - old for new, old in zip(module.parameters(), before, strict=True)]
    weight, bias, head_weight, head_bias = changes
    assert losses[-1] < losses[0]
    sizes, head_sizes = torch.linalg.svdvals(weight), torch.linalg.svdvals(head_weight)
    assert sizes[0] < 2 * sizes[-1] and head_sizes[0] > 2 * head_sizes[-1]
    assert torch.allclose(bias, head_bias) and bias.abs().min() > 0
    # torch scales Muon's steps to 0.2 of AdamW's root mean square, as AdamW's are in practice; here they are 1
    ratio = weight.square().mean().sqrt() / head_weight.square().mean().sqrt()
    assert ratio == pytest.approx(0.2 * descent.MUON_RATE, rel=0.25)


def test_the_learning_rate_rises_then_falls_to_nearly_nothing():
    rates = [descent.one_cycle(step, 100) for step in range(100)]
    assert max(rates) == 1 and rates.index(1) == 9 and rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True) and 0 < rates[-1] < 0.001
    assert descent.one_cycle(0, 1) == 1


def test_the_closed_form_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    truth, fitted = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    inputs = [torch.randn(4, 8, 5, generator=generator) + 2 for _ in range(10)]
    stage1.fit_linear(fitted, [(batch, truth(batch).detach()) for batch in inputs])
    assert torch.allclose(fitted(inputs[0]), truth(inputs[0]), atol=0.05)


def test_an_unclear_fact_has_no_loss(tokenizer):
    embedding = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    kind = FactWords(["red", None, "green"], tokenizer, embedding)
    logits = torch.randn(3, 2, requires_grad=True)
    loss = kind.loss(logits, kind.targets(["red", None, "green"]))
    assert loss.item() == pytest.approx(kind.loss(logits[[0, 2]], kind.targets(["red", "green"])).item())
    loss.backward()
    assert logits.grad is not None and not logits.grad[1].any() and logits.grad[0].any()
    assert kind.loss(logits[:1], kind.targets(["blue"])).item() == 0, "a word that no object had"


def test_a_token_near_a_word_says_it(tokenizer):
    embedding = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    kind = FactWords(["red", "green", "red"], tokenizer, embedding)
    assert kind.words == ["green", "red"]
    assert kind.logits(3 * kind.embeddings).argmax(dim=-1).tolist() == [0, 1]
    predicted = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    right, wrong = (
        kind.query_loss(tokens[:, None], predicted) for tokens in (kind.embeddings, kind.embeddings.flip(0))
    )
    assert right < wrong


def test_facts_are_those_of_the_view():
    seen = view_facts(RECORDS[0] | {"legs": 4}, (1.0, 2.0, 4.0))
    assert seen == {
        "noun": "bench",
        "colour": "brown",
        "place": "kitchen",
        "longest side": "depth",
        "height and width": "taller",
        "width and depth": "deeper",
        "proportion": "seven",  # twice as tall as wide: log2 is 1, the seventh half octave from -2
        "legs": "four",
    }
    assert view_facts(RECORDS[0], (2.0, 2.1, 0.1))["height and width"] is None
    assert view_facts(RECORDS[0], (9.0, 0.1, 1.0))["proportion"] == "one"


def test_batches_follow_from_seed_and_step_alone(processor, clouds):
    def batch(step, seed=0):
        return TrainingViews(clouds[:4], RECORDS, 4, processor.feature_extractor, seed).batch(step)

    first, again = batch(3), batch(3)
    assert np.array_equal(first.points, again.points) and first.facts == again.facts and first.names == again.names
    assert not np.array_equal(batch(4).points[..., :3].mean(axis=1), first.points[..., :3].mean(axis=1))
    assert not np.array_equal(batch(3, seed=1).points[0, 0], first.points[0, 0])
    one_round = [name for step in range(4) for name in batch(step).names if name]
    assert len(set(one_round[:4])) == 4, "every object once before any again"


def test_a_share_of_the_views_is_aligned_with_the_axes():
    poses = [view_pose(np.random.default_rng(seed)) for seed in range(300)]
    aligned = [bool((np.abs(pose) > 1e-3).sum() == 3) for pose in poses]
    assert 0.2 < np.mean(aligned) < 0.4
    lengths = np.array([np.linalg.norm(pose, axis=1) for pose in poses])
    assert lengths.min() > np.exp(-views.STRETCH) - 1e-5 and lengths.max() < np.exp(views.STRETCH) + 1e-5


def test_kinds_that_no_object_has_are_left_out_and_query_experts_refused(processor, clouds):
    elsewhere = [record | {"category": "none of the places"} for record in RECORDS]
    assert "place" not in train(processor, clouds, 1, 1, records=elsewhere)[1].kinds
    model = tiny_model()
    model.model.add_query_experts(2)
    with pytest.raises(ValueError, match="query experts"):
        Stage1(model, processor, clouds[:4], RECORDS, 4)


def test_other_settings_do_not_go_on_in_the_same_folder(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('{"seed": 5}')
    assert stage1.main(["--output", str(tmp_path)]) == 1
    assert "other settings" in capsys.readouterr().err

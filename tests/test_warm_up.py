"""A warm-up that teaches a new point branch words without touching the language model."""

import numpy as np
import pytest
import torch
from conftest import tiny_model

from pointalign.embedded import warm_up
from pointalign.embedded.warm_up import FactWords, posed, warm_up_point_branch

SIDES = {"width": 1.0, "height": 2.0, "depth": 1.5, "category": "kitchen"}
RECORDS = [
    {"head_noun": noun, "colors": colours} | SIDES
    for noun, colours in (
        ("bench", {"brown": 1.0}),
        ("cactus", {"green": 1.0}),
        ("extinguisher", {"red": 1.0}),
        ("forklift", {"yellow": 0.5, "black": 0.5}),
    )
]


def test_warm_up_learns_the_facts_and_leaves_the_language_model(processor, clouds):
    def run(steps):
        model = tiny_model()
        model.model.point_encoder.requires_grad_(False)  # for the stage that follows
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.manual_seed(1)
        losses = warm_up_point_branch(model, processor, clouds[:4], RECORDS, steps, batch_size=4, learning_rate=1e-2)
        return model, before, losses

    model, before, losses = run(25)
    assert len(losses) == 25
    after = model.state_dict()
    assert after.keys() == before.keys(), "the encoder's own heads stay behind"
    for name in after:
        if ".language_model." in name:
            assert torch.equal(after[name], before[name]), name
    for part in ("point_encoder", "point_mlp", "qformer", "query_tokens", "modality_projector"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(f"model.{part}")), part
    assert not any(p.requires_grad for p in model.model.point_encoder.parameters())
    assert all(p.requires_grad for p in model.model.qformer.parameters())
    assert run(3)[2] == run(3)[2]


def test_the_encoder_starts_anew_and_the_queries_go_on(processor, clouds):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.model.point_encoder.parameters():
            parameter.fill_(100.0)  # no rate of these steps could bring it back
        model.model.query_tokens.fill_(100.0)
    warm_up_point_branch(model, processor, clouds[:4], RECORDS, 3, batch_size=4, learning_rate=1e-4)
    assert all(parameter.abs().max() < 10 for parameter in model.model.point_encoder.parameters())
    assert model.model.query_tokens.min() > 90


def test_words_are_learned_and_neighbours_beside_them(processor, clouds, monkeypatch):
    monkeypatch.setattr(warm_up, "ENCODER_SHARE", 1.0)

    def first_and_last() -> tuple[float, float]:
        torch.manual_seed(1)
        losses = warm_up_point_branch(
            tiny_model(), processor, clouds[:4], RECORDS, 25, batch_size=4, learning_rate=1e-2
        )
        return sum(losses[:5]), sum(losses[-5:])

    start, _ = first_and_last()
    monkeypatch.setattr(warm_up, "neighbour_loss", lambda embeddings, points: embeddings.sum() * 0)
    words, learned = first_and_last()
    assert learned < 0.9 * words < 0.9 * start


def test_queries_learn_to_say_what_the_encoder_says(processor, clouds):
    torch.manual_seed(1)
    model = tiny_model()
    losses = warm_up_point_branch(model, processor, clouds[:4], RECORDS, 100, batch_size=4, learning_rate=1e-2)
    by_queries = losses[70:]
    assert sum(by_queries[-5:]) < 0.9 * sum(by_queries[:5])
    batch = processor.feature_extractor(clouds[:4])
    with torch.no_grad():
        tokens = model.eval().encode_point_clouds(batch["point_values"]).projected
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert tokens.norm(dim=-1).mean() == pytest.approx(words.item(), rel=0.3), "as long as words are"


def test_muon_takes_equal_steps_in_every_direction_and_adamw_takes_the_rest(monkeypatch):
    monkeypatch.setattr(warm_up, "WEIGHT_DECAY", 0.0)
    torch.manual_seed(0)
    body, head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    slope = torch.linalg.svd(torch.randn(6, 6))[0] @ torch.diag(torch.logspace(0, -1, 6))  # ten times as steep one way
    parameters = [*body.parameters(), *head.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]

    def loss() -> torch.Tensor:
        return sum((layer.weight * slope).sum() + layer.bias.sum() for layer in (body, head))

    losses = warm_up.descend(parameters, [body.weight], loss, 20, 0.01, "test")
    weight, bias, head_weight, head_bias = (new.detach() - old for new, old in zip(parameters, before, strict=True))
    assert losses[-1] < losses[0] and not any(parameter.requires_grad for parameter in parameters)
    sizes, head_sizes = torch.linalg.svdvals(weight), torch.linalg.svdvals(head_weight)
    assert sizes[0] < 2 * sizes[-1] and head_sizes[0] > 2 * head_sizes[-1]
    assert torch.allclose(bias, head_bias) and bias.abs().min() > 0
    # torch scales Muon's steps to 0.2 of AdamW's root mean square, as AdamW's are in practice; here they are 1
    ratio = weight.square().mean().sqrt() / head_weight.square().mean().sqrt()
    assert ratio == pytest.approx(0.2 * warm_up.MUON_RATE, rel=0.25)


@pytest.mark.parametrize(("dtype", "used"), [(torch.float32, 0), (torch.bfloat16, 2)])
def test_muon_runs_where_the_model_computes_in_bfloat16(dtype, used, processor, clouds, monkeypatch):
    calls = []
    muon = torch.optim.Muon
    monkeypatch.setattr(torch.optim, "Muon", lambda *args, **kwargs: (calls.append(args), muon(*args, **kwargs))[1])
    model = tiny_model()
    model.model.language_model.to(dtype)
    losses = warm_up_point_branch(
        model, processor, clouds[:4], RECORDS, 14, batch_size=4, learning_rate=1e-3
    )  # 10 of the encoder
    assert len(calls) == used and len(losses) == 14 and np.isfinite(losses).all()


def test_the_closed_form_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    truth, fitted = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    inputs = [torch.randn(4, 8, 5, generator=generator) + 2 for _ in range(10)]
    warm_up.fit_linear(fitted, [(batch, truth(batch).detach()) for batch in inputs])
    assert torch.allclose(fitted(inputs[0]), truth(inputs[0]), atol=0.05)


def test_tokens_come_near_to_words(processor, clouds, monkeypatch):
    def cosine() -> float:
        torch.manual_seed(1)
        model = tiny_model()
        warm_up_point_branch(model, processor, clouds[:4], RECORDS, 100, batch_size=4, learning_rate=1e-2)
        nouns = FactWords(
            [record["head_noun"] for record in RECORDS], processor.tokenizer, model.get_input_embeddings().weight
        )
        with torch.no_grad():
            tokens = model.encode_point_clouds(processor.feature_extractor(clouds[:4])["point_values"]).projected
            return nouns.logits(tokens[:, ::4], temperature=1.0).amax(dim=-1).mean().item()  # of 4 kinds, the nouns'

    near = cosine()
    monkeypatch.setattr(warm_up, "fit_linear", lambda linear, examples: None)
    assert near > cosine() + 0.1


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


def test_sides_are_those_of_the_pose():
    turned = np.array([[0, 0, 2], [0, 3, 0], [-4, 0, 0]])  # width doubled and turned towards depth, and so on
    sides = posed(RECORDS[0], turned)
    assert [sides[side] for side in ("width", "height", "depth")] == [2.0, 6.0, 6.0]
    assert RECORDS[0]["width"] == 1.0


def test_fewer_clouds_than_a_batch_will_do(processor, clouds):
    few = [cloud[:12] for cloud in clouds[:2]]
    losses = warm_up_point_branch(tiny_model(), processor, few, RECORDS[:2], 3, batch_size=16, learning_rate=1e-3)
    assert len(losses) == 3


def test_kinds_that_no_object_has_are_left_out(processor, clouds):
    elsewhere = [record | {"category": "none of the places"} for record in RECORDS]
    assert (
        len(warm_up_point_branch(tiny_model(), processor, clouds[:4], elsewhere, 1, batch_size=4, learning_rate=1e-3))
        == 1
    )
    nothing = [{"head_noun": None, "colors": {}, "category": "", "width": 1, "height": 1, "depth": 1}] * 4
    with pytest.raises(ValueError, match="a fact of at least one object"):
        warm_up_point_branch(tiny_model(), processor, clouds[:4], nothing, 1, batch_size=4, learning_rate=1e-3)


def test_the_last_map_is_fitted_to_a_number_of_batches_and_one_more_for_the_length(processor, clouds, monkeypatch):
    monkeypatch.setattr(warm_up, "FIT_BATCHES", 3)
    count = 0
    batches = warm_up.training_batches

    def counted(*args):
        nonlocal count
        for batch in batches(*args):
            count += 1
            yield batch

    monkeypatch.setattr(warm_up, "training_batches", counted)
    warm_up_point_branch(tiny_model(), processor, clouds[:4], RECORDS, 5, batch_size=4, learning_rate=1e-3)
    assert count == 5 + 3 + 1

"""A warm-up that teaches a new point branch words without touching the language model."""

import pytest
import torch
from conftest import tiny_model

from pointalign import contrastive
from pointalign.contrastive import Kind, warm_up

FACTS = [
    {"noun": noun, "colour": colour}
    for noun, colour in (("bench", "brown"), ("cactus", "green"), ("extinguisher", "red"), ("forklift", None))
]


def test_warm_up_learns_the_facts_and_leaves_the_language_model(processor, clouds):
    def run(steps):
        model = tiny_model()
        model.model.point_encoder.requires_grad_(False)  # for the stage that follows
        before = {name: one.clone() for name, one in model.state_dict().items()}
        torch.manual_seed(1)
        losses = warm_up(model, processor, clouds[:4], FACTS, steps, batch_size=4, learning_rate=1e-2)
        return model, before, losses

    model, before, losses = run(25)
    assert len(losses) == 25
    after = model.state_dict()
    assert after.keys() == before.keys(), "the encoder's own head stays behind"
    for name in after:
        if ".language_model." in name:
            assert torch.equal(after[name], before[name]), name
    for part in ("point_encoder", "point_mlp", "qformer", "query_tokens", "modality_projector"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(f"model.{part}")), part
    assert not any(p.requires_grad for p in model.model.point_encoder.parameters())
    again, _, same = run(3)
    assert same == run(3)[2]
    assert not torch.equal(again.state_dict()["model.query_tokens"], before["model.query_tokens"])


def test_words_are_learned_and_neighbours_beside_them(processor, clouds, monkeypatch):
    def first_and_last() -> tuple[float, float]:
        torch.manual_seed(1)
        losses = warm_up(tiny_model(), processor, clouds[:4], FACTS, 25, batch_size=4, learning_rate=1e-2)
        return sum(losses[:5]), sum(losses[-5:])

    start, _ = first_and_last()
    monkeypatch.setattr(contrastive, "neighbour_loss", lambda embeddings, points: embeddings.sum() * 0)
    words, learned = first_and_last()
    assert learned < 0.9 * words < 0.9 * start


def test_point_tokens_end_up_as_long_as_words(processor, clouds):
    model = tiny_model()
    warm_up(model, processor, clouds[:4], FACTS, 5, batch_size=4, learning_rate=1e-3)
    batch = processor.feature_extractor(clouds[:4])
    with torch.no_grad():
        tokens = model.eval().encode_point_clouds(batch["point_values"]).projected
    words = model.get_input_embeddings().weight.norm(dim=-1).mean()
    assert tokens.norm(dim=-1).mean() == pytest.approx(words.item(), rel=0.3)


def test_an_unclear_fact_has_no_loss(tokenizer):
    embedding = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    kind = Kind(["red", None, "green"], tokenizer, embedding)
    tokens = torch.randn(3, 2, 8, requires_grad=True)
    loss = kind.loss(tokens, torch.tensor([0, 1, 2]))
    assert loss.item() == pytest.approx(kind.loss(tokens[[0, 2]], torch.tensor([0, 2])).item())
    loss.backward()
    assert tokens.grad is not None and not tokens.grad[1].any() and tokens.grad[0].any()
    assert kind.loss(tokens[:1], torch.tensor([1])).item() == 0


def test_a_token_near_a_word_says_it(tokenizer):
    embedding = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    kind = Kind(["red", "green", "red"], tokenizer, embedding)
    assert kind.words == ["green", "red"]
    assert kind.logits(3 * kind.embeddings).argmax(dim=-1).tolist() == [0, 1]


def test_fewer_clouds_than_a_batch_will_do(processor, clouds):
    few = [cloud[:12] for cloud in clouds[:2]]
    losses = warm_up(tiny_model(), processor, few, FACTS[:2], 3, batch_size=16, learning_rate=1e-3)
    assert len(losses) == 3


def test_kinds_that_no_object_has_are_left_out(processor, clouds):
    facts = [fact | {"place": None} for fact in FACTS]
    assert len(warm_up(tiny_model(), processor, clouds[:4], facts, 1, batch_size=4, learning_rate=1e-3)) == 1
    with pytest.raises(ValueError, match="a fact of at least one object"):
        warm_up(tiny_model(), processor, clouds[:4], [{"noun": None}] * 4, 1, batch_size=4, learning_rate=1e-3)

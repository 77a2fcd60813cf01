"""Sentence embeddings, and a warm-up that learns names without touching the language model."""

import pytest
import torch
from conftest import lively, tiny_model
from torch.nn import functional

from pointalign.contrastive import NamedClouds, warm_up
from pointalign.evaluation.sentences import embed

SENTENCES = ["bench", "cactus", "a fire extinguisher", "forklift"]


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory, tokenizer):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    lively(BertModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_embeddings_are_unit_means_over_the_real_tokens(sentence_encoder, tokenizer):
    from transformers import AutoModel

    together = embed(sentence_encoder, SENTENCES)
    assert together.shape == (4, 16)
    encoder = AutoModel.from_pretrained(sentence_encoder).eval()
    for row, sentence in enumerate(SENTENCES):
        with torch.no_grad():
            tokens = encoder(**tokenizer(sentence, return_tensors="pt", return_token_type_ids=False))
        expected = functional.normalize(tokens.last_hidden_state[0].mean(dim=0), dim=-1)
        torch.testing.assert_close(together[row], expected)


def test_warm_up_learns_the_names_and_leaves_the_rest(sentence_encoder, processor, clouds):
    data = NamedClouds(clouds[:4], SENTENCES)

    def run(steps):
        model = tiny_model()
        before = {name: one.clone() for name, one in model.state_dict().items()}
        torch.manual_seed(1)
        losses = warm_up(model, processor, data, sentence_encoder, steps, batch_size=4, learning_rate=1e-2)
        return model, before, losses

    model, before, losses = run(25)
    assert len(losses) == 25 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    after = model.state_dict()
    assert after.keys() == before.keys(), "the head that maps to sentences stays behind"
    for name in after:
        if ".language_model." in name or ".modality_projector." in name:
            assert torch.equal(after[name], before[name]), name
    for part in ("point_encoder", "point_mlp", "qformer", "query_tokens"):
        assert any(not torch.equal(after[n], before[n]) for n in after if n.startswith(f"model.{part}")), part
    again, _, same = run(3)
    assert same == run(3)[2]
    assert not torch.equal(again.state_dict()["model.query_tokens"], before["model.query_tokens"])


def test_fewer_clouds_than_a_batch_will_do(sentence_encoder, processor, clouds):
    data = NamedClouds([cloud[:12] for cloud in clouds[:2]], SENTENCES[:2])
    losses = warm_up(tiny_model(), processor, data, sentence_encoder, 3, batch_size=16, learning_rate=1e-3)
    assert len(losses) == 3

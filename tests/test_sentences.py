"""Sentence embeddings."""

import torch
from conftest import lively
from torch.nn import functional

from pointalign.evaluation.caption_metrics import embed

SENTENCES = ["bench", "cactus", "a fire extinguisher", "forklift"]


def test_embeddings_are_unit_means_over_the_real_tokens(tmp_path, tokenizer):
    from transformers import AutoModel, BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    lively(BertModel(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    together = embed(tmp_path, SENTENCES)
    assert together.shape == (4, 16)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    for row, sentence in enumerate(SENTENCES):
        with torch.no_grad():
            tokens = encoder(**tokenizer(sentence, return_tensors="pt", return_token_type_ids=False))
        expected = functional.normalize(tokens.last_hidden_state[0].mean(dim=0), dim=-1)
        torch.testing.assert_close(together[row], expected)

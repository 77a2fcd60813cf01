"""Sentence embeddings from a local folder, pooled as the folder says."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

POOLINGS = ("mean", "cls", "pooler")


def pooling_of(folder: Path) -> str:
    """`mean` or `cls` as sentence-transformers' `1_Pooling/config.json` says; else `mean`, or `pooler` for SimCSE."""
    described = folder / "1_Pooling" / "config.json"
    if described.exists():
        return "cls" if json.loads(described.read_text()).get("pooling_mode_cls_token") else "mean"
    return "pooler" if "simcse" in folder.name.lower() else "mean"


@torch.no_grad()  # not inference mode: training compares with these
def embed(folder: Path, sentences: Sequence[str], pooling: str | None = None) -> Tensor:
    """Unit embeddings `[S, D]` of sentences by the encoder in `folder`.

    Args:
        pooling: `mean` over tokens, `cls` token, or `pooler` (the encoder's head on it, as SimCSE's supervised models);
            by default what `pooling_of` finds.
    """
    from transformers import AutoModel, AutoTokenizer

    pooling = pooling or pooling_of(folder)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embeddings = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(list(sentences[start : start + 64]), padding=True, truncation=True, return_tensors="pt")
        output = encoder(**batch)
        mask = batch["attention_mask"][..., None].to(output.last_hidden_state)
        if pooling == "pooler":
            embeddings.append(output.pooler_output)
        elif pooling == "cls":
            embeddings.append(output.last_hidden_state[:, 0])
        else:
            embeddings.append((output.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1))
    return functional.normalize(torch.cat(embeddings).float(), dim=-1)

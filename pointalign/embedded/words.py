"""The words of the facts that stage 1 teaches, as the language model embeds them."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

TEMPERATURE = 0.05  # of the encoder's logits over words
QUERY_TEMPERATURE = 0.15  # of the queries' logits over words
TARGET_SHARPNESS = 3.0  # the closed form is fitted to the softmax of the head's logits times this
LABEL_SMOOTHING = 0.1
UNKNOWN = -100  # target of a fact that is not clear


class FactWords:
    """The words of one kind of facts, such as all nouns, as the language model embeds them.

    Args:
        facts: words in any order, or None.
        embedding: `[V, H]`, the language model's input embeddings.
    """

    def __init__(self, facts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, embedding: Tensor):
        self.words = sorted({word for word in facts if word is not None})
        self.indices: dict[str | None, int] = {word: index for index, word in enumerate(self.words)}
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in self.words]
        means = torch.stack([embedding[word_ids].float().mean(dim=0) for word_ids in ids])
        self.embeddings = functional.normalize(means, dim=-1)  # [W, H]

    def targets(self, facts: Sequence[str | None]) -> Tensor:
        """Indices `[B]` of the facts; UNKNOWN for None and for words that no object had."""
        return torch.tensor([self.indices.get(word, UNKNOWN) for word in facts], device=self.embeddings.device)

    def logits(self, tokens: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        """`[..., W]` of tokens `[..., H]`: cosine over temperature."""
        return functional.normalize(tokens.float(), dim=-1) @ self.embeddings.T / temperature

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits `[B, W]` where the fact is known; 0 where none is."""
        summed = functional.cross_entropy(
            logits, targets, ignore_index=UNKNOWN, label_smoothing=LABEL_SMOOTHING, reduction="sum"
        )
        return summed / (targets != UNKNOWN).sum().clamp(min=1)

    def query_loss(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Mean cross-entropy of tokens `[B, T, H]` against the encoder's distribution, logits `[B, W]`."""
        targets = logits.softmax(dim=-1)[:, None].expand(-1, tokens.shape[1], -1)
        return functional.cross_entropy(self.logits(tokens, QUERY_TEMPERATURE).flatten(0, 1), targets.flatten(0, 1))

    def mean_embedding(self, logits: Tensor) -> Tensor:
        """Mean `[B, H]` of the words' embeddings under the softmax of sharpened logits `[B, W]`."""
        return (TARGET_SHARPNESS * logits).softmax(dim=-1) @ self.embeddings

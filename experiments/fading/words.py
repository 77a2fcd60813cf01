"""The vocabulary of the decoder, and its training texts: captions that name set A, sentences that tell set B."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.fading.things import COLOURS, SHAPES

NAMING = ("what is this ?", "describe it .")
MORE = "tell more ."
B_WORDS = {  # factor of B -> words below and above its median
    "height": ("short", "tall"),
    "bend": ("straight", "bent"),
    "knob": ("small", "big"),
    "band": ("low", "high"),
}
PAD, POINT, START, END = "<pad>", "<point>", "<start>", "<end>"
VOCABULARY = (
    PAD, POINT, START, END,
    *sorted({*" ".join([*NAMING, MORE, *map(" ".join, B_WORDS.values()), *COLOURS, *SHAPES]).split()}),
)  # fmt: skip
IDS = {word: number for number, word in enumerate(VOCABULARY)}


def tell(values: dict[str, float]) -> str:
    """Set B in words, from the values of its factors."""
    return " ".join(B_WORDS[name][value > 0.5] for name, value in values.items()) + " ."


@dataclass
class Examples:
    """Texts about objects, one a row: start, point tokens, question, answer, end, padding.

    Attributes:
        ids: `[N, T]`; the point tokens of a row have the id of `POINT`.
        labels: `[N, T]`, -100 except on answer and end.
        rows: `[N]`, the object of each text.
    """

    ids: Tensor
    labels: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def mask(self) -> Tensor:
        """`[N, T]`, true at the point tokens."""
        return self.ids == IDS[POINT]

    def subset(self, numbers: Sequence[int] | Tensor) -> "Examples":
        numbers = torch.as_tensor(numbers)
        return Examples(self.ids[numbers], self.labels[numbers], self.rows[numbers])


def encode(texts: Sequence[tuple[str, str, int]], num_query_tokens: int) -> Examples:
    """Examples of `texts`: question, answer (may be empty, to be generated), row of the object.

    Raises: KeyError: a word that is not in the vocabulary.
    """
    sequences, labels = [], []
    for question, answer, _ in texts:
        prompt = [IDS[START], *[IDS[POINT]] * num_query_tokens, *(IDS[word] for word in question.split())]
        reply = [*(IDS[word] for word in answer.split()), IDS[END]] if answer else []
        sequences.append(prompt + reply)
        labels.append([-100] * len(prompt) + reply)
    length = max(map(len, sequences))
    return Examples(
        torch.tensor([ids + [IDS[PAD]] * (length - len(ids)) for ids in sequences]),
        torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        torch.tensor([row for *_, row in texts]),
    )

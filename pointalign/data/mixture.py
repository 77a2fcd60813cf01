"""Several data sets in one run: every batch comes from one of them, drawn by ratio.

A batch is a pure function of its number and the seed. So ranks, workers and resumed runs that ask for the same number
get the same batch, and no state has to travel.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset


class MixtureDataset(Dataset):
    """Item i is a whole batch, a list of samples of one data set. Within a set no sample returns before all were shown.

    Args:
        datasets: the parts.
        ratios: how often each is drawn, in any unit.
        batch_sizes: samples per batch, one for each part.
        num_batches: of the whole run, over all ranks.
        seed: of the draws and of the order within each set.

    Raises: ValueError: arguments of unequal length or out of range.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        ratios: Sequence[float],
        batch_sizes: Sequence[int],
        num_batches: int,
        seed: int = 0,
    ):
        if not len(datasets) == len(ratios) == len(batch_sizes) > 0:
            raise ValueError(
                f"expected as many ratios and batch sizes as data sets, got {len(datasets)}, {len(ratios)} and "
                f"{len(batch_sizes)}"
            )
        if min(ratios) <= 0 or min(batch_sizes) <= 0 or num_batches <= 0:
            raise ValueError(f"ratios {ratios}, batch sizes {batch_sizes} and {num_batches} batches must be positive")
        self.datasets, self.batch_sizes, self.seed = list(datasets), list(batch_sizes), seed
        share = np.asarray(ratios, dtype=float) / sum(ratios)
        self.parts = np.random.default_rng(seed).choice(len(datasets), size=num_batches, p=share).astype(np.int16)
        self.turns = np.empty(num_batches, dtype=np.int64)  # how many batches of the same part came before
        for part in range(len(datasets)):
            mine = self.parts == part
            self.turns[mine] = np.arange(mine.sum())
        self._order = lru_cache(maxsize=2 * len(datasets))(self._shuffled)

    def _shuffled(self, part: int, round: int) -> np.ndarray:
        return np.random.default_rng([self.seed, part, round]).permutation(len(self.datasets[part]))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2 * len(self.datasets))(self._shuffled)

    def __len__(self) -> int:
        return len(self.parts)

    def draws(self, number: int) -> list[tuple[int, int, int]]:
        """Part, round through that part, and place in it, of every sample of batch `number`."""
        part, size = int(self.parts[number]), self.batch_sizes[self.parts[number]]
        first, count = int(self.turns[number]) * size, len(self.datasets[part])
        rounds = [divmod(at, count) for at in range(first, first + size)]
        return [(part, round, int(self._order(part, round)[at])) for round, at in rounds]

    def __getitem__(self, number: int) -> list[dict]:
        # what augmentation draws depends on the sample and the round only
        return [
            self.datasets[part][place] | {"draw": (part, round, place)} for part, round, place in self.draws(number)
        ]


class MixtureCollator:
    """Opens the batches of a `MixtureDataset` for a collator of samples."""

    def __init__(self, collator: Callable[[list[dict]], Any]):
        self.collator = collator

    def __call__(self, batches: list[list[dict]]) -> Any:
        return self.collator([sample for batch in batches for sample in batch])

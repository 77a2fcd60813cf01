"""Mixtures drawn alike on every rank, worker and resumed run."""

from collections import Counter

import pytest
from torch.utils.data import DataLoader

from pointalign.data.dataset import MixtureCollator, MixtureDataset


class Numbered(list):
    def __getitem__(self, index):
        return {"id": list.__getitem__(self, index)}


def mixture(num_batches=800, seed=0, sizes=(11, 7, 40)):
    parts = [Numbered(f"{name}{i}" for i in range(size)) for name, size in zip("abc", sizes, strict=True)]
    return MixtureDataset(parts, [2, 3, 3], [6, 10, 4], num_batches, seed)


def ids(batch):
    return [sample["id"] for sample in batch]


def test_batches_come_from_one_part_in_the_ratio_and_size_asked_for():
    made = mixture(4000)
    counts = Counter()
    for number in range(len(made)):
        names = {one[0] for one in ids(made[number])}
        assert len(names) == 1
        name = names.pop()
        assert len(made[number]) == {"a": 6, "b": 10, "c": 4}[name]
        counts[name] += 1
    for name, ratio in zip("abc", (2, 3, 3), strict=True):
        expected = 4000 * ratio / 8
        assert abs(counts[name] - expected) < 4 * (expected * (1 - ratio / 8)) ** 0.5  # four standard deviations


def test_every_sample_is_shown_once_before_any_is_shown_again():
    made = mixture(300)
    shown = {"a": [], "b": [], "c": []}
    for number in range(len(made)):
        for one in ids(made[number]):
            shown[one[0]].append(one)
    for (name, seen), size in zip(shown.items(), (11, 7, 40), strict=True):
        rounds = [seen[start : start + size] for start in range(0, len(seen) - size + 1, size)]
        assert len(rounds) > 2 and all(len(set(one)) == size for one in rounds), name
        assert rounds[0] != rounds[1]  # another order every time


def test_workers_ranks_and_restarts_see_the_same_batches():
    whole = [ids(one) for one in mixture(40)]
    assert [ids(one) for one in mixture(40)] == whole != [ids(one) for one in mixture(40, seed=1)]
    workers = DataLoader(mixture(40), batch_size=1, num_workers=2, collate_fn=MixtureCollator(ids), shuffle=False)
    assert list(workers) == whole
    ranks = [[ids(mixture(40)[number]) for number in range(rank, 40, 4)] for rank in range(4)]
    assert [ranks[i % 4][i // 4] for i in range(40)] == whole
    assert ids(mixture(40)[33]) == whole[33]  # without the batches before it, as after a resume


def test_the_draw_that_seeds_augmentation_is_new_in_every_round():
    made = mixture(300)
    draws = [sample["draw"] for number in range(len(made)) for sample in made[number]]
    assert len(set(draws)) == len(draws)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="as many ratios and batch sizes"):
        MixtureDataset([[1]], [1, 2], [1], 3)
    with pytest.raises(ValueError, match="must be positive"):
        MixtureDataset([[1]], [0], [1], 3)

"""Intervals that cover, tests that are level, families that count once."""

import numpy as np
import pytest

from pointalign.evaluation import statistics
from pointalign.evaluation.statistics import Estimate, cluster_mean, crossed_difference, paired_difference


def names(count: int, size: int = 1) -> list[str]:
    return [f"family {i}" for i in range(count) for _ in range(size)]


def test_a_constant_has_no_interval_and_prints():
    one = cluster_mean([1.0] * 5, names(5))
    assert one == Estimate(1.0, 1.0, 1.0, 5)
    assert str(Estimate(0.4567, 0.4, 0.512, 9)) == " 45.7 % [40.0, 51.2]"
    assert one.as_dict() == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 5}
    with pytest.raises(ValueError, match="no values"):
        cluster_mean([], [])


def test_the_interval_is_the_binomials_where_families_are_single():
    values = np.array([1.0] * 40 + [0.0] * 60)
    one = cluster_mean(values, names(100))
    half = 1.96 * np.sqrt(0.4 * 0.6 / 100)
    assert one.mean == pytest.approx(0.4) and one.count == 100
    assert one.low == pytest.approx(0.4 - half, abs=0.015) and one.high == pytest.approx(0.4 + half, abs=0.015)


def test_copies_within_a_family_bring_no_certainty():
    values = np.random.default_rng(0).integers(2, size=50).astype(float)
    single, copied = cluster_mean(values, names(50)), cluster_mean(np.repeat(values, 8), names(50, 8))
    assert copied.mean == single.mean
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))
    naive = cluster_mean(np.repeat(values, 8), names(400))
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)


def test_the_interval_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        rates = rng.beta(2, 3, size=60)  # mean 0.4, each family a rate of its own
        values = (rng.random((60, 2)) < rates[:, None]).astype(float).ravel()
        one = cluster_mean(values, names(60, 2), seed=trial)
        covered += one.low <= 0.4 <= one.high
    assert 51 <= covered <= 60  # 57 expected; below 51 has a probability of 0.3 %


def test_identical_methods_have_p_one():
    values = [0.0, 1.0, 1.0, 0.0]
    estimate, p = paired_difference(values, values, names(4))
    assert p == 1.0 and (estimate.mean, estimate.low, estimate.high) == (0, 0, 0)


def test_p_is_that_of_the_exact_sign_test_and_symmetric():
    ours, theirs = np.ones(8), np.zeros(8)
    estimate, p = paired_difference(ours, theirs, names(8))
    assert estimate.mean == 1 and p == pytest.approx(2 / 2**8, abs=0.003)  # all signs one way or all the other
    reverse, other = paired_difference(theirs, ours, names(8))
    assert reverse.mean == -1 and other == pytest.approx(p)
    _, two_families = paired_difference(ours, theirs, names(2, 4))
    assert two_families == pytest.approx(0.5, abs=0.03), "eight objects of two families are two observations"


def test_p_is_level_without_a_difference():
    rng = np.random.default_rng(2)
    ps = [paired_difference(rng.random(30), rng.random(30), names(30), seed=trial)[1] for trial in range(60)]
    assert sum(p < 0.05 for p in ps) <= 9 and 0.3 < np.mean(ps) < 0.7


def crossed(rng, effect: float, of_runs: float, of_families: float, runs: int = 5, count: int = 30) -> np.ndarray:
    """Differences `[runs, count]` that vary from run to run, from family to family, and within both."""
    return (
        effect
        + rng.normal(0, of_runs, (runs, 1))
        + rng.normal(0, of_families, (1, count))
        + rng.normal(0, 0.3, (runs, count))
    )


@pytest.mark.parametrize(("of_runs", "of_families"), [(1.0, 0.3), (0.0, 1.0), (0.4, 1.0)])
def test_the_crossed_p_is_level_whatever_varies(of_runs, of_families, monkeypatch):
    """A test that flips families alone takes runs that happen to differ for an effect."""
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    rng = np.random.default_rng(3)
    drawn = [crossed(rng, 0.0, of_runs, of_families) for _ in range(80)]
    rejected = sum(crossed_difference(part, names(30))[1] < 0.05 for part in drawn)
    assert rejected <= 10  # 4 expected; above 10 has a probability of 0.2 %
    by_families = [paired_difference(part.mean(axis=0), np.zeros(30), names(30))[1] for part in drawn[:20]]
    if of_runs == 1.0:
        assert sum(p < 0.05 for p in by_families) > 8


def test_an_effect_in_all_runs_and_families_is_found(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 400)
    values = crossed(np.random.default_rng(4), 0.5, 0.05, 0.3)
    estimate, p, error = crossed_difference(values, names(30))
    assert p < 0.001 and estimate.low > 0 and estimate.count == 30 and 0 < error < 0.15
    disagreeing = values + np.array([[-1.0], [1.0], [-1.0], [1.0], [0.0]])
    wider, p_disagreeing, _ = crossed_difference(disagreeing, names(30))
    assert wider.mean == pytest.approx(estimate.mean) and p_disagreeing > 0.2 and wider.low < 0 < wider.high


def test_runs_that_agree_leave_the_interval_of_one_and_one_run_shows_nothing():
    values = np.repeat(np.random.default_rng(0).normal(0.5, 1, (1, 50)), 4, axis=0)
    estimate, _, _ = crossed_difference(values, names(50))
    alone, p, _ = crossed_difference(values[:1], names(50))
    assert (estimate.low, estimate.high) == pytest.approx((alone.low, alone.high), abs=0.03) and p == 1.0
    assert crossed_difference(np.zeros((3, 4)), names(4))[1] == 1.0
    assert crossed_difference(np.ones((3, 4)), names(4))[:2] == (Estimate(1.0, 1.0, 1.0, 4), 0.0)


def test_a_statistic_that_is_no_mean_gets_an_interval_over_clusters():
    """Of the mean it is `cluster_mean`'s; near-duplicates widen it."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=120)
    alone = [str(i) for i in range(120)]
    of_mean = statistics.cluster_statistic(lambda rows: float(rows.mean()), values[:, None], alone)
    known = statistics.cluster_mean(values, alone)
    assert of_mean.mean == pytest.approx(known.mean) and of_mean.count == 120
    assert [of_mean.low, of_mean.high] == pytest.approx([known.low, known.high], abs=0.02)
    copied, clusters = np.repeat(values[:30], 4)[:, None], np.repeat(alone[:30], 4).tolist()
    spread = statistics.cluster_statistic(lambda rows: float(rows.std()), copied, clusters)
    narrow = statistics.cluster_statistic(lambda rows: float(rows.std()), copied, alone)
    assert spread.high - spread.low > 1.5 * (narrow.high - narrow.low) and spread.low < spread.mean < spread.high

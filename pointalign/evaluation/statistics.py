"""Intervals and tests that respect families: near-duplicate objects are one observation, not many."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 10_000
FEW_RESAMPLES = 1_000  # of a statistic that is computed anew for each
POWER_80 = 2.80  # standard errors of the effect that a two-sided 5 % test finds in 80 % of cases: 1.96 + 0.84


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{100 * self.mean:5.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def _by_cluster(values: np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every cluster."""
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(place, weights=values), np.bincount(place)


def cluster_mean(values: Sequence[float] | np.ndarray, clusters: Sequence[str], seed: int = 0) -> Estimate:
    """Mean of `values [N]` with a percentile bootstrap interval over `clusters [N]`."""
    data = np.asarray(values, dtype=float)
    if len(data) == 0:
        raise ValueError("no values to average")
    sums, counts = _by_cluster(data, clusters)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(data.mean()), float(low), float(high), len(data))


def cluster_statistic(
    statistic: Callable[[np.ndarray], float], rows: np.ndarray, clusters: Sequence[str], seed: int = 0
) -> Estimate:
    """A statistic of `rows [N, F]` that is no mean, with a percentile bootstrap interval over `clusters [N]`."""
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    members = [np.flatnonzero(place == cluster) for cluster in range(place.max() + 1)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(FEW_RESAMPLES):
        drawn = rng.integers(len(members), size=len(members))
        values.append(statistic(rows[np.concatenate([members[cluster] for cluster in drawn])]))
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(float(statistic(rows)), float(low), float(high), len(rows))


def paired_difference(
    ours: Sequence[float] | np.ndarray, theirs: Sequence[float] | np.ndarray, clusters: Sequence[str], seed: int = 0
) -> tuple[Estimate, float]:
    """Mean of `ours - theirs` with its interval, and the two-sided p-value of a sign-flip test over clusters."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    estimate = cluster_mean(difference, clusters, seed)
    sums, _ = _by_cluster(difference, clusters)
    signs = np.random.default_rng(seed + 1).choice([-1, 1], size=(RESAMPLES, len(sums)))
    extreme = np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9
    return estimate, float((extreme.sum() + 1) / (RESAMPLES + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(order))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return [float(p) for p in adjusted]


def crossed_difference(
    differences: np.ndarray, clusters: Sequence[str], seed: int = 0
) -> tuple[Estimate, float, float]:
    """Mean of paired differences over runs and objects, for other runs (seeds) and other objects.

    The standard error is that of a bootstrap which resamples both runs and clusters of objects. The interval and the
    p-value are Student's, with the degrees of freedom of Satterthwaite: few runs that disagree leave few of them.

    Args:
        differences: `[S, N]`, of S paired runs.
        clusters: `[N]`.

    Returns:
        The mean with its interval, the two-sided p-value, and the standard error. One run says nothing about others:
        its p-value is 1, and its interval is that of `cluster_mean`, for this run.
    """
    from scipy.stats import t

    runs, objects = differences.shape
    mean = float(differences.mean())
    error = float(crossed_bootstrap(differences, clusters, seed).std())
    if runs == 1:
        return cluster_mean(differences[0], clusters, seed), 1.0, error
    if error == 0:
        return Estimate(mean, mean, mean, objects), float(mean == 0), error
    of_runs = differences.mean(axis=1).var(ddof=1) / runs
    of_clusters = max(error**2 - of_runs, 0.0)
    freedom = error**4 / (of_runs**2 / (runs - 1) + of_clusters**2 / max(len(set(clusters)) - 1, 1))
    half = float(t.ppf(0.975, freedom)) * error
    p = float(2 * t.sf(abs(mean) / error, freedom))
    return Estimate(mean, mean - half, mean + half, objects), p, error


def minimum_detectable_effect(differences: np.ndarray, clusters: Sequence[str], seed: int = 0) -> float:
    """The true mean difference that a two-sided 5 % test would find with 80 % power, given the observed spread.

    Args:
        differences: `[N]` or `[S, N]`, paired differences per object, of S paired runs.
        clusters: `[N]`; runs and clusters are both resampled.
    """
    return float(POWER_80 * crossed_bootstrap(np.atleast_2d(differences), clusters, seed).std())


def crossed_bootstrap(differences: np.ndarray, clusters: Sequence[str], seed: int) -> np.ndarray:
    """Means of `differences [S, N]` with resampled runs and clusters, `[RESAMPLES]`.

    Resampled means of S runs vary by (S - 1) / S too little, which matters for few runs: their weights are stretched.
    """
    sums = np.stack([_by_cluster(row, clusters)[0] for row in differences])  # [S, K]
    counts = _by_cluster(differences[0], clusters)[1]
    rng = np.random.default_rng(seed)
    number = len(sums)
    runs = rng.integers(number, size=(RESAMPLES, number))
    weights = np.stack([np.bincount(row, minlength=number) for row in runs]) / number  # [RESAMPLES, S]
    if number > 1:
        weights = 1 / number + (weights - 1 / number) * (number / (number - 1)) ** 0.5
    drawn = rng.integers(sums.shape[1], size=(RESAMPLES, sums.shape[1]))
    chosen = np.stack([np.bincount(row, minlength=sums.shape[1]) for row in drawn])  # [RESAMPLES, K]
    return ((weights @ sums) * chosen).sum(axis=1) / (chosen @ counts)

"""Farthest-point sampling, nearest neighbours and grouping: one function per op, `impl` chooses how it runs."""

from torch import Tensor

from pointalign_kernels import reference

IMPLEMENTATIONS = ("auto", "reference")


def _check(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def farthest_point_sample(points: Tensor, num_samples: int, start_index: int = 0, impl: str = "auto") -> Tensor:
    """See `pointalign_kernels.reference.farthest_point_sample`."""
    _check(impl)
    return reference.farthest_point_sample(points, num_samples, start_index)


def knn(query: Tensor, points: Tensor, k: int, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """See `pointalign_kernels.reference.knn`."""
    _check(impl)
    return reference.knn(query, points, k)


def group_points(points: Tensor, centre_index: Tensor, k: int, impl: str = "auto") -> Tensor:
    """See `pointalign_kernels.reference.group_points`."""
    _check(impl)
    return reference.group_points(points, centre_index, k)

"""What can be had without a language model: the commonest noun, and the noun of the nearest training cloud."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from pointalign.data.augment import turn
from pointalign.data.point_cloud import normalise, subsample

CHAMFER_POINTS = 1024


def majority(nouns: Sequence[str]) -> str:
    """The commonest noun; the first in the alphabet among equals."""
    counts = Counter(nouns)
    return min(counts, key=lambda noun: (-counts[noun], noun))


def random_yaw(clouds: Sequence[np.ndarray], seed: int = 0) -> list[np.ndarray]:
    """Clouds `[N, 6]`, each turned about the vertical axis by an angle of its own."""
    angles = np.random.default_rng(seed).uniform(0, 2 * np.pi, size=len(clouds))
    return [
        np.concatenate([turn(cloud[:, :3], angle), cloud[:, 3:]], axis=1)
        for cloud, angle in zip(clouds, angles, strict=True)
    ]


def nearest_by_chamfer(queries: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> np.ndarray:
    """Index `[Q]` of the reference cloud nearest to each query, by the symmetric Chamfer distance of 1024 points each.

    Clouds are centred and scaled to the unit sphere, as the model sees them.
    """
    query_points = [_prepare(cloud) for cloud in queries]
    reference_points = torch.stack([_prepare(cloud) for cloud in references])  # [R, P, 3]
    reference_norms = reference_points.square().sum(dim=-1)
    nearest = np.empty(len(queries), dtype=int)
    for row, points in enumerate(query_points):
        best = []
        for start in range(0, len(references), 32):
            chunk, norms = reference_points[start : start + 32], reference_norms[start : start + 32]
            products = torch.matmul(chunk, points.T)  # [r, P, P]
            squared = products.mul_(-2).add_(norms[..., None]).add_(points.square().sum(dim=-1))
            there = squared.amin(dim=2).clamp(min=0).sqrt().mean(dim=1)
            back = squared.amin(dim=1).clamp(min=0).sqrt().mean(dim=1)
            best.append(there + back)
        nearest[row] = int(torch.cat(best).argmin())
    return nearest


def _prepare(cloud: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(normalise(subsample(cloud, CHAMFER_POINTS))[:, :3].copy()).float()

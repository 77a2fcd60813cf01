"""What can be had without a language model: the commonest noun, and the noun of the nearest training cloud."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from pointalign.data.augment import turn
from pointalign.data.point_cloud import normalise, subsample

CHAMFER_POINTS, COARSE_POINTS, SHORTLIST = 1024, 256, 32


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

    Clouds are centred and scaled to the unit sphere, as the model sees them. The 32 nearest by 256 points are compared
    by all 1024.
    """
    fine = _prepare(references)  # [R, P, 3]
    coarse = fine[:, :COARSE_POINTS]
    nearest = np.empty(len(queries), dtype=int)
    for row, points in enumerate(_prepare(queries)):
        shortlist = chamfer(points[:COARSE_POINTS], coarse).topk(min(SHORTLIST, len(fine)), largest=False).indices
        nearest[row] = int(shortlist[chamfer(points, fine[shortlist]).argmin()])
    return nearest


def chamfer(points: torch.Tensor, references: torch.Tensor, chunk: int = 8) -> torch.Tensor:
    """Symmetric Chamfer distances `[R]` of points `[P, 3]` to references `[R, P, 3]`: mean distances there and back."""
    distances = []
    right = torch.cat([points, torch.ones(len(points), 1), points.square().sum(-1, keepdim=True)], dim=1).T
    for part in references.split(chunk):  # small enough to stay in the cache
        left = torch.cat([-2 * part, part.square().sum(-1, keepdim=True), torch.ones_like(part[..., :1])], dim=-1)
        squared = (left.flatten(0, 1) @ right).view(len(part), part.shape[1], len(points))
        ways = [squared.amin(dim=dim).clamp(min=0).sqrt().mean(dim=1) for dim in (1, 2)]
        distances.append(ways[0] + ways[1])
    return torch.cat(distances)


def _prepare(clouds: Sequence[np.ndarray]) -> torch.Tensor:
    prepared = [torch.from_numpy(normalise(subsample(cloud, CHAMFER_POINTS))[:, :3].copy()) for cloud in clouds]
    # Subsampling keeps the order of the file; in random order, the first points are a sample of the others.
    order = torch.from_numpy(np.random.default_rng(0).permutation(CHAMFER_POINTS))
    return torch.stack([one.float()[order % len(one)] for one in prepared])  # [N, P, 3]

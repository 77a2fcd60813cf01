"""Plain-PyTorch definitions of every op of this package: the specification, the fallback and the test oracle.

Shape legend: B clouds, N points, G centres, K neighbours, F features per point besides xyz; M rows of point tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-8  # norms are clamped at this value, as torch.nn.functional.cosine_similarity does


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of broadcast points `[..., 3]` as `(dx*dx + dy*dy) + dz*dz` in fp32, without contraction."""
    dx, dy, dz = (a.float() - b.float()).unbind(-1)
    return (dx * dx + dy * dy) + dz * dz


def farthest_point_sample(points: Tensor, num_samples: int, start_index: int = 0) -> Tensor:
    """Greedy farthest-point sampling: each new sample is the point farthest from all samples so far.

    Args:
        points: `[B, N, 3]` coordinates.
        num_samples: K. With K > N the last index is repeated.
        start_index: the first sample, so that one cloud always gives the same answer.

    Returns:
        `[B, K]` int64 indices. Ties go to the lowest index.
    """
    batch, num_points, _ = points.shape
    rows = torch.arange(batch, device=points.device)
    index = torch.full((batch, num_samples), start_index, dtype=torch.int64, device=points.device)
    nearest = torch.full((batch, num_points), float("inf"), device=points.device)  # [B, N] to the chosen set
    for step in range(1, num_samples):
        if step >= num_points:
            index[:, step] = index[:, step - 1]
            continue
        newest = points[rows, index[:, step - 1]]  # [B, 3]
        nearest = torch.minimum(nearest, squared_distance(points, newest[:, None]))
        index[:, step] = nearest.argmax(dim=1)  # the first maximum: ties to the lowest index
    return index


def knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest `points` `[B, N, 3]` of every `query` `[B, Q, 3]`.

    Returns:
        squared distance `[B, Q, k]` fp32 and index `[B, Q, k]` int64, sorted by (distance, index). Places past N
        repeat the last neighbour.
    """
    distance = squared_distance(query[:, :, None], points[:, None])  # [B, Q, N]
    available = min(k, points.shape[1])
    if available < points.shape[1]:
        # topk orders ties arbitrarily, so it only gives the bound; what lies within it is sorted stably.
        bound = distance.topk(available, dim=-1, largest=False).values[..., -1:]
        width = int((distance <= bound).sum(dim=-1).max())
        order = torch.arange(points.shape[1], device=points.device).expand_as(distance)
        order = order.masked_fill(distance > bound, points.shape[1]).topk(width, dim=-1, largest=False, sorted=True)
        candidate = order.values.clamp(max=points.shape[1] - 1)
        kept = distance.gather(-1, candidate).masked_fill(order.values == points.shape[1], float("inf"))
        place = kept.sort(dim=-1, stable=True).indices[..., :available]
        index = candidate.gather(-1, place)
    else:
        index = distance.sort(dim=-1, stable=True).indices
    if k > available:
        index = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], k - available)], dim=-1)
    return distance.gather(-1, index), index


def group_points(points: Tensor, centre_index: Tensor, k: int) -> Tensor:
    """Neighbourhoods of chosen centres.

    Args:
        points: `[B, N, 3 + F]`, xyz first.
        centre_index: `[B, G]` int64.
        k: neighbours per centre.

    Returns:
        `[B, G, k, 3 + F]`: the k nearest points of each centre, xyz relative to the centre, features as they are.
    """
    batch = torch.arange(points.shape[0], device=points.device)[:, None]
    centres = points[batch, centre_index][..., :3]  # [B, G, 3]
    _, index = knn(centres, points[..., :3], k)
    groups = points[batch[..., None], index]  # [B, G, k, 3 + F]
    return torch.cat([groups[..., :3] - centres[:, :, None], groups[..., 3:]], dim=-1)


def cosine_alignment(projected: Tensor, target: Tensor) -> Tensor:
    """`1 - mean cos(projected, target)` over the rows of `projected` `[M, D]` or, per layer, `[L, M, D]`.

    Computed in fp32 (fp64 inputs stay fp64), norms clamped at `EPSILON`. No gradient to `target` `[M, D]`.

    Returns:
        scalar or `[L]`; 0 for M = 0.
    """
    dtype = torch.promote_types(projected.dtype, torch.float32)
    if projected.shape[-2] == 0:
        return projected.to(dtype).sum(dim=(-2, -1))
    target = target.detach().to(dtype).expand_as(projected)
    return 1 - functional.cosine_similarity(projected.to(dtype), target, dim=-1, eps=EPSILON).mean(dim=-1)


def alignment_loss(hidden: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The paper's alignment term: a three-layer SiLU projector on hidden states, compared with frozen features.

    Args:
        hidden: `[M, C]` hidden states of the point tokens, or `[L, M, C]` of L tapped layers.
        target: `[M, D]` features to stay close to; no gradient flows into them.
        weights: `[H, C]`, `[H, H]`, `[D, H]`; with L layers also `[L, H, C]`..., one projector per layer.
        biases: `[H]`, `[H]`, `[D]`, or `[L, H]`...

    Returns:
        `1 - mean cos`, fp32: a scalar, or `[L]`, one per layer.
    """
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() == 3:
            hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        else:
            hidden = functional.linear(hidden, weight, bias)
        if layer < len(weights) - 1:
            hidden = functional.silu(hidden)
    return cosine_alignment(hidden, target)

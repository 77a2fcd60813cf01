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
    dx, dy, dz = (a[..., axis].float() - b[..., axis].float() for axis in range(3))
    return (dx * dx + dy * dy) + dz * dz


def require_finite(points: Tensor, lengths: Tensor | None = None, name: str = "points") -> None:
    """Raises ValueError, naming the first of `points` `[B, N, 3 + F]` whose xyz is NaN or infinite."""
    if lengths is None and points.numel() == 0:
        return
    bad = ~points[..., :3].isfinite().all(dim=-1)
    bad &= torch.arange(points.shape[1], device=points.device) < _lengths(points, lengths)[:, None]
    if bad.any():
        cloud, point = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}[{cloud}, {point}]: a coordinate is NaN or infinite; remove such points first")


def _lengths(points: Tensor, lengths: Tensor | None) -> Tensor:
    """Point counts `[B]`, checked and clamped to 1..N; None means N."""
    batch, num_points = points.shape[:2]
    if num_points == 0:
        raise ValueError("points: expected at least one point in every cloud, got N = 0")
    if lengths is None:
        return torch.full((batch,), num_points, device=points.device)
    if lengths.shape != (batch,) or lengths.dtype != torch.int64:
        raise ValueError(f"lengths: expected int64 [B] with B = {batch}, got {lengths.dtype} {list(lengths.shape)}")
    if lengths.device.type == "cpu" and not ((lengths >= 1) & (lengths <= num_points)).all():
        raise ValueError(f"lengths: expected 1 to {num_points}, got {lengths.tolist()}")
    return lengths.clamp(1, num_points)


def farthest_point_sample(
    points: Tensor, num_samples: int, start_index: int = 0, lengths: Tensor | None = None
) -> Tensor:
    """See `pointalign_kernels.point_ops.farthest_point_sample`."""
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    lengths = _lengths(points, lengths)
    num_points = points.shape[1]
    if not 0 <= start_index < num_points:
        raise ValueError(f"start_index: expected 0 to {num_points - 1}, got {start_index}")
    rows = torch.arange(points.shape[0], device=points.device)
    valid = torch.arange(num_points, device=points.device) < lengths[:, None]  # [B, N]
    xyz = points[..., :3].float().masked_fill(~valid[..., None], 0)
    nearest = torch.where(valid, float("inf"), -1.0)  # [B, N] to the chosen set
    newest = lengths.sub(1).clamp(max=start_index)
    index = [newest]
    for step in range(1, num_samples):
        if step < num_points:
            nearest = torch.minimum(nearest, squared_distance(xyz, xyz[rows, newest][:, None]))
            farthest = nearest.argmax(dim=1)  # the first maximum: ties to the lowest index
            newest = torch.where(step < lengths, farthest, newest)
        index.append(newest)
    return torch.stack(index, dim=1)


def knn(query: Tensor, points: Tensor, k: int, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `pointalign_kernels.point_ops.knn`."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    if query.shape[0] != points.shape[0]:
        raise ValueError(f"query: expected a batch of {points.shape[0]}, got {query.shape[0]}")
    lengths = _lengths(points, lengths)
    num_points = points.shape[1]
    distance = squared_distance(query[:, :, None], points[:, None])  # [B, Q, N]
    places = torch.arange(num_points, device=points.device)
    # Places past the length are infinitely far: in a stable order they follow real points whose distance overflowed.
    distance = distance.masked_fill((places >= lengths[:, None])[:, None], float("inf"))
    available = min(k, num_points)
    if available < num_points:
        # topk orders ties arbitrarily, so it gives the bound only; the points within the bound are sorted stably.
        bound = distance.topk(available, dim=-1, largest=False).values[..., -1:]
        width = int((distance <= bound).sum(dim=-1).max()) if distance.numel() else available
        order = places.expand_as(distance).masked_fill(distance > bound, num_points)
        order = order.topk(width, dim=-1, largest=False, sorted=True).values
        candidate = order.clamp(max=num_points - 1)
        near = distance.gather(-1, candidate).masked_fill(order == num_points, float("inf"))
        place = near.sort(dim=-1, stable=True).indices[..., :available]
        index = candidate.gather(-1, place)
    else:
        index = distance.sort(dim=-1, stable=True).indices
    repeated = torch.arange(k, device=points.device).expand(*index.shape[:2], k).minimum(lengths[:, None, None] - 1)
    index = index.gather(-1, repeated)
    return distance.gather(-1, index), index


def group_points(
    points: Tensor, centre_index: Tensor, k: int, lengths: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """See `pointalign_kernels.point_ops.group_points`."""
    valid = _lengths(points, lengths)
    if centre_index.device.type == "cpu" and not ((centre_index >= 0) & (centre_index < valid[:, None])).all():
        raise ValueError(f"centre_index: expected 0 to {valid.tolist()} (exclusive), got {centre_index.tolist()}")
    batch = torch.arange(points.shape[0], device=points.device)[:, None]
    centres = points[batch, centre_index][..., :3].float()  # [B, G, 3]
    _, index = knn(centres, points, k, lengths)
    groups = points[batch[..., None], index]  # [B, G, k, 3 + F]
    xyz = groups[..., :3].float() - centres[:, :, None]
    return torch.cat([xyz, groups[..., 3:].float()], dim=-1).to(dtype or points.dtype)


def alignment_loss(hidden: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The paper's alignment term: a three-layer SiLU projector on hidden states, compared with frozen features.

    Args:
        hidden: `[M, C]` hidden states of the point tokens, or `[L, M, C]` of L tapped layers.
        target: `[M, D]` features to stay close to; no gradient flows into them.
        weights: `[H, C]`, `[H, H]`, `[D, H]`; with L layers also `[L, H, C]`..., one projector per layer.
        biases: `[H]`, `[H]`, `[D]`, or `[L, H]`...

    Returns: `1 - mean cos`, a scalar, or `[L]`, one per layer; 0 for M = 0. Cosines are computed in fp32 (in fp64 for
        fp64 inputs) with norms clamped at `EPSILON`.
    """
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() == 3:
            hidden = torch.baddbmm(bias[:, None], hidden, weight.mT)
        else:
            hidden = functional.linear(hidden, weight, bias)
        if layer < len(weights) - 1:
            hidden = functional.silu(hidden)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.shape[-2] == 0:
        return hidden.to(dtype).sum(dim=(-2, -1))
    target = target.detach().to(dtype).expand_as(hidden)
    return 1 - functional.cosine_similarity(hidden.to(dtype), target, dim=-1, eps=EPSILON).mean(dim=-1)

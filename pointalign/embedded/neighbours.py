"""Which clouds are alike: Chamfer distances, and the loss that teaches an encoder to keep them."""

import math

import torch
from torch import Tensor
from torch.nn import functional

POINTS, TURNS = 64, 8  # of the turned Chamfer distances: enough to tell near clouds from far ones
TILE, TILE_POINTS = 1 << 18, 256  # distances that are computed at once, and of how many points: they stay in the cache
SCALE = 5.0  # target distance of two embeddings per Chamfer distance of their clouds in the unit sphere
SHARPNESS = 5.0  # of the softmax over neighbours, per unit of the embeddings' distance


def lifted(points: Tensor) -> Tensor:
    """`[..., 5]` of points `[..., 3]`: a point, 1 and its squared norm, the references of `chamfer`."""
    return torch.cat([points, torch.ones_like(points[..., :1]), points.square().sum(dim=-1, keepdim=True)], dim=-1)


@torch.no_grad()
def chamfer(points: Tensor, references: Tensor) -> Tensor:
    """Symmetric Chamfer distances `[R]`: the mean distances to the nearest point there and back, added.

    One matrix product makes the squared distances, `-2 p r + |p|^2 + |r|^2`, a tile at a time in memory that is used
    again: to obtain new memory takes as long as the product.

    Args:
        points: `[P, 3]`.
        references: `[R, S, 5]`, see `lifted`.
    """
    factors = torch.cat([-2 * points, points.square().sum(dim=-1, keepdim=True), torch.ones_like(points[:, :1])], dim=1)
    parts = factors.split(TILE_POINTS)
    size = references.shape[1]
    clouds = max(1, TILE // (size * len(parts[0])))
    work = points.new_empty(min(clouds, len(references)) * size * len(parts[0]))
    distances = []
    for tile in references.split(clouds):
        rows, nearest = tile.flatten(0, 1), []
        back = points.new_full((len(tile), size), math.inf)
        for part in parts:
            squared = work[: len(rows) * len(part)].view(len(rows), len(part))
            squared = torch.mm(rows, part.T, out=squared).view(len(tile), size, len(part))
            nearest.append(squared.amin(dim=1))
            back = torch.minimum(back, squared.amin(dim=2))
        there = torch.cat(nearest, dim=1)
        distances.append(there.clamp_(min=0).sqrt().mean(dim=1) + back.clamp_(min=0).sqrt().mean(dim=1))
    return torch.cat(distances)


@torch.no_grad()
def turned_chamfer(points: Tensor, turns: int = TURNS) -> Tensor:
    """Chamfer distances `[B, B]` of clouds `[B, P, 3]`, the least over `turns` turns about the vertical axis, y."""
    angles = torch.arange(turns, device=points.device) * (2 * math.pi / turns)
    cos, sin, zero, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
    rotation = torch.stack([cos, zero, -sin, zero, one, zero, sin, zero, cos], dim=1).view(turns, 3, 3)
    turned = torch.einsum("bpi,rij->brpj", points, rotation)
    references = lifted(turned)
    distances = points.new_zeros(len(points), len(points))
    for row in range(len(points) - 1):
        each = chamfer(points[row], references[row + 1 :].flatten(0, 1))  # [(B - row - 1) turns]
        distances[row, row + 1 :] = each.view(-1, turns).amin(dim=1)
    return distances + distances.T


def neighbour_loss(embeddings: Tensor, points: Tensor) -> Tensor:
    """How far the distances among embeddings `[B, E]` are from those among their clouds `[B, N, 3]`.

    The mean squared difference, plus the cross-entropy of every cloud's neighbours, since near clouds matter most.
    Points are in random order: the first `POINTS` are a sample. A single cloud has no neighbour and no loss.
    """
    if len(points) < 2:
        return embeddings.sum() * 0
    targets = SCALE * turned_chamfer(points[:, :POINTS].float())
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    other = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    shape = (len(points), len(points) - 1)
    targets, distances = targets[other].view(shape), distances[other].view(shape)
    share = (-SHARPNESS * targets).softmax(dim=-1)
    nearest = functional.cross_entropy(-SHARPNESS * distances, share)
    return functional.mse_loss(distances, targets) + nearest

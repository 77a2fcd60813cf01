"""Which clouds are alike: Chamfer distances, and the loss that teaches an encoder to keep them."""

import math

import torch
from torch import Tensor
from torch.nn import functional

POINTS, TURNS = 64, 8  # of the turned Chamfer distances: enough to tell near clouds from far ones
SCALE = 5.0  # target distance of two embeddings per Chamfer distance of their clouds in the unit sphere
SHARPNESS = 5.0  # of the softmax over neighbours, per unit of the embeddings' distance


def chamfer(points: Tensor, references: Tensor, squared_norms: Tensor | None = None) -> Tensor:
    """Symmetric Chamfer distances `[R]`: the mean distances to the nearest point there and back, added.

    Args:
        points: `[P, 3]`.
        references: `[R, P, 3]`.
        squared_norms: `[R, P]` of the references' points, where they are known.
    """
    if squared_norms is None:
        squared_norms = references.square().sum(dim=-1)
    squared = references @ points.T  # [R, P, P]
    squared = squared.mul_(-2).add_(points.square().sum(dim=-1)).add_(squared_norms[..., None])
    squared.clamp_(min=0)
    there, back = (squared.amin(dim=dim).sqrt().mean(dim=1) for dim in (1, 2))
    return there + back


@torch.no_grad()
def turned_chamfer(points: Tensor, turns: int = TURNS) -> Tensor:
    """Chamfer distances `[B, B]` of clouds `[B, P, 3]`, the least over `turns` turns about the vertical axis, y."""
    angles = torch.arange(turns, device=points.device) * (2 * math.pi / turns)
    cos, sin, zero, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
    rotation = torch.stack([cos, zero, -sin, zero, one, zero, sin, zero, cos], dim=1).view(turns, 3, 3)
    turned = torch.einsum("bpi,rij->brpj", points, rotation)
    squared_norms = points.square().sum(dim=-1)
    distances = points.new_zeros(len(points), len(points))
    for row in range(len(points) - 1):
        others = turned[row + 1 :].flatten(0, 1)  # [(B - row - 1) turns, P, 3]
        each = chamfer(points[row], others, squared_norms[row + 1 :].repeat_interleave(turns, 0))
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

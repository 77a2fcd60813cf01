"""Which shapes are alike, however they are turned about the vertical: a metric that an encoder learns without words.

Shape legend: B clouds, P points of each, R turns, E width of an embedding.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

POINTS, TURNS = 64, 8  # of the Chamfer distances: enough to tell who is near whom
SCALE = 5.0  # Embeddings are so many times as far apart as clouds in the unit sphere
SHARPNESS = 5.0  # of the nearest neighbours' share, per unit of the embeddings' distance


@torch.no_grad()
def turned_chamfer(points: Tensor, turns: int = TURNS) -> Tensor:
    """Symmetric Chamfer distances `[B, B]` of clouds `[B, P, 3]`, the least over `turns` turns about the vertical, y.

    As in `evaluation.baselines.chamfer`: the mean distances there and back, added.
    """
    angles = torch.arange(turns, device=points.device) * (2 * math.pi / turns)
    cos, sin, no, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
    turn = torch.stack([cos, no, -sin, no, one, no, sin, no, cos], dim=1).view(turns, 3, 3)
    turned = torch.einsum("bpi,rij->brpj", points, turn)
    squares = points.square().sum(dim=-1)
    distances = points.new_zeros(len(points), len(points))
    for row in range(len(points) - 1):
        others = turned[row + 1 :].flatten(0, 1)  # [(B - row - 1) R, P, 3]
        squared = others @ points[row].T
        squared = squared.mul_(-2).add_(squares[row]).add_(squares[row + 1 :].repeat_interleave(turns, 0)[..., None])
        squared.clamp_(min=0)
        there, back = (squared.amin(dim=dim).sqrt().mean(dim=1) for dim in (1, 2))
        distances[row, row + 1 :] = (there + back).view(-1, turns).amin(dim=1)
    return distances + distances.T


def neighbour_loss(embeddings: Tensor, points: Tensor) -> Tensor:
    """How far the distances among embeddings `[B, E]` are from those among their clouds `[B, N, 3]`.

    The mean square of the difference, and the cross-entropy of every cloud's nearest neighbours among the others, since
    it is the near ones that matter. Points are in random order: the first `POINTS` are a sample of all. A cloud alone
    has no neighbour, and no loss.
    """
    if len(points) < 2:
        return embeddings.sum() * 0
    wanted = SCALE * turned_chamfer(points[:, :POINTS].float())
    found = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    other = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    shape = (len(points), len(points) - 1)
    wanted, found = wanted[other].view(shape), found[other].view(shape)
    share = (-SHARPNESS * wanted).softmax(dim=-1)
    return functional.mse_loss(found, wanted) + functional.cross_entropy(-SHARPNESS * found, share)

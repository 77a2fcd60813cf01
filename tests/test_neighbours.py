"""The metric that a new encoder learns: Chamfer distances that do not depend on how a cloud is turned."""

import math

import numpy as np
import pytest
import torch

from pointalign.data.point_cloud import turn
from pointalign.embedded.neighbours import POINTS, SCALE, TILE, chamfer, lifted, neighbour_loss, turned_chamfer


def shapes(count: int, points: int = 40) -> torch.Tensor:
    return torch.randn(count, points, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("turns", [1, 4])
def test_the_least_over_turns(turns):
    clouds = shapes(3)
    ways = []
    for number in range(turns):
        turned = [turn(cloud.numpy(), 2 * math.pi * number / turns).astype(np.float32) for cloud in clouds]
        ways.append(torch.stack([chamfer(cloud, lifted(torch.from_numpy(np.stack(turned)))) for cloud in clouds]))
    least = torch.stack(ways).amin(dim=0).triu(1)
    assert torch.allclose(turned_chamfer(clouds, turns).triu(1), least, atol=1e-5)


@pytest.mark.parametrize(("points", "size", "count"), [(300, 1000, 3), (40, 30, 300), (1, 1, 2), (513, 613, 1)])
def test_chamfer_in_tiles_equals_all_distances_at_once(points, size, count):
    """Several tiles of clouds and of points, the last of them smaller."""
    cloud, references = shapes(1, points)[0], shapes(count, size) + 1
    assert count * size * points > TILE or points < 40
    gaps = torch.cdist(cloud.double()[None], references.double())  # [R, P, S]
    expected = gaps.amin(dim=2).mean(dim=1) + gaps.amin(dim=1).mean(dim=1)
    torch.testing.assert_close(chamfer(cloud, lifted(references)).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_turned_copy_is_at_no_distance_and_a_fallen_one_is_not():
    cloud = shapes(1)[0] * torch.tensor([1.0, 3.0, 1.0])
    turned = torch.from_numpy(turn(cloud.numpy(), math.pi / 2)).float()
    fallen = cloud[:, [1, 0, 2]]
    distances = turned_chamfer(torch.stack([cloud, turned, fallen]))
    assert distances[0, 1] < 1e-3 < 0.5 < distances[0, 2]
    assert torch.equal(distances, distances.T) and not distances.diagonal().any()


def test_the_loss_is_least_for_embeddings_as_far_apart_as_their_clouds():
    line = torch.tensor([0.0, 0.1, 0.4, 1.0])
    clouds = torch.zeros(4, POINTS, 3)
    clouds[..., 1] = line[:, None]  # one above the other: at distance 2 |a - b|, whatever the turn
    right = (2 * SCALE * line)[:, None].requires_grad_(True)
    best = neighbour_loss(right, clouds)
    gradient = torch.autograd.grad(best, right)[0]
    assert gradient.abs().max() < 1e-3
    for wrong in (right * 0.9, right.flip(0)):
        assert neighbour_loss(wrong, clouds) > best + 1e-3


def test_a_cloud_alone_has_no_loss():
    embeddings = torch.ones(1, 4, requires_grad=True)
    loss = neighbour_loss(embeddings, shapes(1))
    loss.backward()
    assert loss.item() == 0 and embeddings.grad is not None and not embeddings.grad.any()


def test_equal_embeddings_have_a_gradient_without_nan():
    embeddings = torch.zeros(3, 4, requires_grad=True)
    neighbour_loss(embeddings, shapes(3, POINTS)).backward()
    assert embeddings.grad is not None and embeddings.grad.isfinite().all()

"""The folded mini-PointNet computes what the plain modules compute."""

import pytest
import torch
from torch import nn

from pointalign.models.point_encoder import fold_pointnet


def mini_pointnet(channels=6, width=64, bias=True, affine=True):
    torch.manual_seed(0)
    first = nn.Sequential(
        nn.Conv1d(channels, width // 2, 1, bias=bias),
        nn.BatchNorm1d(width // 2, affine=affine),
        nn.ReLU(),
        nn.Conv1d(width // 2, width, 1),
    )
    second = nn.Sequential(
        nn.Conv1d(2 * width, 2 * width, 1, bias=bias),
        nn.BatchNorm1d(2 * width, affine=affine),
        nn.ReLU(),
        nn.Conv1d(2 * width, width, 1),
    )
    for module in [*first, *second]:
        if isinstance(module, nn.BatchNorm1d):  # statistics as training leaves them, negative scales included
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3)
            if affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return first.eval(), second.eval()


def plain(first, second, groups):
    """The module as the paper's encoder writes it."""
    batch, num_groups, neighbours, _ = groups.shape
    features = first(groups.flatten(0, 1).transpose(1, 2))  # [B * G, d, k]
    shared = features.amax(dim=2, keepdim=True).expand(-1, -1, neighbours)
    return second(torch.cat([shared, features], dim=1)).amax(dim=2).view(batch, num_groups, -1)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"channels": 3, "width": 256}])
def test_equals_the_plain_module(options):
    first, second = mini_pointnet(**options)
    groups = torch.randn(2, 9, 32, options.get("channels", 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        folded = fold_pointnet(first, second).forward(groups)
        same_precision = plain(first, second, groups)
        truth = plain(first.double(), second.double(), groups.double())
    assert folded.shape == same_precision.shape

    def error(value):
        return ((value.double() - truth).norm() / truth.norm()).item()

    assert error(folded) < 1e-6
    assert error(folded) < 3 * error(same_precision) + 1e-7


def test_one_neighbour_and_no_groups():
    first, second = mini_pointnet()
    folded = fold_pointnet(first, second)
    groups = torch.randn(3, 4, 1, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(folded.forward(groups), plain(first, second, groups))
    assert folded.forward(groups[:0]).shape == (0, 4, 64)


def test_the_fold_is_a_snapshot():
    first, second = mini_pointnet()
    groups = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(3))
    folded = fold_pointnet(first, second)
    before = folded.forward(groups)
    with torch.no_grad():
        for parameter in [*first.parameters(), *second.parameters()]:
            parameter.add_(1)
    assert torch.equal(folded.forward(groups), before)


def test_training_mode_is_refused():
    first, second = mini_pointnet()
    with pytest.raises(ValueError, match="second_conv: expected a module in evaluation mode"):
        fold_pointnet(first, second.train())
    first[1] = nn.BatchNorm1d(32, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="no running statistics"):
        fold_pointnet(first, second.eval())
    with pytest.raises(ValueError, match="expected Conv1d, BatchNorm1d, ReLU, Conv1d"):
        fold_pointnet(first[:2], second)

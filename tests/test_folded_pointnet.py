"""The folded mini-PointNet computes what the plain modules compute, and its kernel what PyTorch computes."""

import copy
import os

import pytest
import torch
from made_interpreter import reduce_by_slices, run_in_the_interpreter
from torch import nn

from pointalign.models.point_encoder import MiniPointNet, fold_pointnet
from pointalign_kernels.folded_pointnet import folded_pointnet, folded_pointnet_fused, folded_pointnet_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float32, torch.float16)
RUNS_KERNEL = torch.cuda.is_available() or INTERPRETED
runs_kernel = pytest.mark.skipif(not RUNS_KERNEL, reason="needs a GPU or the interpreter")


def mini_pointnet(channels=6, width=64, bias=True, affine=True, outputs=None):
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
        nn.Conv1d(2 * width, outputs or width, 1),
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
        folded = folded_pointnet(groups, fold_pointnet(first, second))
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
        torch.testing.assert_close(folded_pointnet(groups, folded), plain(first, second, groups))
    assert folded_pointnet(groups[:0], folded).shape == (0, 4, 64)


def test_the_fold_is_a_snapshot():
    first, second = mini_pointnet()
    groups = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(3))
    folded = fold_pointnet(first, second)
    before = folded_pointnet(groups, folded)
    with torch.no_grad():
        for parameter in [*first.parameters(), *second.parameters()]:
            parameter.add_(1)
    assert torch.equal(folded_pointnet(groups, folded), before)


def test_training_mode_is_refused():
    first, second = mini_pointnet()
    with pytest.raises(ValueError, match="second_conv: expected a module in evaluation mode"):
        fold_pointnet(first, second.train())
    first[1] = nn.BatchNorm1d(32, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="no running statistics"):
        fold_pointnet(first, second.eval())
    with pytest.raises(ValueError, match="expected Conv1d, BatchNorm1d, ReLU, Conv1d"):
        fold_pointnet(first[:2], second)


# -- the kernel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def quick_reductions():
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            reduce_by_slices(patch)
        yield


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


def folded_case(batch, num_groups, points, channels, width, outputs, dtype):
    """Groups and folded weights on the device, and their vectors in fp64."""
    weights = fold_pointnet(*(part.to(dtype) for part in mini_pointnet(channels, width, outputs=outputs)))
    groups = torch.randn(batch, num_groups, points, channels, generator=torch.Generator().manual_seed(4)).to(dtype)
    exact = moved(weights, torch.float64, "cpu")
    truth = folded_pointnet_reference(groups.double(), exact)
    return groups.to(DEVICE), moved(weights, dtype, DEVICE), truth.to(DEVICE)


def moved(weights, dtype, device):
    pairs = (part if isinstance(part, tuple) else (part,) for part in weights)
    parts = [tuple(tensor.to(device, dtype) for tensor in pair) for pair in pairs]
    return type(weights)(*(part if len(part) == 2 else part[0] for part in parts))


# Clouds, groups, points, channels, w, d: several programs; a last one that is not full; points and widths that are no
# powers of two; a single point; the most points; coordinates alone; a single group.
CASES = (
    (2, 9, 32, 6, 64, 64),
    (1, 7, 20, 6, 48, 40),
    (2, 3, 1, 6, 32, 16),
    (1, 3, 64, 3, 32, 96),
    (1, 1, 5, 6, 72, 33),
)


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_the_reference(case, dtype):
    groups, weights, truth = folded_case(*case, dtype)
    assert folded_pointnet_fused(groups, weights)
    result, plain = folded_pointnet(groups, weights), folded_pointnet_reference(groups, weights)
    assert result.shape == truth.shape and result.dtype == dtype
    assert error(result, truth) <= 2 * error(plain, truth) + 1e-7
    assert error(result, truth) <= {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]


@runs_kernel
def test_a_group_depends_on_itself_alone():
    """Neither on its place in a program nor on the others; bit by bit but for the interpreter's matrix products."""
    tolerance = 1e-6 if INTERPRETED else 0.0
    groups, weights, _ = folded_case(1, 9, 12, 6, 32, 32, DTYPES[0])
    together = folded_pointnet(groups, weights)
    alone = torch.cat([folded_pointnet(groups[:, place : place + 1], weights) for place in range(9)], dim=1)
    torch.testing.assert_close(together, alone, atol=tolerance, rtol=tolerance)
    reordered = folded_pointnet(groups.flip(2), weights)
    torch.testing.assert_close(reordered, together, atol=tolerance, rtol=tolerance)


@runs_kernel
def test_a_nan_shows_in_its_group_and_in_no_other():
    groups, weights, _ = folded_case(1, 5, 4, 6, 32, 32, DTYPES[0])
    groups[0, 2, 1, 5] = float("nan")
    bad = folded_pointnet(groups, weights).isnan()
    assert bad[0, 2].all() and not bad[0, [0, 1, 3, 4]].any()


@runs_kernel
def test_the_frozen_encoder_uses_the_kernel_and_a_gradient_does_not(monkeypatch):
    from pointalign_kernels import folded_pointnet_triton

    launches, launch = [], folded_pointnet_triton.launch
    monkeypatch.setattr(folded_pointnet_triton, "launch", lambda *arguments: (launches.append(1), launch(*arguments)))
    net = MiniPointNet(6, 32, 32).to(DEVICE, DTYPES[0]).eval()
    groups = torch.randn(1, 2, 8, 6, dtype=DTYPES[0], device=DEVICE)
    with torch.no_grad():
        vectors = net(groups)
    assert len(launches) == 1
    tolerance = 1e-4 if DTYPES[0] == torch.float32 else 2e-2
    torch.testing.assert_close(net(groups), vectors, atol=tolerance, rtol=tolerance)  # its parameters may be trained
    copy.deepcopy(net).train()(groups)
    net.requires_grad_(False)
    leaf = groups.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf)
    assert gradient.abs().sum() > 0 and len(launches) == 1
    net(groups)
    assert len(launches) == 2


@runs_kernel
def test_what_the_kernel_leaves_to_pytorch():
    groups, weights, _ = folded_case(1, 2, 65, 6, 16, 16, DTYPES[0])
    assert not folded_pointnet_fused(groups, weights), "more points than a program has"
    assert folded_pointnet_fused(groups[:, :, :64], weights)
    assert not folded_pointnet_fused(groups[:, :, :0], weights)
    assert not folded_pointnet_fused(groups[:, :, :4].double(), weights)
    groups, weights, _ = folded_case(1, 1, 4, 6, 16, 272, DTYPES[0])
    assert not folded_pointnet_fused(groups, weights), "wider than its registers"
    assert folded_pointnet(groups[:0], weights).shape == (0, 1, 272)


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="this process runs the kernel itself")
def test_kernel_in_the_interpreter():
    assert "passed" in run_in_the_interpreter(__file__, "-k", "kernel or itself or nan")

"""The point encoder end to end, points to tokens, at the paper's sizes: native ops, reference ops, the release's way;
on a GPU also its mini-PointNet alone in bf16: `-k pointnet` times just that.

    pytest benchmarks/test_encoder.py --benchmark-only --results FOLDER

Weights are random: speed does not depend on them. Every contender's tokens are first compared with the reference's.
"""

import copy

import pytest
import torch
from point_op_contenders import encoder_contenders, plain_pointnet, surfaces

from pointalign.models.configuration import PRESETS, PointBertConfig
from pointalign.models.point_encoder import PointBertModel, fold_pointnet
from pointalign_kernels import point_ops
from pointalign_kernels.folded_pointnet import folded_pointnet, folded_pointnet_fused, folded_pointnet_reference

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("batch", (1, 16) if CUDA else (1, 4))
def test_encoder(device, small, race, record_race, batch):
    config = PointBertConfig(**PRESETS["mini" if small else "minigpt3d-phi2"]["point_config"])
    torch.manual_seed(0)
    dtype, tolerance = (torch.bfloat16, 5e-2) if CUDA else (torch.float32, 1e-3)
    encoder = PointBertModel(config).to(device, dtype).eval()
    points = surfaces(batch, 256 if small else config.num_points)
    points = torch.cat([points, torch.rand(points.shape)], dim=-1).to(device)
    calls = encoder_contenders(encoder, device.type in point_ops.NATIVE_DEVICES)
    with torch.inference_mode():
        truth = calls["reference ops"](points).float()
        for name, call in calls.items():
            error = ((call(points).float() - truth).norm() / truth.norm()).item()
            assert error < tolerance, f"{name}: tokens differ by {error:.1e} (relative L2) from the reference's"
        timing = race({name: lambda call=call: call(points) for name, call in calls.items()})
    if timing is not None:
        sizes = {"points": points.shape[1], "groups": config.num_groups, "hidden_size": config.hidden_size}
        row = {"race": "encoder", "batch": batch, **sizes, "dtype": str(dtype), "threads": torch.get_num_threads()}
        record_race("encoder", row | timing)


@pytest.mark.skipif(not CUDA, reason="the kernel of the mini-PointNet needs a GPU")
@pytest.mark.parametrize("batch", (1, 16))
def test_pointnet(device, small, race, record_race, batch):
    """Groups to vectors with folded weights, in one kernel and by PyTorch, and the convolutions that were folded."""
    config = PointBertConfig(**PRESETS["mini" if small else "minigpt3d-phi2"]["point_config"])
    torch.manual_seed(0)
    encoder = PointBertModel(config).to(device, torch.bfloat16).eval()
    net = encoder.encoder
    points = surfaces(batch, 256 if small else config.num_points)
    points = torch.cat([points, torch.rand(points.shape)], dim=-1).to(device)
    with torch.inference_mode():
        groups = encoder.group(points)[0].bfloat16()
        weights = fold_pointnet(net.first_conv, net.second_conv)
        assert folded_pointnet_fused(groups, weights)
        calls = {
            "one kernel": lambda: folded_pointnet(groups, weights),
            "folded, PyTorch": lambda: folded_pointnet_reference(groups, weights),
            "convolutions": lambda: plain_pointnet(net.first_conv, net.second_conv, groups),
            "folding alone": lambda: fold_pointnet(net.first_conv, net.second_conv),
        }
        exact = (copy.deepcopy(part).double() for part in (net.first_conv, net.second_conv))
        truth = plain_pointnet(*exact, groups.double())
        for name in ("one kernel", "folded, PyTorch", "convolutions"):
            error = ((calls[name]().double() - truth).norm() / truth.norm()).item()
            assert error < 2e-2, f"{name}: vectors differ by {error:.1e} (relative L2) from those in fp64"
        timing = race(calls)
    if timing is not None:
        sizes = {"points": points.shape[1], "groups": config.num_groups, "neighbours": config.group_size}
        row = {"race": "pointnet", "batch": batch, **sizes, "dtype": str(groups.dtype)}
        record_race("encoder", row | {"threads": torch.get_num_threads()} | timing)

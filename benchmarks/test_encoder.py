"""The point encoder end to end, points to tokens, at the paper's sizes: native ops, reference ops, the release's way.

    pytest benchmarks/test_encoder.py --benchmark-only --results FOLDER

Weights are random: speed does not depend on them. Every contender's tokens are first compared with the reference's.
"""

import pytest
import torch
from point_op_contenders import encoder_contenders, surfaces

from pointalign.models.configuration import PRESETS, PointBertConfig
from pointalign.models.point_encoder import PointBertModel
from pointalign_kernels import point_ops

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

"""Every example runs and learns what it says, in seconds."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def main_of(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_the_point_operations_train_a_pointnet2():
    assert main_of("pointnet2.py")() > 0.9


def test_the_layer_of_the_pointnet2_example_sends_gradients_to_every_weight():
    import torch

    made = runpy.run_path(str(EXAMPLES / "pointnet2.py"))
    model = made["PointNet2"]()
    xyz, _ = made["clouds"](4, torch.Generator().manual_seed(0))
    centres, features = model.first(xyz, xyz)
    assert centres.shape == (4, 64, 3) and features.shape == (4, 64, 32)
    assert all((xyz[row] == centre).all(dim=1).any() for row in range(4) for centre in centres[row]), (
        "points of the cloud"
    )
    model(xyz).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_trl_fine_tunes_our_model():
    pytest.importorskip("trl", reason="SFTTrainer needs trl")
    pytest.importorskip("datasets", reason="trl needs datasets")
    losses = main_of("finetune_trl.py")()
    assert losses[-1] < losses[0] / 2


def test_every_example_is_run_here_or_beside_what_it_shows():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [path.name for path in EXAMPLES.glob("*.py") if path.name not in tests] == []

"""The parity table: every case runs and agrees, so that no refactoring is first noticed by a GPU call."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import parity


@pytest.mark.parametrize("operator", parity.cases())
def test_every_implementation_agrees_with_float64(operator):
    leaves, plain, others = parity.cases()[operator]
    truth = parity.outputs(plain, leaves, torch.float64)
    for implementation, function in ({"plain PyTorch": plain} | others).items():
        error = parity.error(function, leaves, torch.float32, truth)
        assert 0 < error < 1e-5, implementation


def test_an_operator_that_is_wrong_has_a_large_error():
    leaves, plain, _ = parity.cases()["tanh-GELU"]
    truth = parity.outputs(plain, leaves, torch.float64)
    assert parity.error(lambda x: plain(x) * 1.01, leaves, torch.float32, truth) > 5e-3

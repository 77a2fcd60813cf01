"""What the benchmark measures beside the library's launches: as exact as they are."""

import sys
from pathlib import Path

import pytest
import torch
from test_alignment_kernels import TABLE_ROWS, assert_as_accurate, assert_written_and_bit_equal, problem

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from alignment_candidates import EARLIER, under
from alignment_tma import by_tma

hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90 or no GPU"
)


@hopper
@pytest.mark.parametrize("rows", TABLE_ROWS)
def test_tma_launches(rows):
    tensors = problem((rows, 144, 136, 72))
    with by_tma():
        assert_written_and_bit_equal(tensors, assert_as_accurate(tensors))


@hopper
@pytest.mark.parametrize("shared", (False, True), ids=("stacked", "shared"))
def test_tma_launches_of_several_layers(shared):
    with by_tma():
        assert_as_accurate(problem((33, 48, 40, 24), layers=2, shared=shared))


def test_the_earlier_tiles():
    with under(EARLIER[90]):
        assert_as_accurate(problem((33, 144, 136, 72)))

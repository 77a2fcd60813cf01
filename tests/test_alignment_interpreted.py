"""The alignment kernels where a new process must decide about Triton: in its interpreter, and without Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_interpreter import run_in_the_interpreter


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_alignment_kernels.py runs on the GPU itself")
def test_kernels_in_the_interpreter():
    tests = [Path(__file__).with_name(f"test_alignment_{name}.py") for name in ("kernels", "variants")]
    assert "passed" in run_in_the_interpreter(*map(str, tests))


def test_without_triton_the_reference_runs():
    """PyTorch for CPUs comes without Triton: the package must import, and only `impl="triton"` may fail."""
    code = """if True:
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch, pointalign_kernels as kernels
        hidden, target = torch.randn(5, 4), torch.randn(5, 3)
        weights = [torch.randn(*size) for size in ((6, 4), (6, 6), (3, 6))]
        biases = [torch.zeros(size) for size in (6, 6, 3)]
        loss = kernels.alignment_loss(hidden, target, weights, biases)
        assert loss == kernels.alignment_loss(hidden, target, weights, biases, "reference")
        assert not kernels.fused_available("cuda")
        try:
            kernels.alignment_loss(hidden, target, weights, biases, "triton")
        except RuntimeError as error:
            assert "needs Triton" in str(error)
        else:
            raise AssertionError("impl='triton' ran without Triton")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]

"""The alignment kernels where a new process must decide about Triton: in its interpreter, and without Triton."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_alignment_kernels.py runs on the GPU itself")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="the kernels need triton")
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 cannot loop to a run-time bound with numpy >= 2.4")
    tests = [Path(__file__).with_name(f"test_alignment_{name}.py") for name in ("kernels", "variants")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *map(str, tests)]
    # A single BLAS thread is several times faster at the small products of the interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests[0].parents[1])
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "passed" in run.stdout.splitlines()[-1]


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

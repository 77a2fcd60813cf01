"""Runs test_alignment_kernels.py in Triton's interpreter, which must be chosen before anything imports Triton."""

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
    pytest.importorskip("triton", reason="the fused kernels need triton")
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 cannot loop to a run-time bound with numpy >= 2.4")
    tests = Path(__file__).with_name("test_alignment_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(tests)]
    # BLAS threads only fight over the small products of the interpreter: one is several times faster.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tests.parents[1])
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert "passed" in run.stdout.splitlines()[-1]

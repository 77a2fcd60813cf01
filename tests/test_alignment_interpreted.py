"""The alignment kernels where a new process must decide about Triton: in its interpreter, and without Triton."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_interpreter import run_in_the_interpreter
from made_programs import run_program


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_alignment_kernels.py runs on the GPU itself")
def test_kernels_in_the_interpreter():
    tests = [Path(__file__).with_name(f"test_alignment_{name}.py") for name in ("kernels", "variants")]
    assert "passed" in run_in_the_interpreter(*map(str, tests))


def test_the_interpreter_of_the_tests_computes_what_tritons_does():
    code = """if True:
        import made_quick_interpreter as quick  # imported by the server
        import torch, pointalign_kernels as kernels
        from triton import language
        torch.manual_seed(0)
        given = [torch.randn(*size) for size in ((33, 48), (33, 24), (40, 48), (40, 40), (24, 40), (40,), (40,), (24,))]
        before = {name: getattr(language.core, name) for name in dir(language.core)}

        def step():
            leaves = [tensor.clone().requires_grad_(place != 1) for place, tensor in enumerate(given)]
            loss = kernels.alignment_loss(leaves[0], leaves[1], leaves[2:5], leaves[5:], "triton")
            loss.backward()
            return [loss, *(leaf.grad for leaf in leaves if leaf.requires_grad)]

        assert quick.interpreter._patch_lang is quick.patch_lang
        ours = step()
        assert all(getattr(language.core, name) is value for name, value in before.items())
        with quick.as_triton_has_it():
            theirs = step()
        assert all(map(torch.equal, ours, theirs)) and len(ours) == 8
    """
    pytest.importorskip("triton", reason="the kernels need triton")
    run = run_program(code, interpreted=True)
    assert run.returncode == 0, run.stderr[-2000:]


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

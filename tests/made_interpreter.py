"""Tests of Triton kernels in a process of their own, whose kernels run in Triton's interpreter on CPU tensors."""

import functools
import importlib.metadata

import numpy as np
import pytest
from made_programs import PYTEST, run_program


def version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


def run_in_the_interpreter(*arguments: str) -> str:
    """The last line of a pytest with these arguments; skips where Triton, or an interpreter that works, is missing."""
    pytest.importorskip("triton", reason="the kernels need triton")
    if version("triton") < (3, 7) and version("numpy") >= (2, 4):
        pytest.skip("the interpreter of triton < 3.7 cannot loop to a run-time bound with numpy >= 2.4")
    run = run_program(PYTEST, "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments, interpreted=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return run.stdout.splitlines()[-1]


def reduce_by_slices(patch: pytest.MonkeyPatch) -> None:
    """The interpreter reduces by a kernel's own function a slice at a time; it would take an element at a time.

    The order is the same, and so is the function that combines: on a tile of 64 x 64 it is called 63 times, not 4032.
    """
    from triton.runtime.interpreter import ReduceOps

    def reduce(ops, tensors):
        (tensor,) = tensors
        assert ops.axis is not None and not ops.keep_dims, "no kernel of this project needs more"
        slices = [ops.to_tensor(data, tensor.dtype) for data in np.moveaxis(tensor.handle.data, ops.axis, 0)]
        return [functools.reduce(ops.combine_fn.fn, slices)]

    patch.setattr(ReduceOps, "generic_reduce", reduce)

"""A CUDA graph on a CPU: records the operators that run, and replays them on the same memory."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")  # what CUDA refuses while it captures


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{func} waits for the device during a capture")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class CpuRecorder:
    """In place of `graphs.CudaRecorder`."""

    def warm_up(self, run) -> None:
        run()

    def record(self, run) -> tuple[Any, Any]:
        with Operators() as operators:
            result = run()
        return result, operators.replay

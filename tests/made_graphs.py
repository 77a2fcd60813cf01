"""A CUDA graph on a CPU: records the operators that run, and replays them on the same memory.

Attention that can be recorded so is registered with transformers as `masked`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

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


def masked_attention(module, query, key, value, attention_mask, scaling=None, *, cu_seq_lens_q, **_):
    """Packed attention on a CPU that does not wait for the lengths, as FlashAttention on CUDA does not."""
    places = torch.arange(query.shape[2], device=query.device)
    segment = torch.bucketize(places, cu_seq_lens_q[1:], right=True)
    seen = (segment[:, None] == segment[None]) & (places[:, None] >= places[None])
    grouped = query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2), None


AttentionInterface.register("masked", masked_attention)

"""The alignment loss as one explicit forward and backward in ATen calls: what a lean CPU path would look like.

Only a row of the benchmark: the matrix products dominate on a CPU, so it is kept here to be measured, not shipped.
"""

import torch
from torch import Tensor
from torch.nn import functional

from pointalign_kernels.reference import EPSILON


class ExplicitAlignment(torch.autograd.Function):
    """`apply(hidden [M, C], target [M, D], dtype of the products, three weights, three biases)`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, target: Tensor, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            w1, w2, w3, b1, b2, b3 = (parameter.to(dtype) for parameter in parameters)
            x = hidden.to(dtype)
            z1 = torch.addmm(b1, x, w1.mT)
            a1 = functional.silu(z1)
            z2 = torch.addmm(b2, a1, w2.mT)
            a2 = functional.silu(z2)
            y = torch.addmm(b3, a2, w3.mT).float()
            length = torch.linalg.vector_norm(y, dim=1, keepdim=True).clamp_min(EPSILON)
            y = y / length
            target = functional.normalize(target.float(), dim=1, eps=EPSILON)
            cosine = (y * target).sum(1, keepdim=True)
            dy = (cosine * y - target) / length
        ctx.save_for_backward(x, z1, a1, z2, a2, dy, w1, w2, w3)
        ctx.dtypes = hidden.dtype, parameters[0].dtype
        return 1 - cosine.mean()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, z1, a1, z2, a2, dy, w1, w2, w3 = ctx.saved_tensors
        hidden_dtype, dtype = ctx.dtypes
        d3 = (dy * (upstream / len(dy))).to(x.dtype)
        d2 = torch.ops.aten.silu_backward(d3 @ w3, z2)
        d1 = torch.ops.aten.silu_backward(d2 @ w2, z1)
        weights = [(d.mT @ a).to(dtype) for d, a in ((d1, x), (d2, a1), (d3, a2))]
        biases = [d.sum(0, dtype=torch.float32).to(dtype) for d in (d1, d2, d3)]
        return (d1 @ w1).to(hidden_dtype), None, None, *weights, *biases

"""The mini-PointNet of a frozen point encoder, its BatchNorms folded into the weights: groups of points to vectors.

On CUDA in 16 bits a Triton kernel computes it (`folded_pointnet_triton.py`), which keeps everything between the points
and the vectors on the chip; elsewhere, and where a gradient is needed, the plain PyTorch of `folded_pointnet_reference`
does. With TRITON_INTERPRET=1 the kernel runs on CPU tensors in fp32 and fp16.

Shape legend: B clouds, G groups of k points with C channels; w inner width; d features of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pointalign_kernels.alignment import fused_available

MAX_POINTS, MAX_WIDTH = 64, 256  # k, and w and d, for which a program's registers suffice


class FoldedPointNet(NamedTuple):
    """Weights of a mini-PointNet in evaluation mode, BatchNorms folded into them.

    Every pair is the weight `[out, in]` and the bias `[out]` of a linear layer.
    """

    first: tuple[Tensor, Tensor]  # C -> w/2 with its BatchNorm
    lift: tuple[Tensor, Tensor]  # w/2 -> w
    shared: tuple[Tensor, Tensor]  # w -> 2w, once per group: the global half, with the bias and the BatchNorm
    local: Tensor  # [2w, w], once per point
    last: tuple[Tensor, Tensor]  # 2w -> d

    def tensors(self) -> tuple[Tensor, ...]:
        """Weights and biases in order."""
        return (*self.first, *self.lift, *self.shared, self.local, *self.last)


def folded_pointnet_fused(groups: Tensor, weights: FoldedPointNet) -> bool:
    """Whether the kernel computes these groups: sizes, dtype and device fit, and no gradient is needed."""
    dtypes = (torch.float32, torch.float16) if groups.device.type == "cpu" else (torch.float16, torch.bfloat16)
    tensors = (groups, *weights.tensors())
    return (
        groups.dtype in dtypes
        and all(tensor.dtype == groups.dtype and tensor.device == groups.device for tensor in tensors)
        and 1 <= groups.shape[2] <= MAX_POINTS
        and max(len(weights.lift[1]), len(weights.last[1])) <= MAX_WIDTH
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and fused_available(groups.device.type)
    )


def folded_pointnet(groups: Tensor, weights: FoldedPointNet) -> Tensor:
    """Per-group features, `[B, G, k, C] -> [B, G, d]`, in the dtype of the weights."""
    if not folded_pointnet_fused(groups, weights):
        return folded_pointnet_reference(groups, weights)
    from pointalign_kernels import folded_pointnet_triton  # here: without Triton this file must still import

    out = groups.new_empty(*groups.shape[:2], len(weights.last[1]))
    with torch.cuda.device_of(groups):  # Triton launches on the current device
        folded_pointnet_triton.launch(groups.contiguous(), [tensor.contiguous() for tensor in weights.tensors()], out)
    return out


def folded_pointnet_reference(groups: Tensor, weights: FoldedPointNet) -> Tensor:
    """The same in plain PyTorch."""
    batch, num_groups, neighbours, channels = groups.shape
    points = groups.reshape(-1, channels)  # [B * G * k, C]
    features = functional.linear(functional.linear(points, *weights.first).relu_(), *weights.lift)
    features = features.view(batch * num_groups, neighbours, features.shape[-1])
    shared = functional.linear(features.amax(dim=1), *weights.shared)  # [B * G, 2w]
    hidden = functional.linear(features, weights.local).add_(shared[:, None]).relu_()
    # The maximum commutes with the bias: it is added once per group.
    weight, bias = weights.last
    return (functional.linear(hidden, weight).amax(dim=1) + bias).view(batch, num_groups, len(bias))

"""The mini-PointNet of the point encoder, folded for frozen encoders: the same function in fewer operations.

Both BatchNorms become part of the convolution before them, and the first convolution after the concatenation
`[global, local]` is split: its global half is applied once per group, as a bias, instead of once per point. With 32
points per group that is 30 % fewer multiplications, and the `[B * G * k, 2d]` concatenation is never built.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class FoldedPointNet(NamedTuple):
    """Weights of a mini-PointNet in eval mode; `forward` maps groups `[B, G, k, C]` to `[B, G, d]`."""

    first: tuple[Tensor, Tensor]  # C -> d/2 with its BatchNorm
    lift: tuple[Tensor, Tensor]  # d/2 -> d
    shared: tuple[Tensor, Tensor]  # d -> 2d, once per group: the global half, with the bias and the BatchNorm
    local: Tensor  # [2d, d], once per point
    last: tuple[Tensor, Tensor]  # 2d -> d

    def forward(self, groups: Tensor) -> Tensor:
        """Per-group features.

        Args:
            groups: `[B, G, k, C]`, any floating dtype that the weights have.

        Returns:
            `[B, G, d]`.
        """
        batch, num_groups, neighbours, channels = groups.shape
        points = groups.reshape(-1, channels)  # [B * G * k, C]
        features = functional.linear(functional.linear(points, *self.first).relu_(), *self.lift)
        features = features.view(batch * num_groups, neighbours, features.shape[-1])
        shared = functional.linear(features.amax(dim=1), *self.shared)  # [B * G, 2d]
        hidden = functional.linear(features, self.local).add_(shared[:, None]).relu_()
        # The maximum commutes with the bias: it is added once per group.
        weight, bias = self.last
        return (functional.linear(hidden, weight).amax(dim=1) + bias).view(batch, num_groups, len(bias))


def _linear(convolution: nn.Conv1d) -> tuple[Tensor, Tensor]:
    weight = convolution.weight[..., 0].clone()
    return weight, torch.zeros_like(weight[:, 0]) if convolution.bias is None else convolution.bias.clone()


def _folded(convolution: nn.Conv1d, norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """The weight `[out, in]` and bias of a 1x1 convolution followed by a BatchNorm in eval mode, folded in fp64."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("the BatchNorm keeps no running statistics: there is nothing to fold")
    weight, bias = (tensor.double() for tensor in _linear(convolution))
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    dtype = convolution.weight.dtype
    return (weight * scale[:, None]).to(dtype), ((bias - norm.running_mean.double()) * scale + shift).to(dtype)


def _parts(name: str, block: nn.Sequential) -> tuple[nn.Conv1d, nn.BatchNorm1d, nn.Conv1d]:
    if len(block) == 4:
        first, norm, activation, last = block
        if isinstance(first, nn.Conv1d) and isinstance(norm, nn.BatchNorm1d) and isinstance(last, nn.Conv1d):
            if isinstance(activation, nn.ReLU):
                if block.training or norm.training:
                    raise ValueError(f"{name} is in training mode: call eval() before folding")
                return first, norm, last
    raise ValueError(f"{name}: expected Conv1d, BatchNorm1d, ReLU, Conv1d, got {block}")


@torch.no_grad()
def fold_pointnet(first_conv: nn.Sequential, second_conv: nn.Sequential) -> FoldedPointNet:
    """Folds a mini-PointNet that is frozen and in eval mode.

    Args:
        first_conv: `Conv1d(C, d/2, 1), BatchNorm1d, ReLU, Conv1d(d/2, d, 1)`.
        second_conv: `Conv1d(2d, 2d, 1), BatchNorm1d, ReLU, Conv1d(2d, d, 1)`, applied to `[global, local]`.

    Returns:
        Weights of the same dtype and device, equal to the plain module within fp32 rounding. They are copies: fold
        again after the module changes or moves.

    Raises:
        ValueError: a module is built otherwise, is in training mode (its BatchNorm would use the batch) or keeps no
            statistics.
    """
    first, first_norm, lift = _parts("first_conv", first_conv)
    second, second_norm, last = _parts("second_conv", second_conv)
    weight, bias = _folded(second, second_norm)
    width = weight.shape[1] // 2
    return FoldedPointNet(
        first=_folded(first, first_norm),
        lift=_linear(lift),
        shared=(weight[:, :width].contiguous(), bias),
        local=weight[:, width:].contiguous(),
        last=_linear(last),
    )

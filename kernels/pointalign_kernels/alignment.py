"""The alignment loss: one function per op, `impl` chooses how it runs.

Shape legend: L tapped layers, M rows of point tokens, C hidden size, H projector width, D target width.

`reference` is plain PyTorch (`pointalign_kernels.reference`), `triton` the fused kernels, `auto` the fused kernels
where they can run and the reference elsewhere. With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, in fp32
and fp16 (Triton's interpreter multiplies bf16 wrongly).

Nothing here synchronises with the host, so where M is fixed `torch.cuda.make_graphed_callables(projector, (hidden,
target))` turns forward and backward of a module that calls `alignment_loss` into two launches.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pointalign_kernels import reference

IMPLEMENTATIONS = ("auto", "reference", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def fused_available(device_type: str) -> bool:
    """Whether the fused alignment loss can run on this kind of device ("cpu", "cuda")."""
    if not HAS_TRITON:
        return False
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _fused(impl: str, device_type: str) -> bool:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    available = impl != "reference" and fused_available(device_type)
    if impl == "triton" and not available:
        raise RuntimeError(
            f"impl='triton' cannot run on {device_type}: it needs Triton and a CUDA device of capability 8.0 or higher "
            "(or TRITON_INTERPRET=1 for CPU tensors); impl='reference' runs anywhere"
        )
    return available


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    device_type = tensor.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype
    supported = DTYPES[:2] if device_type == "cpu" else DTYPES
    if dtype not in supported:
        raise ValueError(f"the fused alignment loss on {device_type} expected one of {supported}, got {dtype}")
    return dtype


def _check_target(features: Tensor, width: int, target: Tensor) -> None:
    if features.dim() not in (2, 3):
        raise ValueError(f"expected [M, {width}] or [L, M, {width}], got {list(features.shape)}")
    expected = [features.shape[-2], width]
    if list(target.shape) != expected:
        raise ValueError(f"target: expected {expected}, got {list(target.shape)}")


def cosine_alignment(projected: Tensor, target: Tensor, impl: str = "auto") -> Tensor:
    """See `pointalign_kernels.reference.cosine_alignment`.

    Raises:
        ValueError: shapes or dtype do not fit. RuntimeError: `impl` cannot run on this device.
    """
    _check_target(projected, projected.shape[-1], target)
    if not _fused(impl, projected.device.type):
        return reference.cosine_alignment(projected, target)
    from pointalign_kernels import alignment_ops

    layers = projected if projected.dim() == 3 else projected[None]
    loss, _ = alignment_ops.cosine_forward(layers.contiguous(), target.detach().contiguous())
    return loss if projected.dim() == 3 else loss.squeeze(0)


def alignment_loss(
    hidden: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], impl: str = "auto"
) -> Tensor:
    """See `pointalign_kernels.reference.alignment_loss`.

    Under autocast the fused form casts inside the op: it reads fp32 master weights and writes fp32 gradients.
    In fp16 it stores the gradient of a row's `1 - cos` before the upstream factor, saturated at the largest fp16 value,
    which only projections shorter than about 1e-6 can reach.

    Raises:
        ValueError: shapes or dtypes do not fit. RuntimeError: `impl` cannot run on this device.
    """
    _check_target(hidden, weights[-1].shape[-2], target)
    if not _fused(impl, hidden.device.type):
        return reference.alignment_loss(hidden, target, weights, biases)
    dtype = _compute_dtype(hidden)
    _check_projector(hidden, weights, biases)
    from pointalign_kernels import alignment_ops

    layers = hidden if hidden.dim() == 3 else hidden[None]
    loss = alignment_ops.alignment_forward(
        layers.contiguous(),
        target.detach().contiguous(),
        [(weight if weight.dim() == 3 else weight[None]).contiguous() for weight in weights],
        [(bias if bias.dim() == 2 else bias[None]).contiguous() for bias in biases],
        dtype,
    )[0]
    return loss if hidden.dim() == 3 else loss.squeeze(0)


def _check_projector(hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if len(weights) != 3 or len(biases) != 3:
        raise ValueError(f"expected three weights and three biases, got {len(weights)} and {len(biases)}")
    stacked = list(weights[0].shape[:-2])
    width, features = weights[0].shape[-2], weights[2].shape[-2]
    if stacked and stacked != list(hidden.shape[:-2]):
        raise ValueError(f"stacked weights of {stacked} layers need hidden of as many, got {list(hidden.shape)}")
    expected = ([*stacked, width, hidden.shape[-1]], [*stacked, width, width], [*stacked, features, width])
    for layer, (shape, weight, bias) in enumerate(zip(expected, weights, biases, strict=True)):
        if list(weight.shape) != shape or list(bias.shape) != shape[:-1]:
            raise ValueError(
                f"linear {layer}: expected weight {shape} and bias {shape[:-1]}, "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
    dtypes = {tensor.dtype for tensor in (*weights, *biases)}
    if not torch.is_autocast_enabled(hidden.device.type):
        dtypes.add(hidden.dtype)
    if len(dtypes) != 1:
        raise ValueError(f"expected one dtype of parameters (and of hidden, outside autocast), got {dtypes}")

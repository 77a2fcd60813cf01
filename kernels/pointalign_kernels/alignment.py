"""The alignment loss as an op; `impl` chooses how it runs.

Shape legend: L tapped layers, M rows of point tokens, C hidden size, H projector width, D target width.

`impl="reference"` is the plain PyTorch of `reference.py`, `impl="triton"` the kernels of `alignment_triton.py`, and
`impl="auto"` those kernels where they can run, else the reference. With TRITON_INTERPRET=1 the kernels run on CPU
tensors, slowly, in fp32 and fp16 (Triton's interpreter multiplies bf16 wrongly).

Nothing here synchronises with the host, so where M is fixed `torch.cuda.make_graphed_callables(projector, (hidden,
target))` turns forward and backward of a module that calls `alignment_loss` into two launches.

In this file: the choice of an implementation, the public function, the checks, and the two ops that launch kernels.
"""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pointalign_kernels import reference

IMPLEMENTATIONS = ("auto", "reference", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.assume_constant_result
def fused_available(device_type: str) -> bool:
    """Whether the Triton kernels of the alignment loss can run on this kind of device ("cpu", "cuda")."""
    if not HAS_TRITON:
        return False
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def _runs_triton(impl: str, device_type: str) -> bool:
    """Whether `impl` means the Triton kernels here. Raises: ValueError: unknown. RuntimeError: they cannot run."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    available = impl != "reference" and fused_available(device_type)
    if impl == "triton" and not available:
        raise RuntimeError(
            f"impl='triton' cannot run on {device_type}: it needs Triton and a CUDA device of capability 8.0 or higher "
            "(or TRITON_INTERPRET=1 for CPU tensors); impl='reference' runs anywhere"
        )
    return available


# -- public functions --------------------------------------------------------------------------------------------------


def alignment_loss(
    hidden: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], impl: str = "auto"
) -> Tensor:
    """`1 - mean cos(projector(hidden), target)`, fp32, a scalar or `[L]`; see `reference.alignment_loss`.

    Under autocast the Triton op casts by itself: it reads fp32 weights and writes fp32 gradients. In fp16 it stores the
    gradient of a row's `1 - cos` before the upstream factor, saturated at the largest fp16 value, which only
    projections shorter than about 1e-6 can reach.

    Args:
        hidden: `[M, C]` or `[L, M, C]`.
        target: `[M, D]`; no gradient flows into it.
        weights: `[H, C]`, `[H, H]`, `[D, H]`; stacked `[L, H, C]`... for a projector per layer.
        biases: `[H]`, `[H]`, `[D]`; or `[L, H]`...
        impl: "auto", "reference" or "triton".

    Raises:
        ValueError: shapes or dtypes do not fit, or an unknown `impl`.
        RuntimeError: `impl="triton"` where the kernels cannot run.
    """
    _check_target(hidden, weights[-1].shape[-2], target)
    if not _runs_triton(impl, hidden.device.type):
        return reference.alignment_loss(hidden, target, weights, biases)
    dtype = _compute_dtype(hidden)
    _check_projector(hidden, weights, biases)
    layers = hidden if hidden.dim() == 3 else hidden[None]
    loss = alignment_forward(
        layers.contiguous(),
        target.detach().contiguous(),
        [(weight if weight.dim() == 3 else weight[None]).contiguous() for weight in weights],
        [(bias if bias.dim() == 2 else bias[None]).contiguous() for bias in biases],
        dtype,
    )[0]
    return loss if hidden.dim() == 3 else loss.squeeze(0)


# -- checks ------------------------------------------------------------------------------------------------------------


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the kernels' matrix products: autocast's, or else the tensor's."""
    device_type = tensor.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else tensor.dtype
    supported = TRITON_DTYPES[:2] if device_type == "cpu" else TRITON_DTYPES
    if dtype not in supported:
        raise ValueError(
            f"the Triton kernels on {device_type} expected one of {supported}, got {dtype}: impl='reference' takes any"
        )
    return dtype


def _check_target(features: Tensor, width: int, target: Tensor) -> None:
    """Check that features `[M, *]` or `[L, M, *]` and `target` `[M, width]` have the same rows."""
    if features.dim() not in (2, 3):
        raise ValueError(f"expected two or three dimensions, [M, ...] or [L, M, ...], got {list(features.shape)}")
    expected = [features.shape[-2], width]
    if list(target.shape) != expected:
        raise ValueError(f"target: expected {expected}, got {list(target.shape)}")


def _check_projector(hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Check shapes and dtypes of the projector's parameters."""
    if len(weights) != 3 or len(biases) != 3:
        raise ValueError(f"expected three weights and three biases, got {len(weights)} and {len(biases)}")
    stacked = list(weights[0].shape[:-2])
    width, features = weights[0].shape[-2], weights[2].shape[-2]
    if stacked and stacked != list(hidden.shape[:-2]):
        raise ValueError(
            f"stacked weights of {stacked[0]} layers: expected hidden of as many, got {list(hidden.shape)}"
        )
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


# -- the ops -----------------------------------------------------------------------------------------------------------


def _cast(weights: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """The weights in the dtype of `flat`, as views of it that a single launch fills; as they are where it is empty."""
    if not flat.numel():
        return list(weights)
    copies = _split(flat, weights)
    torch._foreach_copy_(copies, list(weights))  # pyright: ignore[reportPrivateImportUsage]
    return copies


def _split(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Views of `flat` in the shapes of the weights."""
    pieces = flat.split([weight.numel() for weight in weights])
    return [piece.view(weight.shape) for piece, weight in zip(pieces, weights, strict=True)]


def _outputs(
    hidden: Tensor, weights: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs of `alignment_forward` other than the loss."""
    layers, rows, _ = hidden.shape
    width, features = weights[0].shape[1], weights[2].shape[1]
    return (
        hidden.new_empty((layers * rows, features), dtype=dtype),
        hidden.new_empty((2, layers, rows, width), dtype=dtype),
        hidden.new_empty((2, layers, rows, width), dtype=dtype),
        hidden.new_empty(hidden.shape if hidden.dtype != dtype else (0,), dtype=dtype),
        hidden.new_empty(sum(w.numel() for w in weights) if weights[0].dtype != dtype else 0, dtype=dtype),
    )


@torch.library.custom_op("pointalign::alignment_forward", mutates_args=())
def alignment_forward(
    hidden: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses `[L]` and what the backward needs; contiguous inputs.

    Args:
        hidden: `[L, M, C]`.
        target: `[M, D]`.
        weights: `[G, H, C]`, `[G, H, H]`, `[G, D, H]`.
        biases: `[G, H]`, `[G, H]`, `[G, D]`.
        dtype: of the matrix products.

    Returns:
        loss `[L]` fp32; gradient of each row's `1 - cos` with respect to the projection `[L * M, D]`; pre-activations
        and activations `[2, L, M, H]`; copies of hidden and of the weights (flat) in `dtype`, empty where not needed.
    """
    dy, pre, act, hidden_copy, weight_copy = outputs = _outputs(hidden, weights, dtype)
    layers, rows, _ = hidden.shape
    if rows == 0:
        return hidden.new_zeros(layers, dtype=torch.float32), *outputs
    if layers * rows * max(*hidden.shape[2:], *weights[1].shape[2:], dy.shape[1]) >= 2**31:
        raise ValueError(f"{layers} x {rows} rows are too many for 32-bit offsets: pass the layers one by one")
    from pointalign_kernels import alignment_triton  # here: without Triton this file must still import

    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        weights = _cast(weights, weight_copy)
        if hidden_copy.numel():
            hidden = hidden_copy.copy_(hidden)
        x = hidden.view(weights[0].shape[0], -1, hidden.shape[2])
        shape = (2, *x.shape[:2], -1)
        (z1, z2), (a1, a2) = pre.view(shape), act.view(shape)
        alignment_triton.linear(x, weights[0], biases[0], z1, a1)
        alignment_triton.linear(a1, weights[1], biases[1], z2, a2)
        partial = alignment_triton.linear(a2, weights[2], None, None, None)
        loss = alignment_triton.cosine(partial, biases[2], target, x.shape[1], dy)
    return loss, *outputs


@alignment_forward.register_fake
def _(hidden, target, weights, biases, dtype):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), *_outputs(hidden, weights, dtype)


@torch.library.custom_op("pointalign::alignment_backward", mutates_args=())
def alignment_backward(
    upstream: Tensor, hidden: Tensor, dy: Tensor, pre: Tensor, act: Tensor, weights: Sequence[Tensor],
    biases: Sequence[Tensor], hidden_copy: Tensor, weight_copy: Tensor, need_hidden: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, of the three weights and of the three biases, empty where not needed.

    `upstream` `[L]` is the gradient of the losses; the rest are inputs and outputs of `alignment_forward`.
    """
    grads = _gradients(hidden, weights, biases, need_hidden, need_parameters)
    layers, rows, inputs = hidden.shape
    if rows == 0:
        for grad in grads:
            grad.zero_()
        return grads
    from pointalign_kernels import alignment_triton

    groups = weights[0].shape[0]
    if weight_copy.numel():
        weights = _split(weight_copy, weights)
    x = (hidden_copy if hidden_copy.numel() else hidden).view(groups, -1, inputs)
    shape = (groups, x.shape[1], -1)
    factor = upstream.to(torch.float32).contiguous()
    if groups != layers:  # a shared dW sums layers of different factors: they apply before the products
        dy, factor = (dy.view(layers, rows, -1) * (factor / rows)[:, None, None]).to(dy.dtype), None
    (z1, z2), (a1, a2), dy = pre.view(2, *shape), act.view(2, *shape), dy.view(shape)
    dz2, dz1 = torch.empty_like(z2), torch.empty_like(z1)
    dw1, dw2, dw3, db1, db2, db3 = grads[1:] if need_parameters else [None] * 6
    with torch.cuda.device_of(hidden):
        alignment_triton.backward(dy, weights[2], a2, z2, factor, dz2, dw3, db3)
        alignment_triton.backward(dz2, weights[1], a1, z1, None, dz1, dw2, db2)
        dh = grads[0].view(shape) if need_hidden else None
        alignment_triton.backward(dz1, weights[0], x, None, None, dh, dw1, db1)
    return grads


def _gradients(
    hidden: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], need_hidden: bool, need_parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised outputs of `alignment_backward`, empty where not needed."""
    dh = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    w1, w2, w3, b1, b2, b3 = (torch.empty_like(p) if need_parameters else p.new_empty(0) for p in (*weights, *biases))
    return dh, w1, w2, w3, b1, b2, b3


@alignment_backward.register_fake
def _(upstream, hidden, dy, pre, act, weights, biases, hidden_copy, weight_copy, need_hidden, need_parameters):
    return _gradients(hidden, weights, biases, need_hidden, need_parameters)


def _alignment_context(ctx, inputs, output) -> None:
    hidden, _, weights, biases, _ = inputs
    ctx.save_for_backward(hidden, *weights, *biases, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else every backward fills zeros for the other outputs


def _alignment_backward(ctx, upstream, *_):
    hidden, *rest = ctx.saved_tensors
    weights, biases, (dy, pre, act, hidden_copy, weight_copy) = rest[:3], rest[3:6], rest[6:]
    need_hidden, _, need_weights, need_biases, _ = ctx.needs_input_grad
    need_parameters = any((*need_weights, *need_biases))
    dh, *grads = alignment_backward(
        upstream, hidden, dy, pre, act, weights, biases, hidden_copy, weight_copy, need_hidden, need_parameters
    )
    of_parameters = [grad if need_parameters else None for grad in grads]
    return dh if need_hidden else None, None, of_parameters[:3], of_parameters[3:], None


alignment_forward.register_autograd(_alignment_backward, setup_context=_alignment_context)

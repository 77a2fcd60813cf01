"""Dropout of LoRA layers whose masks are drawn from a counter wherever they are read, and are never stored.

Element (row, column) of an adapter's input is dropped where 16 bits of a random number are below `dropout * 2**16`. The
numbers are Philox 4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), a function
of a 64-bit key, the seed of a call, and of a counter, `(column // 8, row, adapter, 0)`: forward and backward pass draw
the same mask from the same seed. A number of 128 bits serves eight columns.

The Triton kernels of `lora_dropout_triton.py` put the mask between memory and the products, `*_reference` is the same
in plain PyTorch, with equal bits. With TRITON_INTERPRET=1 the kernels run on CPU tensors in fp32 and fp16.

Shape legend: R rows; K inputs of the layers; A adapters that read them, each of rank r.
"""

import torch
from torch import Tensor

from pointalign_kernels.alignment import TRITON_DTYPES, fused_available
from pointalign_kernels.philox import LOW, philox

STEPS = 2**16  # of a dropout probability


def counter_dropout_available(x: Tensor) -> bool:
    """Whether the kernels can run on `x`; else PyTorch's dropout, with stored masks, is faster than the reference."""
    supported = TRITON_DTYPES[:2] if x.device.type == "cpu" else TRITON_DTYPES
    return x.dtype in supported and fused_available(x.device.type)


def draw_seed(device: torch.device) -> Tensor:
    """`[1]` int64 from PyTorch's generator of the device, whose state checkpoints of a run hold; nothing waits."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropped_share(dropout: float) -> float:
    """The probability nearest to `dropout` that 16 bits can express: 0.05 is 0.050003."""
    return round(dropout * STEPS) / STEPS


def dropout_mask(seed: Tensor, rows: int, cols: int, adapter: int, dropout: float) -> Tensor:
    """`[R, K]`, True where an input of this adapter is not dropped."""
    row = torch.arange(rows, device=seed.device)[:, None]
    octet = torch.arange(-(-cols // 8), device=seed.device)[None]
    words = philox((seed & LOW, seed >> 32 & LOW), (octet, row, torch.full_like(row, adapter), torch.zeros_like(row)))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    numbers = torch.stack(torch.broadcast_tensors(*halves), dim=2).view(rows, -1)[:, :cols]
    return numbers >= round(dropout * STEPS)


# -- products ----------------------------------------------------------------------------------------------------------


def lora_dropout_down(
    x: Tensor, down: Tensor, seed: Tensor, adapters: int, dropout: float, scale: float = 1.0
) -> Tensor:
    """`[R, A r]`: for each adapter `scale * (mask * x) A^T`; the caller puts dropout's 1 / (1 - p) into the scale.

    Args:
        x: `[R, K]`.
        down: `[A r, K]`, the matrices of all adapters.
        seed: from `draw_seed`.
        dropout: probability, rounded to 16 bits.
    """
    if not counter_dropout_available(x):
        return lora_dropout_down_reference(x, down, seed, adapters, dropout, scale)
    from pointalign_kernels import lora_dropout_triton  # here: without Triton this file must still import

    low = x.new_empty(len(x), len(down))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        lora_dropout_triton.down(x.contiguous(), down.contiguous(), seed, adapters, round(dropout * STEPS), scale, low)
    return low


def lora_dropout_down_gradient(x: Tensor, dlow: Tensor, seed: Tensor, adapters: int, dropout: float, out: Tensor):
    """Write `[A r, K]`, for each adapter `dlow^T (mask * x)`, the gradient of its matrix, into `out`.

    Args:
        x, seed, dropout: as in the forward pass.
        dlow: `[R, A r]`, gradient of the products, times their scale.
    """
    if not counter_dropout_available(x):
        return out.copy_(lora_dropout_down_gradient_reference(x, dlow, seed, adapters, dropout))
    from pointalign_kernels import lora_dropout_triton

    with torch.cuda.device_of(x):
        lora_dropout_triton.down_gradient(x.contiguous(), dlow, seed, adapters, round(dropout * STEPS), out)
    return out


def lora_dropout_input_gradient_(
    dx: Tensor, dlow: Tensor, down: Tensor, seed: Tensor, adapters: int, dropout: float
) -> Tensor:
    """Add to `dx [R, K]`, in place, for each adapter `mask * (dlow A)`; arguments as above."""
    if not counter_dropout_available(dx):
        return dx.add_(lora_dropout_input_gradient_reference(dlow, down, seed, adapters, dropout))
    from pointalign_kernels import lora_dropout_triton

    with torch.cuda.device_of(dx):
        lora_dropout_triton.input_gradient(dx, dlow, down.contiguous(), seed, adapters, round(dropout * STEPS))
    return dx


# -- the same in plain PyTorch -----------------------------------------------------------------------------------------


def lora_dropout_down_reference(
    x: Tensor, down: Tensor, seed: Tensor, adapters: int, dropout: float, scale: float = 1.0
) -> Tensor:
    masks = [dropout_mask(seed, *x.shape, adapter, dropout) for adapter in range(adapters)]
    products = [(x * mask) @ part.mT for mask, part in zip(masks, down.chunk(adapters), strict=True)]
    return torch.cat(products, dim=1) * scale


def lora_dropout_down_gradient_reference(
    x: Tensor, dlow: Tensor, seed: Tensor, adapters: int, dropout: float
) -> Tensor:
    masks = [dropout_mask(seed, *x.shape, adapter, dropout) for adapter in range(adapters)]
    return torch.cat([part.mT @ (x * mask) for mask, part in zip(masks, dlow.chunk(adapters, dim=1), strict=True)])


def lora_dropout_input_gradient_reference(
    dlow: Tensor, down: Tensor, seed: Tensor, adapters: int, dropout: float
) -> Tensor:
    total = dlow.new_zeros(len(dlow), down.shape[1])
    for adapter, (left, right) in enumerate(zip(dlow.chunk(adapters, dim=1), down.chunk(adapters), strict=True)):
        total += (left @ right) * dropout_mask(seed, *total.shape, adapter, dropout)
    return total

"""The alignment loss: one function per op, `impl` chooses how it runs."""

from collections.abc import Sequence

from torch import Tensor

from pointalign_kernels import reference

IMPLEMENTATIONS = ("auto", "reference")


def _check(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")


def fused_available(device_type: str) -> bool:
    """Whether a fused implementation of the alignment loss can run on this kind of device ("cpu", "cuda")."""
    return False


def cosine_alignment(projected: Tensor, target: Tensor, impl: str = "auto") -> Tensor:
    """See `pointalign_kernels.reference.cosine_alignment`."""
    _check(impl)
    return reference.cosine_alignment(projected, target)


def alignment_loss(
    hidden: Tensor, target: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], impl: str = "auto"
) -> Tensor:
    """See `pointalign_kernels.reference.alignment_loss`."""
    _check(impl)
    return reference.alignment_loss(hidden, target, weights, biases)

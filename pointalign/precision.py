"""The dtype of a language model's weights where `model.dtype` is `auto`: the rule by which models are loaded."""

import sys

import torch


def resolve_dtype(name: str) -> torch.dtype:
    """The language model's dtype; `auto` is bfloat16 where this machine computes in it, else float32.

    On a GPU that only emulates bfloat16 (T4, V100, RTX 20) the choice and the faster one are printed.
    """
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        print(
            "model.dtype=auto: float32, because this GPU only emulates bfloat16; float16 is faster and smaller: "
            "--model.dtype float16 --training.fp16 true",
            file=sys.stderr,
        )
        return torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`, as `model.dtype` is written."""
    return str(dtype).removeprefix("torch.")

"""Parts of the language model's training step that take less time and memory: `--fused`, beside the alignment loss.

A part computes what the plain modules compute and can be chosen by name (`--fused_parts`, `applied(parts=)`):

    lora            adapters without casts to fp32 and without intermediate sums; saves inputs and rank-r products only
    merged          layers that read the same input share products: q, k, v (and fc1 in Phi's parallel block); gate, up
    gelu            tanh-GELU as a single operator where transformers composes it
    swiglu          silu(gate) * up saves its two inputs only
    norms           frozen layer norms and RMS norms in the compute dtype, not fp32; RMS norms by liger-kernel (a layer
                    norm of PyTorch is a single launch already)
    rotary          rotary embedding by liger-kernel, a single launch in place of many
    cross_entropy   head and cross-entropy over supervised rows together, without storing all logits; by liger-kernel,
                    else by `LinearCrossEntropy`. PyTorch's `linear_cross_entropy` sums in the compute dtype: not used

liger-kernel's kernels run on CUDA where the package is installed, PyTorch's operators elsewhere.
Weights must be frozen. On leaving, everything is undone: parameters, names and checkpoints stay the same.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointalign.efficient.fused_lora import AdapterGroup, adapter_groups, copy_adapters
from pointalign.efficient.quantization import is_sharded

PARTS = ("lora", "merged", "gelu", "swiglu", "norms", "rotary", "cross_entropy")
ROTARY = "apply_rotary_pos_emb"
ROWS_AT_ONCE = 1024  # of fp32 logits that exist at a time


@contextmanager
def applied(model: Any, parts: Sequence[str] = PARTS) -> Iterator[dict[str, int]]:
    """Run `model`, a `PointAlignForConditionalGeneration`, with the named parts inside the `with` block.

    Yields: for each part the number of modules that it replaces; 0 where the model has no such module.

    Raises: ValueError: an unknown part, or `merged` without `lora`.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"fused_parts: unknown part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    if "merged" in parts and "lora" not in parts:
        raise ValueError("fused_parts: merged needs lora, whose products it shares: name both or neither")
    language_model = model.model.language_model
    groups = adapter_groups(language_model, "merged" in parts and not is_sharded()) if "lora" in parts else []
    # (torch or Python module, attribute) -> the function that replaces it
    replacements: dict[tuple[Any, str], Callable] = {
        (module, "forward"): partial(group, index) for group in groups for index, module in enumerate(group.modules)
    }
    counts = {"lora": len(replacements), "merged": sum(len(group.modules) > 1 for group in groups)}
    for part, find, name in (
        ("gelu", _gelus, "forward"),
        ("swiglu", _swiglus, "forward"),
        ("norms", _norms, "forward"),
        ("rotary", _rotary, ROTARY),
    ):
        of_part = {(module, name): function for module, function in find(language_model)} if part in parts else {}
        counts[part] = len(of_part)
        replacements |= of_part
    head, loss = model.get_output_embeddings(), (model, "supervised_cross_entropy")
    if "cross_entropy" in parts and not any(p.requires_grad for p in head.parameters()):
        replacements[loss] = partial(head_cross_entropy, head)
    counts["cross_entropy"] = int(loss in replacements)
    originals = {(module, name): vars(module).get(name) for module, name in replacements}
    for (module, name), function in replacements.items():
        vars(module)[name] = function
    # Sharded adapters are whole only within their block, so they are cast there.
    decoder = language_model.get_decoder()
    hook = None if is_sharded() else decoder.register_forward_pre_hook(partial(_copy_adapters, groups))
    try:
        yield {part: counts[part] for part in parts}
    finally:
        for (module, name), original in originals.items():
            if original is None:  # the module's class has the function
                del vars(module)[name]
            else:
                vars(module)[name] = original
        if hook is not None:
            hook.remove()
        for group in groups:
            group.unstack()


def _copy_adapters(groups: Sequence[AdapterGroup], decoder: nn.Module, _inputs: Any) -> None:
    """Before every forward pass: an optimizer may have changed the adapters, and need not tell (8-bit ones do not)."""
    kind = next(decoder.parameters()).device.type
    copy_adapters(groups, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)


# -- activations, norms and the rotary embedding: pairs (module, function that replaces its own) -----------------------


def _gelus(language_model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    from transformers.activations import NewGELUActivation

    for module in language_model.modules():
        if isinstance(module, NewGELUActivation):
            yield module, partial(functional.gelu, approximate="tanh")


class SiluProduct(torch.autograd.Function):
    """`silu(gate) * up`; saves both inputs and computes silu again in the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), functional.silu(gate).mul_(gradient)


def _swiglus(language_model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    def forward(mlp: Any, x: Tensor) -> Tensor:
        return mlp.down_proj(SiluProduct.apply(mlp.gate_proj(x), mlp.up_proj(x)))

    for block in language_model.get_decoder().layers:  # type: ignore[operator,union-attr]
        mlp: Any = getattr(block, "mlp", None)
        if all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            if type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"):
                yield mlp, partial(forward, mlp)


def _norms(language_model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # autocast returns fp32, which every reader casts again
            return functional.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), bias, norm.eps)

    def rms_norm(norm: Any, x: Tensor) -> Tensor:
        weight = norm.weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if x.is_cuda and (liger := liger_rms_norm()) is not None:
                return liger(x, weight, norm.variance_epsilon, 0.0, "llama", False)
            return functional.rms_norm(x, weight.shape, weight, norm.variance_epsilon)

    for module in language_model.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            continue  # in the compute dtype its small updates would be rounded away
        if type(module) is nn.LayerNorm and module.elementwise_affine:  # not `Fp32LayerNorm`, which a stage trained
            yield module, partial(layer_norm, module)
        elif type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
            yield module, partial(rms_norm, module)


def _rotary(language_model: nn.Module) -> Iterator[tuple[Any, Callable]]:
    """The Python module of the attention layers: they call its global function `apply_rotary_pos_emb`."""
    liger = liger_rotary()
    blocks = language_model.get_decoder().layers  # type: ignore[operator,union-attr]
    python_module = sys.modules[type(blocks[0].self_attn).__module__]
    plain = getattr(python_module, ROTARY, None)
    if liger is None or plain is None:
        return

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not q.is_cuda or kwargs or not q.dtype == k.dtype == cos.dtype:
            return plain(q, k, cos, sin, **kwargs)
        return liger(q, k, cos, sin)

    yield python_module, rotary


# -- liger-kernel ------------------------------------------------------------------------------------------------------


def _liger(name: str, function: str) -> Callable | None:
    try:
        return getattr(import_module(f"liger_kernel.ops.{name}"), function).apply
    except ImportError:
        return None


def liger_rms_norm() -> Callable | None:
    """A function of `(x, weight, epsilon, offset, casting mode, in place)`; None without liger-kernel."""
    return _liger("rms_norm", "LigerRMSNormFunction")


def liger_rotary() -> Callable | None:
    """A function of `(q, k, cos, sin)`, q and k `[B, heads, T, D]`, cos and sin `[B or 1, T, D]`; None without
    liger-kernel. It may overwrite q and k."""
    return _liger("rope", "LigerRopeFunction")


def liger_cross_entropy() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None:
    """A function of `(rows [R, H], weight [V, H], targets [R], bias [V])` that returns the fp32 sum of the losses.

    None without liger-kernel. It gets `ROWS_AT_ONCE` rows at a time: by default liger-kernel takes pieces of R H / V
    rows, and each piece reads the whole head from memory.
    """
    apply = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if apply is None:
        return None

    def cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        chunk_factor = -(-weight.shape[0] // weight.shape[1])  # liger-kernel's pieces then have R rows
        # class weights, ignored label, weight of the squared normaliser, smoothing, reduction; then defaults
        options = (None, -100, 0.0, 0.0, "sum", None, False, None, False, False, False, None, None, chunk_factor)
        pieces = zip(rows.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True)
        return torch.stack([apply(part, weight, target, bias, *options)[0] for part, target in pieces]).sum()

    return cross_entropy


# -- loss --------------------------------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of the logits `rows W^T + b`; W and b are frozen.

    The forward pass computes the gradient with respect to the rows too and saves it in place of the logits, which
    exist for `ROWS_AT_ONCE` rows at a time.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            logits = functional.linear(rows[part], weight, bias).float()
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            target = targets[part, None]
            total += (normaliser - logits.gather(1, target)).sum()
            if gradient is not None:
                probabilities = logits.sub_(normaliser).exp_()
                probabilities.scatter_add_(1, target, -torch.ones_like(normaliser))
                gradient[part] = probabilities.to(rows.dtype) @ weight
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


def head_cross_entropy(head: nn.Linear, rows: Tensor, targets: Tensor) -> Tensor:
    """fp32 sum over rows `[R, H]` of the cross-entropy of the head's logits and `targets [R]`."""
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    with torch.autocast(kind, enabled=False):
        bias = None if head.bias is None else head.bias.to(dtype)
        if rows.is_cuda and len(rows) and (liger := liger_cross_entropy()) is not None:
            return liger(rows.to(dtype), head.weight.to(dtype), targets, bias)
        return LinearCrossEntropy.apply(rows.to(dtype), head.weight.to(dtype), bias, targets)  # type: ignore[return-value]

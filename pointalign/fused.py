"""The language model's training step with less to compute and to keep: `--fused`, beside the alignment loss.

Every part computes what the plain modules compute and can be switched by itself (`--fused_parts`, `applied(parts=)`):

    lora            adapters without casts to fp32, without intermediate sums; keeps only inputs and rank-r products
    merged          layers that read one input share products: q, k, v (and fc1 in Phi's parallel block), gate and up
    gelu            tanh-GELU as one operator where transformers composes it
    swiglu          silu(gate) * up keeps its two inputs only
    norms           layer and RMS norms in the compute dtype, not fp32; RMS norms by liger-kernel on CUDA, if installed
    cross_entropy   head and cross-entropy over supervised rows as one operator: no logits are kept

Frozen weights are required and everything is undone on leaving: parameters, names and checkpoints stay the same.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointalign.quantization import full_weight, is_4bit

PARTS = ("lora", "merged", "gelu", "swiglu", "norms", "cross_entropy")
# Layers of a decoder block that read one tensor. In a parallel block (Phi) the MLP reads what the attention reads.
SAME_INPUT = {
    "phi": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")],
    "": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")],
}
ROWS_AT_ONCE = 1024  # of logits in fp32


@contextmanager
def applied(model: Any, parts: Sequence[str] = PARTS) -> Iterator[dict[str, int]]:
    """Within the block `model` (a `PointAlignForConditionalGeneration`) runs the given parts.

    Yields:
        how many modules each part took over; 0 says that the model has nothing of the kind.

    Raises:
        ValueError: an unknown part, or `merged` without `lora`.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"fused_parts: unknown part {unknown[0]!r}, expected of {', '.join(PARTS)}")
    if "merged" in parts and "lora" not in parts:
        raise ValueError("fused_parts: merged products are those of lora, name both")
    language_model = model.model.language_model
    groups = adapter_groups(language_model, "merged" in parts and not sharded()) if "lora" in parts else []
    changes: list[tuple[nn.Module, str, Callable]] = [
        (module, "forward", partial(group, index)) for group in groups for index, module in enumerate(group.modules)
    ]
    counts = {"lora": len(changes), "merged": sum(len(group.modules) > 1 for group in groups)}
    for part, find in (("gelu", _gelus), ("swiglu", _swiglus), ("norms", _norms)):
        found = list(find(language_model)) if part in parts else []
        counts[part] = len(found)
        changes += [(module, "forward", function) for module, function in found]
    head = model.get_output_embeddings()
    if "cross_entropy" in parts and not any(p.requires_grad for p in head.parameters()):
        changes.append((model, "supervised_cross_entropy", partial(head_cross_entropy, head)))
    counts["cross_entropy"] = int(changes[-1:] != [] and changes[-1][0] is model)
    for module, name, function in changes:
        module.__dict__[name] = function  # before the class's own method; nn.Module calls self.forward
    try:
        yield {part: counts[part] for part in parts}
    finally:
        for module, name, _ in changes:
            del module.__dict__[name]
        for group in groups:
            group.unstack()


def sharded() -> bool:
    """Whether FSDP owns the weights: then they cannot be laid side by side."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


# -- adapters ----------------------------------------------------------------------------------------------------------


class LoraProducts(torch.autograd.Function):
    """`y_i = x W_i^T + b_i + s_i (dropout(x) A_i^T) B_i^T` for layers i that read the same x; W and b are frozen.

    Keeps x, the rank-r products and, with dropout, masks of one byte an element. Gradients with respect to x accumulate
    in place, one product after another.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: "AdapterGroup", dtype: torch.dtype, dropout: float, *adapters: Tensor):
        count = len(group.bases)
        a, b = ([one.to(dtype) for one in half] for half in (adapters[:count], adapters[count:]))
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        masks: list[Tensor] = []
        if dropout > 0:  # every adapter has a mask of its own
            dropped = [torch.native_dropout(rows, dropout, True) for _ in a]
            masks = [mask for _, mask in dropped]
            low = torch.cat([kept @ one.mT for (kept, _), one in zip(dropped, a, strict=True)], dim=1)
        else:
            low = rows @ torch.cat(a).mT
        outputs = []
        for y, down, up, scale in zip(group.products(rows), low.split(group.ranks, 1), b, group.scales, strict=True):
            outputs.append(y.addmm_(down, up.mT, alpha=scale).view(*x.shape[:-1], -1))
        ctx.group, ctx.dtype, ctx.dropout, ctx.shape, ctx.x_dtype = group, dtype, dropout, x.shape, x.dtype
        ctx.save_for_backward(rows, low, *masks, *adapters)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):  # type: ignore[override]
        group, dtype, count = ctx.group, ctx.dtype, len(ctx.group.bases)
        rows, low, *rest = ctx.saved_tensors
        masks, adapters = rest[: -2 * count], rest[-2 * count :]
        dy = [
            torch.zeros(len(rows), base.out_features, dtype=dtype, device=rows.device)
            if gradient is None
            else gradient.reshape(len(rows), -1).to(dtype)
            for gradient, base in zip(gradients, group.bases, strict=True)
        ]
        a, b = ([one.to(dtype) for one in half] for half in (adapters[:count], adapters[count:]))
        dlow = [(one @ up) * scale for one, up, scale in zip(dy, b, group.scales, strict=True)]
        db = [
            (one.mT @ down) * scale
            for one, down, scale in zip(dy, low.split(group.ranks, 1), group.scales, strict=True)
        ]
        keep = 1 / (1 - ctx.dropout) if ctx.dropout < 1 else 0.0
        if masks:
            da = [one.mT @ (rows * mask * keep) for one, mask in zip(dlow, masks, strict=True)]
        else:
            da = list((torch.cat(dlow, dim=1).mT @ rows).split(group.ranks))
        dx = None
        if ctx.needs_input_grad[0]:
            for one, base in zip(dy, group.bases, strict=True):
                weight = full_weight(base).to(dtype)
                dx = one @ weight if dx is None else dx.addmm_(one, weight)
            assert dx is not None
            if masks:
                for one, down, mask in zip(dlow, a, masks, strict=True):
                    dx += (one @ down) * mask * keep
            else:
                dx.addmm_(torch.cat(dlow, dim=1), torch.cat(a))
            dx = dx.view(ctx.shape).to(ctx.x_dtype)
        given = [one.to(adapter.dtype) for one, adapter in zip([*da, *db], adapters, strict=True)]
        return dx, None, None, None, *given


class AdapterGroup:
    """Adapted layers of peft that read the same input. The first one called computes for all, the others collect.

    Args:
        modules: peft's LoRA layers with one plain adapter each.
    """

    def __init__(self, modules: Sequence[Any]):
        self.modules = list(modules)
        self.bases = [module.get_base_layer() for module in modules]
        self.ranks = [module.r["default"] for module in modules]
        self.scales = [module.scaling["default"] for module in modules]
        self.original = [module.forward for module in modules]
        self.stacked = False
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []

    def __call__(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(module.disable_adapters or module.merged for module in self.modules):
            return self.original[index](x, *args, **kwargs)
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self.run(x))
        output = self._outputs[index]
        assert output is not None
        self._outputs[index] = None
        if all(one is None for one in self._outputs):
            self._input = None
        return output

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        drop = self.modules[0].lora_dropout["default"]
        dropout = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        adapters = [module.lora_A["default"].weight for module in self.modules]
        adapters += [module.lora_B["default"].weight for module in self.modules]
        with torch.autocast(kind, enabled=False):
            return LoraProducts.apply(x, self, dtype, dropout, *adapters)  # type: ignore[return-value]

    def products(self, rows: Tensor) -> list[Tensor]:
        """`x W_i^T + b_i` of every layer: one product where the weights lie side by side, else one each."""
        if len(self.bases) > 1 and not any(is_4bit(base) for base in self.bases):
            first = self.stack()
            weight = first.as_strided((sum(base.out_features for base in self.bases), first.shape[1]), first.stride())
            together = rows @ weight.to(rows.dtype).mT
            outputs = list(together.split([base.out_features for base in self.bases], dim=1))
            for base, output in zip(self.bases, outputs, strict=True):
                if base.bias is not None:
                    output += base.bias.to(rows.dtype)
            return outputs
        return [
            functional.linear(
                rows, full_weight(base).to(rows.dtype), None if base.bias is None else base.bias.to(rows.dtype)
            )
            for base in self.bases
        ]

    def stack(self) -> Tensor:
        """Lay the weights side by side in one buffer, once they stand where they will stay. Returns the first."""
        first = self.bases[0].weight.detach()
        if not self.stacked or first.untyped_storage().data_ptr() != self._storage:
            together = torch.cat([base.weight.detach() for base in self.bases])
            pieces = together.split([base.out_features for base in self.bases])
            for base, piece in zip(self.bases, pieces, strict=True):
                base.weight.data = piece
            first = pieces[0]
            self.stacked, self._storage = True, together.untyped_storage().data_ptr()
        return first

    def unstack(self) -> None:
        """Give every weight memory of its own again: safetensors refuses shared buffers."""
        if self.stacked:
            for base in self.bases:
                base.weight.data = base.weight.data.clone()
            self.stacked = False


def adapter_groups(language_model: nn.Module, merge: bool) -> list[AdapterGroup]:
    """Every adapted layer of the decoder blocks in exactly one group, of several where `merge` and they share an input.

    Left alone are layers whose own weights train and adapters that are more than two plain matrices.
    """
    sets = SAME_INPUT.get(language_model.config.model_type, SAME_INPUT[""])  # type: ignore[union-attr,arg-type]
    groups = []
    for block in language_model.get_decoder().layers:  # type: ignore[operator,union-attr]
        adapted = {name: module for name, module in block.named_modules() if _is_plain_lora(module)}
        if merge:
            for names in sets:
                members = [adapted.get(name) for name in names]
                if all(member is not None for member in members) and _alike(members):
                    groups.append(AdapterGroup([adapted.pop(name) for name in names]))
        groups += [AdapterGroup([module]) for module in adapted.values()]
    return groups


def _is_plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or list(module.lora_A) != ["default"] or module.lora_variant:
        return False
    base = module.get_base_layer()
    plain = isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters())
    return plain and module.lora_B["default"].bias is None


def _alike(members: Sequence[Any]) -> bool:
    drops = {getattr(member.lora_dropout["default"], "p", 0.0) for member in members}
    return len(drops) == 1 and len({is_4bit(member.get_base_layer()) for member in members}) == 1


# -- activations and norms ---------------------------------------------------------------------------------------------


def _gelus(language_model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
    from transformers.activations import NewGELUActivation

    for module in language_model.modules():
        if isinstance(module, NewGELUActivation):
            yield module, partial(functional.gelu, approximate="tanh")


class SiluProduct(torch.autograd.Function):
    """`silu(gate) * up`, keeping both inputs; silu is computed again in the backward pass."""

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
        with torch.autocast(x.device.type, enabled=False):  # which would return fp32, cast again by every reader
            return functional.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), bias, norm.eps)

    def rms_norm(norm: Any, x: Tensor) -> Tensor:
        weight = norm.weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if x.is_cuda and (liger := liger_rms_norm()) is not None:
                return liger(x, weight, norm.variance_epsilon, 0.0, "llama", False)
            return functional.rms_norm(x, weight.shape, weight, norm.variance_epsilon)

    for module in language_model.modules():
        if any(one.requires_grad for one in module.parameters(recurse=False)):
            continue  # rounded, its steps would be lost
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            yield module, partial(layer_norm, module)
        elif type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"):
            yield module, partial(rms_norm, module)


def liger_rms_norm() -> Callable | None:
    """liger-kernel's RMS norm, `(x, weight, epsilon, offset, casting mode, in place)`, if it is installed."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # type: ignore[import-not-found]
    except ImportError:
        return None
    return LigerRMSNormFunction.apply


# -- loss --------------------------------------------------------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies of `rows W^T + b`; W and b are frozen. The gradient is computed on the way forward.

    Logits exist for `ROWS_AT_ONCE` rows at a time; what is kept is the gradient with respect to the rows.
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
        return LinearCrossEntropy.apply(rows.to(dtype), head.weight.to(dtype), bias, targets)  # type: ignore[return-value]

"""LoRA with less to compute and to keep: products of layers that read one input, or that add into one residual.

The parts `lora`, `merged` and `residual` of `fused_parts`. Frozen weights are required; adapters are peft's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointalign.efficient.quantization import full_weight, is_4bit

# Layers of a decoder block that read one tensor. In a parallel block (Phi) the MLP reads what the attention reads.
SAME_INPUT = {
    "phi": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")],
    "pointalign_phi": [("self_attn.query_key_value", "mlp.fc1")],
    "": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")],
}


class LoraProducts(torch.autograd.Function):
    """`y_i = x W_i^T + b_i + s_i (dropout(x) A_i^T) B_i^T` for layers i that read the same x; W and b are frozen.

    Of one layer alone the product can add to `onto [..., out]`, which then stands in place of b: see `ParallelBlock`.
    Keeps x, the rank-r products and, with dropout, masks of one byte an element. Gradients with respect to x accumulate
    in place, one product after another.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        group: "AdapterGroup",
        dtype: torch.dtype,
        dropout: float,
        onto: Tensor | None,
        *adapters: Tensor,
    ):
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
        for y, down, up, scale in zip(
            group.products(rows, onto), low.split(group.ranks, 1), b, group.scales, strict=True
        ):
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
        return dx, None, None, None, gradients[0] if ctx.needs_input_grad[4] else None, *given


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

    def run(self, x: Tensor, onto: Tensor | None = None) -> tuple[Tensor, ...]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        drop = self.modules[0].lora_dropout["default"]
        dropout = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        adapters = [module.lora_A["default"].weight for module in self.modules]
        adapters += [module.lora_B["default"].weight for module in self.modules]
        with torch.autocast(kind, enabled=False):
            return LoraProducts.apply(x, self, dtype, dropout, onto, *adapters)  # type: ignore[return-value]

    def products(self, rows: Tensor, onto: Tensor | None = None) -> list[Tensor]:
        """`x W_i^T + b_i` of every layer: one product where the weights lie side by side, else one each."""
        if onto is not None:
            (base,) = self.bases
            return [torch.addmm(onto.reshape(len(rows), -1), rows, full_weight(base).to(rows.dtype).mT)]
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


class ParallelBlock:
    """A block of stock Phi whose two output layers add onto the residual: `x + b + dense(attention) + fc2(mlp)`.

    Each product accumulates onto what is there (a matrix product adds to its output for free), so nothing is summed
    afterwards and nothing more is kept: part of `--fused` by default. A single product would need both inputs side by
    side, `hidden_size + intermediate_size` wide, and copying them moves more bytes than the sums that it saves. Not
    where residual dropout is on, which draws a mask for either output, nor in the published variant, whose attention
    output passes a norm.

    Args:
        block: the decoder block.
        dense, fc2: groups of its two output layers alone.
    """

    def __init__(self, block: Any, dense: AdapterGroup, fc2: AdapterGroup):
        self.block, self.groups = block, (dense, fc2)
        self.deferred = False

    def output(self, index: int, x: Tensor) -> Tensor:
        """In place of an output layer's forward: its input, while the block runs, which makes the product itself."""
        return x if self.deferred else self.groups[index](0, x)

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        block, kind = self.block, hidden_states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_states.dtype
        layers = [group.modules[0] for group in self.groups]
        off = any(layer.disable_adapters or layer.merged for layer in layers)
        dropped = block.resid_dropout.training and block.resid_dropout.p > 0
        if off or dropped or hidden_states.dtype != dtype:
            return type(block).forward(block, hidden_states, **kwargs)
        dense, fc2 = self.groups
        biases = [layer.get_base_layer().bias for layer in layers]
        self.deferred = True
        try:
            normed = block.input_layernorm(hidden_states)
            attended, _ = block.self_attn(hidden_states=normed, **kwargs)
            (total,) = dense.run(attended, hidden_states + (biases[0] + biases[1]).to(dtype))
            (total,) = fc2.run(block.mlp(normed), total)
        finally:
            self.deferred = False
        return total


def parallel_blocks(language_model: nn.Module, groups: Sequence[AdapterGroup]) -> list[ParallelBlock]:
    """Blocks of stock Phi without residual dropout, `dense` and `fc2` of which are layers of `groups`."""
    from transformers.models.phi.modeling_phi import PhiAttention, PhiDecoderLayer

    alone = {id(group.modules[0]): group for group in groups if len(group.modules) == 1}
    found = []
    for block in language_model.get_decoder().layers:  # type: ignore[operator,union-attr]
        if type(block) is PhiDecoderLayer and type(block.self_attn) is PhiAttention and not block.resid_dropout.p:
            dense, fc2 = (alone.get(id(one)) for one in (block.self_attn.dense, block.mlp.fc2))
            if dense is not None and fc2 is not None:
                found.append(ParallelBlock(block, dense, fc2))
    return found


def adapter_groups(language_model: nn.Module, merge: bool) -> list[AdapterGroup]:
    """Every adapted layer of the decoder blocks in exactly one group, of several where `merge` and they share an input.

    Of the layers that share an input those merge that have adapters: q, k and v alone under the paper's targets. Left
    alone are layers whose own weights train and adapters that are more than two plain matrices.
    """
    sets = SAME_INPUT.get(language_model.config.model_type, SAME_INPUT[""])  # type: ignore[union-attr,arg-type]
    groups = []
    for block in language_model.get_decoder().layers:  # type: ignore[operator,union-attr]
        adapted = {name: module for name, module in block.named_modules() if _is_plain_lora(module)}
        if merge:
            for names in sets:
                present = [name for name in names if name in adapted]
                if len(present) > 1 and _alike([adapted[name] for name in present]):
                    groups.append(AdapterGroup([adapted.pop(name) for name in present]))
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

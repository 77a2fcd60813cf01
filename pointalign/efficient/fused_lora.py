"""LoRA layers that save less for the backward pass and share products: the parts `lora` and `merged` of `fused_parts`.

Shape legend: R rows, the tokens of all samples; K inputs and N outputs of a layer; r rank of its adapter.
The layers' weights must be frozen; the adapters stay peft's parameters.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pointalign.efficient.quantization import full_weight, is_4bit

# Layers of a decoder block that read the same tensor. In Phi's parallel block the MLP reads the attention's input.
SAME_INPUT = {
    "phi": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")],
    "pointalign_phi": [("self_attn.query_key_value", "mlp.fc1")],
    "": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")],
}


class LoraProducts(torch.autograd.Function):
    """`y_i = x W_i^T + b_i + s_i (dropout(x) A_i^T) B_i^T` for layers i that read the same x; W and b are frozen.

    Saves x, the rank-r products and, with dropout, masks of one byte per element. The products that make up the
    gradient with respect to x accumulate in place.

    Args of `apply`:
        x: `[..., K]`.
        group: the layers.
        dtype: of all products.
        dropout: probability; every adapter draws a separate mask.
        adapters: all A `[r, K]`, then all B `[N, r]`.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, group: "AdapterGroup", dtype: torch.dtype, dropout: float, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        count = len(group.bases)
        a, b = ([factor.to(dtype) for factor in half] for half in (adapters[:count], adapters[count:]))
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        masks: list[Tensor] = []
        if dropout > 0:
            dropped = [torch.native_dropout(rows, dropout, True) for _ in a]
            masks = [mask for _, mask in dropped]
            low = torch.cat([inputs @ down.mT for (inputs, _), down in zip(dropped, a, strict=True)], dim=1)
        else:
            low = rows @ torch.cat(a).mT  # [R, sum of ranks]
        outputs = []
        for y, xa, up, scale in zip(group.products(rows), low.split(group.ranks, 1), b, group.scales, strict=True):
            outputs.append(y.addmm_(xa, up.mT, alpha=scale).view(*x.shape[:-1], -1))
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
        a, b = ([factor.to(dtype) for factor in half] for half in (adapters[:count], adapters[count:]))
        dlow = [(dy_i @ up) * scale for dy_i, up, scale in zip(dy, b, group.scales, strict=True)]
        db = [
            (dy_i.mT @ xa) * scale for dy_i, xa, scale in zip(dy, low.split(group.ranks, 1), group.scales, strict=True)
        ]
        dropout_scale = 1 / (1 - ctx.dropout) if ctx.dropout < 1 else 0.0
        if masks:
            da = [dlow_i.mT @ (rows * mask * dropout_scale) for dlow_i, mask in zip(dlow, masks, strict=True)]
        else:
            da = list((torch.cat(dlow, dim=1).mT @ rows).split(group.ranks))
        dx = None
        if ctx.needs_input_grad[0]:
            for dy_i, base in zip(dy, group.bases, strict=True):
                weight = full_weight(base).to(dtype)
                dx = dy_i @ weight if dx is None else dx.addmm_(dy_i, weight)
            assert dx is not None
            if masks:
                for dlow_i, down, mask in zip(dlow, a, masks, strict=True):
                    dx += (dlow_i @ down) * mask * dropout_scale
            else:
                dx.addmm_(torch.cat(dlow, dim=1), torch.cat(a))
            dx = dx.view(ctx.shape).to(ctx.x_dtype)
        dadapters = [gradient.to(adapter.dtype) for gradient, adapter in zip([*da, *db], adapters, strict=True)]
        return dx, None, None, None, *dadapters


class AdapterGroup:
    """LoRA layers that read the same input: the first that is called computes the outputs of all, the others take them.

    Args:
        modules: peft's LoRA layers, each with a single plain adapter.
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
        """The output of layer `index`; peft's forward where its adapter is disabled or merged."""
        if any(module.disable_adapters or module.merged for module in self.modules):
            return self.original[index](x, *args, **kwargs)
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self.run(x))
        output = self._outputs[index]
        assert output is not None
        self._outputs[index] = None
        if all(output is None for output in self._outputs):
            self._input = None
        return output

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of all layers, `[..., N]` each, in the dtype of autocast or else of x."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        drop = self.modules[0].lora_dropout["default"]
        dropout = drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0
        adapters = [module.lora_A["default"].weight for module in self.modules]
        adapters += [module.lora_B["default"].weight for module in self.modules]
        with torch.autocast(kind, enabled=False):
            return LoraProducts.apply(x, self, dtype, dropout, *adapters)  # type: ignore[return-value]

    def products(self, rows: Tensor) -> list[Tensor]:
        """`x W_i^T + b_i` of every layer: a single product where the weights are in one buffer, else one per layer."""
        biases = [None if base.bias is None else base.bias.to(rows.dtype) for base in self.bases]
        if len(self.bases) > 1 and not any(is_4bit(base) for base in self.bases):
            sizes = [base.out_features for base in self.bases]
            first = self.stack()
            weight = first.as_strided((sum(sizes), first.shape[1]), first.stride())
            outputs = (rows @ weight.to(rows.dtype).mT).split(sizes, dim=1)
            return [y if bias is None else y.add_(bias) for y, bias in zip(outputs, biases, strict=True)]
        weights = (full_weight(base).to(rows.dtype) for base in self.bases)  # a dequantised weight at a time
        return [functional.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    def stack(self) -> Tensor:
        """Put the weights side by side into one buffer, again after they have moved. Returns the first weight."""
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
        """Give every weight separate memory again: safetensors refuses shared buffers."""
        if self.stacked:
            for base in self.bases:
                base.weight.data = base.weight.data.clone()
            self.stacked = False


def adapter_groups(language_model: nn.Module, merge: bool) -> list[AdapterGroup]:
    """Groups that together hold every LoRA layer of the decoder blocks once.

    Layers whose weights train and adapters that are more than two plain matrices are in no group.

    Args:
        merge: put LoRA layers that share an input into a group; else each has a separate group.
    """
    sets = SAME_INPUT.get(language_model.config.model_type, SAME_INPUT[""])  # type: ignore[union-attr,arg-type]
    groups = []
    for block in language_model.get_decoder().layers:  # type: ignore[operator,union-attr]
        adapted = {name: module for name, module in block.named_modules() if _is_plain_lora(module)}
        if merge:
            for names in sets:
                present = [name for name in names if name in adapted]
                if len(present) > 1 and _can_merge([adapted[name] for name in present]):
                    groups.append(AdapterGroup([adapted.pop(name) for name in present]))
        groups += [AdapterGroup([module]) for module in adapted.values()]
    return groups


def _is_plain_lora(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or list(module.lora_A) != ["default"] or module.lora_variant:
        return False
    base = module.get_base_layer()
    is_frozen_linear = isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters())
    return is_frozen_linear and module.lora_B["default"].bias is None


def _can_merge(layers: Sequence[Any]) -> bool:
    """Whether LoRA layers have the same dropout and are all in 4 bits or all not."""
    dropouts = {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers}
    return len(dropouts) == 1 and len({is_4bit(layer.get_base_layer()) for layer in layers}) == 1

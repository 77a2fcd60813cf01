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
from pointalign_kernels import lora_dropout

# Layers of a decoder block that read the same tensor. In Phi's parallel block the MLP reads the attention's input.
SAME_INPUT = {
    "phi": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")],
    "pointalign_phi": [("self_attn.query_key_value", "mlp.fc1")],
    "": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")],
}


class LoraProducts(torch.autograd.Function):
    """`y_i = x W_i^T + b_i + s_i (dropout(x) A_i^T) B_i^T` for layers i that read the same x; W and b are frozen.

    Saves x, the rank-r products and, with dropout, a seed: the kernels of `lora_dropout` draw the masks again from it.
    Where they cannot run, PyTorch's masks of one byte per element are saved instead. The scale s and dropout's
    1 / (1 - p) are applied to tensors of width r only. The products that make up the gradient with respect to x
    accumulate in place, and the gradients of all adapters are parts of one buffer, which is cast to the adapters' dtype
    once.

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
        down, ups = group.factors(adapters, dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        masks: list[Tensor] = []  # or the seed of all masks
        counted = dropout > 0 and group.draws_from_counter(rows)
        if counted:
            dropout = lora_dropout.dropped_share(dropout)
            masks = [lora_dropout.draw_seed(rows.device)]
            scale = group.scales[0] * _rescale(dropout)
            low = lora_dropout.lora_dropout_down(rows, down, masks[0], len(group.bases), dropout, scale)
        elif dropout > 0:
            low = rows.new_empty(len(rows), len(down))  # [R, sum of ranks]
            for part, down_i in zip(low.split(group.ranks, 1), down.split(group.ranks), strict=True):
                dropped, mask = torch.native_dropout(rows, dropout, True)
                torch.mm(dropped, down_i.mT, out=part)
                masks.append(mask)
        else:
            low = rows @ down.mT
        if not counted:
            group.scale(low)
        outputs = []
        for y, low_i, up in zip(group.products(rows), low.split(group.ranks, 1), ups, strict=True):
            outputs.append(y.addmm_(low_i, up.mT).view(*x.shape[:-1], -1))
        ctx.group, ctx.dropout, ctx.counted = group, dropout, counted
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        ctx.adapter_dtypes = [adapter.dtype for adapter in adapters]
        ctx.save_for_backward(rows, low, down, *ups, *masks)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):  # type: ignore[override]
        group, count = ctx.group, len(ctx.group.bases)
        rows, low, down, *rest = ctx.saved_tensors
        ups, masks = rest[:count], rest[count:]
        dtype = rows.dtype
        dy = [
            rows.new_zeros(len(rows), base.out_features)
            if gradient is None
            else gradient.reshape(len(rows), -1).to(dtype)
            for gradient, base in zip(gradients, group.bases, strict=True)
        ]
        dlow = torch.empty_like(low)
        for part, dy_i, up in zip(dlow.split(group.ranks, 1), dy, ups, strict=True):
            torch.mm(dy_i, up, out=part)
        group.scale(dlow, _rescale(ctx.dropout))

        # The gradients of all A `[sum of ranks, K]`, then those of the B, end to end.
        buffer = rows.new_empty(down.numel() + sum(up.numel() for up in ups))
        d_down, *d_ups = buffer.split([down.numel(), *(up.numel() for up in ups)])
        d_down, d_ups = d_down.view_as(down), [part.view_as(up) for part, up in zip(d_ups, ups, strict=True)]
        if ctx.counted:
            lora_dropout.lora_dropout_down_gradient(rows, dlow, masks[0], count, ctx.dropout, d_down)
        elif masks:
            for part, dlow_i, mask in zip(d_down.split(group.ranks), dlow.split(group.ranks, 1), masks, strict=True):
                torch.mm(dlow_i.mT, rows * mask, out=part)
        else:
            torch.mm(dlow.mT, rows, out=d_down)
        for part, dy_i, low_i in zip(d_ups, dy, low.split(group.ranks, 1), strict=True):
            torch.mm(dy_i.mT, low_i, out=part)

        dx = None
        if ctx.needs_input_grad[0]:
            for dy_i, base in zip(dy, group.bases, strict=True):
                weight = full_weight(base).to(dtype)
                dx = dy_i @ weight if dx is None else dx.addmm_(dy_i, weight)
            assert dx is not None
            if ctx.counted:
                lora_dropout.lora_dropout_input_gradient_(dx, dlow, down, masks[0], count, ctx.dropout)
            elif masks:
                parts = zip(dlow.split(group.ranks, 1), down.split(group.ranks), masks, strict=True)
                for dlow_i, down_i, mask in parts:
                    dx.addcmul_(dlow_i @ down_i, mask)
            else:
                dx.addmm_(dlow, down)
            dx = dx.view(ctx.shape).to(ctx.x_dtype)
        buffer = buffer.to(ctx.adapter_dtypes[0])
        d_down, *d_ups = buffer.split([down.numel(), *(up.numel() for up in ups)])
        parts = [
            *d_down.view_as(down).split(group.ranks),
            *(part.view_as(up) for part, up in zip(d_ups, ups, strict=True)),
        ]
        return dx, None, None, None, *(part.to(kind) for part, kind in zip(parts, ctx.adapter_dtypes, strict=True))


def _rescale(dropout: float) -> float:
    """What dropout multiplies the elements with that it keeps."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


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
        # Both stay where they are while the group is in use: CUDA graphs read them.
        self._copies: tuple[Tensor, list[Tensor]] | None = None  # of the adapters in the dtype of the products
        self._copied = False  # whether the copies are up to date
        self._bias: dict[torch.dtype, tuple[Any, Tensor]] = {}  # what it was made of, and the biases end to end

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
        with torch.autocast(kind, enabled=False):
            return LoraProducts.apply(x, self, dtype, dropout, *self.adapters())  # type: ignore[return-value]

    def draws_from_counter(self, rows: Tensor) -> bool:
        """Whether dropout's masks come from a counter: where the kernels run, and ranks and scales are equal."""
        uniform = len(set(self.ranks)) == len(set(self.scales)) == 1
        return uniform and lora_dropout.counter_dropout_available(rows)

    def adapters(self) -> list[Tensor]:
        """The parameters: all A `[r, K]`, then all B `[N, r]`."""
        adapters = [module.lora_A["default"].weight for module in self.modules]
        return adapters + [module.lora_B["default"].weight for module in self.modules]

    def factors(self, adapters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """All A together `[sum of ranks, K]` and every B in the dtype of the products: the copies, where there are."""
        if self._copied and self._copies is not None and self._copies[0].dtype == dtype:
            return self._copies
        downs, ups = ([factor.detach().to(dtype) for factor in half] for half in self._halves(adapters))
        return torch.cat(downs) if len(downs) > 1 else downs[0], ups

    def copies(self, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs (copy in this dtype, adapter) to be copied by `copy_adapters`; none for None, and none are read."""
        adapters = self.adapters()
        downs, ups = self._halves(adapters)
        self._copied = dtype is not None and any(adapter.dtype != dtype for adapter in adapters)
        if not self._copied:
            return [], []
        assert dtype is not None
        if self._copies is None or self._copies[0].dtype != dtype or self._copies[0].device != downs[0].device:
            together = torch.empty(sum(self.ranks), downs[0].shape[1], dtype=dtype, device=downs[0].device)
            self._copies = together, [torch.empty_like(up, dtype=dtype) for up in ups]
        return [*self._copies[0].split(self.ranks), *self._copies[1]], adapters

    def _halves(self, adapters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return adapters[: len(self.bases)], adapters[len(self.bases) :]

    def scale(self, low: Tensor, factor: float = 1.0) -> None:
        """Multiply rank-r products `[R, sum of ranks]` in place by each adapter's scale and by `factor`."""
        if len(set(self.scales)) == 1:
            low.mul_(self.scales[0] * factor)
            return
        for part, scale in zip(low.split(self.ranks, 1), self.scales, strict=True):
            part.mul_(scale * factor)

    def products(self, rows: Tensor) -> list[Tensor]:
        """`x W_i^T + b_i` of every layer: a single product where the weights are in one buffer, else one per layer."""
        if len(self.bases) > 1 and not any(is_4bit(base) for base in self.bases):
            sizes = [base.out_features for base in self.bases]
            first = self.stack()
            weight = first.as_strided((sum(sizes), first.shape[1]), first.stride())
            return list(functional.linear(rows, weight.to(rows.dtype), self.bias(rows)).split(sizes, dim=1))
        return [  # a dequantised weight at a time
            functional.linear(
                rows, full_weight(base).to(rows.dtype), None if base.bias is None else base.bias.to(rows.dtype)
            )
            for base in self.bases
        ]

    def bias(self, rows: Tensor) -> Tensor | None:
        """The biases of all layers end to end, in the dtype of `rows`; None where there is none. They are frozen."""
        biases = [base.bias for base in self.bases]
        if all(bias is None for bias in biases):
            return None
        origin = [rows.dtype, *(None if bias is None else (bias.data_ptr(), bias._version) for bias in biases)]
        if rows.dtype not in self._bias or self._bias[rows.dtype][0] != origin:
            parts = [
                rows.new_zeros(base.out_features) if bias is None else bias.detach().to(rows.dtype)
                for base, bias in zip(self.bases, biases, strict=True)
            ]
            self._bias[rows.dtype] = origin, torch.cat(parts)
        return self._bias[rows.dtype][1]

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


def copy_adapters(groups: Sequence[AdapterGroup], dtype: torch.dtype | None) -> None:
    """Bring every group's copies of its adapters up to date, all by one operator; None: do without copies.

    Without them each group casts its adapters in every forward pass, one by one.
    """
    pairs = [group.copies(dtype) for group in groups]
    copies = [copy for targets, _ in pairs for copy in targets]
    if copies:
        with torch.no_grad():
            torch._foreach_copy_(copies, [adapter for _, sources in pairs for adapter in sources])


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

"""The paper's idea in one file: hidden states of point tokens stay close to what the point branch produced.

At chosen layers of the language model the hidden states of the point tokens pass a small projector and are pulled, by
cosine, toward a detached target (section 3 of the paper): `L = L_ntp + weight * (1 - mean cos(f(h), stop_grad(q)))`.
The projector lives in training only. Nothing here knows the rest of the package, so the same objects attach to any
vision-language model with a list of decoder layers and a mask of the tokens in question.

Shape legend: R rows (point tokens in the batch), H width of the language model, D width of the target.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pointalign_kernels import alignment_loss


@dataclass
class AlignmentConfig:
    """Options of the alignment loss (`--alignment.*`).

    Attributes:
        weight: lambda, the share of the alignment loss in the total. 0 switches it off.
        layer: k of `hidden_states[k]`, the output of the k-th decoder layer; several for multi-layer alignment;
            by default `(L - 1) // 2`, 15 of Phi-2's 32.
        target: `qformer`, `encoder` (tokens without cls, average-pooled in order to one per query token), or
            `llm:<layer>` (the hidden states of that later layer).
        layer_weights: with several layers, `uniform` or `learned` (softmax over one scalar per layer).
        seed: of the projector's initial weights, drawn apart from every other random number.
    """

    weight: float = 0.1
    layer: list[int] = field(default_factory=list)
    target: str = "qformer"
    layer_weights: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"alignment.weight={self.weight}: expected 0 or more")
        if self.layer_weights not in ("uniform", "learned"):
            raise ValueError(f"alignment.layer_weights={self.layer_weights!r}: expected uniform or learned")
        self.target_layer()  # raises if there is no such target

    def target_layer(self) -> int | None:
        """The layer of an `llm:<layer>` target, else None."""
        if self.target in ("qformer", "encoder"):
            return None
        kind, _, layer = self.target.partition(":")
        if kind != "llm" or not layer.isdigit():
            raise ValueError(f"alignment.target={self.target!r}: expected one of qformer, encoder, llm:<layer>")
        return int(layer)

    def layers(self, num_layers: int) -> list[int]:
        """The layers to align in a language model of `num_layers`, checked."""
        layers = self.layer or [max(1, (num_layers - 1) // 2)]
        target = self.target_layer()
        for layer in [*layers, *([] if target is None else [target])]:
            if not 1 <= layer <= num_layers:
                raise ValueError(f"alignment layer {layer}: the language model has layers 1 to {num_layers}")
        return layers


class LayerTap:
    """Collects the hidden states of masked tokens at chosen decoder layers, during one forward pass.

    The hooks only hold on to the layers' outputs, which the next layer keeps alive anyway; the rows of the mask are
    taken when the block closes. transformers up to 5.17 runs forward hooks inside the region that activation
    checkpointing computes a second time, where an indexing operation would change the tensors saved for backward.

    Args:
        layers: the decoder layers of the language model.
        indices: k of `hidden_states[k]`: the hook sits on `layers[k - 1]`.
    """

    def __init__(self, layers: Sequence[nn.Module], indices: Sequence[int]):
        self.layers = layers
        self.indices = sorted(set(indices))
        self._outputs: dict[int, Tensor] | None = None  # of the pass under way
        self._hooks: list[RemovableHandle] = []

    def install(self) -> None:
        """Put the hooks on the layers until `remove`: torch.compile keeps those that a layer had when it compiled."""
        for index in self.indices:
            self._hooks.append(self.layers[index - 1].register_forward_hook(partial(self._note, index)))

    def remove(self) -> None:
        """Take the hooks off."""
        while self._hooks:
            self._hooks.pop().remove()

    def _note(self, index: int, _module: nn.Module, _args: tuple, output: Any) -> None:
        # The first call counts: recomputation calls again, with tensors that no loss depends on.
        if self._outputs is not None:
            self._outputs.setdefault(index, output[0] if isinstance(output, tuple) else output)

    @contextmanager
    def capture(self, mask: Tensor) -> Iterator[dict[int, Tensor]]:
        """One forward pass within the block; once the block has closed, the dict holds `{k: [R, H]}`.

        Args:
            mask: `[B, T]` with R true places.

        Raises:
            RuntimeError: a layer did not run.
            ValueError: a layer's output has other batch or token dimensions than the mask.
        """
        places = mask.bool().flatten().nonzero()[:, 0]  # here, where the device has little queued to wait for
        rows: dict[int, Tensor] = {}
        installed = bool(self._hooks)
        if not installed:
            self.install()
        self._outputs = outputs = {}
        try:
            yield rows
        finally:
            self._outputs = None
            if not installed:
                self.remove()
        missing = [index for index in self.indices if index not in outputs]
        if missing:
            raise RuntimeError(f"no hidden states came from layers {missing}: the forward pass did not run them")
        for index in self.indices:
            output = outputs[index]
            if output.shape[:2] != mask.shape:
                raise ValueError(
                    f"layer {index} gave hidden states of shape {list(output.shape)}, the mask of the tokens to align "
                    f"has shape {list(mask.shape)}: capture one forward pass over the tokens of the mask"
                )
            rows[index] = output.flatten(0, 1).index_select(0, places.to(output.device))


class AlignmentProjector(nn.Module):
    """`H -> (H + D) // 2 -> (H + D) // 2 -> D` with SiLU between: 8,310,784 parameters at the paper's sizes.

    Parameter names are those of the published checkpoints.
    """

    def __init__(self, hidden_size: int, target_size: int):
        super().__init__()
        width = (hidden_size + target_size) // 2
        self.projector = nn.Sequential(
            nn.Linear(hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, target_size)
        )

    def loss(self, hidden: Tensor, target: Tensor, impl: str = "reference") -> Tensor:
        """`1 - mean cos` (fp32 scalar) of hidden `[R, H]`, projected, and target `[R, D]`."""
        linears = list(self.projector)[::2]
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        return alignment_loss(hidden, target, weights, biases, impl=impl)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projector(hidden)


class Alignment(nn.Module):
    """One projector per aligned layer, and the weighted mean of their losses.

    Args:
        config: options.
        layers: the aligned layers, as `AlignmentConfig.layers` gives them.
        hidden_size, target_size: H and D.
    """

    def __init__(self, config: AlignmentConfig, layers: Sequence[int], hidden_size: int, target_size: int):
        super().__init__()
        self.config = config
        self.layers = list(layers)
        # A generator of its own: a run with weight 0 equals a run without this module, bit for bit.
        generator = torch.Generator().manual_seed(config.seed)
        with torch.device("meta"):
            projectors = [AlignmentProjector(hidden_size, target_size) for _ in self.layers]
        self.alignment_projector = nn.ModuleList(projectors).to_empty(device="cpu")
        for linear in [module for module in self.alignment_projector.modules() if isinstance(module, nn.Linear)]:
            bound = linear.in_features**-0.5  # torch's choice for a linear layer
            nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        if config.layer_weights == "learned":
            self.layer_logits = nn.Parameter(torch.zeros(len(self.layers)))

    def layer_weights(self) -> Tensor:
        """`[number of layers]`, positive, summing to 1."""
        if self.config.layer_weights == "learned":
            return self.layer_logits.softmax(dim=0)
        return torch.full((len(self.layers),), 1 / len(self.layers))

    def forward(self, hidden: dict[int, Tensor], target: Tensor, impl: str = "reference") -> Tensor:
        """fp32 scalar, the weighted mean over layers of `1 - mean cos`; hidden `{k: [R, H]}`, target `[R, D]`."""
        pairs = zip(self.layers, self.alignment_projector, strict=True)
        losses = torch.stack([projector.loss(hidden[layer], target.detach(), impl) for layer, projector in pairs])
        return (losses * self.layer_weights().to(losses)).sum()

    def beside(
        self,
        tap: LayerTap,
        mask: Tensor,
        run: Callable[[], Any],
        target: Callable[[Any, dict[int, Tensor]], Tensor],
        impl: str = "reference",
    ) -> tuple[Any, Tensor, int]:
        """One forward pass of a model and the alignment loss of its masked tokens.

        Args:
            tap: on the aligned layers of the model.
            mask: `[B, T]` with R true places; without any, the loss is 0.
            run: the forward pass.
            target: outputs of `run` and hidden states `{k: [R, H]}` -> rows `[R, D]`.

        Returns: the outputs of `run`, the loss (fp32 scalar), and R.

        Raises: ValueError: the target has other than R rows of width D.
        """
        with tap.capture(mask) as hidden:
            outputs = run()
        num_rows = len(hidden[self.layers[0]])
        if num_rows == 0:  # every parameter takes part in every step, as DistributedDataParallel wants it
            return outputs, torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0, 0
        rows = target(outputs, hidden)
        width = self.alignment_projector[0].projector[-1].out_features
        if rows.shape != (num_rows, width):
            raise ValueError(
                f"the target of the alignment has shape {list(rows.shape)}, expected {[num_rows, width]}: a row for "
                f"each of the {num_rows} tokens"
            )
        dtype = hidden[self.layers[0]].dtype  # 16-bit states pass the fp32 projector under autocast
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(mask.device.type, dtype) if half else nullcontext():
            return outputs, self(hidden, rows, impl), num_rows


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of rows `[N, F]` and `[N, G]` (Kornblith et al., ICML 2019), 0 to 1."""
    x, y = (rows.double() - rows.double().mean(dim=0) for rows in (x, y))
    shared = (x.T @ y).square().sum()
    return float(shared / ((x.T @ x).norm() * (y.T @ y).norm()))


def pool_tokens(tokens: Tensor, num_queries: int) -> Tensor:
    """Encoder tokens `[C, 1 + G, D]` without cls, average-pooled in their (farthest-point) order to `[C, Q, D]`."""
    return nn.functional.adaptive_avg_pool1d(tokens[:, 1:].transpose(1, 2), num_queries).transpose(1, 2)

"""`pointalign.attach`: the alignment loss for any multimodal model of transformers, trained by whatever trains it.

The model's `forward` is wrapped: in training it also taps decoder layers and computes the loss. Everything else of the
model, its state dict included, stays as it is, and `detach` takes the wrapper off again.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import make_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pointalign.alignment import Alignment, AlignmentConfig, LayerTap, linear_cka
from pointalign.attached_logging import LogAlignment, join_trainer
from pointalign.attached_model import base_model, chosen_layers, decoder_layers, token_id
from pointalign.attached_targets import make_target

NAME = "pointalign_attached"  # of the projectors among the model's modules, which optimizers and DDP look through


def attach(
    model: nn.Module,
    tokens: str | int | Callable[[dict[str, Any]], Tensor] | None = None,
    layers: int | Sequence[int] | str | None = None,
    target: str | Path | Callable[[dict[str, Any], Any], Tensor] = "projector_input",
    weight: float = 0.1,
    *,
    target_size: int | None = None,
    seed: int = 0,
    impl: str = "auto",
) -> "AttachedAlignment":
    """Add the alignment loss to a multimodal model of transformers.

    In training mode `model(...).loss` is the model's loss plus `weight` times the alignment loss, which the output also
    has apart as `alignment_loss`. In evaluation mode the model is as before. The projectors are parameters of the
    model, so an optimizer over `model.parameters()` trains them, but no part of its state dict.

    Args:
        model: with gradients in at least one part before the aligned layers. Attach after adapters were put on
            (`peft`), and before DistributedDataParallel or torch.compile.
        tokens: whose hidden states are aligned: `<image>` or `<point>`, the placeholder tokens of the model's
            configuration; a token id; or a function of the inputs of `forward` that gives a mask `[B, T]`. By default
            the model's point tokens, else its image tokens.
        layers: k of `hidden_states[k]`, or several; `learned` weighs up to eight evenly spaced ones by a softmax that
            trains. By default the middle one.
        target: what they are compared with, a row for each token. `projector_input`: features as they enter the
            projector into the language model, after it has grouped them; `vision`: the vision tower's output, pooled
            where a token stands for several patches; a folder of files `{id}.npy` `[n, D]`, which a batch names under
            `feature_ids`; or a function of inputs and outputs that gives `[R, D]`.
        weight: lambda.
        target_size: D, where the target is a function.
        seed: of the projectors' initial weights.
        impl: how the loss runs: `auto` (fused where a kernel can run), `reference` or `triton`.

    Raises: ValueError: the model, tokens, layers or target do not fit; says what was expected.
    """
    return AttachedAlignment(model, tokens, layers, target, weight, target_size, seed, impl)


class AttachedAlignment:
    """The handle that `attach` returns.

    Attributes:
        losses: of the last forward pass in training, detached: `token_loss`, `alignment_loss` and their weighted sum
            `loss`.
        num_rows: aligned tokens of the step, over all its micro-batches and processes, for a loop of your own that
            accumulates gradients. By default a micro-batch weighs by its supervised tokens where `num_items_in_batch`
            is passed, as the token loss does (transformers' Trainer), and fully where it is not.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: str | int | Callable | None,
        layers: int | Sequence[int] | str | None,
        target: Any,
        weight: float,
        target_size: int | None,
        seed: int,
        impl: str,
    ):
        self.model = base_model(model)
        configuration: Any = self.model.config
        self.tokens = tokens if callable(tokens) else token_id(configuration, tokens)
        self.impl, self.losses, self.num_rows = impl, {}, None
        self.joined = False  # a trainer adds `pending` to its loss, see `join`
        self.pending: Tensor | None = None
        blocks = decoder_layers(self.model)
        kind = "learned" if layers == "learned" else "uniform"
        config = AlignmentConfig(weight, chosen_layers(layers, len(blocks)), layer_weights=kind, seed=seed)
        chosen = config.layers(len(blocks))
        hidden_size = configuration.get_text_config(decoder=True).hidden_size
        self._check_not_attached()
        self.target = make_target(self.model, target, target_size)
        self.alignment = Alignment(config, chosen, hidden_size, self.target.width)
        self.alignment.to(next(blocks.parameters()).device)
        self.tap = LayerTap(blocks, self.alignment.layers)  # type: ignore[arg-type]
        self.tap.install()
        self._wrapper = AttachedForward(self)
        self.model.add_module(NAME, self.alignment)
        self.model.forward = self._wrapper  # type: ignore[method-assign]
        self._guard = blocks[0].register_forward_pre_hook(self._require_forward)
        self._hooks = [
            self._guard,
            self.model.register_state_dict_post_hook(_leave_out),
            self.model.register_load_state_dict_post_hook(_do_not_miss),
        ]

    @property
    def weight(self) -> float:
        """Lambda, which may be changed during training."""
        return self.alignment.config.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self.alignment.config.weight = value

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the projectors, and the weights of layers that are learned. `model.parameters()` has them too."""
        return self.alignment.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the model's state."""
        return self.alignment.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: RuntimeError: the state is of other layers or sizes."""
        self.alignment.load_state_dict(state)

    def layer_weights(self) -> dict[int, float]:
        """Layer -> its share of the loss."""
        return dict(zip(self.alignment.layers, self.alignment.layer_weights().tolist(), strict=True))

    def callback(self) -> LogAlignment:
        """For `transformers.Trainer`: logs the loss, and saves and resumes the projectors with its checkpoints."""
        return LogAlignment(self)

    def join(self, trainer: Any) -> None:
        """For a trainer that computes its own loss, such as TRL's: add the alignment loss to what it computes.

        Call it, like `attach`, once the trainer is built, since TRL replaces `forward` of the model then. The callback
        is added too.

        Raises: ValueError: the trainer's model no longer calls this alignment.
        """
        if base_model(trainer.model).__dict__.get("forward") is not self._wrapper:
            raise ValueError("the trainer has replaced `forward` since: build it first, then attach to trainer.model")
        join_trainer(self, trainer)

    def detach(self) -> None:
        """Leave modules, hooks, forward and state dict of the model as before `attach`. A second call does nothing."""
        if self._wrapper is None:
            return
        self._wrapper.take_off()
        self._wrapper = None
        self.tap.remove()
        self.target.remove()
        for hook in self._hooks:
            hook.remove()
        del self.model._modules[NAME]

    @torch.no_grad()
    def probe(self, **inputs: Any) -> list[dict[str, float]]:
        """How much of the target each layer's tokens hold, in one batch with the inputs of `forward`.

        Returns: for every layer `layer`; `cka`, the linear centred kernel alignment with the target (0 to 1; of a batch
            with far more tokens than the width of the target); and of the aligned layers `cosine`, the mean cosine of
            projected tokens with the target.
        """
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        inputs = dict(inputs)
        bound = self._bound((), inputs)
        mask = self._mask(bound)
        inputs.pop("feature_ids", None)
        tap = LayerTap(self.tap.layers, range(1, len(self.tap.layers) + 1))
        self.target.begin(bound)
        try:
            with tap.capture(mask) as hidden:
                outputs = self.model(**inputs)
            rows = self.target.rows(bound, outputs, int(mask.sum())).float()
        finally:
            self.target.end()
            for module in training:
                module.training = True
        projectors = dict(zip(self.alignment.layers, self.alignment.alignment_projector, strict=True))
        report = []
        for layer, states in hidden.items():
            entry = {"layer": layer, "cka": linear_cka(states.float(), rows)}
            if layer in projectors:
                entry["cosine"] = 1 - float(projectors[layer].loss(states.float(), rows))
            report.append(entry)
        return report

    # -- the wrapped forward pass --------------------------------------------------------------------------------------

    @torch.compiler.disable(recursive=False)
    def forward(self, original: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]) -> Any:
        """The model's own forward pass, and in training the loss beside it."""
        inputs = self._bound(arguments, keywords)
        keywords.pop("feature_ids", None)
        self._guard.remove()
        if not (self.model.training and torch.is_grad_enabled()) or self.weight == 0:
            return original(*arguments, **keywords)
        self._check_projectors_train()
        mask = self._mask(inputs)
        self.target.begin(inputs)
        try:
            outputs, alignment, num_rows = self.alignment.beside(
                self.tap,
                mask,
                lambda: original(*arguments, **keywords),
                lambda outputs, hidden: self._rows(inputs, outputs, hidden),
                self.impl,
            )
        finally:
            self.target.end()
        if self.joined:
            self.pending = alignment
            self.losses = {"alignment_loss": alignment.detach()}
            return outputs
        return self._add(outputs, alignment * self._share(inputs, num_rows))

    def _rows(self, inputs: dict[str, Any], outputs: Any, hidden: dict[int, Tensor]) -> Tensor:
        for layer, states in hidden.items():
            if not states.requires_grad:
                raise ValueError(
                    f"no gradient reaches the hidden states of layer {layer}: nothing before it trains, or activation "
                    "checkpointing with use_reentrant=True hides them (pass use_reentrant=False)"
                )
        rows = self.target.rows(inputs, outputs, len(next(iter(hidden.values()))))
        return rows.to(next(iter(hidden.values())).device)

    def _share(self, inputs: dict[str, Any], num_rows: int) -> Tensor | float:
        """Share of this batch in the mean over the step."""
        if self.num_rows is not None:
            return num_rows / self.num_rows
        num_items, labels = inputs.get("num_items_in_batch"), inputs.get("labels")
        if num_items is None or labels is None:
            return 1.0
        labels = inputs["shift_labels"] if inputs.get("shift_labels") is not None else labels[..., 1:]
        return (labels != -100).sum() / num_items

    def _add(self, outputs: Any, alignment: Tensor) -> Any:
        """The outputs with the loss in them."""
        in_tuple = isinstance(outputs, tuple)
        token_loss = outputs[0] if in_tuple else getattr(outputs, "loss", None)
        if token_loss is None or (in_tuple and token_loss.dim() > 0):
            warnings.warn(
                "the model returned no loss (no labels?): the alignment loss is in the output as `alignment_loss`, add "
                "it to yours",
                stacklevel=2,
            )
            self.losses = {"alignment_loss": alignment.detach()}
            return outputs if in_tuple else _with_alignment(outputs, {}, alignment)
        total = token_loss + self.weight * alignment.to(token_loss.device)
        self.losses = {
            "loss": total.detach(), "token_loss": token_loss.detach(), "alignment_loss": alignment.detach()
        }  # fmt: skip
        if in_tuple:
            return total, *outputs[1:]
        return _with_alignment(outputs, {"loss": total}, alignment)

    def _require_forward(self, layer: nn.Module, _inputs: tuple) -> None:
        """Until the first pass through `forward`: the loss must not be lost without a word."""
        if layer.training and torch.is_grad_enabled():
            raise RuntimeError(
                "the language model trains, but not through `forward` of the model that the alignment is attached to: "
                "it was replaced after `attach` (TRL's trainers do that: build the trainer, attach to trainer.model, "
                "then handle.join(trainer)), or an inner model was called"
            )

    def _bound(self, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
        """The inputs of `forward` by name."""
        names = list(self._wrapper.__signature__.parameters) if self._wrapper else []
        return dict(zip(names, arguments, strict=False)) | keywords

    def _mask(self, inputs: dict[str, Any]) -> Tensor:
        if callable(self.tokens):
            return self.tokens(inputs)
        if inputs.get("point_mask") is not None:
            return inputs["point_mask"].bool()
        if inputs.get("input_ids") is None:
            raise ValueError("expected input_ids, which say where the tokens are; or give `tokens` as a function")
        return inputs["input_ids"] == self.tokens

    def _check_projectors_train(self) -> None:
        if not all(parameter.requires_grad for parameter in self.alignment.parameters()):
            raise ValueError(
                "the alignment projectors were frozen after `attach`, as get_peft_model and "
                "prepare_model_for_kbit_training do with all weights: attach after them"
            )

    def _check_not_attached(self) -> None:
        if NAME in self.model._modules:
            raise ValueError("an alignment is attached to this model already: detach it first")


class AttachedForward:
    """Stands in for a model's `forward`, with its signature; copies with the model."""

    __slots__ = ("__signature__", "handle", "in_place_of", "original")

    def __init__(self, handle: AttachedAlignment):
        self.handle: AttachedAlignment | None = handle
        self.original = handle.model.forward
        self.in_place_of = handle.model.__dict__.get("forward")  # another wrapper, or None for the class's method
        self.__signature__ = inspect.signature(self.original)

    @torch.compiler.disable(recursive=False)
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.handle is None:
            return self.original(*arguments, **keywords)
        return self.handle.forward(self.original, arguments, keywords)

    def take_off(self) -> None:
        """Restore the model's `forward`; inside a wrapper that came later, such as accelerate's, pass calls on."""
        assert self.handle is not None
        model, self.handle = self.handle.model, None
        if model.__dict__.get("forward") is not self:
            return
        if self.in_place_of is None:
            del model.forward
        else:
            model.forward = self.in_place_of  # type: ignore[method-assign]


@torch.compiler.disable
def _with_alignment(outputs: Any, changed: dict[str, Tensor], alignment: Tensor) -> Any:
    """A copy of a model's output with the field `alignment_loss`, in a class that PyTorch can take apart and join."""
    fields = dict(outputs) | changed | {"alignment_loss": alignment}
    return _output_class(type(outputs))(**fields) if isinstance(outputs, ModelOutput) else fields


@cache
def _output_class(kind: type) -> type:
    return make_dataclass(f"Aligned{kind.__name__}", [("alignment_loss", Any, None)], bases=(kind,))


def _leave_out(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{NAME}.")]:
        del state[name]


def _do_not_miss(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if f".{NAME}." not in f".{name}"]

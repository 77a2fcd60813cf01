"""The form a model trains in: attention for packed batches, fused parts, no point branch beside a feature cache."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from pointalign.efficient import fused_parts
from pointalign.efficient.varlen_attention import choose_attention
from pointalign.models import PointAlignForConditionalGeneration
from pointalign.models.modeling import PointAlignModel

if TYPE_CHECKING:
    from pointalign.options import Options

FROZEN = ("point_encoder", "point_mlp", "qformer")  # and query_tokens, a parameter, or query_experts


@contextmanager
def training_form(model: PointAlignForConditionalGeneration, options: "Options") -> Iterator[dict[str, int]]:
    """Within the block the model has the attention, fused parts and point branch that the options ask for.

    After it the model is an ordinary one again, which reads padded batches, answers, and can be saved.

    Yields: the number of modules that each fused part replaced, see `fused_parts.applied`.
    """
    language_model = model.model.language_model
    before = language_model.config._attn_implementation
    device_type = options.training.device.type
    name = "varlen" if options.training.cuda_graphs else options.model.attention  # captured without waiting
    attention = choose_attention(name, options.data.packing, device_type)
    with ExitStack() as stack:
        if options.data.feature_cache is not None:
            stack.enter_context(without_point_branch(model))
        stack.callback(language_model.set_attn_implementation, before)
        language_model.set_attn_implementation(attention)
        parts = options.fused_parts if options.fused_parts is not None else fused_parts.PARTS
        yield stack.enter_context(fused_parts.applied(model, parts if options.fused else ()))


def frozen_parts(branch: PointAlignModel) -> tuple[str, ...]:
    """The modules whose outputs a feature cache stores."""
    return FROZEN if branch.query_experts is None else (*FROZEN, "query_experts")


@contextmanager
def without_point_branch(model: PointAlignForConditionalGeneration) -> Iterator[None]:
    """Within the block the frozen point branch is not part of the model: neither moved to a device nor run."""
    parts = {name: getattr(model.model, name).to("cpu") for name in frozen_parts(model.model)}
    for name in parts:
        setattr(model.model, name, nn.Module())
    try:
        yield
    finally:
        for name, part in parts.items():
            setattr(model.model, name, part)

"""What the model returns beside the language model's outputs; shapes as in `pointalign.models.modeling`."""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class PointFeatures:
    """The clouds' tokens after each stage of the point branch.

    Attributes:
        encoder: `[C, T', D]` tokens of the point encoder; None where Q-Former features were given in their place.
        qformer: `[C, Q, Dq]` tokens of the Q-Former, the default target of the alignment loss.
        projected: `[C, Q, H]` tokens in the language model's space.
    """

    encoder: Tensor | None
    qformer: Tensor
    projected: Tensor


@dataclass
class PointAlignOutput(CausalLMOutputWithPast):
    """A causal language model's output and the point features that it read."""

    point_features: PointFeatures | None = None

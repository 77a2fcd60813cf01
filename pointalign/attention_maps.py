"""Where the Q-Former looks: its cross-attention over the patches of a cloud, and from patches to points.

Shape legend: C clouds, Q queries, K query experts in use, T' = 1 + G tokens of the point encoder (cls first, then G
patches), N points, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pointalign.models import PointAlignForConditionalGeneration


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of each query, averaged over heads and over the layers with cross-attention.

    Attributes:
        weights: `[C, Q, T']`, cls first; each row sums to 1.
        centres: `[C, G, 3]`, the patches' centres, in the coordinates of the clouds that were given.
    """

    weights: Tensor
    centres: Tensor

    def on_patches(self, query: int | None = None) -> Tensor:
        """`[C, G]` attention to the patches, as a multiple of their average; of a query, or of all on average."""
        patches = self.weights[..., 1:]
        patches = patches.mean(dim=1) if query is None else patches[:, query]
        return patches / patches.mean(dim=1, keepdim=True)


@torch.inference_mode()
def attention_maps(
    model: PointAlignForConditionalGeneration, point_values: Tensor, point_lengths: Tensor | None = None
) -> AttentionMaps:
    """Where the Q-Former looks in clouds `[C, N, 3 + F]`, normalised as the feature extractor does.

    Args:
        point_lengths: `[C]` real points of each cloud; None where all are.

    Raises: ValueError: the point encoder does not say where its tokens lie (it has no method `group`).
    """
    encoder = model.model.point_encoder
    if not hasattr(encoder, "group"):
        raise ValueError(f"{type(encoder).__name__} has no method `group`, which says where its tokens lie")
    point_values = point_values.to(model.device)
    lengths = [point_values.shape[1]] * len(point_values) if point_lengths is None else point_lengths.tolist()
    weights = query_attention(model, model.model.get_encoder_tokens(point_values, point_lengths))
    centres = [encoder.group(cloud[None, :length])[1] for cloud, length in zip(point_values, lengths, strict=True)]
    return AttentionMaps(weights.cpu(), torch.cat(centres).cpu())


@torch.inference_mode()
def query_attention(model: PointAlignForConditionalGeneration, tokens: Tensor) -> Tensor:
    """Attention `[C, Q, T']` of the queries over encoder tokens `[C, T', D]`; each row sums to 1.

    Computed from the queries and keys of the attention modules, because the fast attention functions return no weights.
    With query experts it is the mean over those in use, by the router's weights.
    """
    branch = model.model
    modules = [layer.crossattention.attention for layer in branch.qformer.encoder.layer if layer.has_cross_attention]
    outputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        outputs[module] = output

    hooks = [part.register_forward_hook(note) for module in modules for part in (module.query, module.key)]
    try:
        branch.query(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    layers = [_softmax(module, outputs[module.query], outputs[module.key]) for module in modules]
    weights = torch.stack(layers).mean(dim=0)  # [C or C * K, Q, T']
    if branch.query_experts is None:
        return weights
    _, routing = branch.query_experts(tokens)  # [C, K]
    weights = weights.unflatten(0, routing.shape)
    return torch.einsum("ckqt,ck->cqt", weights, routing / routing.sum(dim=1, keepdim=True))


def _softmax(module: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """`[C, Q, T']`, the mean over heads; queries `[C, Q, D]`, keys `[C, T', D]`."""
    heads = module.num_attention_heads
    queries, keys = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    scores = queries @ keys.transpose(2, 3) * module.scaling  # [C, heads, Q, T']
    return scores.softmax(dim=-1).mean(dim=1)


def nearest_centres(points: Tensor, centres: Tensor) -> Tensor:
    """The patch of each point, `[N]`: the nearest of the centres `[G, 3]` to points `[N, 3]`."""
    return torch.cdist(points.float(), centres.float()).argmin(dim=1)

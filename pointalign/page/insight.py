"""What the page computes about an object: where the Q-Former looked, and what each layer still knows."""

from dataclasses import dataclass

import numpy as np
import torch

from pointalign.alignment import linear_cka
from pointalign.attention_maps import attention_maps, nearest_centres
from pointalign.data.point_cloud import subsample
from pointalign.evaluation.probe import point_states
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor


@dataclass(frozen=True)
class Gaze:
    """Where the Q-Former looked in a cloud.

    Attributes:
        values: `[N]` for each point, the attention to its patch as a multiple of the average patch.
        patches: G, how many there are.
    """

    values: np.ndarray
    patches: int


def gaze(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    points: np.ndarray,
    num_points: int,
    shown: np.ndarray,
    query: int | None = None,
) -> Gaze:
    """Cross-attention over the patches of a cloud, as the colour of points that are shown.

    Args:
        points: `[N, 6]`, of which the model reads `num_points`.
        shown: `[S, 6]`, points of the same object in the same coordinates.
        query: of the Q-Former, from 0; None for the average of all.
    """
    read = subsample(points, num_points)
    maps = attention_maps(model, torch.from_numpy(processor.feature_extractor.prepare(read))[None])
    centre = read[:, :3].astype(np.float64).mean(axis=0)  # as `normalise` moves and scales them
    radius = np.linalg.norm(read[:, :3] - centre, axis=1).max()
    xyz = torch.from_numpy(((shown[:, :3] - centre) / radius).astype(np.float32))
    values = maps.on_patches(query)[0]
    return Gaze(values[nearest_centres(xyz, maps.centres[0])].numpy(), len(values))


def layer_similarity(
    model: PointAlignForConditionalGeneration, processor: PointAlignProcessor, points: np.ndarray, num_points: int
) -> dict[int, float]:
    """Layer -> linear CKA, 0 to 1, of an object's point tokens after that layer with its Q-Former tokens.

    Layer 0 is the language model's input. CKA compares which tokens are alike in both, so nothing is fitted.
    """
    values = torch.from_numpy(processor.feature_extractor.prepare(subsample(points, num_points)))[None]
    with torch.inference_mode():
        features = model.get_qformer_features(values.to(model.device)).float().cpu()
    layers = range(model.config.get_text_config().num_hidden_layers + 1)
    _, states = point_states(model, processor, features, (), layers)
    return {layer: linear_cka(states[layer][0], features[0]) for layer in layers}

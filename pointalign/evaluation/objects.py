"""Objects ready for probes and ablations: frozen features computed once, conversations, and what is known of each."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from pointalign import assets, storage
from pointalign.alignment import pool_tokens
from pointalign.embedded.facts import main_colour
from pointalign.evaluation.tasks import _naming
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor


@dataclass
class Material:
    """Objects of one part, training or held out.

    Attributes:
        features: `[C, Q, D]` Q-Former tokens.
        encoder: `[C, Q, D']` encoder tokens, pooled to one per query.
        conversations: per object, its (question, answer) pairs.
        labels: per object, the name of its true candidate; "" where it has none.
        families: per object, its cluster.
        properties: name -> value per object, None where unknown; strings and booleans are categories.
        candidates: label -> answer text, the closed set.
    """

    features: Tensor
    encoder: Tensor
    conversations: list[list[tuple[str, str]]]
    labels: list[str]
    families: list[str]
    properties: dict[str, list]
    candidates: dict[str, str]

    def subset(self, rows: Iterable[int]) -> "Material":
        rows = list(rows)
        return Material(
            self.features[rows],
            self.encoder[rows],
            [self.conversations[i] for i in rows],
            [self.labels[i] for i in rows],
            [self.families[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.properties.items()},
            self.candidates,
        )


def evenly(count: int, limit: int | None) -> list[int]:
    """Up to `limit` of `count` rows, spread over the whole: neighbours are of one catalogue and look alike."""
    return np.linspace(0, count - 1, min(count, limit or count)).round().astype(int).tolist()


def compute_features(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: list[Callable[[], np.ndarray]],
    kept: Path,
    digest: str,
    batch_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Q-Former and pooled encoder tokens of clouds, from the file `kept` if it was made under the same `digest`."""
    if kept.exists():
        stored = load_file(kept)
        if bytes(stored["digest"].tolist()).decode() == digest:
            return stored["qformer"], stored["encoder"]
    model.eval()
    qformer, encoder = [], []
    with torch.inference_mode():
        for start in tqdm(range(0, len(clouds), batch_size), desc="frozen features", unit="batch", leave=False):
            points = processor.feature_extractor([make() for make in clouds[start : start + batch_size]])
            made = model.encode_point_clouds(
                points["point_values"].to(model.device), points["point_lengths"].to(model.device)
            )
            assert made.encoder is not None
            qformer.append(made.qformer.float().cpu())
            encoder.append(pool_tokens(made.encoder.float(), model.config.num_query_tokens).cpu())
    tensors = {"qformer": torch.cat(qformer), "encoder": torch.cat(encoder)}
    storage.write_tensors(kept, tensors | {"digest": torch.tensor(list(digest.encode()), dtype=torch.uint8)})
    return tensors["qformer"], tensors["encoder"]


def point_branch_hash(model: PointAlignForConditionalGeneration) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".language_model." not in name and "modality_projector" not in name:
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def furniture(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    split: str,
    cache: Path,
    limit: int | None,
    fold: int | None = None,
) -> Material:
    """The embedded objects of a split; the closed set is the nouns of the test split that occur in training."""
    folder = assets.furniture(fold)
    everything = json.loads((folder / "objects.json").read_text())
    records = [one for one in everything if one["split"] == split]
    records = [records[row] for row in evenly(len(records), limit)]
    clouds = [lambda r=r: np.load(folder / "clouds" / f"{r['object_id']}_8192.npy") for r in records]
    names = hashlib.sha256(" ".join(one["object_id"] for one in records).encode()).hexdigest()
    digest = f"{point_branch_hash(model)} {names[:16]}"
    features, encoder = compute_features(model, processor, clouds, cache / f"furniture-{split}.safetensors", digest)
    said: dict[str, list[tuple[str, str]]] = {}
    for entry in json.loads((folder / "annotations" / f"{split}.json").read_text()):
        if entry["conversation_type"] in ("simple_description", "single_round"):
            question, answer = (turn["value"] for turn in entry["conversations"])
            said.setdefault(entry["object_id"], []).append((question.removeprefix("<point>\n"), answer))
    nouns = {part: {one["head_noun"] for one in everything if one["split"] == part} for part in ("train", "test")}
    candidates = {noun: _naming(noun) for noun in sorted(nouns["train"] & nouns["test"])}
    aspects = [float(np.log(one["height"] / one["width"])) for one in records]
    depths = [float(np.log(one["depth"] / one["width"])) for one in records]
    return Material(
        features,
        encoder,
        [said[one["object_id"]] for one in records],
        [one["head_noun"] if one["head_noun"] in candidates else "" for one in records],
        [one["family"] for one in records],
        {
            "noun": [one["head_noun"] if one["head_noun"] in nouns["train"] else None for one in records],
            "main colour": [main_colour(one) for one in records],
            "height over width": aspects,
            "depth over width": depths,
        },
        candidates,
    )


HELD_OUT = "test"


def load(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    cache: Path,
    train: int | None = None,
    held_out: int | None = None,
    fold: int | None = None,
) -> tuple[Material, Material]:
    """Training and held-out embedded objects, at most `train` and `held_out` of them.

    With `fold`, that fold of the families is held out.
    """
    return (
        furniture(model, processor, "train", cache, train, fold),
        furniture(model, processor, HELD_OUT, cache, held_out, fold),
    )

"""`evaluate probe`: what each layer of a model still knows of a cloud, and how much of it reaches the answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pointalign import checkpointing
from pointalign.evaluation import material
from pointalign.evaluation.material import Material
from pointalign.evaluation.representations import point_states, ridge_probe, similarity
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

QFORMER = "Q-Former"


@dataclass
class ProbeOptions:
    """What is probed.

    Attributes:
        data: `furniture` or `shapes`.
        output: folder of the result.
        train, held_out: the most objects used to fit the probes and to score them.
        layers: number of layers probed, evenly spaced, the input and the last among them.
        against: folder of an earlier probe, drawn into the same plot (the same model without alignment, say).
    """

    data: str = "furniture"
    output: str = "runs/probe"
    train: int | None = None
    held_out: int | None = None
    layers: int = 7
    against: str | None = None


def qformer_probes(train: Material, held_out: Material) -> dict[str, float]:
    """What a linear probe reads from the mean Q-Former token: the most that the language model is given."""
    return {
        name: probe_property(
            train.features.mean(dim=1), truth, held_out.features.mean(dim=1), held_out.properties[name]
        )
        for name, truth in train.properties.items()
    }


def probe_property(train: Tensor, truth: list, held_out: Tensor, wanted: list) -> float:
    """`ridge_probe` on the rows where the property is known (not None)."""
    known, asked = ([i for i, one in enumerate(values) if one is not None] for values in (truth, wanted))
    return ridge_probe(
        train[known].numpy(),
        [truth[i] for i in known],
        held_out[asked].numpy(),
        [wanted[i] for i in asked],
        categorical(truth),
    )


def categorical(values: list) -> bool:
    return not isinstance(next(value for value in values if value is not None), float)


def probe_layers(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    train: Material,
    held_out: Material,
    layers: list[int],
    similar: list[int],
) -> dict[str, Any]:
    """Probes of every property at every layer, and similarity to the Q-Former tokens at the layers in `similar`.

    Returns:
        `probes`: property -> {"Q-Former" | layer: accuracy or R^2}; `kinds`: property -> which of the two;
        `similarity`: layer -> measures of `representations.similarity`.
    """
    means, tokens = point_states(model, processor, train.features, layers, similar)
    held_means, held_tokens = point_states(model, processor, held_out.features, layers, similar)
    rows: dict[str, tuple[Tensor, Tensor]] = {QFORMER: (train.features.mean(dim=1), held_out.features.mean(dim=1))}
    rows |= {str(layer): (means[layer], held_means[layer]) for layer in layers}
    probes: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    for name, truth in train.properties.items():
        kinds[name] = "accuracy" if categorical(truth) else "R2"
        probes[name] = {
            place: probe_property(fitted, truth, scored, held_out.properties[name])
            for place, (fitted, scored) in rows.items()
        }
    return {
        "probes": probes,
        "kinds": kinds,
        "similarity": {
            str(k): similarity(tokens[k], train.features, held_tokens[k], held_out.features) for k in similar
        },
        "majority": {name: _majority(held_out.properties[name]) for name, kind in kinds.items() if kind == "accuracy"},
    }


def _majority(values: list) -> float:
    known = [value for value in values if value is not None]
    return max(known.count(value) for value in set(known)) / len(known)


def spaced(count: int, depth: int) -> list[int]:
    """`count` layers from 0, the input, to `depth`, the last."""
    return sorted({int(layer) for layer in np.linspace(0, depth, count).round()})


def probe_model(name: str | None, options: ProbeOptions) -> str:
    """Probe a model; writes `probe.json` and `layers.png`. Returns a Markdown table."""
    from pointalign.evaluation.loading import load, shipped
    from pointalign.evaluation.plots import layer_curves
    from pointalign.evaluation.runs import versions

    torch.manual_seed(0)
    model, processor, weights = load(name or shipped())
    folder = Path(options.output)
    train, held_out = material.load(
        options.data, model, processor, folder / "features", options.train, options.held_out
    )
    layers = spaced(options.layers, model.config.get_text_config().num_hidden_layers)
    result = {"model": Path(name or shipped()).name, "weights": weights, "data": options.data, "versions": versions()}
    result |= probe_layers(model, processor, train, held_out, layers, layers)
    checkpointing.write_json(folder / "probe.json", result)
    curves = {result["model"]: result}
    if options.against is not None:
        import json

        other = json.loads((Path(options.against) / "probe.json").read_text())
        curves = {f"{other['model']} (before)" if other["model"] == result["model"] else other["model"]: other} | curves
    layer_curves(curves, folder / "layers.png")
    return f"{layer_table(result)}\n\nwritten: {folder / 'probe.json'}, {folder / 'layers.png'}"


def layer_table(result: dict[str, Any]) -> str:
    places = list(next(iter(result["probes"].values())))
    lines = [f"| | {' | '.join(places)} |", f"|---|{'---|' * len(places)}"]
    for name, values in result["probes"].items():
        lines.append(f"| {name} ({result['kinds'][name]}) | {' | '.join(f'{values[p]:.3f}' for p in places)} |")
    for measure in next(iter(result["similarity"].values()), {}):
        shown = [f"{result['similarity'][p][measure]:.3f}" if p in result["similarity"] else "" for p in places]
        lines.append(f"| {measure} | {' | '.join(shown)} |")
    return "\n".join(lines)

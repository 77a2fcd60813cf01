"""`evaluate probe`: what each layer of a model still knows of a cloud, and how much of it reaches the answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pointalign import storage
from pointalign.alignment import AlignmentProjector, LayerTap
from pointalign.evaluation import objects
from pointalign.evaluation.answering import encode
from pointalign.evaluation.objects import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

FIT_STEPS = 200  # of a projector fitted after training
RIDGE = 10.0 ** np.arange(-2, 6)  # strengths tried, for standardised features


@torch.inference_mode()
def point_states(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    features: Tensor,
    layers: Sequence[int],
    whole: Sequence[int] = (),
    batch_size: int = 32,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Hidden states of the point tokens in the prompt "What is this?", layer 0 being the language model's input.

    A causal model's point tokens see nothing behind them, so the text is cut there.

    Args:
        features: `[C, Q, D]` Q-Former tokens.
        layers: those to average over tokens.
        whole: those to keep token by token.

    Returns:
        `{layer: [C, H]}` means, and `{layer: [C, Q, H]}`, in fp32.
    """
    model.eval()
    content = [{"type": "point", "point": None}, {"type": "text", "text": "What is this?"}]
    batch = encode(processor, [[{"role": "user", "content": content}]], features[:1])
    end = int(batch["point_mask"][0].nonzero().max()) + 1
    ids, mask = batch["input_ids"][:, :end].to(model.device), batch["point_mask"][:, :end].to(model.device)
    indices = [layer for layer in {*layers, *whole} if layer > 0]
    tap = LayerTap(model.get_decoder().layers, indices)  # type: ignore[arg-type]
    means: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in whole}
    for start in range(0, len(features), batch_size):
        part = features[start : start + batch_size].to(model.device)
        rows = len(part)
        embeds, made = model.model.embed(ids.expand(rows, -1), point_mask=mask.expand(rows, -1), query_features=part)
        with tap.capture(mask.expand(rows, -1)) as hidden:
            model.get_decoder()(inputs_embeds=embeds, use_cache=False)
        assert made is not None
        states = {layer: one.view(rows, part.shape[1], -1).float() for layer, one in hidden.items()}
        states[0] = made.projected.float()
        for layer in layers:
            means[layer].append(states[layer].mean(dim=1).cpu())
        for layer in whole:
            tokens[layer].append(states[layer].cpu())
    return {k: torch.cat(v) for k, v in means.items()}, {k: torch.cat(v) for k, v in tokens.items()}


def ridge_probe(train: np.ndarray, truth: Sequence, test: np.ndarray, wanted: Sequence, categorical: bool) -> float:
    """How well a linear map reads a property: accuracy on `test` for categories, else R^2.

    Ridge regression (on one-hot targets for categories) of standardised features; its strength is chosen by
    leave-one-out error on the training rows alone.

    Args:
        train, test: features `[N, F]` and `[M, F]`.
        truth, wanted: the property of every row.
    """
    centre, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    x, z = (train - centre) / scale, (test - centre) / scale
    classes = sorted(set(truth)) if categorical else []
    if categorical:
        y = np.array([[float(value == one) for one in classes] for value in truth])
    else:
        y = np.asarray(truth, dtype=float)[:, None]
    mean = y.mean(axis=0)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    uy = u.T @ (y - mean)
    errors = []
    for strength in RIDGE:
        shrink = s**2 / (s**2 + strength)
        fitted = u @ (shrink[:, None] * uy)
        leverage = (u**2 * shrink).sum(axis=1) + 1 / len(x)
        errors.append(float((((y - mean - fitted) / (1 - np.minimum(leverage, 0.999))[:, None]) ** 2).mean()))
    strength = RIDGE[int(np.argmin(errors))]
    predicted = z @ (vt.T @ ((s / (s**2 + strength))[:, None] * uy)) + mean
    if categorical:
        return float(
            np.mean([classes[best] == one for best, one in zip(predicted.argmax(axis=1), wanted, strict=True)])
        )
    target = np.asarray(wanted, dtype=float)
    return float(1 - ((target - predicted[:, 0]) ** 2).sum() / ((target - target.mean()) ** 2).sum())


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of rows `[N, F]` and `[N, G]` (Kornblith et al., ICML 2019), 0 to 1."""
    x, y = (one.double() - one.double().mean(dim=0) for one in (x, y))
    shared = (x.T @ y).square().sum()
    return float(shared / ((x.T @ x).norm() * (y.T @ y).norm()))


def fit_projector(hidden: Tensor, target: Tensor, seed: int = 0) -> AlignmentProjector:
    """An alignment projector fitted after training, on frozen states: the same capacity for every model compared.

    Args:
        hidden: `[R, H]`.
        target: `[R, D]`; the loss is the alignment loss between their parts beyond the mean.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        projector = AlignmentProjector(hidden.shape[1], target.shape[1])
        optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=FIT_STEPS)
        for _ in range(FIT_STEPS):
            rows = torch.randint(len(hidden), (min(1024, len(hidden)),))
            loss = 1 - functional.cosine_similarity(projector(hidden[rows]), target[rows], dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return projector.requires_grad_(False)


def similarity(train_hidden: Tensor, train_target: Tensor, hidden: Tensor, target: Tensor) -> dict[str, float]:
    """How much of the Q-Former tokens can be read off a layer, on held-out clouds.

    Per-query means of the training clouds are removed first: they are the same for every cloud, and make raw cosines
    high even between different objects.

    Args:
        train_hidden, hidden: `[C, Q, H]` states of training and held-out clouds.
        train_target, target: `[C, Q, D]` Q-Former tokens.

    Returns:
        `centred cosine` after a projector fitted on the training clouds; `retrieval@1`, the share of held-out clouds
        whose own tokens are the nearest; `CKA` of the states; `raw cosine`, with the means left in.
    """
    centre_h, centre_t = train_hidden.mean(dim=0), train_target.mean(dim=0)
    scale = (train_hidden - centre_h).std() + 1e-6
    given, held = (train_hidden - centre_h) / scale, (hidden - centre_h) / scale
    wanted, held_wanted = train_target - centre_t, target - centre_t
    projected = fit_projector(given.flatten(0, 1), wanted.flatten(0, 1))(held)
    scores = functional.normalize(projected.flatten(1), dim=1) @ functional.normalize(held_wanted.flatten(1), dim=1).T
    raw = fit_projector(given.flatten(0, 1), train_target.flatten(0, 1))(held)
    return {
        "centred cosine": float(functional.cosine_similarity(projected, held_wanted, dim=-1).mean()),
        "retrieval@1": float((scores.argmax(dim=1) == torch.arange(len(scores))).float().mean()),
        "CKA": linear_cka(held.flatten(0, 1), held_wanted.flatten(0, 1)),
        "raw cosine": float(functional.cosine_similarity(raw, target, dim=-1).mean()),
    }


QFORMER = "Q-Former"


@dataclass
class ProbeOptions:
    """What is probed.

    Attributes:
        output: folder of the result.
        train, held_out: the most objects used to fit the probes and to score them.
        layers: number of layers probed, evenly spaced, the input and the last among them.
        against: folder of an earlier probe, drawn into the same plot (the same model without alignment, say).
    """

    output: str = "runs/probe"
    train: int | None = None
    held_out: int | None = None
    layers: int = 7
    against: str | None = None


def qformer_probes(train: EncodedObjects, held_out: EncodedObjects) -> dict[str, float]:
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
    train: EncodedObjects,
    held_out: EncodedObjects,
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
    from pointalign.build import load, shipped
    from pointalign.evaluation.plots import layer_curves
    from pointalign.evaluation.results import versions

    torch.manual_seed(0)
    model, processor, weights = load(name or shipped())
    folder = Path(options.output)
    train, held_out = objects.load(model, processor, options.train, options.held_out)
    layers = spaced(options.layers, model.config.get_text_config().num_hidden_layers)
    result = {"model": Path(name or shipped()).name, "weights": weights, "data": "furniture", "versions": versions()}
    result |= probe_layers(model, processor, train, held_out, layers, layers)
    storage.write_json(folder / "probe.json", result)
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

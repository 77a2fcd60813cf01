"""`pointalign probe`: what can be read about a cloud from each layer of the language model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pointalign import build, storage
from pointalign.alignment import AlignmentProjector, LayerTap, linear_cka
from pointalign.evaluation import markdown_table, tasks
from pointalign.evaluation.answering import encode
from pointalign.evaluation.results import versions
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

FIT_STEPS = 200  # optimizer steps of a projector that is fitted after training
RIDGE = 10.0 ** np.arange(-2, 6)  # regularisation strengths tried, for standardised features
QFORMER = "Q-Former"  # the place, beside the layers, where a linear probe reads the Q-Former tokens
SIMILARITY = ("centred cosine", "retrieval@1", "CKA")  # the measures of `similarity` that tables and plots show
LEAST_SPAN = 0.1  # of a plot's vertical axis, so that noise does not fill the picture


@torch.inference_mode()
def point_states(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    features: Tensor,
    layers: Sequence[int],
    token_layers: Sequence[int] = (),
    batch_size: int = 32,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Hidden states of the point tokens in the prompt "What is this?"; layer 0 is the language model's input.

    In a causal model the point tokens do not depend on later text, so the prompt is cut behind them.

    Args:
        features: `[C, Q, D]` Q-Former tokens.
        layers: where the mean over a cloud's tokens is returned.
        token_layers: where the states of every token are returned.

    Returns:
        `{layer: [C, H]}` means, and `{layer: [C, Q, H]}`, in fp32.
    """
    model.eval()
    content = [{"type": "point", "point": None}, {"type": "text", "text": "What is this?"}]
    batch = encode(processor, [[{"role": "user", "content": content}]], features[:1])
    end = int(batch["point_mask"][0].nonzero().max()) + 1
    ids, mask = batch["input_ids"][:, :end].to(model.device), batch["point_mask"][:, :end].to(model.device)
    indices = [layer for layer in {*layers, *token_layers} if layer > 0]
    tap = LayerTap(model.get_decoder().layers, indices)  # type: ignore[arg-type]
    means: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in token_layers}
    for start in range(0, len(features), batch_size):
        part = features[start : start + batch_size].to(model.device)
        rows = len(part)
        embeds, point_features = model.model.embed(
            ids.expand(rows, -1), point_mask=mask.expand(rows, -1), query_features=part
        )
        with tap.capture(mask.expand(rows, -1)) as hidden:
            model.get_decoder()(inputs_embeds=embeds, use_cache=False)
        assert point_features is not None
        states = {layer: state.view(rows, part.shape[1], -1).float() for layer, state in hidden.items()}
        states[0] = point_features.projected.float()
        for layer in layers:
            means[layer].append(states[layer].mean(dim=1).cpu())
        for layer in token_layers:
            tokens[layer].append(states[layer].cpu())
    return {k: torch.cat(v) for k, v in means.items()}, {k: torch.cat(v) for k, v in tokens.items()}


def ridge_probe(
    train: np.ndarray, train_values: Sequence, test: np.ndarray, test_values: Sequence, categorical: bool
) -> float:
    """How well a linear map reads a property: accuracy on `test` for categories, else R^2.

    Args:
        train, test: features `[N, F]` and `[M, F]`.
        train_values, test_values: the property of each row.
    """
    predicted = ridge_predictions(train, train_values, test, categorical)
    if categorical:
        return float(np.mean([name == truth for name, truth in zip(predicted, test_values, strict=True)]))
    return explained_variance(np.array([predicted, test_values], dtype=float).T)


def ridge_predictions(train: np.ndarray, train_values: Sequence, test: np.ndarray, categorical: bool) -> list:
    """The property of every row of `test [M, F]`, read by a linear map that is fitted to `train [N, F]`.

    Ridge regression (on one-hot targets for categories) of standardised features; its strength is chosen by
    leave-one-out error on the training rows alone.
    """
    centre, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    x, z = (train - centre) / scale, (test - centre) / scale
    classes = sorted(set(train_values)) if categorical else []
    if categorical:
        y = np.array([[float(value == name) for name in classes] for value in train_values])
    else:
        y = np.asarray(train_values, dtype=float)[:, None]
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
    return [classes[best] for best in predicted.argmax(axis=1)] if categorical else predicted[:, 0].tolist()


def explained_variance(rows: np.ndarray) -> float:
    """R^2 of predictions and true values, the columns of `rows [M, 2]`."""
    predicted, target = rows.T
    return float(1 - ((target - predicted) ** 2).sum() / ((target - target.mean()) ** 2).sum())


def fit_projector(hidden: Tensor, target: Tensor, seed: int = 0) -> AlignmentProjector:
    """An alignment projector fitted to frozen hidden states, so that models are compared by a reader of equal capacity.

    Args:
        hidden: `[R, H]` states.
        target: `[R, D]`; the loss is `1 - mean cos` of projected states and targets.
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
    """How much of the Q-Former tokens can be read from a layer, on held-out clouds.

    The mean of each query over the training clouds is removed first: it is the same for every cloud, and makes raw
    cosines high even between different objects.

    Args:
        train_hidden, hidden: `[C, Q, H]` states of training and held-out clouds.
        train_target, target: `[C, Q, D]` Q-Former tokens.

    Returns:
        `centred cosine` after a projector fitted on the training clouds; `retrieval@1`, the share of held-out clouds
        whose projected states are nearest to that cloud's Q-Former tokens; `CKA` of states and tokens; `raw cosine`,
        without the means removed.
    """
    mean_hidden, mean_target = train_hidden.mean(dim=0), train_target.mean(dim=0)
    scale = (train_hidden - mean_hidden).std() + 1e-6
    fit_hidden, test_hidden = (train_hidden - mean_hidden) / scale, (hidden - mean_hidden) / scale
    fit_target, test_target = train_target - mean_target, target - mean_target
    projected = fit_projector(fit_hidden.flatten(0, 1), fit_target.flatten(0, 1))(test_hidden)
    scores = functional.normalize(projected.flatten(1), dim=1) @ functional.normalize(test_target.flatten(1), dim=1).T
    raw = fit_projector(fit_hidden.flatten(0, 1), train_target.flatten(0, 1))(test_hidden)
    return {
        "centred cosine": float(functional.cosine_similarity(projected, test_target, dim=-1).mean()),
        "retrieval@1": float((scores.argmax(dim=1) == torch.arange(len(scores))).float().mean()),
        "CKA": linear_cka(test_hidden.flatten(0, 1), test_target.flatten(0, 1)),
        "raw cosine": float(functional.cosine_similarity(raw, target, dim=-1).mean()),
    }


@dataclass
class ProbeOptions:
    """Options of `pointalign probe`.

    Attributes:
        output: folder of the result.
        train: at most this many objects to fit the probes on; all by default.
        held_out: at most this many objects to score them on; all by default.
        layers: number of layers probed, evenly spaced, including the input (0) and the last.
        against: folder of an earlier probe to draw in the same plot, for example of the model without alignment.
    """

    output: str = "runs/probe"
    train: int | None = None
    held_out: int | None = None
    layers: int = 7
    against: str | None = None


def probe_property(train: Tensor, train_values: list, test: Tensor, test_values: list) -> float:
    """`ridge_probe` on the rows where the property is known (not None)."""
    train_rows, test_rows = (
        [row for row, value in enumerate(values) if value is not None] for values in (train_values, test_values)
    )
    return ridge_probe(
        train[train_rows].numpy(),
        [train_values[row] for row in train_rows],
        test[test_rows].numpy(),
        [test_values[row] for row in test_rows],
        categorical(train_values),
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
        `probes`: property -> {"Q-Former" or layer: accuracy or R^2}; `kinds`: property -> `accuracy` or `R2`;
        `similarity`: layer -> what the function `similarity` measures; `majority`: property -> the share of its most
        frequent value, the accuracy of a constant guess.
    """
    means, tokens = point_states(model, processor, train.features, layers, similar)
    held_means, held_tokens = point_states(model, processor, held_out.features, layers, similar)
    rows: dict[str, tuple[Tensor, Tensor]] = {QFORMER: (train.features.mean(dim=1), held_out.features.mean(dim=1))}
    rows |= {str(layer): (means[layer], held_means[layer]) for layer in layers}
    kinds = {name: "accuracy" if categorical(values) else "R2" for name, values in train.properties.items()}
    return {
        "probes": {
            name: {
                place: probe_property(fitted, values, tested, held_out.properties[name])
                for place, (fitted, tested) in rows.items()
            }
            for name, values in train.properties.items()
        },
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
    """Probe a model on the embedded objects; writes `probe.json` and `layers.png`. Returns a Markdown table."""
    torch.manual_seed(0)
    name = name or build.default_model()
    model, processor, weights = build.load(name)
    folder = Path(options.output)
    train, held_out = tasks.load(model, processor, options.train, options.held_out)
    layers = spaced(options.layers, model.config.get_text_config().num_hidden_layers)
    result = {"model": Path(name).name, "weights": weights, "data": "furniture", "versions": versions()}
    result |= probe_layers(model, processor, train, held_out, layers, layers)
    storage.write_json(folder / "probe.json", result)
    curves = {result["model"]: result}
    if options.against is not None:
        other = json.loads((Path(options.against) / "probe.json").read_text(encoding="utf-8"))
        curves = {f"{other['model']} (before)" if other["model"] == result["model"] else other["model"]: other} | curves
    layer_curves(curves, folder / "layers.png")
    return f"{layer_table(result)}\n\nwritten: {folder / 'probe.json'}, {folder / 'layers.png'}"


def layer_table(result: dict[str, Any]) -> str:
    """Markdown: a row for each property and each similarity measure, a column for the Q-Former and each layer."""
    places = list(next(iter(result["probes"].values())))
    rows = [
        [f"{name} ({result['kinds'][name]})", *(f"{values[place]:.3f}" for place in places)]
        for name, values in result["probes"].items()
    ]
    similar = result["similarity"]
    for measure in next(iter(similar.values()), {}):
        rows.append([measure, *(f"{similar[p][measure]:.3f}" if p in similar else "" for p in places)])
    return markdown_table(["", *places], rows)


def layer_curves(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write a PNG with one plot for each property and similarity measure, over layers, with one line per model.

    Args:
        results: name of a model or arm -> what `probe_layers` returns.
    """
    from matplotlib.figure import Figure

    first = next(iter(results.values()))
    measures = SIMILARITY if len(first["similarity"]) > 1 else ()  # the value at a single layer is not a curve
    titles = [*first["probes"], *measures]
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows))
    flat = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, title in zip(flat, titles, strict=False):
        if title in first["probes"]:
            level = first["probes"][title][QFORMER]
            axis.axhline(level, color="black", linewidth=0.9, linestyle=":", label=QFORMER)
        for name, result in results.items():
            values = result["probes"].get(title) or {k: v[title] for k, v in result["similarity"].items()}
            curve = sorted((int(place), value) for place, value in values.items() if place != QFORMER)
            axis.plot(*zip(*curve, strict=True), marker="o", markersize=3, linewidth=1.4, label=name)
        low, high = axis.get_ylim()
        if high - low < LEAST_SPAN:
            axis.set_ylim((low + high - LEAST_SPAN) / 2, (low + high + LEAST_SPAN) / 2)
        kind = first["kinds"].get(title)
        axis.set_title(title + (f" ({kind.replace('R2', 'R²')})" if kind else ""), fontsize=10)
        axis.set_xlabel("layer", fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in flat[len(titles) :]:
        axis.set_visible(False)
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.3 / (2.7 * rows), 1, 1))
    figure.savefig(path, dpi=130)

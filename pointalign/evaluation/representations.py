"""What the layers of the language model still know of a cloud: probes, similarity, retrieval.

Shape legend: C clouds, Q query tokens, H width of the language model, D width of the Q-Former.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pointalign.alignment import AlignmentProjector, LayerTap
from pointalign.evaluation.answering import encode
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

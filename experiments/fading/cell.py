"""A cell of the grid: one arm and seed, trained on captions and measured on held-out objects."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import OPTConfig

from experiments.ablation.ablation import behind
from experiments.ablation.train_arm import (
    Arm,
    Schedule,
    TargetFromBatch,
    aligned_model,
    optimise,
    restore,
    target_table,
    trainable_state,
)
from experiments.fading.grid import ARMS, LAYERS, Decoder, Sizes
from experiments.fading.things import FACTORS_B
from experiments.fading.words import B_WORDS, END, IDS, MORE, NAMING, PAD, Examples, encode, tell
from pointalign.alignment import LayerTap
from pointalign.evaluation.probe import QFORMER, fit_projector, probe_property
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.models import PointAlignForConditionalGeneration
from pointalign.trainer import AlignedModel


def new_decoder(
    point_model: PointAlignForConditionalGeneration, decoder: Decoder, features: Tensor, seed: int
) -> PointAlignForConditionalGeneration:
    """A decoder drawn from `seed` behind a modality projector whose tokens have the size that `decoder` asks for.

    Args:
        features: `[C, Q, D]`, over which the norm of the tokens is averaged.
    """
    text = OPTConfig(
        hidden_size=decoder.width, ffn_dim=2 * decoder.width, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=decoder.width, dropout=0.0, vocab_size=len(IDS),
        pad_token_id=IDS[PAD], eos_token_id=IDS[END], bos_token_id=None, tie_word_embeddings=True
    )  # fmt: skip
    model = behind(point_model, text, seed)
    projector = model.model.modality_projector
    with torch.no_grad():
        tokens = projector(features).norm(dim=-1).mean()
        words = model.get_input_embeddings().weight[IDS[END] + 1 :].norm(dim=-1).mean()
        for parameter in projector[-1].parameters():  # both of its layers are linear: this scales the tokens
            parameter.mul_(decoder.token_size * words / tokens)
    for parameter in projector.parameters():
        parameter.requires_grad_(decoder.projector_trains)
    return model


def caption_examples(objects: EncodedObjects, num_query_tokens: int) -> Examples:
    texts = [(*pair, row) for row, pairs in enumerate(objects.conversations) for pair in pairs]
    return encode(texts, num_query_tokens)


def b_examples(objects: EncodedObjects, rows: Sequence[int], num_query_tokens: int) -> Examples:
    """The sentences that tell set B of the objects in `rows`."""
    texts = [(MORE, tell({name: objects.properties[f"B: {name}"][row] for name in FACTORS_B}), row) for row in rows]
    return encode(texts, num_query_tokens)


def train(
    aligned: AlignedModel,
    examples: Examples,
    objects: EncodedObjects,
    schedule: Schedule,
    seed: int,
    description: str,
    arm: Arm | None = None,
) -> dict[str, list[float]]:
    """Train on examples in an order that depends on the seed alone; `arm` says where the targets come from."""
    rng = np.random.default_rng(seed)
    targets = target_table(arm, objects, seed) if arm and isinstance(aligned, TargetFromBatch) else None

    def batches() -> Iterator[dict[str, Tensor]]:
        order = np.array([], dtype=int)
        for _ in range(schedule.steps):
            while len(order) < schedule.batch_size:
                order = np.concatenate([order, rng.permutation(len(examples))])
            numbers, order = order[: schedule.batch_size], order[schedule.batch_size :]
            part = examples.subset(numbers)
            batch = inputs(part, objects) | {"labels": part.labels}
            if arm and targets is not None:
                batch["target_tokens"] = targets[part.rows.roll(1) if arm.source == "other" else part.rows]
            yield batch

    return optimise(aligned, batches(), schedule, description)


def inputs(examples: Examples, objects: EncodedObjects) -> dict[str, Tensor]:
    """Inputs of the model. Rows are padded at the right, so causal attention needs no mask."""
    features = objects.features[examples.rows]
    return {"input_ids": examples.ids, "point_mask": examples.mask, "query_features": features}


@torch.inference_mode()
def logits(model: PointAlignForConditionalGeneration, examples: Examples, objects: EncodedObjects) -> Tensor:
    """`[N, T, vocabulary]`."""
    model.eval()
    parts = [examples.subset(numbers) for numbers in torch.arange(len(examples)).split(512)]
    return torch.cat([model(**inputs(part, objects)).logits for part in parts])


def captions_right(model: PointAlignForConditionalGeneration, objects: EncodedObjects) -> np.ndarray:
    """`[C]`, how many of the naming prompts each object's exact caption follows, decoded greedily.

    Every token is the most likely after the true ones before it: then, and only then, greedy decoding gives them all.
    """
    examples = caption_examples(objects, model.config.num_query_tokens)
    predicted = logits(model, examples, objects)[:, :-1].argmax(dim=-1)
    labels = examples.labels[:, 1:]
    right = ((predicted == labels) | (labels == -100)).all(dim=1)
    return right.view(-1, len(NAMING)).sum(dim=1).numpy()


def b_right(model: PointAlignForConditionalGeneration, objects: EncodedObjects) -> np.ndarray:
    """`[C, factors of B]` bool: whether the right word of the two is the likelier, after the true words before it."""
    examples = b_examples(objects, range(len(objects.ids)), model.config.num_query_tokens)
    scores = logits(model, examples, objects)
    first = int((examples.labels[0] != -100).int().argmax())  # the same in all rows: they are of one length
    right = []
    for place, words in enumerate(B_WORDS.values(), start=first):
        ids = torch.tensor([IDS[word] for word in words])
        above = scores[:, place - 1, ids].argmax(dim=1)
        right.append(ids[above] == examples.ids[:, place])
    return torch.stack(right, dim=1).numpy()


def few_shot(
    model: PointAlignForConditionalGeneration,
    train_objects: EncodedObjects,
    held_out: EncodedObjects,
    sizes: Sizes,
    seed: int,
) -> dict[int, np.ndarray]:
    """k -> `b_right` after fine-tuning on k objects; the weights are restored afterwards."""
    start = trainable_state(model)
    order = np.random.default_rng([seed, 2]).permutation(len(train_objects.ids))
    right = {}
    for count, steps in sizes.few_shot_steps.items():
        examples = b_examples(train_objects, [int(row) for row in order[:count]], model.config.num_query_tokens)
        plain = aligned_model(model, Arm(weight=0.0), 0.0, seed)
        schedule = replace(sizes.few_shot, steps=steps)
        train(plain, examples, train_objects, schedule, seed, f"few-shot, {count}")
        right[count] = b_right(model, held_out)
        restore(model, start)
    return right


@torch.inference_mode()
def point_states(model: PointAlignForConditionalGeneration, objects: EncodedObjects) -> dict[int, Tensor]:
    """Layer -> states `[C, Q, H]` of the point tokens; layer 0 is the decoder's input. No text follows or matters."""
    model.eval()
    queries = model.config.num_query_tokens
    prompt = encode([("", "", 0)], queries)
    count = len(objects.ids)
    ids, mask = prompt.ids.expand(count, -1), prompt.mask.expand(count, -1)
    embeds, features = model.model.embed(ids, point_mask=mask, query_features=objects.features)
    tap = LayerTap(model.get_decoder().layers, range(1, LAYERS + 1))  # type: ignore[arg-type]
    with tap.capture(mask) as hidden:
        model.get_decoder()(inputs_embeds=embeds, use_cache=False)
    assert features is not None
    return {0: features.projected} | {layer: rows.view(count, queries, -1) for layer, rows in hidden.items()}


def retrieval(train_states: Tensor, states: Tensor, train_objects: EncodedObjects, held_out: EncodedObjects) -> float:
    """Share of held-out objects whose projected states are nearest to their Q-Former tokens among objects of equal A.

    The projector is fitted on training objects after training, the same for every arm; means are removed.

    Args:
        train_states, states: `[C, Q, H]`.
    """
    mean, target_mean = train_states.mean(dim=0), train_objects.features.mean(dim=0)
    scale = (train_states - mean).std() + 1e-6
    targets = train_objects.features[: len(train_states)] - target_mean
    projector = fit_projector(((train_states - mean) / scale).flatten(0, 1), targets.flatten(0, 1))
    projected = functional.normalize(projector((states - mean) / scale).flatten(1), dim=1)
    tokens = functional.normalize((held_out.features - target_mean).flatten(1), dim=1)
    groups = torch.tensor([sorted(set(held_out.labels)).index(label) for label in held_out.labels])  # equal captions
    scores = (projected @ tokens.T).masked_fill(groups[:, None] != groups, -2.0)
    return float((scores.argmax(dim=1) == torch.arange(len(scores))).float().mean())


def measure_states(
    model: PointAlignForConditionalGeneration, train_objects: EncodedObjects, held_out: EncodedObjects, rows: int
) -> dict[str, Any]:
    """Probes of every factor by layer, probes of B on all tokens side by side, retrieval at equal A."""
    fitted = train_objects.subset(range(min(rows, len(train_objects.ids))))
    states, held_states = point_states(model, fitted), point_states(model, held_out)
    probes: dict[str, dict[str, float]] = {}
    joint: dict[str, dict[str, float]] = {}
    for name, values in fitted.properties.items():
        places = {QFORMER: (fitted.features, held_out.features)}
        places |= {str(layer): (states[layer], held_states[layer]) for layer in states}
        truth = held_out.properties[name]
        probes[name] = {
            place: probe_property(ours.mean(dim=1), values, theirs.mean(dim=1), truth)
            for place, (ours, theirs) in places.items()
        }
        if name.startswith("B: "):
            joint[name] = {
                str(layer): probe_property(states[layer].flatten(1), values, held_states[layer].flatten(1), truth)
                for layer in (0, LAYERS)
            }
    found = retrieval(states[LAYERS], held_states[LAYERS], fitted, held_out)
    return {"probes": probes, "probes on all tokens": joint, "retrieval at equal A": {str(LAYERS): found}}


def run_cell(
    point_model: PointAlignForConditionalGeneration,
    name: str,
    seed: int,
    train_objects: EncodedObjects,
    held_out: EncodedObjects,
    sizes: Sizes,
) -> dict[str, Any]:
    """Train one arm and measure it. Per held-out object, the result has a digit: how many texts or words are right."""
    decoder = ARMS[name]
    model = new_decoder(point_model, decoder, train_objects.features, seed)
    aligned = aligned_model(model, decoder.arm, decoder.arm.weight or 0.0, seed, decoder.layer_weights)
    examples = caption_examples(train_objects, model.config.num_query_tokens)
    history = train(aligned, examples, train_objects, sizes.captions, seed, f"{name}, seed {seed}", decoder.arm)
    result: dict[str, Any] = {
        "arm": name,
        "seed": seed,
        "losses": {kind: _by_tenths(values) for kind, values in history.items()},
        "captions": _digits(captions_right(model, held_out)),
    }
    if aligned.alignment is not None:
        weights = aligned.alignment.layer_weights().tolist()
        result["layer weights"] = dict(zip(map(str, aligned.alignment.layers), weights, strict=True))
    result |= measure_states(model, train_objects, held_out, sizes.probe_rows)
    right = few_shot(model, train_objects, held_out, sizes, seed)
    result["few-shot"] = {str(count): _digits(words.sum(axis=1)) for count, words in right.items()}
    result["few-shot by factor"] = {
        str(count): dict(zip(FACTORS_B, words.mean(axis=0).tolist(), strict=True)) for count, words in right.items()
    }
    return result


def _by_tenths(values: list[float]) -> list[float]:
    """Means over the tenths of a training."""
    return [float(np.mean(part)) for part in np.array_split(values, 10)]


def _digits(counts: np.ndarray) -> str:
    return "".join(str(int(count)) for count in counts)

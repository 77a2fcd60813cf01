"""The gate: a point branch is trained until set B can be read from its Q-Former tokens; then it is frozen.

Only what the language model receives can fade in it. So a small point encoder and Q-Former learn to tell all factors of
procedural things, A and B, and a linear probe on the mean Q-Former token of held-out things decides: every factor of B
has to be read with R2, and every factor of A with accuracy, of at least `LEAST`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2QFormerConfig, LlamaConfig

from experiments.fading.things import FACTORS_A, FACTORS_B, POINTS, Thing, held_out_things, sample, training_things
from experiments.fading.words import END, IDS, NAMING, PAD, POINT
from pointalign import storage
from pointalign.alignment import pool_tokens
from pointalign.evaluation.probe import probe_property
from pointalign.evaluation.tasks import EncodedObjects
from pointalign.models import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.configuration import PointBertConfig

LEAST = 0.85  # R2 of each factor of B, accuracy of each factor of A
QUERIES, WIDTH = 6, 64  # Q-Former tokens of a cloud and their width
# Weights are drawn in order, those of the placeholder first: its size is fixed, so that new words in the vocabulary
# leave the point branch, and with it all finished cells, as they are.
PLACEHOLDER_WORDS = 32
REPEATED = 2e-3  # of R2 or accuracy: what rounding may change between machines
GATE_FILE, TOKEN_FILE = "gate.json", "features/tokens.safetensors"  # git ignores folders named features

Things = list[tuple[Thing, np.random.Generator]]  # each with what samples its cloud


def point_model(seed: int = 0) -> PointAlignForConditionalGeneration:
    """The model classes of the library in a small configuration; its language model is a placeholder."""
    text = LlamaConfig(vocab_size=PLACEHOLDER_WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                       num_attention_heads=1, pad_token_id=IDS[PAD], eos_token_id=IDS[END], bos_token_id=None,
                       tie_word_embeddings=True)  # fmt: skip
    point = PointBertConfig(num_points=POINTS, num_groups=16, group_size=16, group_dim=WIDTH, pointnet_width=32,
                            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=2 * WIDTH)  # fmt: skip
    qformer = Blip2QFormerConfig(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
                                 intermediate_size=2 * WIDTH, encoder_hidden_size=WIDTH, cross_attention_frequency=1,
                                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                 initializer_range=0.07)  # fmt: skip
    config = PointAlignConfig(text_config=text, point_config=point, qformer_config=qformer,
                              point_token_id=IDS[POINT], num_query_tokens=QUERIES, projector_hidden_size=WIDTH,
                              initializer_range=0.07)  # fmt: skip
    torch.manual_seed(seed)
    return PointAlignForConditionalGeneration(config)


class FactorReader(nn.Module):
    """Linear maps from all Q-Former tokens of a cloud to its factors: classes of A, numbers of B."""

    def __init__(self, classes: dict[str, list[str]]):
        super().__init__()
        self.classes = classes
        self.heads = nn.ModuleDict({name: nn.Linear(QUERIES * WIDTH, len(names)) for name, names in classes.items()})
        self.numbers = nn.Linear(QUERIES * WIDTH, len(FACTORS_B))

    def forward(self, tokens: Tensor, things: list[Thing]) -> Tensor:
        """Sum of cross-entropies of A and of squared errors of B, in their variances; tokens `[C, Q, D]`."""
        flat = tokens.flatten(1)
        truth = torch.tensor([[getattr(thing, name) for name in FACTORS_B] for thing in things])
        loss = functional.mse_loss(self.numbers(flat), (truth - 0.5) * 12**0.5) * len(FACTORS_B)
        for name, head in self.heads.items():
            labels = torch.tensor([self.classes[name].index(getattr(thing, name)) for thing in things])
            loss = loss + functional.cross_entropy(head(flat), labels)
        return loss


def train_point_branch(model: PointAlignForConditionalGeneration, things: Things, batch_size: int = 64) -> None:
    """One pass over `things`; encoder, point MLP and Q-Former train."""
    classes = {name: sorted({getattr(thing, name) for thing, _ in things}) for name in FACTORS_A}
    reader = FactorReader(classes)
    core = model.model
    parts = (core.point_encoder, core.point_mlp, core.qformer, reader)
    trained = [core.query_tokens, *(parameter for part in parts for parameter in part.parameters())]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    starts = range(0, len(things) - batch_size + 1, batch_size)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=len(starts), pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for start in starts:
        batch = things[start : start + batch_size]
        loss = reader(model.get_qformer_features(_clouds(batch)), [thing for thing, _ in batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rate.step()
    model.eval()


def encode_things(model: PointAlignForConditionalGeneration, things: Things) -> EncodedObjects:
    """The frozen tokens of things, with their factors as properties `A: shape`, ..., `B: band`."""
    qformer, encoder = [], []
    with torch.inference_mode():
        for start in range(0, len(things), 256):
            tokens = model.model.get_encoder_tokens(_clouds(things[start : start + 256]))
            qformer.append(model.model.query(tokens))
            encoder.append(pool_tokens(tokens, QUERIES))
    return encoded_objects([thing for thing, _ in things], torch.cat(qformer).clone(), torch.cat(encoder).clone())


def encoded_objects(things: list[Thing], features: Tensor, encoder: Tensor) -> EncodedObjects:
    """Things with tokens; `features` and `encoder` are `[C, Q, D]`."""
    captions = [thing.caption() for thing in things]
    properties: dict[str, list] = {
        f"{'A' if name in FACTORS_A else 'B'}: {name}": [getattr(thing, name) for thing in things]
        for name in (*FACTORS_A, *FACTORS_B)
    }
    return EncodedObjects(
        [str(number) for number in range(len(things))],
        _no_cloud,
        captions,
        captions,
        features=features,
        encoder=encoder,
        conversations=[[(question, caption) for question in NAMING] for caption in captions],
        properties=properties,
    )


def _no_cloud(_name: str) -> np.ndarray:
    raise ValueError("the clouds of this study are not stored: its decoders read tokens")


def _clouds(things: Things) -> Tensor:
    """`[C, POINTS, 6]`."""
    return torch.from_numpy(np.stack([sample(thing, rng) for thing, rng in things]))


def read_gate(train: EncodedObjects, held_out: EncodedObjects) -> dict[str, float]:
    """Factor -> R2 or accuracy on held-out things of a linear probe on the mean Q-Former token."""
    means = [objects.features.mean(dim=1) for objects in (train, held_out)]
    return {
        name: probe_property(means[0], values, means[1], held_out.properties[name])
        for name, values in train.properties.items()
    }


def failures(read: dict[str, float]) -> list[str]:
    """The factors that the tokens do not hold, in words; none if the gate is passed."""
    return [f"{name} {value:.3f}, expected at least {LEAST}" for name, value in read.items() if not value >= LEAST]


def prepare(
    folder: Path, seen: int, trained_on: int, per_combination: int
) -> tuple[PointAlignForConditionalGeneration, EncodedObjects, EncodedObjects, dict[str, Any]]:
    """The point branch, training and held-out things with its tokens, and what the gate measured.

    Where the tokens are read from a file, the point branch is a new one: nobody uses its weights.

    Args:
        folder: of `gate.json` and the tokens, which are read where they exist, else written.
        seen: things that the point branch is trained on, each once.
        trained_on: of these, the first so many, which decoders are trained on.
        per_combination: held-out things of every combination of A.

    Raises: ValueError: `folder` has a gate of other sizes, or one that this machine does not repeat.
    """
    sizes = {"seen": seen, "trained_on": trained_on, "per_combination": per_combination}
    known = storage.read_json(folder / GATE_FILE) if (folder / GATE_FILE).exists() else None
    if known and known["sizes"] != sizes:
        raise ValueError(f"{folder} was prepared with {known['sizes']}, asked for {sizes}: choose another --output")
    cached = known is not None and (folder / TOKEN_FILE).exists()
    things = training_things(trained_on if cached else seen)
    drawn = {"train": things[:trained_on], "held_out": held_out_things(per_combination)}
    model = point_model()
    if known is not None and cached:
        tensors = storage.load_tensors(folder / TOKEN_FILE)
        parts = [
            encoded_objects([thing for thing, _ in part], tensors[f"{name}.qformer"], tensors[f"{name}.encoder"])
            for name, part in drawn.items()
        ]
        return model.eval(), parts[0], parts[1], known
    print("training the point branch: some minutes on a CPU core", flush=True)
    train_point_branch(model, things)
    train, held_out = (encode_things(model, part) for part in drawn.values())
    read = read_gate(train, held_out)
    if known:  # a clone has the gate of the committed cells, without the tokens: they must be the same again
        require_equal_reads(folder, known["read"], read)
    gate = known or {
        "sizes": sizes,
        "least": LEAST,
        "read": read,
        "provenance": storage.provenance(torch.device("cpu")),
    }
    tensors = {f"{name}.{kind}": getattr(part, attribute)
               for name, part in (("train", train), ("held_out", held_out))
               for kind, attribute in (("qformer", "features"), ("encoder", "encoder"))}  # fmt: skip
    (folder / TOKEN_FILE).parent.mkdir(parents=True, exist_ok=True)
    storage.write_tensors(folder / TOKEN_FILE, tensors)
    storage.write_json(folder / GATE_FILE, gate)
    return model, train, held_out, gate


def require_equal_reads(folder: Path, known: dict[str, float], read: dict[str, float]) -> None:
    """Raises: ValueError: this machine's point branch is another one than that of the cells in `folder`."""
    far = [name for name, value in known.items() if abs(value - read[name]) > REPEATED]
    if far:
        values = ", ".join(f"{name} {known[name]:.3f}, here {read[name]:.3f}" for name in far)
        raise ValueError(
            f"{folder} holds cells with the tokens of another machine's point branch ({values}): choose another "
            "--output, and all cells are run there"
        )

"""`python -m pointalign.embedded.stage1`: encoder, Q-Former and projector learn the words for what they see.

A few hundred objects are too few to teach an encoder through a language model. Every object comes with facts, such as
its noun and its main colour. This stage compares tokens of the modality projector with the language model's input
embeddings: a token near the embedding of "chair" is what the language model will read as a chair. The language model
itself is not used; the alignment stage (`python -m pointalign.train`) teaches it to answer from the tokens.

1. The encoder learns the facts through a head that is thrown away, and through further heads which clouds are alike:
   names alone it would learn by heart. For the same reason a part of every batch is procedural objects.
2. The queries learn to repeat what the encoder's head predicts. Each query is assigned one kind of facts, so that they
   do not all learn the same. They do not see the true facts: their errors on training objects then resemble those on
   new objects, and the language model learns to read tokens of the kind it will meet.
3. The last linear map of the modality projector is solved in closed form, so that tokens come to lie near the words.

Training takes hours on a CPU. The same command goes on where it was stopped, with the same result.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pointalign import assets, storage
from pointalign.embedded.descent import descend
from pointalign.embedded.neighbours import neighbour_loss
from pointalign.embedded.views import Batch, TrainingViews
from pointalign.embedded.words import FactWords
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

RIDGE = 1e-3  # regularisation of the closed form, relative to the mean square of its inputs
FIT_BATCHES = 50  # batches that the closed form is fitted to
DROPOUT = 0.1  # before the encoder's head for words
METRIC_WIDTH = 256  # width of the embedding that says which clouds are alike
TEACHER_WEIGHT = 2.0  # of the loss towards the teacher's features


class Encoder(nn.Module):
    """The point encoder with heads that are thrown away: for words, for distances among clouds, for a teacher."""

    def __init__(
        self,
        point_encoder: nn.Module,
        width: int,
        word_width: int,
        num_kinds: int,
        teacher_width: int,
        precision: torch.autocast,
    ):
        super().__init__()
        self.point_encoder, self.num_kinds, self.precision = point_encoder, num_kinds, precision
        self.word_head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(2 * width, num_kinds * word_width))
        self.metric_head = nn.Linear(2 * width, METRIC_WIDTH)
        self.teacher_head = nn.Linear(2 * width, teacher_width) if teacher_width else None

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[B, T, D]`, words `[B, kinds, H]` and pooled features `[B, 2 D]` of points `[B, N, C]`."""
        with self.precision:
            tokens = self.point_encoder(points)
        pooled = torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1).float()
        return tokens, self.word_head(pooled).unflatten(-1, (self.num_kinds, -1)), pooled


class Stage1:
    """The parts in training, their target words and the views. Query q learns kind q modulo their number.

    Args:
        clouds: arrays `[N, 6]`.
        records: of each cloud, what `facts.facts` reads.
        teacher: object id -> features `[E]` of unit length that a teacher gave it; may lack objects.

    Raises:
        ValueError: the model has query experts, or no record has a fact.
    """

    def __init__(
        self,
        model: PointAlignForConditionalGeneration,
        processor: PointAlignProcessor,
        clouds: Sequence[np.ndarray],
        records: Sequence[dict],
        batch_size: int,
        seed: int = 0,
        teacher: Mapping[str, np.ndarray] | None = None,
        device: torch.device | str = "cpu",
    ):
        if model.model.query_tokens is None:
            raise ValueError("stage 1 trains a new point branch: query experts come in a later stage")
        assert processor.feature_extractor is not None
        self.branch, self.device, self.teacher = model.model, torch.device(device), teacher or {}
        self.embedding = model.get_input_embeddings().weight.detach()
        self.views = TrainingViews(clouds, records, batch_size, processor.feature_extractor, seed)
        known = self.views.known_facts()
        if not any(fact is not None for record_facts in known.values() for fact in record_facts):
            raise ValueError("stage 1 needs a fact of at least one object, but no record has any")
        self.kinds = {
            kind: FactWords(facts, processor.tokenizer, self.embedding)
            for kind, facts in known.items()
            if any(fact is not None for fact in facts)
        }
        # each query says one kind: with fewer queries than kinds, the first kinds
        self.said = dict(list(self.kinds.items())[: model.config.num_query_tokens])
        self.bfloat16 = self.branch.language_model.dtype == torch.bfloat16
        self.precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
        widths = model.config.point_config.hidden_size, self.embedding.shape[1], len(self.kinds)
        teacher_width = len(next(iter(self.teacher.values()))) if self.teacher else 0
        torch.manual_seed(seed)
        self.encoder = Encoder(self.branch.point_encoder, *widths, teacher_width, self.precision).to(device)

    def points(self, batch: Batch) -> Tensor:
        return torch.from_numpy(batch.points).to(self.device)

    def encoder_loss(self, step: int) -> Tensor:
        batch = self.views.batch(step)
        points = self.points(batch)
        _, words, pooled = self.encoder(points)
        loss = neighbour_loss(self.encoder.metric_head(pooled), points[..., :3])
        for number, (name, kind) in enumerate(self.kinds.items()):
            loss = loss + kind.loss(kind.logits(words[:, number]), kind.targets(batch.facts[name]))
        taught = [row for row, name in enumerate(batch.names) if name in self.teacher]
        if taught and self.encoder.teacher_head is not None:
            targets = torch.from_numpy(np.stack([self.teacher[batch.names[row]] for row in taught])).to(self.device)
            predicted = self.encoder.teacher_head(pooled[taught])
            loss = loss + TEACHER_WEIGHT * (1 - functional.cosine_similarity(predicted, targets, dim=-1)).mean()
        return loss

    def query_loss(self, step: int) -> Tensor:
        with torch.no_grad():
            tokens, words, _ = self.encoder(self.points(self.views.batch(step)))
        with self.precision:
            projected = self.branch.modality_projector(self.branch.query(tokens))
        loss = projected.new_zeros((), dtype=torch.float32)
        for number, kind in enumerate(self.said.values()):
            loss = loss + kind.query_loss(projected[:, number :: len(self.said)], kind.logits(words[:, number]))
        return loss

    def train(
        self, encoder_steps: int, query_steps: int, learning_rate: float, folder: Path | None = None
    ) -> tuple[list[float], list[float]]:
        """Train the point branch in place. With `folder`, keep the state there and go on from what it holds.

        Returns: the losses of the encoder's steps and of the queries', since the last stored step.
        """
        branch = self.branch
        trainable = [parameter for parameter in branch.parameters() if parameter.requires_grad]
        branch.requires_grad_(False)
        self.encoder.requires_grad_(True).train()
        matrices = self.muon_matrices(branch.point_encoder)
        encoder_losses = descend(
            self.encoder, matrices, self.encoder_loss, encoder_steps, learning_rate, "encoder", folder
        )
        self.encoder.requires_grad_(False).eval()
        readers = nn.ModuleDict(
            {name: getattr(branch, name) for name in ("point_mlp", "qformer", "modality_projector")}
        )
        readers.register_parameter("query_tokens", branch.query_tokens)
        readers.requires_grad_(True).train()
        first = encoder_steps  # views go on where the encoder's ended
        query_losses = descend(
            readers, self.muon_matrices(branch.qformer), lambda step: self.query_loss(first + step), query_steps,
            learning_rate, "queries", folder,
        )  # fmt: skip
        readers.requires_grad_(False).eval()
        self.fit_last_map(encoder_steps + query_steps)
        for parameter in trainable:
            parameter.requires_grad_(True)
        return encoder_losses, query_losses

    def fit_last_map(self, first_step: int) -> None:
        """Solve for the modality projector's last linear map, then scale its tokens to the length of words.

        Training fits the directions of the tokens only.
        """
        last = self.branch.modality_projector[-1]
        fit_linear(last, (self.fit_example(first_step + number) for number in range(FIT_BATCHES)))
        with torch.no_grad():
            tokens = self.branch.encode_point_clouds(self.points(self.views.batch(first_step + FIT_BATCHES))).projected
            ratio = self.embedding.float().norm(dim=-1).mean() / tokens.float().norm(dim=-1).mean()
            for parameter in last.parameters():
                parameter.mul_(ratio)

    def fit_example(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs `[B, Q, P]` of the projector's last map, and the word embeddings `[B, Q, H]` it should give."""
        tokens, words, _ = self.encoder(self.points(self.views.batch(step)))
        with self.precision:
            inputs = self.branch.modality_projector[:-1](self.branch.query(tokens)).float()
        targets = inputs.new_empty(*inputs.shape[:2], self.embedding.shape[1])
        for number, kind in enumerate(self.said.values()):
            targets[:, number :: len(self.said)] = kind.mean_embedding(kind.logits(words[:, number]))[:, None]
        return inputs, targets

    def muon_matrices(self, part: nn.Module) -> list[nn.Parameter]:
        """Weights of linear layers, for Muon. It computes in bfloat16: where the machine does not, AdamW takes all."""
        return [m.weight for m in part.modules() if isinstance(m, nn.Linear)] if self.bfloat16 else []

    @torch.no_grad()
    def predicted_nouns(self, clouds: Sequence[np.ndarray], batch_size: int = 32) -> list[str]:
        """The noun that the encoder's head prefers for each cloud `[N, 6]`."""
        kind, nouns = self.kinds["noun"], []
        extractor, training = self.views.extractor, self.encoder.training
        self.encoder.eval()
        for start in range(0, len(clouds), batch_size):
            points = extractor(list(clouds[start : start + batch_size]))["point_values"].to(self.device)
            words = self.encoder(points)[1][:, list(self.kinds).index("noun")]
            nouns += [kind.words[index] for index in kind.logits(words).argmax(dim=-1).tolist()]
        self.encoder.train(training)
        return nouns


@torch.no_grad()
def fit_linear(linear: nn.Linear, examples: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Ridge regression in place, from pairs of inputs `[..., P]` and outputs `[..., H]`.

    Training by comparison leaves tokens far from any word: it asks which word is nearest, not how near. A language
    model reads a token that lies near a word without any training.
    """
    rows, device = linear.in_features + 1, linear.weight.device
    gram, moment = (torch.zeros(rows, columns, device=device) for columns in (rows, linear.out_features))
    for inputs, targets in examples:
        inputs = functional.pad(inputs, (0, 1), value=1.0).flatten(0, -2)  # with a column for the bias
        gram += inputs.T @ inputs
        moment += inputs.T @ targets.flatten(0, -2)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, moment)
    linear.weight.copy_(solution[:-1].T)
    linear.bias.copy_(solution[-1])


# -- the command -------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pointalign.embedded.stage1", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("runs/stage1"), help="folder (default: %(default)s)")
    parser.add_argument("--encoder-steps", type=int, default=12000, help="default: %(default)s")
    parser.add_argument("--query-steps", type=int, default=2500, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="views per step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--fold", type=int, help="hold out this fold of the objects, 0 to 4, in place of the split")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--extra-objects", action="store_true", help="train on those of `assets.extra_objects` too")
    parser.add_argument("--teacher", type=Path, help="features of `python -m experiments.teacher` to learn from")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    from pointalign.allocator import keep_freed_memory

    keep_freed_memory()
    options = parse(arguments)
    try:
        train_stage1(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {options.output}", file=sys.stderr)
        return 130
    return 0


def read_teacher(path: Path) -> dict[str, np.ndarray]:
    """Object id -> features `[E]` of unit length, from an npz file with `object_ids [N]` and `targets [N, E]`."""
    with np.load(path) as file:
        targets = file["targets"].astype(np.float32)
        targets /= np.linalg.norm(targets, axis=1, keepdims=True)
        return dict(zip(file["object_ids"].tolist(), targets, strict=True))


def train_stage1(options: argparse.Namespace) -> None:
    """Train as the options say and write `stage.safetensors`, for `--model.checkpoint`, with its description."""
    from pointalign import build, stage_file
    from pointalign.evaluation.tasks import embedded_objects
    from pointalign.model_options import DataOptions, ModelOptions

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    described = options.output / "settings.json"
    if described.exists() and (other := json.loads(described.read_text(encoding="utf-8"))) != settings:
        changed = ", ".join(sorted(name for name in settings if settings[name] != other.get(name)))
        raise ValueError(f"{options.output} holds a training with other settings ({changed}): give another --output")
    storage.write_json(described, settings)
    model, processor = build.build_model(ModelOptions(lora_rank=0, train=[], seed=options.seed), DataOptions())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]
    folder = assets.embedded_objects(options.fold)
    training = embedded_objects(folder, "train")
    clouds, records = training.clouds, training.records
    if options.extra_objects:
        extra = assets.extra_objects()
        more = json.loads((extra / "objects.json").read_text(encoding="utf-8"))
        clouds = clouds + [np.load(extra / "clouds" / f"{record['object_id']}_8192.npy") for record in more]
        records = records + more
    teacher = read_teacher(options.teacher) if options.teacher else None
    stage = Stage1(model, processor, clouds, records, options.batch_size, options.seed, teacher, device)
    stage.train(options.encoder_steps, options.query_steps, options.learning_rate, options.output)
    accuracy = {}
    for split in ("train", "validation" if options.fold is None else "test"):
        objects = embedded_objects(folder, split)
        known = [row for row, noun in enumerate(objects.labels) if noun in set(training.labels)]
        predicted = stage.predicted_nouns([objects.clouds[row] for row in known])
        accuracy[split] = float(
            np.mean([noun == objects.labels[row] for noun, row in zip(predicted, known, strict=True)])
        )
        print(f"the encoder's head names {100 * accuracy[split]:.1f} % of {len(known)} {split} objects")
    description: dict[str, Any] = {
        "command": "python -m pointalign.embedded.stage1",
        "model": {"llm": "smollm2", "preset": "mini", "lora_rank": 0},
        "data": {"fold": options.fold},
        "stage1": settings | {"noun_accuracy": accuracy},
        **storage.provenance(device),
    }
    stage_file.save_stage(model, options.output / stage_file.STAGE_FILE, description)
    print(f"written: {options.output / stage_file.STAGE_FILE}")


if __name__ == "__main__":
    sys.exit(main())

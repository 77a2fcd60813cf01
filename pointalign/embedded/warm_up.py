"""Warm-up of a new point branch: encoder, Q-Former and modality projector learn the words for what they see.

A few hundred objects are too few to teach an encoder through a language model. Every object comes with facts, such as
its noun and its main colour. The warm-up compares tokens of the modality projector with the language model's input
embeddings: a token near the embedding of "chair" is what the language model will read as a chair.

1. The encoder learns the facts through a head that is thrown away, and through a second head which clouds are alike:
   names alone it would learn by heart. For the same reason a part of every batch is procedural objects.
2. The queries learn to repeat what the encoder's head predicts. Each query is assigned one kind of facts, so that they
   do not all learn the same. They do not see the true facts: their errors on training objects then resemble those on
   new objects, and the language model learns to read tokens of the kind it will meet.
3. The last linear map of the modality projector is solved in closed form, so that tokens come to lie near the words.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase

from pointalign.data.point_cloud import augment, random_pose
from pointalign.embedded.facts import facts
from pointalign.embedded.neighbours import neighbour_loss
from pointalign.embedded.procedural import MAKERS, procedural_object
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

TEMPERATURE = 0.05  # of the encoder's logits over words
QUERY_TEMPERATURE = 0.15  # of the queries' logits over words
TARGET_SHARPNESS = 3.0  # the closed form is fitted to the softmax of the head's logits times this
RIDGE = 1e-3  # regularisation of the closed form, relative to the mean square of its inputs
FIT_BATCHES = 50  # batches that the closed form is fitted to
LABEL_SMOOTHING = 0.1
DROPOUT = 0.1  # before the encoder's head for words
WEIGHT_DECAY = 0.1
MUON_RATE = 4.0  # Muon's learning rate relative to AdamW's
ENCODER_SHARE = 0.7  # share of the steps that train the encoder; the others train the queries
METRIC_WIDTH = 256  # width of the embedding that says which clouds are alike
PROCEDURAL_POOL = 2000  # procedural objects that are made before they repeat; each takes 3 ms
PROCEDURAL_SHARE = 0.35  # share of procedural objects in every batch
STRETCH = 0.4  # of the views: a table half as wide is still a table, and its sides are measured again
UNKNOWN = -100  # target of a fact that is not clear


# -- words -------------------------------------------------------------------------------------------------------------


class FactWords:
    """The words of one kind of facts, such as all nouns, as the language model embeds them.

    Args:
        facts: words in any order, or None.
        embedding: `[V, H]`, the language model's input embeddings.
    """

    def __init__(self, facts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, embedding: Tensor):
        self.words = sorted({word for word in facts if word is not None})
        self.indices: dict[str | None, int] = {word: index for index, word in enumerate(self.words)}
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in self.words]
        means = torch.stack([embedding[word_ids].float().mean(dim=0) for word_ids in ids])
        self.embeddings = functional.normalize(means, dim=-1)  # [W, H]

    def targets(self, facts: Sequence[str | None]) -> Tensor:
        """Indices `[B]` of the facts; UNKNOWN for None and for words that no object had."""
        return torch.tensor([self.indices.get(word, UNKNOWN) for word in facts], device=self.embeddings.device)

    def logits(self, tokens: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        """`[..., W]` of tokens `[..., H]`: cosine over temperature."""
        return functional.normalize(tokens.float(), dim=-1) @ self.embeddings.T / temperature

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits `[B, W]` where the fact is known; 0 where none is."""
        summed = functional.cross_entropy(
            logits, targets, ignore_index=UNKNOWN, label_smoothing=LABEL_SMOOTHING, reduction="sum"
        )
        return summed / (targets != UNKNOWN).sum().clamp(min=1)

    def query_loss(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Mean cross-entropy of tokens `[B, T, H]` against the encoder's distribution, logits `[B, W]`."""
        targets = logits.softmax(dim=-1)[:, None].expand(-1, tokens.shape[1], -1)
        return functional.cross_entropy(self.logits(tokens, QUERY_TEMPERATURE).flatten(0, 1), targets.flatten(0, 1))

    def mean_embedding(self, logits: Tensor) -> Tensor:
        """Mean `[B, H]` of the words' embeddings under the softmax of sharpened logits `[B, W]`."""
        return (TARGET_SHARPNESS * logits).softmax(dim=-1) @ self.embeddings


def words_by_kind(
    records: Sequence[dict], tokenizer: PreTrainedTokenizerBase, embedding: Tensor
) -> dict[str, FactWords]:
    """Kind of facts -> its words, for the kinds that some object has. Raises ValueError if there are none."""
    known = [facts(record) for record in records]
    kinds = [kind for kind in known[0] if any(record[kind] is not None for record in known)]
    if not kinds:
        raise ValueError("the contrastive warm-up needs a fact of at least one object, but no record has any")
    return {kind: FactWords([record[kind] for record in known], tokenizer, embedding) for kind in kinds}


# -- training ----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The point encoder with two heads that are thrown away: one for words, one for the distances among clouds."""

    def __init__(
        self, point_encoder: nn.Module, width: int, word_width: int, num_kinds: int, precision: torch.autocast
    ):
        super().__init__()
        self.point_encoder, self.num_kinds, self.precision = point_encoder, num_kinds, precision
        self.word_head = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(2 * width, num_kinds * word_width))
        self.metric_head = nn.Linear(2 * width, METRIC_WIDTH)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[B, T, D]`, words `[B, kinds, H]` and embeddings `[B, METRIC_WIDTH]` of points `[B, N, C]`."""
        with self.precision:
            tokens = self.point_encoder(points)
        pooled = torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1).float()
        return tokens, self.word_head(pooled).unflatten(-1, (self.num_kinds, -1)), self.metric_head(pooled)


class WarmUp:
    """The parts in training, their target words and the endless batches. Query q learns kind q modulo their number."""

    def __init__(
        self,
        model: PointAlignForConditionalGeneration,
        processor: PointAlignProcessor,
        clouds: Sequence[np.ndarray],
        records: Sequence[dict],
        batch_size: int,
        device: torch.device | str,
    ):
        self.branch, self.device = model.model, torch.device(device)
        self.embedding = model.get_input_embeddings().weight.detach()
        self.kinds = words_by_kind(records, processor.tokenizer, self.embedding)
        point_config = model.config.point_config
        new_encoder = AutoModel.from_config(point_config)  # an encoder that knows its objects by heart is of no use
        self.branch.point_encoder.load_state_dict(new_encoder.state_dict())
        self.bfloat16 = self.branch.language_model.dtype == torch.bfloat16
        self.precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)
        widths = point_config.hidden_size, self.embedding.shape[1]
        self.encoder = Encoder(self.branch.point_encoder, *widths, len(self.kinds), self.precision).to(device)
        self.batches = training_batches(clouds, records, list(self.kinds), batch_size, processor)

    def next_batch(self) -> tuple[Tensor, dict[str, list[str | None]]]:
        clouds, seen = next(self.batches)
        return torch.from_numpy(clouds).to(self.device), seen

    def train_encoder(self, steps: int, learning_rate: float) -> list[float]:
        self.encoder.train()
        matrices = self.muon_matrices(self.branch.point_encoder)
        losses = descend([*self.encoder.parameters()], matrices, self.encoder_loss, steps, learning_rate, "encoder")
        self.encoder.eval()
        return losses

    def encoder_loss(self) -> Tensor:
        points, seen = self.next_batch()
        _, words, embeddings = self.encoder(points)
        loss = neighbour_loss(embeddings, points[..., :3])
        for number, (name, kind) in enumerate(self.kinds.items()):
            loss = loss + kind.loss(kind.logits(words[:, number]), kind.targets(seen[name]))
        return loss

    def train_queries(self, steps: int, learning_rate: float) -> list[float]:
        branch = self.branch
        modules = nn.ModuleList([branch.point_mlp, branch.qformer, branch.modality_projector]).train()
        parameters = [branch.query_tokens, *modules.parameters()]
        return descend(parameters, self.muon_matrices(branch.qformer), self.query_loss, steps, learning_rate, "queries")

    def query_loss(self) -> Tensor:
        points, _ = self.next_batch()
        with torch.no_grad():
            tokens, words, _ = self.encoder(points)
        with self.precision:
            projected = self.branch.modality_projector(self.branch.query(tokens))
        loss = projected.new_zeros((), dtype=torch.float32)
        for number, kind in enumerate(self.kinds.values()):
            loss = loss + kind.query_loss(projected[:, number :: len(self.kinds)], kind.logits(words[:, number]))
        return loss

    def fit_last_map(self) -> None:
        """Solve for the modality projector's last linear map, then scale its tokens to the length of words.

        Training fits the directions of the tokens only.
        """
        last = self.branch.modality_projector[-1]
        fit_linear(last, (self.fit_example() for _ in range(FIT_BATCHES)))
        points, _ = self.next_batch()
        with torch.no_grad():
            tokens = self.branch.encode_point_clouds(points).projected
            ratio = self.embedding.float().norm(dim=-1).mean() / tokens.float().norm(dim=-1).mean()
            for parameter in last.parameters():
                parameter.mul_(ratio)

    def fit_example(self) -> tuple[Tensor, Tensor]:
        """Inputs `[B, Q, P]` of the projector's last map, and the word embeddings `[B, Q, H]` it should give."""
        points, _ = self.next_batch()
        tokens, words, _ = self.encoder(points)
        with self.precision:
            inputs = self.branch.modality_projector[:-1](self.branch.query(tokens)).float()
        targets = inputs.new_empty(*inputs.shape[:2], self.embedding.shape[1])
        for number, kind in enumerate(self.kinds.values()):
            targets[:, number :: len(self.kinds)] = kind.mean_embedding(kind.logits(words[:, number]))[:, None]
        return inputs, targets

    def muon_matrices(self, part: nn.Module) -> list[nn.Parameter]:
        """Weights of linear layers, for Muon. It computes in bfloat16: where the machine does not, AdamW takes all."""
        return [m.weight for m in part.modules() if isinstance(m, nn.Linear)] if self.bfloat16 else []


def warm_up_point_branch(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: Sequence[np.ndarray],
    records: Sequence[dict],
    steps: int,
    batch_size: int,
    learning_rate: float,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Train the point branch in place, whichever of its parts train afterwards.

    The encoder starts from new weights; the other parts continue from theirs.

    Args:
        clouds: arrays `[N, 6]`.
        records: of each cloud, what `facts.facts` reads.

    Returns:
        The loss of every step: first the encoder's, then the queries'.

    Raises:
        ValueError: the model has query experts, or no record has a fact.
    """
    branch = model.model
    if branch.query_tokens is None:
        raise ValueError("the contrastive warm-up is of a new point branch: query experts come in a later stage")
    warm_up = WarmUp(model, processor, clouds, records, batch_size, device)
    trainable = [parameter for parameter in branch.parameters() if parameter.requires_grad]
    branch.requires_grad_(False)
    encoder_steps = round(ENCODER_SHARE * steps)
    losses = warm_up.train_encoder(encoder_steps, learning_rate)
    losses += warm_up.train_queries(steps - encoder_steps, learning_rate)
    for parameter in trainable:
        parameter.requires_grad_(True)
    model.eval()
    warm_up.fit_last_map()
    return losses


def descend(
    parameters: list[nn.Parameter],
    matrices: list[nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    name: str,
) -> list[float]:
    """Minimise a loss that differs from batch to batch, over parameters that are frozen before and after.

    Args:
        matrices: the parameters that Muon takes; AdamW takes the rest.
        name: of the progress bar.
    """
    if not steps:
        return []
    for_muon = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in for_muon]
    adamw = torch.optim.AdamW(others, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        muon_rate = MUON_RATE * learning_rate
        optimizers.append(
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        )
    rise = 0.1 if steps > 10 else 0.3  # share of the steps; OneCycleLR divides by zero if it is a single step
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=rise, cycle_momentum=False
        )
        for optimizer in optimizers
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    losses: list[float] = []
    progress = tqdm(range(steps), desc=f"contrastive warm-up, {name}", unit="step", mininterval=1.0)
    for _ in progress:
        loss = loss_of_batch()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepping in [*optimizers, *schedules]:
            stepping.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses


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


# -- batches -----------------------------------------------------------------------------------------------------------


def training_batches(
    clouds: Sequence[np.ndarray],
    records: Sequence[dict],
    kinds: Sequence[str],
    batch_size: int,
    processor: PointAlignProcessor,
) -> Iterator[tuple[np.ndarray, dict[str, list[str | None]]]]:
    """Endless batches of views in random poses, some of procedural objects whose nouns occur in `records`.

    Yields:
        clouds `[B, N, 6]`, and kind -> fact of each cloud.
    """
    extractor = processor.feature_extractor
    assert extractor is not None
    rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
    nouns = [noun for noun in MAKERS if any(record["head_noun"] == noun for record in records)]
    procedural = procedural_objects(nouns, rng)
    num_real = batch_size - round(PROCEDURAL_SHARE * batch_size) if nouns else batch_size
    order = np.array([], dtype=int)
    while True:
        if len(order) < num_real:
            order = np.concatenate([order, rng.permutation(len(clouds))])
        chosen, order = order[:num_real], order[num_real:]
        batch = [(records[i], clouds[i]) for i in chosen]
        batch += [next(procedural) for _ in range(batch_size - num_real)]
        poses = [random_pose(rng, STRETCH) for _ in batch]
        # no more points than the model reads: the rest would be augmented in vain
        samples = [cloud[rng.permutation(len(cloud))[: extractor.num_points]] for _, cloud in batch]
        views = [
            augment(sample, rng, fewest=extractor.num_points, pose=pose)
            for sample, pose in zip(samples, poses, strict=True)
        ]
        # one random density for the batch, so that it needs no padding
        most = min(len(view) for view in views)
        size = max(extractor.min_points, int(most * rng.uniform(0.5, 1.0))) if rng.random() < 0.5 else most
        seen = [facts(posed(record, pose)) for (record, _), pose in zip(batch, poses, strict=True)]
        prepared = np.stack([extractor.prepare(view[:size]) for view in views])
        yield prepared, {kind: [view_facts[kind] for view_facts in seen] for kind in kinds}


def procedural_objects(nouns: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[dict, np.ndarray]]:
    """Endless procedural objects of these nouns: `PROCEDURAL_POOL` new ones, then those again at random."""
    pool: list[tuple[dict, np.ndarray]] = []
    while True:
        if len(pool) < PROCEDURAL_POOL:
            pool.append(procedural_object(nouns[rng.integers(len(nouns))], rng))
            yield pool[-1]
        else:
            yield pool[rng.integers(len(pool))]


def posed(record: dict, pose: np.ndarray) -> dict:
    """The record with its sides as long as they are in another pose `[3, 3]`, see `random_pose`."""
    growth = np.linalg.norm(pose, axis=1).tolist()
    sides = ("width", "height", "depth")
    return record | {side: record[side] * factor for side, factor in zip(sides, growth, strict=True)}

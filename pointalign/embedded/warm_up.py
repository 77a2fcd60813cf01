"""Warm-up of a new point encoder, and of Q-Former and modality projector behind it: they learn to say what they see.

A few hundred objects are too few to teach an encoder through a language model. Every object comes with facts, such as
its noun and its main colour, and a fact is told from the others of its kind by the language model's own input
embeddings: a token of the modality projector that lies near the embedding of "chair" says chair, and that is where the
language model will look for it.

First the encoder learns the facts by a head of its own, and which clouds are alike, because names alone it would learn
by heart; for the same reason a part of what it sees is procedural furniture. Then the queries, which share out the
kinds of facts so that they do not all learn the same, learn to say what that head says. They are not shown the facts:
what they say of an object of the training set is then not much more often right than what they say of another object,
and the language model learns to read tokens of the kind that it will meet. Last, the final map of the modality
projector is solved for in closed form, so that tokens which tell words apart come to lie near the words.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoModel, PreTrainedTokenizerBase

from pointalign.data.augment import augment, random_pose
from pointalign.embedded.facts import facts
from pointalign.embedded.procedural import MAKERS, furniture
from pointalign.models import PointAlignForConditionalGeneration, PointAlignProcessor

POINTS, TURNS = 64, 8  # of the Chamfer distances: enough to tell who is near whom
SCALE = 5.0  # Embeddings are so many times as far apart as clouds in the unit sphere
SHARPNESS = 5.0  # of the nearest neighbours' share, per unit of the embeddings' distance


@torch.no_grad()
def turned_chamfer(points: Tensor, turns: int = TURNS) -> Tensor:
    """Symmetric Chamfer distances `[B, B]` of clouds `[B, P, 3]`, the least over `turns` turns about the vertical, y.

    As in `evaluation.baselines.chamfer`: the mean distances there and back, added.
    """
    angles = torch.arange(turns, device=points.device) * (2 * math.pi / turns)
    cos, sin, no, one = angles.cos(), angles.sin(), torch.zeros_like(angles), torch.ones_like(angles)
    turn = torch.stack([cos, no, -sin, no, one, no, sin, no, cos], dim=1).view(turns, 3, 3)
    turned = torch.einsum("bpi,rij->brpj", points, turn)
    squares = points.square().sum(dim=-1)
    distances = points.new_zeros(len(points), len(points))
    for row in range(len(points) - 1):
        others = turned[row + 1 :].flatten(0, 1)  # [(B - row - 1) R, P, 3]
        squared = others @ points[row].T
        squared = squared.mul_(-2).add_(squares[row]).add_(squares[row + 1 :].repeat_interleave(turns, 0)[..., None])
        squared.clamp_(min=0)
        there, back = (squared.amin(dim=dim).sqrt().mean(dim=1) for dim in (1, 2))
        distances[row, row + 1 :] = (there + back).view(-1, turns).amin(dim=1)
    return distances + distances.T


def neighbour_loss(embeddings: Tensor, points: Tensor) -> Tensor:
    """How far the distances among embeddings `[B, E]` are from those among their clouds `[B, N, 3]`.

    The mean square of the difference, and the cross-entropy of every cloud's nearest neighbours among the others, since
    it is the near ones that matter. Points are in random order: the first `POINTS` are a sample of all. A cloud alone
    has no neighbour, and no loss.
    """
    if len(points) < 2:
        return embeddings.sum() * 0
    wanted = SCALE * turned_chamfer(points[:, :POINTS].float())
    found = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    other = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    shape = (len(points), len(points) - 1)
    wanted, found = wanted[other].view(shape), found[other].view(shape)
    share = (-SHARPNESS * wanted).softmax(dim=-1)
    return functional.mse_loss(found, wanted) + functional.cross_entropy(-SHARPNESS * found, share)


TEMPERATURE = 0.05  # of the encoder's comparison with the words
QUERY_TEMPERATURE = 0.15  # of the queries' comparison while they learn
SURER = 3.0  # than the encoder's head the tokens shall be in the end: logits so many times as large
RIDGE = 1e-3  # of the closed form, of the mean square of what it maps
READINGS = 50  # batches that the closed form is fitted to
SMOOTHING = 0.1  # of the facts
DROPOUT = 0.1  # in front of the encoder's own head
WEIGHT_DECAY = 0.1
MUON_RATE = 4.0  # Muon's learning rate, times that of AdamW
ENCODER_SHARE = 0.7  # of the steps, the rest is for the queries
METRIC_WIDTH = 256  # of the embedding that says which clouds are alike
PROCEDURAL = 2000  # things to draw from: to make one takes 3 ms
PROCEDURAL_SHARE = 0.35  # of every batch: things of `data.procedural` whose nouns occur
STRETCH = 0.4  # of the views: a table half as wide is a table, and its sides are measured anew
UNKNOWN = -100  # target where a fact is not clear


class Kind:
    """One kind of facts: the words that occur, as the language model embeds them.

    Args:
        facts: words in any order, or None.
        embedding: `[V, H]`, the language model's input embeddings.
    """

    def __init__(self, facts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase, embedding: Tensor):
        self.words = sorted({word for word in facts if word is not None})
        self.places: dict[str | None, int] = {word: place for place, word in enumerate(self.words)}
        ids = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in self.words]
        means = torch.stack([embedding[one].float().mean(dim=0) for one in ids])
        self.embeddings = functional.normalize(means, dim=-1)  # [W, H]

    def targets(self, facts: Sequence[str | None]) -> Tensor:
        """Places `[B]` of the facts among the words; UNKNOWN for None and for words that did not occur."""
        return torch.tensor([self.places.get(word, UNKNOWN) for word in facts], device=self.embeddings.device)

    def logits(self, tokens: Tensor, temperature: float = TEMPERATURE) -> Tensor:
        """`[..., W]` of tokens `[..., H]`."""
        return functional.normalize(tokens.float(), dim=-1) @ self.embeddings.T / temperature

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits `[B, W]` where the fact is known; 0 where none is."""
        summed = functional.cross_entropy(
            logits, targets, ignore_index=UNKNOWN, label_smoothing=SMOOTHING, reduction="sum"
        )
        return summed / (targets != UNKNOWN).sum().clamp(min=1)

    def reading_loss(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Mean cross-entropy of tokens `[B, T, H]` with what logits `[B, W]` say."""
        wanted = logits.softmax(dim=-1)[:, None].expand(-1, tokens.shape[1], -1)
        said = self.logits(tokens, QUERY_TEMPERATURE)
        return functional.cross_entropy(said.flatten(0, 1), wanted.flatten(0, 1))

    def expected(self, logits: Tensor) -> Tensor:
        """Embeddings `[B, H]` of the words by logits `[B, W]`: of the likeliest, mostly, see SURER."""
        return (SURER * logits).softmax(dim=-1) @ self.embeddings


class Encoder(nn.Module):
    """The point encoder with its head for words and its head for likeness, which are discarded."""

    def __init__(
        self, point_encoder: nn.Module, width: int, num_kinds: int, word_width: int, precision: torch.autocast
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
    """Train the whole point branch in place, whichever of its parts train afterwards.

    The encoder starts anew: one that knows its objects by heart does not unlearn it. The other parts go on from where
    they are.

    Args:
        clouds: arrays `[N, 6]`.
        records: of each cloud, what `captions.facts` reads.

    Returns:
        The loss of every step: first the encoder's, of words and neighbours, then the queries'.
    """
    branch = model.model
    if branch.query_tokens is None:
        raise ValueError("the contrastive warm-up is of a new point branch: query experts come in a later stage")
    embedding = model.get_input_embeddings().weight.detach()
    known = [facts(record) for record in records]
    kinds: dict[str, Kind] = {}
    for name in known[0]:
        if any(one[name] is not None for one in known):
            kinds[name] = Kind([one[name] for one in known], processor.tokenizer, embedding)
    if not kinds:
        raise ValueError("the contrastive warm-up needs a fact of at least one object")

    branch.point_encoder.load_state_dict(AutoModel.from_config(model.config.point_config).state_dict())
    width = model.config.point_config.hidden_size
    half = branch.language_model.dtype == torch.bfloat16
    precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half)
    encoder = Encoder(branch.point_encoder, width, len(kinds), embedding.shape[1], precision).to(device)
    readers = nn.ModuleList([branch.point_mlp, branch.qformer, branch.modality_projector])
    batches = _batches(clouds, records, list(kinds), batch_size, processor)

    def encoder_loss() -> Tensor:
        views, seen = next(batches)
        points = torch.from_numpy(views).to(device)
        _, words, embeddings = encoder(points)
        loss = neighbour_loss(embeddings, points[..., :3])
        for number, (name, kind) in enumerate(kinds.items()):
            loss = loss + kind.loss(kind.logits(words[:, number]), kind.targets(seen[name]))
        return loss

    def query_loss() -> Tensor:
        points = torch.from_numpy(next(batches)[0]).to(device)
        with torch.no_grad():
            tokens, words, _ = encoder(points)
        with precision:
            projected = branch.modality_projector(branch.query(tokens))
        loss = projected.new_zeros((), dtype=torch.float32)
        for number, kind in enumerate(kinds.values()):
            loss = loss + kind.reading_loss(projected[:, number :: len(kinds)], kind.logits(words[:, number]))
        return loss

    def readings() -> Iterator[tuple[Tensor, Tensor]]:
        """What arrives at the projector's last map `[B, Q, P]`, and the embeddings wanted of it `[B, Q, H]`."""
        for _ in range(READINGS):
            points = torch.from_numpy(next(batches)[0]).to(device)
            tokens, words, _ = encoder(points)
            with precision:
                arriving = branch.modality_projector[:-1](branch.query(tokens)).float()
            wanted = arriving.new_empty(*arriving.shape[:2], embedding.shape[1])
            for number, kind in enumerate(kinds.values()):
                wanted[:, number :: len(kinds)] = kind.expected(kind.logits(words[:, number]))[:, None]
            yield arriving, wanted

    def for_muon(part: nn.Module) -> list[nn.Parameter]:
        """Its linear layers, if the machine computes in bfloat16, as Muon does: else a step would take seconds."""
        return [one.weight for one in part.modules() if isinstance(one, nn.Linear)] if half else []

    first = round(ENCODER_SHARE * steps)
    trainable = [parameter for parameter in branch.parameters() if parameter.requires_grad]
    branch.requires_grad_(False)
    encoder.train()
    whole = [*encoder.parameters()]
    losses = _descend(whole, for_muon(branch.point_encoder), encoder_loss, first, learning_rate, "encoder")
    encoder.eval()
    readers.train()
    queries = [branch.query_tokens, *readers.parameters()]
    losses += _descend(queries, for_muon(branch.qformer), query_loss, steps - first, learning_rate, "queries")
    for parameter in trainable:
        parameter.requires_grad_(True)
    model.eval()
    _refit(branch.modality_projector[-1], readings())
    with torch.no_grad():
        points = torch.from_numpy(next(batches)[0]).to(device)
        _scale_like_words(branch.modality_projector[-1], model.encode_point_clouds(points).projected, embedding)
    return losses


def _descend(
    parameters: list[nn.Parameter],
    matrices: list[nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    what: str,
) -> list[float]:
    """Minimise a loss that differs from batch to batch, over parameters that are frozen before and after.

    Args:
        matrices: those of the parameters that Muon takes; AdamW takes the rest.
    """
    if not steps:
        return []
    apart = {id(one) for one in matrices}
    others = [one for one in parameters if id(one) not in apart]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    ]
    if matrices:
        muon_rate = MUON_RATE * learning_rate
        optimizers.append(
            torch.optim.Muon(matrices, lr=muon_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        )
    rising = 0.1 if steps > 10 else 0.3  # of the steps; a rise of one single step is more than OneCycleLR can divide
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            one, one.param_groups[0]["lr"], total_steps=steps, pct_start=rising, cycle_momentum=False
        )
        for one in optimizers
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    losses: list[float] = []
    progress = tqdm(range(steps), desc=f"contrastive warm-up, {what}", unit="step", mininterval=1.0)
    for _ in progress:
        loss = loss_of_batch()
        for one in optimizers:
            one.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for one in [*optimizers, *schedules]:
            one.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return losses


@torch.no_grad()
def _refit(linear: nn.Linear, examples: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Ridge regression of a map's outputs on its inputs, pairs `[..., P]` and `[..., H]`, in place.

    Comparison alone leaves tokens far from any word: it asks which is nearest, not how near. A language model reads a
    word in a token that lies near it with no training at all.
    """
    rows, device = linear.in_features + 1, linear.weight.device
    gram, moment = (torch.zeros(rows, columns, device=device) for columns in (rows, linear.out_features))
    for given, wanted in examples:
        given = functional.pad(given, (0, 1), value=1.0).flatten(0, -2)  # with a column for the bias
        gram += given.T @ given
        moment += given.T @ wanted.flatten(0, -2)
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, moment)
    linear.weight.copy_(solution[:-1].T)
    linear.bias.copy_(solution[-1])


@torch.no_grad()
def _scale_like_words(last: nn.Linear, tokens: Tensor, embedding: Tensor) -> None:
    """Directions were learned; give the tokens `[..., H]` of a projector's last map the length that words have."""
    ratio = embedding.float().norm(dim=-1).mean() / tokens.float().norm(dim=-1).mean()
    last.weight *= ratio
    last.bias *= ratio


def _batches(
    clouds: Sequence[np.ndarray],
    records: Sequence[dict],
    kinds: Sequence[str],
    batch_size: int,
    processor: PointAlignProcessor,
) -> Iterator[tuple[np.ndarray, dict[str, list[str | None]]]]:
    """Without end: clouds `[B, N, 6]`, some of them procedural, in random poses, and of each kind their facts there."""
    extractor = processor.feature_extractor
    assert extractor is not None
    rng = np.random.default_rng(int(torch.randint(2**62, (1,))))
    nouns = [noun for noun in MAKERS if any(record["head_noun"] == noun for record in records)]
    made = _things(nouns, rng)
    real = batch_size - round(PROCEDURAL_SHARE * batch_size) if nouns else batch_size
    order = np.array([], dtype=int)
    while True:
        if len(order) < real:
            order = np.concatenate([order, rng.permutation(len(clouds))])
        chosen, order = order[:real], order[real:]
        batch = [(records[i], clouds[i]) for i in chosen]
        batch += [next(made) for _ in range(batch_size - real)]
        poses = [random_pose(rng, STRETCH) for _ in batch]
        # no more points than the model reads: the rest would be augmented for nothing
        parts = [cloud[rng.permutation(len(cloud))[: extractor.num_points]] for _, cloud in batch]
        views = [
            augment(part, rng, fewest=extractor.num_points, pose=pose) for part, pose in zip(parts, poses, strict=True)
        ]
        # one random density for all, so that they need no padding
        most = min(len(view) for view in views)
        size = max(extractor.min_points, int(most * rng.uniform(0.5, 1.0))) if rng.random() < 0.5 else most
        seen = [facts(posed(record, pose)) for (record, _), pose in zip(batch, poses, strict=True)]
        prepared = np.stack([extractor.prepare(view[:size]) for view in views])
        yield prepared, {kind: [one[kind] for one in seen] for kind in kinds}


def _things(nouns: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[dict, np.ndarray]]:
    """Without end: procedural things of these nouns, the first `PROCEDURAL` of them new."""
    things: list[tuple[dict, np.ndarray]] = []
    while True:
        if len(things) < PROCEDURAL:
            things.append(furniture(nouns[rng.integers(len(nouns))], rng))
            yield things[-1]
        else:
            yield things[rng.integers(len(things))]


def posed(record: dict, pose: np.ndarray) -> dict:
    """The record with its sides as long as they are in another pose `[3, 3]`, see `random_pose`."""
    growth = np.linalg.norm(pose, axis=1).tolist()
    return record | {side: record[side] * by for side, by in zip(("width", "height", "depth"), growth, strict=True)}

"""Samples of a `ConversationDataset` become one batch, padded or packed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm

from pointalign.data.conversations import Conversation, to_messages
from pointalign.data.dataset import ConversationDataset
from pointalign.data.point_cloud import augment

IGNORED = -100  # label of a token that carries no loss
NAMED = 10  # samples named in a message
WAITING = 8  # batches of a token budget that later samples may still fill


def pack(batch: dict[str, Tensor]) -> dict[str, Tensor | int]:
    """A padded batch `[B, T]` as one row `[1, S]`, S the number of real tokens, samples in their order.

    Args:
        batch: `input_ids`, `attention_mask`, `point_mask`, `labels`; the clouds' tensors stay as they are, since they
            follow the text's reading order.

    Returns:
        The same without `attention_mask` (with it, samples would see each other), and `position_ids [1, S]` that
        start at 0 in every sample, `cu_seq_lens_q`, `cu_seq_lens_k` `[B + 1]` int32, `max_length_q`, `max_length_k`:
        the names under which transformers passes them to an attention function. The first token of a sample has no
        label, so that no sample predicts the beginning of the next.
    """
    packed: dict[str, Tensor | int] = dict(batch)
    real = batch["attention_mask"].bool()
    del packed["attention_mask"]
    lengths = real.sum(dim=1)
    ends = lengths.cumsum(0)
    starts = ends - lengths
    for name in ("input_ids", "point_mask", "labels"):
        packed[name] = batch[name][real][None]
    packed["labels"][0, starts] = IGNORED  # type: ignore[index]
    total = int(ends[-1])
    packed["position_ids"] = (torch.arange(total) - starts.repeat_interleave(lengths))[None]
    cumulative = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return packed | {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class PackShape(NamedTuple):
    """The shape that `fill` brings packed batches to.

    Attributes:
        tokens: of the row.
        segments: pieces between which attention does not look: the samples, and those of the filling.
        longest: the most tokens of a piece.
    """

    tokens: int
    segments: int
    longest: int


def fill(packed: dict[str, Tensor | int], shape: PackShape) -> dict[str, Tensor | int]:
    """A batch of `pack` with tokens at its end that change no loss and no gradient, so that all batches have one shape.

    The tokens carry no label and no cloud. Attention cuts them into segments of at most `shape.longest` tokens, apart
    from the samples; segments that are left over are empty. Clouds are not filled up: their number does not reach the
    decoder.

    Raises: ValueError: the batch does not fit the shape.
    """
    ends = packed["cu_seq_lens_q"]
    assert isinstance(ends, Tensor)
    total, samples = int(ends[-1]), len(ends) - 1
    missing, pieces = shape.tokens - total, shape.segments - samples
    if missing < 0 or missing > max(pieces, 0) * shape.longest or packed["max_length_q"] > shape.longest:
        raise ValueError(
            f"a packed batch of {samples} samples, {total} tokens and at most {packed['max_length_q']} a sample does "
            f"not fit {shape}: take the shape from the sampler of these batches"
        )
    filled = dict(packed)
    for name, value in (("input_ids", 0), ("labels", IGNORED), ("point_mask", 0)):
        filled[name] = torch.nn.functional.pad(packed[name], (0, missing), value=value)  # type: ignore[arg-type]
    position_ids = (torch.arange(missing) % shape.longest)[None]
    filled["position_ids"] = torch.cat([packed["position_ids"], position_ids], dim=1)  # type: ignore[list-item]
    more = (total + shape.longest * torch.arange(1, pieces + 1)).clamp(max=shape.tokens)
    cumulative = torch.cat([ends, more.to(ends.dtype)])
    return filled | {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": shape.longest,
        "max_length_k": shape.longest,
    }


def smallest_shape(batches: Sequence[Sequence[int]], tokens: int) -> PackShape:
    """The shape of `tokens` tokens with the fewest segments that `fill` can bring packed batches to.

    Args:
        batches: tokens of every sample, at most `tokens` a batch.
    """
    longest = max(max(lengths) for lengths in batches)
    segments = max(len(lengths) - (sum(lengths) - tokens) // longest for lengths in batches)
    return PackShape(tokens, segments, longest)


def token_counts(processor, conversations: Sequence[Conversation], max_length: int) -> list[int]:
    """Number of tokens of each conversation in the processor's layout, at most `max_length`; no cloud is read."""
    return [min(max_length, len(_tokens(processor, each)["input_ids"])) for each in conversations]


def _tokens(processor, conversation: Conversation) -> dict[str, list]:
    """Token ids, point mask and labels of a conversation in the processor's layout; no cloud is read."""
    messages = to_messages(conversation, [""] * len(conversation.object_ids))
    parts, _ = processor._render(messages, processor.chat_template, False, {})
    return processor._encode(parts)


def check_lengths(dataset: ConversationDataset, processor, max_length: int, skip_long: bool = False) -> str:
    """Find the samples that cannot be cut at `max_length` tokens, or that the chat template refuses, before training.

    A token is a byte of text at least, so the entries' lengths in the file leave few to tokenise.

    Args:
        skip_long: drop these samples from `dataset.conversations`.

    Returns: A line on the samples that were dropped and those that training cuts; "" if there are none.

    Raises: ValueError: there are such samples and `skip_long` is off, or no sample is left; names their objects.
    """
    conversations = dataset.conversations
    empty = Conversation((), "", (("user", ""), ("assistant", "")))
    around = len(_tokens(processor, empty)["input_ids"])  # a system turn, among others
    bad: dict[int, str] = {}
    cut = 0
    entries = list(zip(conversations.entry_bytes, conversations.object_ids, strict=True))
    for place, (size, ids) in enumerate(tqdm(entries, "Checking the lengths", disable=None)):
        if size + around + processor.num_query_tokens * len(ids) <= max_length:
            continue
        try:
            row = _tokens(processor, conversations[place])
            problem = processor.cut_problem(row, max_length)
            cut += len(row["input_ids"]) > max_length and not problem
        except ValueError as error:
            problem = str(error)
        if problem:
            bad[place] = f"{', '.join(ids) or 'a text'}: {problem}"
    named = "\n".join(f"  {line}" for line in list(bad.values())[:NAMED])
    lines = [f"{len(bad)} of {len(conversations)} samples cannot be used, the first {NAMED}:\n{named}"] if bad else []
    if bad and not skip_long:
        raise ValueError(f"{lines[0]}\nRaise data.max_length, or pass --data.skip_long true to train without them.")
    if bad:
        conversations.keep_places([place for place in range(len(conversations)) if place not in bad])
        lines.append(f"{len(bad)} samples were dropped, {len(conversations)} are left")
    if not len(conversations):
        raise ValueError(f"{lines[0]}\nNo sample is left to train on.")
    lines += [f"{cut} samples are longer than {max_length} tokens and are cut"] if cut else []
    return "\n".join(lines)


@dataclass
class OpenBatch:
    """A batch that may take more samples."""

    left: int  # tokens
    samples: list[int] = field(default_factory=list)


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of samples that together have at most `budget` tokens, for `DataLoader(batch_sampler=...)`.

    Samples are shuffled once by `seed` and grouped greedily, in windows of 64 sorted by length so that batches fill up;
    batches that have room left wait for the next window. Every epoch has the same batches in another order. With
    several processes, process r takes batches r, r + world, ...; the last batches, fewer than `world`, are left out so
    that all processes have equally many.

    Args:
        lengths: tokens of every sample.
        budget: the most tokens of a batch.
        rank, world: number of this process, and of all processes.

    Raises: ValueError: a sample alone exceeds the budget, or there are fewer batches than processes.
    """

    def __init__(self, lengths: Sequence[int], budget: int, seed: int = 0, rank: int = 0, world: int = 1):
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[longest] > budget:
            raise ValueError(
                f"sample {longest} has {lengths[longest]} tokens, the budget is {budget}: raise data.pack_tokens or "
                f"lower data.max_length"
            )
        self.lengths, self.budget, self.seed = list(lengths), budget, seed
        self.rank, self.world, self.epoch = rank, world, 0
        self.batches = self._group()
        if len(self.batches) < world:
            raise ValueError(
                f"expected a batch for each of {world} processes, got {len(self.batches)} batches of {budget} tokens: "
                "lower data.pack_tokens or start fewer processes"
            )

    def _group(self) -> list[list[int]]:
        order = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(self.seed)).tolist()
        batches: list[list[int]] = []
        waiting: list[OpenBatch] = []
        for first in range(0, len(order), 64):
            for sample in sorted(order[first : first + 64], key=self.lengths.__getitem__, reverse=True):
                length = self.lengths[sample]
                batch = next((batch for batch in waiting if batch.left >= length), None)
                if batch is None:
                    batch = OpenBatch(self.budget)
                    waiting.append(batch)
                batch.left -= length
                batch.samples.append(sample)
            waiting.sort(key=lambda batch: batch.left)
            complete = max(len(waiting) - WAITING, 0)
            batches += [batch.samples for batch in waiting[:complete]]
            del waiting[:complete]
        return batches + [batch.samples for batch in waiting]

    @property
    def shape(self) -> PackShape:
        """The smallest shape that `fill` can bring every batch to."""
        return smallest_shape([[self.lengths[sample] for sample in batch] for batch in self.batches], self.budget)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches) // self.world

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        for place in range(self.rank, len(self) * self.world, self.world):
            yield self.batches[order[place]]


def view_name(object_id: str, view: int) -> str:
    """The name of an object's view in a feature cache."""
    return f"{object_id}#{view}"


POSE_FREE = "simple_description"  # the type of conversation whose text does not depend on pose and sides


class ConversationCollator:
    """Chat samples to tensors with labels on the answers.

    Args:
        processor: a `PointAlignProcessor`.
        max_length: the most tokens of a sample; a longer sample is cut at the right, never through a cloud.
        augmentation: change every cloud in every epoch. The changes depend on the sample and the epoch only, so that a
            resumed run continues exactly.
        packing: put the samples end to end in a single row, see `pack`.
        features: a `pointalign.feature_cache.FeatureCache` that replaces the clouds.
        views: of every object in `features`; each sample reads one of them, which depends on its draw only.

    Attributes:
        shape: that packed batches are filled up to, see `fill`; set once the batches are known.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int,
        augmentation: bool = False,
        packing: bool = False,
        features: Any = None,
        views: int = 0,
    ):
        self.processor = processor
        self.max_length = max_length
        self.augmentation = augmentation
        self.packing = packing
        self.shape: PackShape | None = None
        self.features = features
        self.views = views

    def __call__(self, samples: list[dict]) -> dict[str, Tensor]:
        conversations = [self._augmented(sample) if self.augmentation else sample["messages"] for sample in samples]
        batch = dict(
            self.processor.apply_chat_template(
                conversations,
                tokenize=True,
                return_labels=True,
                truncation=True,
                max_length=self.max_length,
                read_clouds=self.features is None,
            )
        )
        if self.features is not None:
            batch |= self.features.batch([name for sample in samples for name in self._entries(sample)])
        if not self.packing:
            return batch
        return pack(batch) if self.shape is None else fill(pack(batch), self.shape)

    def _entries(self, sample: dict) -> list[str]:
        """Names of the sample's clouds in the feature cache."""
        if not self.views:
            return list(sample["object_ids"])
        rng = np.random.default_rng(sample["draw"])
        pose_free = sample["conversation_type"] == POSE_FREE
        count = self.views if pose_free else self.views // 2  # the first half keeps the pose
        return [view_name(name, int(rng.integers(count))) for name in sample["object_ids"]]

    def _augmented(self, sample: dict) -> list[dict]:
        rng = np.random.default_rng(sample["draw"])
        pose_free = sample["conversation_type"] == POSE_FREE
        fewest = self.processor.feature_extractor.min_points

        def view(item: dict) -> dict:
            if item["type"] != "point":
                return item
            return item | {"point": augment(item["point"], rng, pose_free, fewest)}

        return [message | {"content": [view(item) for item in message["content"]]} for message in sample["messages"]]

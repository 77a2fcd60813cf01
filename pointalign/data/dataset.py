"""Annotated conversations joined with their clouds: each item is a chat sample."""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from pointalign.data.conversations import IndexedConversations, to_messages
from pointalign.data.point_cloud import FORMATS, UP_AXES, PointCloudError, load_point_cloud

if TYPE_CHECKING:
    from pointalign.options import Options


def find_cloud(folders: str | Path | Sequence[str | Path], object_id: str) -> Path:
    """The file of an object, from the first folder that has it.

    In a folder `{object_id}_8192.npy` comes first, then `{object_id}.npy`, then the other readable formats.

    Raises:
        PointCloudError: no folder has such a file.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    names = [f"{object_id}_8192.npy", *(f"{object_id}{suffix}" for suffix in FORMATS)]
    for folder in folders:
        for name in names:
            if (path := Path(folder) / name).is_file():
                return path
    raise PointCloudError(
        f"no cloud of object {object_id!r} in {', '.join(map(str, folders))}: expected {', '.join(names[:2])} or "
        f"another format of {', '.join(FORMATS)}"
    )


class ConversationDataset(Dataset):
    """Conversations of an annotation file; an item holds `messages`, `object_ids`, `conversation_type`.

    The clouds in the messages are float32 [N, 6], y up, as `load_point_cloud` returns them: the feature extractor
    normalises and subsamples them. `pointalign.data.check` drops conversations with `conversations.keep`.

    Args:
        annotation: JSON in the PointLLM schema.
        clouds: folder with a file per object id, or several folders, see `find_cloud`.
        types: conversation types to use; None for all.
        up_axis: vertical axis of the clouds, see `load_point_cloud`.
        read_clouds: off, the messages hold object ids in the clouds' places.

    Raises:
        AnnotationError, NotADirectoryError, ValueError (unknown `up_axis`): on construction.
        PointCloudError: on access to an item whose cloud is missing or bad.
    """

    def __init__(
        self,
        annotation: str | Path,
        clouds: str | Path | Sequence[str | Path],
        types: Collection[str] | None = None,
        up_axis: str = "y",
        read_clouds: bool = True,
    ):
        self.clouds = [Path(folder) for folder in ([clouds] if isinstance(clouds, (str, Path)) else clouds)]
        self.read_clouds = read_clouds
        for folder in self.clouds if read_clouds else []:
            if not folder.is_dir():
                raise NotADirectoryError(f"expected a folder of clouds, there is none at {folder}")
        if up_axis not in UP_AXES:
            raise ValueError(f"up_axis must be one of {', '.join(UP_AXES)}, got {up_axis!r}")
        self.up_axis = up_axis
        self.conversations = IndexedConversations(annotation, types)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another augmentation of every cloud, see `ConversationCollator`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict:
        conversation = self.conversations[index]
        clouds = list(conversation.object_ids)
        if self.read_clouds:
            clouds = [load_point_cloud(find_cloud(self.clouds, i), self.up_axis) for i in conversation.object_ids]
        return {
            "messages": to_messages(conversation, clouds),
            "object_ids": conversation.object_ids,
            "conversation_type": conversation.conversation_type,
            "draw": (self.epoch, index),  # seeds the augmentation
        }


class MixtureDataset(Dataset):
    """Item i is a batch: a list of samples of a single data set. A set repeats no sample before all were shown.

    Args:
        datasets: the parts of the mixture.
        ratios: how often each part is drawn, in any unit.
        batch_sizes: samples per batch, for each part.
        num_batches: of the run, over all ranks.
        seed: of the draws and of the order within each set.

    Raises:
        ValueError: arguments of unequal length or out of range.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        ratios: Sequence[float],
        batch_sizes: Sequence[int],
        num_batches: int,
        seed: int = 0,
    ):
        if not len(datasets) == len(ratios) == len(batch_sizes) > 0:
            raise ValueError(
                f"expected as many ratios and batch sizes as data sets, got {len(datasets)}, {len(ratios)} and "
                f"{len(batch_sizes)}"
            )
        if min(ratios) <= 0 or min(batch_sizes) <= 0 or num_batches <= 0:
            raise ValueError(f"ratios {ratios}, batch sizes {batch_sizes} and {num_batches} batches must be positive")
        self.datasets, self.batch_sizes, self.seed = list(datasets), list(batch_sizes), seed
        share = np.asarray(ratios, dtype=float) / sum(ratios)
        self.parts = np.random.default_rng(seed).choice(len(datasets), size=num_batches, p=share).astype(np.int16)
        self.turns = np.empty(num_batches, dtype=np.int64)  # how many batches of the same part came before
        for part in range(len(datasets)):
            of_part = self.parts == part
            self.turns[of_part] = np.arange(of_part.sum())
        self._order = lru_cache(maxsize=2 * len(datasets))(self._shuffled)

    def _shuffled(self, part: int, round: int) -> np.ndarray:
        return np.random.default_rng([self.seed, part, round]).permutation(len(self.datasets[part]))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2 * len(self.datasets))(self._shuffled)

    def __len__(self) -> int:
        return len(self.parts)

    def draws(self, number: int) -> list[tuple[int, int, int]]:
        """Of every sample of batch `number`: the part, the round through that part, and the index in it."""
        part, size = int(self.parts[number]), self.batch_sizes[self.parts[number]]
        first, count = int(self.turns[number]) * size, len(self.datasets[part])
        rounds = [divmod(position, count) for position in range(first, first + size)]
        return [(part, round, int(self._order(part, round)[position])) for round, position in rounds]

    def __getitem__(self, number: int) -> list[dict]:
        # "draw" seeds the augmentation: it depends on the sample and the round only
        return [
            self.datasets[part][index] | {"draw": (part, round, index)} for part, round, index in self.draws(number)
        ]


class MixtureCollator:
    """Passes the samples of a batch of `MixtureDataset` to a collator of samples."""

    def __init__(self, collator: Callable[[list[dict]], Any]):
        self.collator = collator

    def __call__(self, batches: list[list[dict]]) -> Any:
        return self.collator([sample for batch in batches for sample in batch])


def make_datasets(options: "Options") -> list[Any]:
    """A data set for every part of the mixture, or a single data set without a mixture."""
    annotations, clouds = data_paths(options)
    parts = [(part.annotations or annotations, part.types) for part in options.data.mixture]
    parts = parts or [(annotations, options.data.types)]
    read_clouds = options.data.feature_cache is None
    return [ConversationDataset(path, clouds, types, options.data.up_axis, read_clouds) for path, types in parts]


def data_paths(options: "Options") -> tuple[Path, Path | list[Path]]:
    """Annotation file and folders of clouds: the user's, or the embedded objects'."""
    clouds = options.data.clouds
    if options.data.annotations is not None and clouds is not None:
        folders = [clouds] if isinstance(clouds, str) else clouds
        return Path(options.data.annotations), [Path(folder) for folder in folders]
    from pointalign import assets

    folder = assets.embedded_objects(options.data.fold)
    return folder / "annotations" / "train.json", folder / "clouds"

"""Data sets: annotated conversations joined with their clouds, mixtures of them, and ModelNet40's test file."""

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from pointalign.data.conversations import IndexedConversations, to_messages
from pointalign.data.pickles import MALFORMED_PICKLE, read_pickle
from pointalign.data.point_cloud import (
    FORMATS,
    MISSING_COLORS,
    READ_FORMATS,
    PointCloudError,
    Reading,
    read_point_cloud,
)
from pointalign.data.point_records import check_expansion

if TYPE_CHECKING:
    from pointalign.options import Options


def find_cloud(folders: str | Path | Sequence[str | Path], object_id: str) -> Path:
    """The file of an object, from the first folder that has it.

    In a folder `{object_id}_8192.npy` comes first, then `{object_id}.npy`, then the other readable formats. An id may
    also be the path of a file in the folder.

    Raises: PointCloudError: no folder has such a file.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    names = [f"{object_id}_8192.npy", *(f"{object_id}{suffix}" for suffix in FORMATS)]
    exact = [object_id] if Path(object_id).suffix.lower() in FORMATS else []
    for folder in folders:
        for name in exact + names:
            if (path := Path(folder) / name).is_file():
                return path
    others = [path for folder in folders for path in Path(folder).glob(f"{escape(object_id)}.*") if path.is_file()]
    if others:
        raise PointCloudError(f"{others[0]}: not a format that is read, {READ_FORMATS}")
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
        up_axis: vertical axis of the clouds.
        read_clouds: off, the messages hold object ids in the clouds' places.
        reading: the further options of `Reading`.

    Raises:
        AnnotationError, NotADirectoryError, ValueError (unknown choice of an option): on construction.
        PointCloudError: on access to an item whose cloud is missing or bad.
    """

    def __init__(
        self,
        annotation: str | Path,
        clouds: str | Path | Sequence[str | Path],
        types: Collection[str] | None = None,
        up_axis: str = "y",
        read_clouds: bool = True,
        **reading: Any,
    ):
        self.clouds = [Path(folder) for folder in ([clouds] if isinstance(clouds, (str, Path)) else clouds)]
        self.read_clouds = read_clouds
        for folder in self.clouds if read_clouds else []:
            if not folder.is_dir():
                raise NotADirectoryError(f"expected a folder of clouds, there is none at {folder}")
        self.reading = Reading(up_axis, **reading)
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
            paths = [find_cloud(self.clouds, object_id) for object_id in conversation.object_ids]
            clouds = [read_point_cloud(path, self.reading).points for path in paths]
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

    Raises: ValueError: arguments of unequal length or out of range.
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

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> list[dict]:
        part, size = int(self.parts[number]), self.batch_sizes[self.parts[number]]
        first, count = int(self.turns[number]) * size, len(self.datasets[part])
        samples = []
        for round, position in (divmod(place, count) for place in range(first, first + size)):
            index = int(_order(self.seed, part, round, count)[position])
            # "draw" seeds the augmentation: it depends on the sample and the round only
            samples.append(self.datasets[part][index] | {"draw": (part, round, index)})
        return samples


@lru_cache(maxsize=16)  # the current and the next round of every part
def _order(seed: int, part: int, round: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, part, round]).permutation(count)


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
    reading = {name: getattr(options.data, name) for name in ("missing_color", "max_nonfinite", "parts")}
    return [
        ConversationDataset(path, clouds, types, options.data.up_axis, read_clouds, **reading) for path, types in parts
    ]


def data_paths(options: "Options") -> tuple[Path, Path | str | list[str]]:
    """Annotation file and folders of clouds: the user's, or the embedded objects'."""
    if options.data.annotations is not None and options.data.clouds is not None:
        return Path(options.data.annotations), options.data.clouds
    from pointalign import assets

    folder = assets.embedded_objects(options.data.fold)
    return folder / "annotations" / "train.json", folder / "clouds"


CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup", "curtain",
    "desk", "door", "dresser", "flower pot", "glass box", "guitar", "keyboard", "lamp", "laptop", "mantel", "monitor",
    "night stand", "person", "piano", "plant", "radio", "range hood", "sink", "sofa", "stairs", "stool", "table",
    "tent", "toilet", "tv stand", "vase", "wardrobe", "xbox",
)  # fmt: skip


def load_modelnet40(path: str | Path, missing_color: str = "black") -> tuple[list[np.ndarray], list[int]]:
    """Clouds `[N, 6]` float32, xyz with the missing colour (normals are dropped), and labels, indices of `CLASSES`.

    Args:
        missing_color: black, as in the published evaluation, grey or white.

    Raises: PointCloudError: another kind of file, or the pickle asks for anything but arrays.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read()
        content = read_pickle(data)
        clouds, labels = content
        arrays = [cloud.numpy() for cloud in clouds]
        check_expansion(sum(24 * len(array) for array in arrays), len(data), "the clouds of the pickle")
        numbers = [int(label if isinstance(label, int) else label.numpy().reshape(-1)[0]) for label in labels]
    except PointCloudError as error:
        raise PointCloudError(f"{path}: {error}") from error
    except MALFORMED_PICKLE as error:
        raise PointCloudError(f"{path}: not a pickle of clouds and labels ({error})") from error
    if len(arrays) != len(numbers) or any(array.ndim != 2 or array.shape[1] < 3 for array in arrays):
        raise PointCloudError(f"{path}: expected a cloud [N, 6] for every label")
    if not all(0 <= number < len(CLASSES) for number in numbers):
        raise PointCloudError(
            f"{path}: expected labels from 0 to {len(CLASSES) - 1}, got {min(numbers)} to {max(numbers)}"
        )
    level = MISSING_COLORS[missing_color]
    coloured = [np.hstack([array[:, :3], np.full((len(array), 3), level)]).astype(np.float32) for array in arrays]
    return coloured, numbers

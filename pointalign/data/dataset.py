"""Annotated conversations joined with their clouds, one chat sample per item."""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch.utils.data import Dataset

from pointalign.data.conversations import IndexedConversations, to_messages
from pointalign.data.point_cloud import FORMATS, UP_AXES, PointCloudError, load_point_cloud


def find_cloud(folders: str | Path | Sequence[str | Path], object_id: str) -> Path:
    """The file of an object: `{object_id}_8192.npy`, `{object_id}.npy`, then any other readable format.

    Of several folders the first that has one counts.

    Raises: PointCloudError: there is none.
    """
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    names = [f"{object_id}_8192.npy", *(f"{object_id}{suffix}" for suffix in FORMATS)]
    for folder in folders:
        for name in names:
            if (path := Path(folder) / name).is_file():
                return path
    raise PointCloudError(
        f"no cloud of object {object_id!r} in {', '.join(map(str, folders))}: expected {', '.join(names[:2])} or "
        "another format"
    )


class ConversationDataset(Dataset):
    """Conversations of an annotation file; an item holds `messages`, `object_ids`, `conversation_type`.

    The clouds in the messages are float32 [N, 6], y up, as `load_point_cloud` returns them: normalising and subsampling
    is the feature extractor's. `conversations` may be filtered by `keep`, as `pointalign.data.check` does.

    Args:
        annotation: JSON in the PointLLM schema.
        clouds: folder with a file per object id, or several, see `find_cloud`.
        types: conversation types to keep; None keeps all.
        up_axis: vertical axis of the clouds, see `load_point_cloud`.
        read_clouds: off, the messages hold object ids in the clouds' places.

    Raises: AnnotationError, NotADirectoryError, ValueError (unknown `up_axis`) on construction; PointCloudError on
        access to an item whose cloud is missing or bad.
    """

    def __init__(
        self,
        annotation: str | Path,
        clouds: str | Path | Sequence[str | Path],
        types: Collection[str] | None = None,
        up_axis: str = "y",
        read_clouds: bool = True,
    ):
        self.clouds = [Path(one) for one in ([clouds] if isinstance(clouds, (str, Path)) else clouds)]
        self.read_clouds = read_clouds
        for folder in self.clouds if read_clouds else []:
            if not folder.is_dir():
                raise NotADirectoryError(f"expected a folder of clouds, {folder} is none")
        if up_axis not in UP_AXES:
            raise ValueError(f"up_axis must be one of {', '.join(UP_AXES)}, got {up_axis!r}")
        self.up_axis = up_axis
        self.conversations = IndexedConversations(annotation, types)

        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
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

"""What comes from outside: uploaded files, bounded before they are parsed and removed once they are read."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pointalign.data.point_cloud import PointCloudError, Reading, point_count, read_point_cloud
from pointalign.models import PointAlignFeatureExtractor

MAX_MEGABYTES = 64  # of an uploaded file
MAX_POINTS = 2_000_000  # in an uploaded file
LONGEST_MESSAGE = 300  # characters of a message on the page


@dataclass(frozen=True)
class Item:
    """An object to ask about.

    Attributes:
        name: what the page calls it: a file's name, or an example's.
        points: `[N, 6]`, as `load_point_cloud` returns them.
        notes: what was left out or assumed of the file, or who made the example.
    """

    name: str
    points: np.ndarray = field(repr=False)
    notes: tuple[str, ...] = ()


def read_upload(path: str | Path, extractor: PointAlignFeatureExtractor, up_axis: str) -> Item:
    """An uploaded file as an object to ask about; the file is removed, whether it can be read or not.

    Raises: PointCloudError: the file is too large or has too many points, or the model cannot read it. The message
        names the file without its folder.
    """
    path = Path(path)
    try:
        _check_size(path)
        cloud = read_point_cloud(path, Reading(up_axis, **extractor.reading))
        extractor.prepare(cloud.points)
    except PointCloudError as error:
        raise PointCloudError(f"{path.name}: {str(error).removeprefix(f'{path}: ')}") from error
    finally:
        path.unlink(missing_ok=True)
    return Item(path.name, cloud.points, cloud.notes)


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_MEGABYTES << 20:
        raise PointCloudError(
            f"the file has {size / 2**20:.0f} MB, more than the {MAX_MEGABYTES} MB that the page takes"
        )
    count = point_count(path)
    if count is not None and count > MAX_POINTS:
        raise PointCloudError(
            f"the file has {count:,} points, more than the {MAX_POINTS:,} that the page takes: subsample it"
        )


def short(message: str) -> str:
    """A message for the page: one line, not too long."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_MESSAGE else line[: LONGEST_MESSAGE - 1].rstrip() + "…"

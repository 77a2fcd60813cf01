"""Check of a data set before training (`pointalign check`), so that no bad file stops a run after hours."""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pointalign.data.dataset import ConversationDataset, find_cloud
from pointalign.data.point_cloud import (
    FORMATS,
    PointCloudError,
    Reading,
    point_count,
    read_point_cloud,
)

FULL_READ_LIMIT = 20_000  # objects; beyond it a sample is read in full
FULL_READ_SAMPLE = 2_000
_NAMED = 10  # bad objects named in a message
_THREADS = 8


class BadObjectsError(ValueError):
    """Objects that cannot be used for training; the message names the first ten and their number."""


@dataclass
class Report:
    """Outcome of `check`.

    Attributes:
        objects, read_in_full: number of objects checked, and of those read in full.
        bad: object ids with reasons.
        notes: object ids with what was left out of their files or assumed.
        dropped_conversations: about bad objects.
        warning: on the set, empty if there is nothing to say.
    """

    objects: int
    read_in_full: int
    bad: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dropped_conversations: int = 0
    warning: str = ""

    def __str__(self) -> str:
        depth = "all read in full" if self.read_in_full == self.objects else f"{self.read_in_full} read in full"
        lines = [f"{self.objects} objects checked ({depth}), none bad"]
        if self.bad:
            lines = [f"{len(self.bad)} of {self.objects} objects are bad ({depth}):", *_listed(self.bad)]
        if self.dropped_conversations:
            lines.append(f"{self.dropped_conversations} conversations about them were dropped")
        if self.notes:
            lines += [f"of {len(self.notes)} objects something was left out:", *_listed(self.notes)]
        return "\n".join([*lines, *([self.warning] if self.warning else [])])


def _listed(reasons: dict[str, str]) -> list[str]:
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:_NAMED]]
    return [*lines, f"  ... and {len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else lines


def check(dataset: ConversationDataset, num_groups: int, skip_bad: bool = False) -> Report:
    """Verifies that every object of `dataset` has a cloud that loads and has at least `num_groups` points.

    In sets of up to 20,000 objects every cloud is read in full. In larger sets a seeded sample of 2,000 is; of the
    others existence and header are checked (point count against file size; of a mesh, only that it is not empty).

    Args:
        num_groups: groups of the point encoder, the least number of points that it can encode.
        skip_bad: drop the conversations about bad objects from `dataset.conversations` and print them, do not raise.

    Raises: BadObjectsError: objects are bad and `skip_bad` is off, or no conversation is left.
    """
    objects = sorted({object_id for ids in dataset.conversations.object_ids for object_id in ids})
    full = set(objects)
    if len(objects) > FULL_READ_LIMIT:
        full = set(random.Random(0).sample(objects, FULL_READ_SAMPLE))

    def read(object_id: str) -> tuple[str, str, str]:
        """Why the object is bad, what was left out of its file, and the file's suffix; each may be empty."""
        try:
            path = find_cloud(dataset.clouds, object_id)
            notes: tuple[str, ...] = ()
            if object_id in full:
                points, notes = read_point_cloud(path, dataset.reading)
                count = len(points)
            else:
                count = point_count(path)
        except PointCloudError as error:
            return str(error), "", ""
        if count is not None and count < num_groups:
            return f"{path}: {count} points, the encoder needs at least {num_groups} (one per group)", "", ""
        return "", "; ".join(notes and (f"{path}", *notes)), path.suffix.lower()

    report = Report(len(objects), len(full))
    suffixes: Counter[str] = Counter()
    with ThreadPool(_THREADS) as pool:
        outcomes = tqdm(pool.imap(read, objects, chunksize=16), "Checking the clouds", len(objects), disable=None)
        for name, (why, note, suffix) in zip(objects, outcomes, strict=True):
            suffixes[suffix] += 1
            if why:
                report.bad[name] = why
            elif note:
                report.notes[name] = note
    report.warning = _mixed_axes(suffixes, dataset.reading.up_axis)
    if not report.bad and (report.notes or report.warning):
        print(report, file=sys.stderr)
    if not report.bad:
        return report
    if not skip_bad:
        raise BadObjectsError(f"{report}\nRepair or remove them, or pass --data.skip_bad true to train without them.")
    before = len(dataset.conversations)
    dataset.conversations.keep(report.bad.keys().isdisjoint)
    report.dropped_conversations = before - len(dataset.conversations)
    if not len(dataset.conversations):
        raise BadObjectsError(f"{report}\nNo conversation is left to train on.")
    print(report, file=sys.stderr)
    return report


# the vertical axis that a format's specification or habit fixes; the others leave it open
_FORMAT_AXES = {".glb": "y", ".gltf": "y", ".las": "z", ".laz": "z"}


def _mixed_axes(suffixes: Counter[str], up_axis: str) -> str:
    """A warning where a set holds files of different verticals: `up_axis` is one for all."""
    known = {suffix: _FORMAT_AXES[suffix] for suffix in suffixes if suffix in _FORMAT_AXES}
    if all(axis == up_axis for axis in known.values()):
        return ""
    listed = ", ".join(f"{suffixes[suffix]} {suffix} ({axis} up)" for suffix, axis in sorted(known.items()))
    return (
        f"warning: the set holds {listed}, and --data.up_axis {up_axis} is applied to every file: see 'The vertical "
        "axis' in docs/data.md"
    )


def check_files(paths: Sequence[Path], reading: Reading, num_groups: int) -> bool:
    """Reads cloud and mesh files, and those in folders; prints a line for each. Returns whether all are usable."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if not path.is_dir() or file.suffix.lower() in FORMATS]
    good = bool(files)
    for file in files:
        try:
            points, notes = read_point_cloud(file, reading)
        except PointCloudError as error:
            good = False
            print(f"bad  {error}")
            continue
        size, usable = np.ptp(points[:, :3], axis=0), len(points) >= num_groups
        good &= usable
        colours = len(np.unique(points[:, 3:], axis=0))
        few = "" if usable else f", fewer than the {num_groups} that the encoder needs"
        sides = " x ".join(f"{side:.4g}" for side in size)
        print(f"{'good' if usable else 'bad '} {file}: {len(points)} points{few}, {sides}, {colours} colours")
        for note in notes:
            print(f"       {note}")
    if not files:
        print(f"no file of {', '.join(FORMATS)} in {', '.join(map(str, paths))}")
    return good

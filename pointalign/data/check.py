"""Check of a data set before training (`pointalign check`), so that no bad file stops a run after hours."""

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from pointalign.data.dataset import ConversationDataset
from pointalign.data.point_cloud import (
    FORMATS,
    OTHER_FORMATS,
    Reading,
)
from pointalign.data.reading_pool import Job, Outcome, read_all
from pointalign.data.survey import Survey

FULL_READ_LIMIT = 20_000  # objects; beyond it a sample is read in full
FULL_READ_SAMPLE = 2_000
_NAMED = 10  # bad objects named in a message


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

    report = Report(len(objects), len(full))
    suffixes: Counter[str] = Counter()
    jobs = [Job(name, dataset.clouds, name in full) for name in objects]
    with tqdm(total=len(jobs), desc="Checking the clouds", disable=None) as bar:
        outcomes = read_all(jobs, dataset.reading, bar.update)
    for outcome in outcomes:
        if why := outcome.error or _too_few(outcome, num_groups):
            report.bad[outcome.name] = why
            continue
        suffixes[Path(outcome.path).suffix.lower()] += 1
        if outcome.notes:
            report.notes[outcome.name] = "; ".join((outcome.path, *outcome.notes))
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


def _too_few(outcome: Outcome, num_groups: int) -> str:
    """Why a file that was read has too few points, else ""."""
    if outcome.count is None or outcome.count >= num_groups:
        return ""
    return f"{outcome.path}: {outcome.count} points, the encoder needs at least {num_groups} (one per group)"


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


def check_files(paths: Sequence[Path], reading: Reading, num_groups: int) -> Survey:
    """Reads cloud and mesh files, and those in folders; prints a line for each.

    In a folder, clouds and meshes of formats that are not read are named too; textures and other files are passed over.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        files += [file for file in inside if not path.is_dir() or file.suffix.lower() in (*FORMATS, *OTHER_FORMATS)]
    survey = Survey(read_all([Job(str(file), details=True) for file in files], reading), num_groups)
    for outcome in survey.outcomes:
        if outcome.error:
            print(f"bad  {outcome.error}")
            continue
        few = _too_few(outcome, num_groups)
        sides = " x ".join(f"{high - low:.4g}" for low, high in zip(outcome.low, outcome.high, strict=True))
        reason = f", fewer than the {num_groups} that the encoder needs" if few else ""
        print(
            f"{'bad ' if few else 'good'} {outcome.path}: {outcome.count} points{reason}, {sides}, "
            f"{outcome.colours} colours"
        )
        for note in outcome.notes:
            print(f"       {note}")
    if not files:
        print(f"no file of {', '.join(FORMATS)} in {', '.join(map(str, paths))}")
    return survey

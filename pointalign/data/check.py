"""Check of a data set before training, so that no bad file stops a run after hours.

python -m pointalign.data.check ANNOTATION --clouds DIR
"""

import argparse
import random
import sys
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

from tqdm import tqdm

from pointalign.data.conversations import AnnotationError
from pointalign.data.dataset import ConversationDataset, find_cloud
from pointalign.data.point_cloud import UP_AXES, PointCloudError, point_count, read_point_cloud

FULL_READ_LIMIT = 20_000  # objects; beyond it a sample is read in full
FULL_READ_SAMPLE = 2_000
_NAMED = 10  # bad objects named in a message
_THREADS = 8


class BadObjectsError(ValueError):
    """Objects that cannot be used for training; the message names the first ten and their number."""


@dataclass
class Report:
    """Outcome of `check`: objects checked and read in full, bad object ids with reasons, conversations dropped."""

    objects: int
    read_in_full: int
    bad: dict[str, str] = field(default_factory=dict)
    dropped_conversations: int = 0

    def __str__(self) -> str:
        depth = "all read in full" if self.read_in_full == self.objects else f"{self.read_in_full} read in full"
        if not self.bad:
            return f"{self.objects} objects checked ({depth}), none bad"
        lines = [f"{len(self.bad)} of {self.objects} objects are bad ({depth}):"]
        lines += [f"  {object_id}: {reason}" for object_id, reason in list(self.bad.items())[:_NAMED]]
        if len(self.bad) > _NAMED:
            lines.append(f"  ... and {len(self.bad) - _NAMED} more")
        if self.dropped_conversations:
            lines.append(f"{self.dropped_conversations} conversations about them were dropped")
        return "\n".join(lines)


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

    def reason(object_id: str) -> str | None:
        try:
            path = find_cloud(dataset.clouds, object_id)
            count = len(read_point_cloud(path, dataset.reading).points) if object_id in full else point_count(path)
        except PointCloudError as error:
            return str(error)
        if count is not None and count < num_groups:
            return f"{path}: {count} points, the encoder needs at least {num_groups} (one per group)"
        return None

    report = Report(len(objects), len(full))
    with ThreadPool(_THREADS) as pool:
        outcomes = tqdm(pool.imap(reason, objects, chunksize=16), "Checking the clouds", len(objects), disable=None)
        report.bad = {name: why for name, why in zip(objects, outcomes, strict=True) if why is not None}
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pointalign.data.check", description="Checks every cloud that an annotation file refers to."
    )
    parser.add_argument("annotation", help="annotation JSON in the PointLLM schema")
    parser.add_argument("--clouds", required=True, help="folder with {object_id}_8192.npy or other files per object")
    parser.add_argument("--types", nargs="+", help="conversation types to keep (default: all)")
    parser.add_argument("--up_axis", choices=UP_AXES, default="y", help="vertical axis of the clouds")
    parser.add_argument("--num_groups", type=int, default=512, help="least number of points (default: 512)")
    options = parser.parse_args(arguments)
    try:
        dataset = ConversationDataset(options.annotation, options.clouds, options.types, options.up_axis)
        print(f"{len(dataset)} conversations; {check(dataset, options.num_groups)}")
    except (AnnotationError, BadObjectsError, NotADirectoryError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

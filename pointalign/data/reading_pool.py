"""Many cloud files read in several processes: the memory of all together and the time of each are bounded."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pointalign.data.dataset import find_cloud
from pointalign.data.point_cloud import PointCloudError, Reading, memory_bound, point_count, read_point_cloud

MEMORY = 8 << 30  # bytes that all processes may use; a file whose bound exceeds its share is read alone
SECONDS = 60  # that reading a file may take, with a second more for every megabyte
PROCESSES = 8
_FEW = 32  # files that are read in this process


class Job(NamedTuple):
    """A file to read: of an object in folders of clouds, or a path by itself (no folders).

    Attributes:
        full: read it; otherwise only its header is checked.
        details: also note ranges, colours and a digest of the points.
    """

    name: str
    clouds: Sequence[str | Path] = ()
    full: bool = True
    details: bool = False


class Outcome(NamedTuple):
    """What reading a file gave.

    Attributes:
        path: of the file, "" if the object has none.
        error: why it cannot be used, else "".
        count: of points; None of a mesh whose header alone was checked.
        low, high: of the coordinates on each axis; empty without details.
        colours: different ones; digest: equal for equal points.
    """

    name: str
    path: str = ""
    error: str = ""
    count: int | None = None
    notes: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colours: int = 0
    digest: str = ""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block with a PointCloudError after some seconds; only in a main thread, and not on Windows."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise PointCloudError(f"refused: reading it takes more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again every second: trimesh catches any error in places
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def read_job(job: Job, reading: Reading, share: int | None = None) -> Outcome | None:
    """Read a file; None, and nothing is read, if its memory may exceed the bytes `share`."""
    path = ""
    try:
        file = find_cloud(job.clouds, job.name) if job.clouds else Path(job.name)
        path = str(file)
        size = file.stat().st_size if file.is_file() else 0
        if share is not None and size and memory_bound(file) > share:
            return None
        with time_limit(SECONDS + size / 1e6):
            if not job.full:
                return Outcome(job.name, path, count=point_count(file))
            points, notes = read_point_cloud(file, reading)
            outcome = Outcome(job.name, path, count=len(points), notes=notes)
            return _with_details(outcome, points) if job.details else outcome
    except PointCloudError as error:
        return Outcome(job.name, path, str(error) if path in str(error) else f"{path}: {error}")


def _with_details(outcome: Outcome, points: np.ndarray) -> Outcome:
    xyz = points[:, :3]
    return outcome._replace(
        low=tuple(xyz.min(axis=0).tolist()),
        high=tuple(xyz.max(axis=0).tolist()),
        colours=len(np.unique(points[:, 3:], axis=0)),
        digest=hashlib.sha256(np.ascontiguousarray(points)).hexdigest(),
    )


def read_all(jobs: Sequence[Job], reading: Reading, progress: Callable[[], Any] = lambda: None) -> list[Outcome]:
    """The outcome of every job, in their order.

    Args:
        progress: called after each.

    Raises: ChildProcessError: a process that read files was killed.
    """
    outcomes: dict[int, Outcome] = {}
    if len(jobs) > _FEW:
        workers = min(PROCESSES, os.cpu_count() or 1)
        read = partial(read_job, reading=reading, share=MEMORY // workers)
        for number, outcome in enumerate(_in_processes(read, jobs, workers)):
            if outcome is not None:
                outcomes[number] = outcome
                progress()
    for number, job in enumerate(jobs):
        if number not in outcomes:
            outcome = read_job(job, reading)
            assert outcome is not None
            outcomes[number] = outcome
            progress()
    return [outcomes[number] for number in range(len(jobs))]


def _in_processes(read: Callable[[Job], Outcome | None], jobs: Sequence[Job], workers: int) -> Iterator[Outcome | None]:
    # forked ones, as data loaders have, start at once; spawned ones import everything again
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(workers, multiprocessing.get_context(method)) as pool:
        done = 0
        try:
            for outcome in pool.map(read, jobs, chunksize=16):
                yield outcome
                done += 1
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process that read clouds was killed, mostly for its memory, at object {jobs[done].name!r} or "
                f"one of the {16 * workers} after it"
            ) from error

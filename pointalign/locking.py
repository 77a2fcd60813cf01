"""One process at a time: a lock that the system releases even if its holder is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the file `path`, made if missing, as long as the block runs.

    Args:
        wait: until another process lets go of it; else the block runs at once, without the lock.

    Yields:
        Whether it is held. Always true where the system has no flock: processes then are not kept apart.
    """
    if os.name != "posix":
        yield True
        return
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True

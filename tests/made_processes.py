"""Processes of one job, as torchrun starts them, but forked from a server that has imported everything once."""

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

PRELOADED = ["test_trainer", "test_sharded", "test_train"]


class Ended(NamedTuple):
    """Exit status of a process, and what it printed, errors included."""

    status: int | None
    output: str


def _run(function: Callable, arguments: tuple, environment: dict[str, str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    gc.freeze()  # collections pass over what the server has imported
    torch.set_num_threads(1)
    function(*arguments)


def in_processes(folder: Path, function: Callable, *arguments, count: int = 2, **environment: str) -> list[Ended]:
    """Run `function(*arguments)`, a function of a module, in the processes of one job, with their logs in `folder`.

    Returns:
        How each process ended, by rank.

    Raises:
        TimeoutError: a process runs for more than five minutes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes, logs = [], [folder / f"rank-{rank}.log" for rank in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)  # the folder of benchmarks has a conftest.py too
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # by which the server finds what it imports
        for rank, log in enumerate(logs):
            log.touch()  # also of a process that ends before it writes
            given = job | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(context.Process(target=_run, args=(function, arguments, given, log)))
            processes[-1].start()
    deadline = time.monotonic() + 300
    for process in processes:
        process.join(deadline - time.monotonic())
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    ended = [Ended(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]
    if hanging:
        raise TimeoutError(f"after five minutes: {ended}")
    return ended

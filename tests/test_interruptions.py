"""Signals save at the next step; a dead data worker is a clear error; nothing that was trained is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, make_processor, read_clouds
from made_processes import in_processes
from test_trainer import ROOT, make_trainer
from transformers import TrainerCallback

from pointalign import interruptions
from pointalign.interruptions import SIGNALS, StopOnSignal
from pointalign.run_checkpoints import checkpoints, verify


class SendAt(TrainerCallback):
    """Sends signals to this process at the beginning of a step."""

    def __init__(self, step: int, *numbers: int):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM)])
def test_the_signals_of_a_scheduler_save_at_the_next_step(numbers, tmp_path, processor, clouds):
    died = []
    previous = {number: signal.signal(number, lambda *_: died.append(1)) for number in set(numbers)}
    trainer = make_trainer(tmp_path, processor, clouds, max_steps=9, save_strategy="steps", save_steps=100)
    trainer.add_callback(SendAt(2, *numbers))
    try:
        trainer.train()
        assert trainer.state.global_step == 3 and trainer.stop.number in numbers and not died
        assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
        verify(tmp_path / "checkpoint-3")
        os.kill(os.getpid(), numbers[0])
        assert died == [1], "after training the handlers are those of before"
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_signals_are_those_that_schedulers_send():
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} == set(SIGNALS)


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not():
    stop = StopOnSignal()
    stop._receive(signal.SIGTERM, None)
    stop._receive(signal.SIGTERM, None)
    stop._receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._receive(signal.SIGINT, None)


class KillWorkerAt(TrainerCallback):
    """Kills a data worker after a step, as the system does when memory is short."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            children = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()]
            for pid in children:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    assert b"python" in file.read()
                os.kill(pid, signal.SIGKILL)


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
import conftest, test_interruptions
torch.set_num_threads(1)
processor = conftest.processor.__wrapped__(conftest.tokenizer.__wrapped__())
options = dict(save_strategy="steps", save_steps=100, dataloader_num_workers=1, max_steps=40)
trainer = test_interruptions.make_trainer({folder!r}, processor, conftest.clouds.__wrapped__(), **options)
trainer.add_callback(test_interruptions.KillWorkerAt(2))
try:
    trainer.train()
except ChildProcessError as error:
    print("stopped:", error, trainer.state.global_step, flush=True)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the workers in /proc")
@pytest.mark.skipif(
    "POINTALIGN_LONG_TESTS" not in os.environ, reason="a signal that may arrive anywhere: run it by `make test-long`"
)
def test_a_killed_data_worker_is_a_clear_error_and_the_run_is_saved(tmp_path):
    """In a process of its own: PyTorch raises from a signal handler, which may run anywhere in a process of tests."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "run")))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.search(
        r"stopped: a data worker died after step \d+.*num_workers.*checkpoint-\d+.* (\d+)", done.stdout, re.DOTALL
    )
    assert said, done.stdout[-2000:]
    (checkpoint,) = checkpoints(tmp_path / "run")
    verify(checkpoint)
    assert checkpoint.name == f"checkpoint-{said[1]}"


class Hang(TrainerCallback):
    """Hangs in one process of a job, before its third step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if os.environ["RANK"] == "1" and state.global_step == 2:
            time.sleep(10_000)


def train_a_rank_that_hangs(folder: Path, seconds: int) -> None:
    processor = make_processor(byte_tokenizer())
    trainer = make_trainer(folder, processor, read_clouds(), max_steps=50, ddp_timeout=seconds)
    trainer.add_callback(Hang())
    trainer.train()


def test_a_process_that_hangs_ends_the_job_and_is_named(tmp_path):
    ended = in_processes(tmp_path, train_a_rank_that_hangs, tmp_path / "run", 6)
    assert all(process.status not in (0, None) for process in ended), ended
    named = "no progress for 6 s (training.ddp_timeout): process 1 hangs before the computation of step 3"
    assert any(named in process.output for process in ended), ended


class LostStore:
    """The store of a job that has died with its process, or that never answers."""

    def __init__(self, answers: bool):
        self.answers = answers

    def set(self, key, value):
        pass

    def check(self, keys):
        if self.answers:
            raise torch.distributed.DistNetworkError("Failed to recv, got 0 bytes")
        time.sleep(10_000)


def wait_without_progress(store_answers: bool) -> None:
    interruptions.STORE_TIMEOUT = 1.0
    torch.distributed.distributed_c10d._get_default_store = lambda: LostStore(store_answers)
    interruptions.HangWatch(rank=1, world_size=2, timeout=1)
    time.sleep(10_000)


@pytest.mark.parametrize("store_answers", [True, False])
def test_a_hanging_process_ends_without_the_store_of_its_job(store_answers, tmp_path):
    """The first process holds the store; it may end before the others have asked which of them hang."""
    (ended,) = in_processes(tmp_path, wait_without_progress, store_answers, count=1)
    assert ended.status == 1
    assert not store_answers or "no progress for 1 s (training.ddp_timeout), and" in ended.output, ended.output


@pytest.mark.skipif("POINTALIGN_LONG_TESTS" not in os.environ, reason="the same by torchrun, in `make test-long`")
def test_torchrun_ends_a_job_in_which_a_process_hangs(tmp_path):
    script = tmp_path / "rank.py"
    tests, folder = str(ROOT / "tests"), str(tmp_path / "run")
    script.write_text(f"import sys\nsys.path.insert(0, {tests!r})\nimport test_interruptions\n"
                      f"test_interruptions.train_a_rank_that_hangs({folder!r}, 20)\n")  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert (
        "no progress for 20 s (training.ddp_timeout): process 1 hangs before the computation of step 3" in done.stderr
    )

"""What ends a run from outside: signals, data workers that die, and processes of a job that hang."""

import os
import signal
import sys
import threading
import time
import traceback

import torch
from transformers import TrainerCallback

# Schedulers send these before they kill a job; Windows has only the first two.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
STORE_TIMEOUT = 20.0  # seconds in which the store of a job must answer a process that reports why it ends


class StopOnSignal(TrainerCallback):
    """Ctrl-C and the signals of a scheduler end the current step, save, and stop; a second Ctrl-C stops at once.

    Attributes:
        number: of the signal that stopped this run, in all its processes at the same step; 0 if none did.
    """

    def __init__(self) -> None:
        self.number = 0
        self._received = 0  # by this process; others may hear of it a step later, or not at all
        self._previous: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.number = self._received = 0
        try:
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        except ValueError:  # not in the main thread, which alone can catch signals
            self._previous = {}

    def on_step_begin(self, args, state, control, **kwargs):
        # When a data worker dies, torch raises wherever this process is. The loader notices it too, between two steps,
        # where the state can be saved.
        if args.dataloader_num_workers and self._previous and hasattr(signal, "SIGCHLD"):
            self._previous.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, signal.SIG_DFL))

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        again = "; press Ctrl-C again to stop without saving" if number == signal.SIGINT else ""
        if not self._received or again:
            print(f"\n{signal.Signals(number).name}: saving and stopping after this step{again}", flush=True)
        self._received = number

    def on_step_end(self, args, state, control, **kwargs):
        number = self._received
        if args.world_size > 1:  # in any process
            shared = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            number = int(shared)
        if number:
            self.number = number
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}


class HangWatch:
    """Ends this process when it makes no progress for too long, and says which process of the job the others wait for.

    A process that hangs leaves the others waiting inside a collective operation. Every process notes its progress in
    the store that all of a job share, and a thread watches its own.

    Args:
        rank: of this process among `world_size`.
        timeout: seconds without progress.
    """

    def __init__(self, rank: int, world_size: int, timeout: float):
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._store = torch.distributed.distributed_c10d._get_default_store()
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self.note(0, computing=False)
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def note(self, step: int, computing: bool) -> None:
        """This process begins to read the batches of a step, or to compute it."""
        self._store.set(f"pointalign/progress/{self.rank}", str(2 * step + computing))
        self._last = time.monotonic()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(5.0, self.timeout / 10)):
            if time.monotonic() - self._last > self.timeout:
                # The store may not answer: this process ends all the same, by os._exit, as nothing else interrupts the
                # operation in which its main thread waits.
                threading.Timer(STORE_TIMEOUT, os._exit, [1]).start()
                stack = traceback.format_stack(sys._current_frames()[self._main])
                print(f"error: {self.report()}\nProcess {self.rank} is at\n{stack[-1]}", file=sys.stderr, flush=True)
                os._exit(1)

    def report(self) -> str:
        """Which processes are behind, and where."""
        late = f"no progress for {self.timeout} s (training.ddp_timeout)"
        keys = [f"pointalign/progress/{rank}" for rank in range(self.world_size)]
        try:
            progress = [int(self._store.get(key)) if self._store.check([key]) else 0 for key in keys]
        except torch.distributed.DistError as error:  # the process that holds the store has ended
            return f"{late}, and the process that knows which others hang has ended: see its messages ({error})"
        step, computing = divmod(min(progress), 2)
        behind = [str(rank) for rank, number in enumerate(progress) if number == min(progress)]
        names = f"process {behind[0]} hangs" if len(behind) == 1 else f"processes {', '.join(behind)} hang"
        where = f"{'in' if computing else 'before'} the computation of step {step + 1}"
        return f"{late}: {names} {where}"

"""What ends a run from outside: signals, data workers that die, and processes of a job that hang."""

import signal

import torch
from transformers import TrainerCallback

# Schedulers send these before they kill a job; Windows has only the first two.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


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

"""Preemption: on SIGTERM, SIGUSR1 or Ctrl-C a run saves a checkpoint at the next step and ends with its own code."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.engine import HookBase

from moco_d2.io import timeouts
from moco_d2.running.checkpoints import PeriodicCheckpoint

logger = logging.getLogger(__name__)

# 75, "try again": the exit code of a run that was asked to stop, has saved and can be continued.
EXIT_PREEMPTED = os.EX_TEMPFAIL

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Ends the process with :data:`EXIT_PREEMPTED`; not an ``Exception``, which training loops log as a failure."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


_asked: list[int] = []  # signals received
_training = False  # whether a training loop, which obeys the requests, has begun
_PRESSED = b"\nstopping: the run saves at the end of this step; press Ctrl-C again to end at once, without saving\n"


def requested() -> bool:
    """Tell whether this process was asked to stop."""
    return bool(_asked)


def handle_signals(pass_on: Callable[[int], None] | None = None, again_ends: bool = True) -> None:
    """Treat SIGTERM, SIGUSR1 and an interruption from the keyboard as requests to stop from now on.

    Clusters signal all processes of a job at once, and so does a terminal. The workers of data loaders, which are
    forked from this process, ignore the signals, because the last step needs their data. Before the training loop
    begins there is nothing to save, and an interruption from the keyboard raises KeyboardInterrupt. A shell that starts
    a command in the background has it ignore the keyboard; then it is ignored here as well.

    Args:
        pass_on: called with each signal; for a process that only starts and watches those that train.
        again_ends: whether a second interruption from the keyboard ends this process at once; False if another process
            decides it.
    """

    def note(signum: int, _frame: FrameType | None) -> None:
        _asked.append(signum)
        if pass_on:
            pass_on(signum)

    def press(signum: int, frame: FrameType | None) -> None:
        if not pass_on and not _training:
            raise KeyboardInterrupt
        if again_ends:
            # The system's handler ends a process that waits in a library, too; a watching process must end the others.
            signal.signal(signum, signal.default_int_handler if pass_on else signal.SIG_DFL)
            with contextlib.suppress(OSError):
                os.write(2, _PRESSED)  # not a log, whose stream may be in use at this moment
        note(signum, frame)

    global _training
    _training = False
    _protect_workers()
    for number in SIGNALS:
        signal.signal(number, note)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, press)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [*SIGNALS, signal.SIGINT])  # those that started this process block them


@contextlib.contextmanager
def keyboard_restored() -> Iterator[None]:
    """Restore the handler of interruptions from the keyboard at the end, for programs that go on after a run."""
    earlier = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if earlier is not None:  # not one of a library in C
            signal.signal(signal.SIGINT, earlier)


@functools.cache  # once per process
def _protect_workers() -> None:
    os.register_at_fork(after_in_child=_obey_parent_only)


def _obey_parent_only() -> None:
    """In a forked child: end on SIGTERM only if the parent sends it, which is how a loader ends its workers."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class StopWhenAsked(HookBase):
    """Save and end the run after a step once any process was asked to stop; all processes end at the same iteration.

    The processes exchange their requests at every step and read the result one step later, so that none waits for it.
    Must be the last hook: an evaluation that is due at the same step comes first.
    """

    def __init__(self, checkpoint: PeriodicCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._answer: dist.Work | None = None
        self._group: dist.ProcessGroup | None = None

    def before_train(self) -> None:
        """Create the process group for the exchange, on the CPU, so that no GPU is synchronised."""
        global _training
        if _several():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeouts.limit()))
        _training = True

    def after_step(self) -> None:
        """Save and stop if all processes know that one was asked to."""
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if self._agreed(last) and not last:
            self.checkpoint.save()
            if _several():
                dist.barrier(self._group)  # launchers kill the other processes once the first has ended
            logger.warning(
                "asked to stop: saved iteration %d; continue with --resume (exit code %d)",
                self.trainer.iter, EXIT_PREEMPTED,
            )  # fmt: skip
            raise Preempted

    def _agreed(self, last: bool) -> bool:
        if not _several():
            return requested()
        if self._answer is not None:
            self._answer.wait()
            if self._asked.item():
                return True
        if not last:
            self._asked.fill_(requested())
            self._answer = dist.all_reduce(self._asked, dist.ReduceOp.MAX, self._group, async_op=True)
        return False


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

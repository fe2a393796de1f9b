"""Stop when the cluster asks: SIGTERM or SIGUSR1, a checkpoint at the next step, and an exit code that says so."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.engine import HookBase

from moco_d2.io import timeouts
from moco_d2.running.checkpoints import PeriodicCheckpoint

logger = logging.getLogger(__name__)

# 75, "try again": the exit code of a run that was asked to stop, has saved and can go on.
EXIT_PREEMPTED = os.EX_TEMPFAIL

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Ends the process with :data:`EXIT_PREEMPTED`. Loops that log an ``Exception`` as a failure let it pass."""

    def __init__(self) -> None:
        super().__init__(EXIT_PREEMPTED)


_asked: list[int] = []  # signals received


def requested() -> bool:
    """Tell whether this process was asked to stop."""
    return bool(_asked)


def listen(pass_on: Callable[[int], None] = lambda signum: None) -> None:
    """Take SIGTERM and SIGUSR1 as requests to stop from now on, and hand them to ``pass_on`` as well.

    Clusters signal all processes of a job at once, so that data loaders' workers, which are forked from this one, must
    not heed them: the last step needs their data.
    """

    def note(signum: int, _frame: FrameType | None) -> None:
        _asked.append(signum)
        pass_on(signum)

    if not hasattr(listen, "once"):
        os.register_at_fork(after_in_child=_heed_parent_only)
        listen.once = True  # type: ignore[attr-defined]
    for number in SIGNALS:
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a launcher may have blocked them until now


def _heed_parent_only() -> None:
    """In a forked child: end at SIGTERM only when the parent sends it, which is how a loader ends its workers."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
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
    """Save and end the run at a step's end once any process was asked to stop; all end at the same iteration.

    The processes compare notes once a step. The answer is collected a step later, so that nobody waits for it. It is
    the last hook: an evaluation that is due at this step is made before.
    """

    def __init__(self, checkpoint: PeriodicCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._answer: dist.Work | None = None
        self._group: dist.ProcessGroup | None = None

    def before_train(self) -> None:
        """Make the group of processes that compare notes: on the CPU, so that no device is waited for."""
        if _several():
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeouts.limit()))

    def after_step(self) -> None:
        """Stop if all know that somebody was asked to."""
        last = self.trainer.iter + 1 >= self.trainer.max_iter
        if self._agreed(last) and not last:
            self.checkpoint.save()
            if _several():
                dist.barrier(self._group)  # Launchers end the others once the first process has ended.
            logger.warning(
                "asked to stop: iteration %d is saved; continue with --resume (exit code %d)",
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

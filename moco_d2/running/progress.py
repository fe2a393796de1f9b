"""Progress lines of trainings and other long work."""

from __future__ import annotations

import contextlib
import datetime
import logging
import re
import resource
import sys
import time
from pathlib import Path

import torch
from detectron2.utils.events import CommonMetricPrinter, EventStorage

logger = logging.getLogger(__name__)

_STATUS = Path("/proc/self/status")


def peak_memory_gib() -> float:
    """Return the peak memory of this process in GiB: on the GPU if it uses one, else its resident memory."""
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held / 2**30
    # On Linux, getrusage counts the memory of the process that started this one as well.
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())):
        return int(found[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's printer without its division by zero if an iteration is written twice before a step was timed.

    This happens if a run is asked to stop in its first step after a resume: the line is due then, and again at the end.
    """

    def _get_eta(self, storage: EventStorage) -> str | None:
        with contextlib.suppress(ZeroDivisionError):
            eta: str | None = super()._get_eta(storage)
            return eta
        return None


class Countdown:
    """Logs how much of a work is done, and the time that the rest will take, every ten seconds."""

    def __init__(self, work: str, things: str, total: int, period: float = 10.0) -> None:
        """Begin to count ``total`` things of a work."""
        self.work, self.things, self.total, self.period = work, things, total, period
        self.start = self.last = time.monotonic()

    def seen(self, count: int) -> None:
        """Take the number of things that are done by now."""
        now = time.monotonic()
        if now - self.last >= self.period and count:
            self.last = now
            left = datetime.timedelta(seconds=int((now - self.start) * (self.total - count) / count))
            logger.info("%s: eta %s  %d of %d %s", self.work, left, count, self.total, self.things)

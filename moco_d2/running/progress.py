"""Progress lines of a training."""

from __future__ import annotations

import contextlib

from detectron2.utils.events import CommonMetricPrinter, EventStorage


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's printer without its division by zero if an iteration is written twice before a step was timed.

    This happens if a run is asked to stop in its first step after a resume: the line is due then, and again at the end.
    """

    def _get_eta(self, storage: EventStorage) -> str | None:
        with contextlib.suppress(ZeroDivisionError):
            eta: str | None = super()._get_eta(storage)
            return eta
        return None

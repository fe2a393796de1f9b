"""The line of progress, also in the first step after a start."""

from __future__ import annotations

import contextlib

from detectron2.utils.events import CommonMetricPrinter, EventStorage


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's printer, which divides by zero when it writes one iteration twice before any step was timed.

    That is what a request to stop does in the first step after a resume: the line is due, and due again at the end.
    """

    def _get_eta(self, storage: EventStorage) -> str | None:
        with contextlib.suppress(ZeroDivisionError):
            eta: str | None = super()._get_eta(storage)
            return eta
        return None

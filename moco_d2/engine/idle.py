"""The time for which a GPU waits for images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class _Wait(NamedTuple):
    iteration: int
    before: torch.cuda.Event
    after: torch.cuda.Event
    host: float


class IdleTime:
    """The time between steps for which a GPU has nothing to do because there are no images.

    The host, which is steps ahead of the GPU, may wait for images while the GPU has work. So events on the GPU mark the
    end of a step and the start of the next; what lies between them, but at most the host's wait for images, counts. The
    bound leaves out the time that hooks take, and a host that is slow to launch.
    """

    def __init__(self, event: Callable[[], torch.cuda.Event] = lambda: torch.cuda.Event(enable_timing=True)) -> None:
        """Set up; ``event`` makes an event."""
        self._event = event
        self._end: torch.cuda.Event | None = None
        self._waits: list[_Wait] = []

    def images_arrived(self, iteration: int, waited: float) -> None:
        """Mark the start of a step whose images the host has awaited for ``waited`` seconds."""
        if self._end is not None:
            self._waits.append(_Wait(iteration, self._end, self._mark(), waited))

    def step_ends(self) -> None:
        """Mark the end of a step, all of whose operations are launched."""
        self._end = self._mark()

    def read(self) -> list[tuple[int, float]]:
        """Return ``(iteration, seconds)`` of the steps since the last call, for which the GPU must be done.

        The first step of a run is left out: nothing came before it.
        """
        found = [(w.iteration, min(w.before.elapsed_time(w.after) / 1000, w.host)) for w in self._waits]
        self._waits.clear()
        return found

    def _mark(self) -> torch.cuda.Event:
        event = self._event()
        event.record()
        return event

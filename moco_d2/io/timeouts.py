"""How long this process waits for another, a rank or a loader's worker, before it gives up: the tools' ``--timeout``.

Kept for the whole process, as :func:`socket.setdefaulttimeout` keeps its own: a run is the same with another.
"""

from __future__ import annotations

DEFAULT = 1800.0  # seconds; rank 0 may evaluate alone for so long

_limit = DEFAULT


def limit() -> float:
    """Return the number of seconds."""
    return _limit


def set_limit(seconds: float) -> None:
    """Set the number of seconds for groups of processes and loaders that are made from now on."""
    global _limit
    _limit = seconds

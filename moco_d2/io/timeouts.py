"""Timeout of this process for other processes, ranks and loaders' workers: the commands' ``--timeout``.

It is a setting of the process, like :func:`socket.setdefaulttimeout`, because the results of a run do not depend on it.
"""

from __future__ import annotations

DEFAULT = 1800.0  # seconds; the others wait for this long while rank 0 computes metrics

_limit = DEFAULT


def limit() -> float:
    """Return the timeout in seconds."""
    return _limit


def set_limit(seconds: float) -> None:
    """Set the timeout in seconds for process groups and loaders that are created from now on."""
    global _limit
    _limit = seconds

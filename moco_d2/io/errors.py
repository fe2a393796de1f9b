"""The error of a file that cannot be used, and how a message lists names."""

from __future__ import annotations

from collections.abc import Iterable


class CheckpointError(ValueError):
    """A file cannot be used; the message is one line: the path, what was found, what to do."""


def some(names: Iterable[str], shown: int = 6) -> str:
    """Join the first few names for a message."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more

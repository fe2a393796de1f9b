"""Error of a file that cannot be used, and lists of names in messages."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 200  # characters of a name that are shown


class CheckpointError(ValueError):
    """A file cannot be used. The message is one line: the path, what was found, what to do."""


def some(names: Iterable[str], shown: int = 6) -> str:
    """Join the first few names for a message, on one line, whatever their length and characters."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(_on_one_line, names[:shown])) + more


def _on_one_line(name: str) -> str:
    plain = name if name.isprintable() else repr(name)
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."

"""What to say of a name that is none of the choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: object, choices: Iterable[str]) -> str:
    """Return the complaint about a setting whose value is none of the choices: value, rule and nearest choice."""
    known = list(choices)
    words = ", ".join(word or "empty" for word in known)
    return f"{what} is {name!r}; it must be one of {words}{did_you_mean(name, known)}"


def did_you_mean(name: object, choices: Iterable[str], most: int = 1) -> str:
    """Return the end of a message, with the nearest choices (``most`` of them), or nothing where none is near."""
    words = list(choices)
    same = [word for word in words if word.lower() == str(name).lower()]  # but for the letters' case
    near = same or difflib.get_close_matches(str(name), words, n=most)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""

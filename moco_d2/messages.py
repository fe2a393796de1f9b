"""Messages about unknown names, with suggestions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown_name(what: str, name: object, choices: Iterable[str]) -> str:
    """Return the complaint about a setting whose value is not among the choices: value, rule and suggestion."""
    known = list(choices)
    words = ", ".join(word or "empty" for word in known)
    return f"{what} is {name!r}; it must be one of {words}{did_you_mean(name, known)}"


def did_you_mean(name: object, choices: Iterable[str], most: int = 1) -> str:
    """Return the end of a message: up to ``most`` similar choices, or an empty string if there are none."""
    words = list(choices)
    same = [word for word in words if word.lower() == str(name).lower()]  # except for upper and lower case
    near = same or difflib.get_close_matches(str(name), words, n=most)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""

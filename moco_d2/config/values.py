"""Checks of the values of config keys: they have the type of their default, and are finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from moco_d2.config import roles

# Other words for a value: this key was a switch once, and may be used like one.
_SAME = {"ENGINE.COMPILE": {"True": "default", "False": ""}}


def canonical(key: str, value: Any) -> Any:
    """Return the value of a key, or the one that it is another word for."""
    return _SAME.get(key, {}).get(str(value), value)


def mistyped(stage: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, complaint) for each key that a stage reads with a value of a wrong type, or not finite.

    Args:
        stage: pretraining or fine-tuning.
        values: of all keys.
        defaults: of all keys except ``SSL.ARGS``, which the method's constructor defines.
    """
    for key, value in values.items():
        like = defaults.get(key)
        if like is None or not roles.role(key, stage):
            continue
        if not fits(value, type(like)) or not _parts_fit(value, like):
            yield key, wrong_type(key, value, like)
        elif isinstance(like, tuple) and key in roles.PATHS and not all(isinstance(part, str) for part in value):
            yield key, f"{key} is {value!r}; it must contain names and paths, as text"
        elif isinstance(value, float) and not math.isfinite(value):
            yield key, f"{key} is {value}; it must be finite"


def wrong_type(key: str, value: Any, like: Any) -> str:
    """Return the complaint about a value whose type is not that of the key's present value."""
    if isinstance(like, Mapping):
        return f"{key} is a group of keys and cannot be set to {value!r}; it has {', '.join(like)}"
    if fits(value, type(like)):
        return f"{key} is {value!r}; its items must be of the same kind as in {like!r}"
    kind = "list or tuple" if isinstance(like, list | tuple) else type(like).__name__
    return f"{key} is {value!r}; it must be {'an' if kind[0] in 'aeiou' else 'a'} {kind}, as {like!r} is"


def fits(value: Any, wanted: Any) -> bool:
    """Tell whether a value has a type. A whole number counts as a float; a bool counts as nothing else.

    Of an annotation such as ``list[int]`` only the outer type is checked; what is not a type (``Any``) fits everything.
    """
    origin = get_origin(wanted)
    if origin is Literal:
        return value in get_args(wanted)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in get_args(wanted))
    wanted = origin or wanted
    if wanted is Any or not isinstance(wanted, type):
        return True
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, {float: (int, float), list: (list, tuple), tuple: (list, tuple)}.get(wanted, wanted))


def _parts_fit(value: Any, like: Any) -> bool:
    """Tell whether the items of a list or tuple have the type of the default's items, if there are any."""
    if not isinstance(like, (list, tuple)) or not like or not isinstance(value, (list, tuple)):
        return True
    # In Detectron2's tuples int and float differ; its lists of numbers (sizes of anchors, of crops) take either.
    numbers = isinstance(like, list) and isinstance(like[0], (int, float)) and not isinstance(like[0], bool)
    wanted = float if numbers else type(like[0])
    return all(fits(part, wanted) and _parts_fit(part, like[0]) for part in value)

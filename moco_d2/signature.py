"""The arguments of methods and encoders that a config sets: names, defaults and types, by their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moco_d2.messages import did_you_mean

_VALUES = (int, float, str, list, tuple, dict, type(None))  # of a config; a bool is an int


def defaults(name: str, function: Callable[..., Any], given: Iterable[str]) -> dict[str, Any]:
    """Return a function's arguments with their defaults, as a config states them.

    Args:
        name: of the method or encoder, for messages.
        function: constructs it. Its ``*args`` and ``**kwargs`` cannot be set by a config, and are left out.
        given: arguments that the program fills in.

    Raises:
        ValueError: an argument has no default, or one that a config cannot hold.
    """
    found = {}
    for key, parameter in inspect.signature(function).parameters.items():
        if key in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            raise ValueError(
                f"{name}: its argument {key} has no default; every argument that a config can set needs one"
            )
        if not isinstance(parameter.default, _VALUES):
            raise ValueError(
                f"{name}: the default of its argument {key} is {parameter.default!r}; a config can hold only numbers, "
                "text, None, lists, tuples and dictionaries"
            )
        found[key] = parameter.default
    return found


def types(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function's arguments; an argument without one has the type of its default."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:  # a name is imported for type checkers only
        signature = inspect.signature(function)
    found = {}
    for key, parameter in signature.parameters.items():
        annotation = parameter.annotation
        if annotation is parameter.empty or isinstance(annotation, str):
            annotation = Any if parameter.default in (parameter.empty, None) else type(parameter.default)
        found[key] = annotation
    return found


def refuse_unknown(group: str, name: str, args: Mapping[str, Any], accepted: Mapping[str, Any]) -> None:
    """Raise ValueError if a group of the config has an argument that the method or encoder does not accept."""
    for key in args:
        if key not in accepted:
            raise ValueError(f"{group} has {key!r}; {name} accepts {', '.join(accepted)}{did_you_mean(key, accepted)}")

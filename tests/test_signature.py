"""The signatures that a user's method or encoder may have, and what a config can then set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Optional

import pytest

from moco_d2.config.values import fits
from moco_d2.signature import defaults, refuse_unknown, types

if TYPE_CHECKING:
    from collections.abc import Callable


def annotated(
    encoder: Any, mode: Literal["a", "b"] = "a", tau: float | None = None, top: Optional[int] = 3,  # noqa: UP045
    sizes: tuple[int, ...] = (1, 2), anything=None, plain=0.5, *more: int, **rest: int,
) -> None:  # fmt: skip
    """Take arguments with annotations of many kinds, and without any."""


def unresolved(encoder: Callable[..., Any], dim: int = 8, tau: float | None = None) -> None:
    """Take arguments whose annotations cannot be evaluated, because one of their names is for type checkers only."""


def test_all_but_the_given_and_the_variable_arguments_can_be_set() -> None:
    expected = {"mode": "a", "tau": None, "top": 3, "sizes": (1, 2), "anything": None, "plain": 0.5}
    assert defaults("f", annotated, ("encoder",)) == expected
    refuse_unknown("SSL.ARGS", "f", {"mode": "b"}, expected)
    with pytest.raises(ValueError, match=r"SSL\.ARGS has 'rest'; f accepts mode, tau"):
        refuse_unknown("SSL.ARGS", "f", {"rest": 1}, expected)


def test_arguments_that_a_config_cannot_set_are_refused() -> None:
    with pytest.raises(ValueError, match="the method F: its argument encoder has no default; every argument"):
        defaults("the method F", unresolved, ())
    with pytest.raises(ValueError, match="f: the default of its argument made is <class 'set'>; a config can hold"):
        defaults("f", lambda made=set: made, ())


@pytest.mark.parametrize(
    ("argument", "good", "bad"),
    [
        ("mode", ["a", "b"], ["c", 1]),
        ("tau", [None, 0.5, 1], ["0.5", True]),
        ("top", [None, 1], [0.5, True]),
        ("sizes", [(1,), [1, 2]], [1, "12"]),
        ("anything", [None, True, "x", [1]], []),
        ("plain", [1, 0.5], ["x", None, True]),
    ],
)
def test_values_are_compared_with_the_annotation_or_the_default(argument: str, good: list[Any], bad: list[Any]) -> None:
    wanted = types(annotated)[argument]
    assert all(fits(value, wanted) for value in good) and not any(fits(value, wanted) for value in bad)


def test_annotations_that_cannot_be_evaluated_give_way_to_the_defaults() -> None:
    assert types(unresolved) == {"encoder": Any, "dim": int, "tau": Any}

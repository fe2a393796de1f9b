"""Rules of the fields of labels: which values are allowed, and which of them are normalised.

Every field of an image, an annotation or a category of a COCO file passes :func:`plain_record`; XML's texts pass the
same rules. ``null`` means that the field is absent. A number may be text (``"12"``), because its meaning is certain;
a value of uncertain meaning is a problem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moco_d2.detection.labels.files import shown

# No picture, box or area is larger. Beyond it floats no longer tell neighbouring numbers apart.
_LIMIT = 2**53
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_FLAGS = {"0": 0, "false": 0, "1": 1, "true": 1}


def number(value: Any) -> float:
    """Return a finite number; text of one is that number.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value):
        value = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    if type(value) in (int, float) and -_LIMIT < value < _LIMIT:
        return value
    raise ValueError(value)


def numbers(values: Any) -> list[float]:
    """Return a list of finite numbers, the same object if it is one already.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(values, list):
        raise ValueError(values)
    if {*map(type, values)} <= {int, float} and all(-_LIMIT < value < _LIMIT for value in values):
        return values
    return [number(value) for value in values]


def whole(value: Any) -> int:
    """Return a whole number; 12.0 and "12" are 12.

    Raises:
        ValueError: it is none.
    """
    found = number(value)
    if found != math.floor(found):
        raise ValueError(value)
    return int(found)


def side(value: Any) -> int | None:
    """Return a picture's width or height, or None for 0, which tools write for a size that they do not know.

    Raises:
        ValueError: it is none.
    """
    found = whole(value)
    if found < 0:
        raise ValueError(value)
    return found or None


def flag(value: Any) -> int:
    """Return 0 or 1; false and true, also as text, are 0 and 1.

    Raises:
        ValueError: it is none of them.
    """
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    found = whole(value)
    if found not in (0, 1):
        raise ValueError(value)
    return found


def identity(value: Any) -> int | str:
    """Return an id: a whole number of any size, or text.

    Raises:
        ValueError: it is none.
    """
    if type(value) is int or (isinstance(value, str) and value):
        return value
    if isinstance(value, float):
        return whole(value)
    raise ValueError(value)


def text(value: Any) -> str:
    """Return text that is not empty.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return value
    raise ValueError(value)


def _box(value: Any) -> list[float]:
    found = numbers(value)
    if len(found) != 4:
        raise ValueError(value)
    return found


def _area(value: Any) -> float:
    found = number(value)
    if found < 0:
        raise ValueError(value)
    return found


_Rule = tuple[Callable[[Any], Any], str]
_ID: _Rule = (identity, "it must be a whole number or text")
_TEXT: _Rule = (text, "it must be text")
_SIDE: _Rule = (side, "it must be a positive whole number")
_FLAG: _Rule = (flag, "it must be 0 or 1")
RULES: Mapping[str, Mapping[str, _Rule]] = {
    "images": {"id": _ID, "file_name": _TEXT, "width": _SIDE, "height": _SIDE},
    "annotations": {
        "id": _ID, "image_id": _ID, "category_id": _ID, "iscrowd": _FLAG, "ignore": _FLAG,
        "bbox": (_box, "it must be [x, y, width, height], four numbers"),
        "area": (_area, "it must be a number, at least 0; leave it out, and it is computed"),
    },
    "categories": {"id": _ID, "name": _TEXT},
}  # fmt: skip


def plain_record(kind: str, record: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a record with plain fields, and its first problem or None.

    Args:
        kind: ``images``, ``annotations`` or ``categories``.
        record: is not changed; it is returned itself if nothing in it needs a change.
    """
    values = {}
    for field, (rule, said) in RULES[kind].items():
        if field not in record:
            continue
        value = record[field]
        try:
            values[field] = None if value is None else rule(value)
        except ValueError:
            return record, f"has {field} {shown(value)}; {said}"
    return replaced(record, **values), None


def replaced(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a record with other values, of which None takes the field away; the same object if none differs."""
    different = {
        field: value
        for field, value in values.items()
        if (value is not None or field in record) and not _same(record.get(field), value)
    }
    if not different:
        return record
    gone = {field for field, value in different.items() if value is None}
    return {field: value for field, value in {**record, **different}.items() if field not in gone}


def _same(old: Any, new: Any) -> bool:
    # Python takes True, 1 and 1.0 for equal, also in lists; other programs that read the labels do not.
    return old is new is not None or (isinstance(new, (int, float, str)) and type(old) is type(new) and old == new)


class Ids:
    """Ids of one list, which another list refers to.

    A reference that is text where the id is a number, or the other way round, is found by its text, unless two ids of
    the list have the same text.
    """

    def __init__(self, ids: Mapping[int | str, Any]) -> None:
        by_text = {str(known): known for known in ids}
        self._ids, self._by_text = ids, by_text if len(by_text) == len(ids) else {}

    def find(self, reference: int | str | None) -> int | str | None:
        """Return the id that is meant, or None."""
        if reference is None or reference in self._ids:
            return reference
        return self._by_text.get(str(reference))

    def __str__(self) -> str:
        """Tell what the ids are like."""
        few = ", ".join(shown(known, 30) for known in list(self._ids)[:3])
        return f"{few}, ... ({len(self._ids)} in all)" if len(self._ids) > 3 else few or "none"


def known_ids(values: Iterable[Any]) -> dict[int | str, None]:
    """Return what of the values is an id, in order."""
    found: dict[int | str, None] = {}
    for value in values:
        try:
            found[identity(value)] = None
        except ValueError:
            continue  # reported where its record is read
    return found

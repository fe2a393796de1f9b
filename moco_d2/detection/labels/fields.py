"""Rules for the fields of labels: which values are valid, and how they are normalised.

All images, annotations and categories of a COCO file pass :func:`normalised`; VOC's XML uses the same rules. ``null``
means that a field is absent. A number may be text (``"12"``), because its meaning is certain; a value whose meaning
is not certain is a problem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moco_d2.detection.labels.files import shown

# No picture, box or area is larger, and a float cannot represent every whole number beyond it.
_LIMIT = 2**53
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_FLAGS = {"0": 0, "false": 0, "1": 1, "true": 1}


def number(value: Any) -> float:
    """Return a finite number; text such as ``"12"`` is converted.

    Raises:
        ValueError: the value is not a finite number.
    """
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value):
        value = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    if type(value) in (int, float) and -_LIMIT < value < _LIMIT:
        return value
    raise ValueError(value)


def numbers(values: Any) -> list[float]:
    """Return a list of finite numbers; the same object if nothing needs conversion.

    Raises:
        ValueError: the value is not a list of finite numbers.
    """
    if not isinstance(values, list):
        raise ValueError(values)
    if {*map(type, values)} <= {int, float} and all(-_LIMIT < value < _LIMIT for value in values):
        return values
    return [number(value) for value in values]


def whole(value: Any) -> int:
    """Return a whole number; 12.0 and "12" are 12.

    Raises:
        ValueError: the value is not a whole number.
    """
    found = number(value)
    if found != math.floor(found):
        raise ValueError(value)
    return int(found)


def side(value: Any) -> int | None:
    """Return a picture's width or height; None for 0, which tools write if they do not know it.

    Raises:
        ValueError: the value is negative, or not a whole number.
    """
    found = whole(value)
    if found < 0:
        raise ValueError(value)
    return found or None


def flag(value: Any) -> int:
    """Return 0 or 1; false and true, also as text, are 0 and 1.

    Raises:
        ValueError: the value is not a flag.
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
        ValueError: the value is not an id.
    """
    if type(value) is int or (isinstance(value, str) and value):
        return value
    if isinstance(value, float):
        return whole(value)
    raise ValueError(value)


def text(value: Any) -> str:
    """Return text that is not empty.

    Raises:
        ValueError: the value is not text, or is empty.
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
        "area": (_area, "it must be a number of at least 0; if you remove it, it is computed"),
    },
    "categories": {"id": _ID, "name": _TEXT},
}  # fmt: skip


def normalised(kind: str, record: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a record with normalised fields, and its first problem or None.

    Args:
        kind: ``images``, ``annotations`` or ``categories``.
        record: not changed; the same object is returned if no field needs a change.
    """
    values = {}
    for field, (rule, requirement) in RULES[kind].items():
        if field not in record:
            continue
        value = record[field]
        try:
            values[field] = None if value is None else rule(value)
        except ValueError:
            return record, f"has {field} {shown(value)}; {requirement}"
    return replaced(record, **values), None


def replaced(record: dict[str, Any], **values: Any) -> dict[str, Any]:
    """Return a record with other values; None removes a field. It is the same object if no value differs."""
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
    # For Python True, 1 and 1.0 are equal, but not for other programs that read the labels.
    return old is new is not None or (isinstance(new, (int, float, str)) and type(old) is type(new) and old == new)


class Ids:
    """The ids of one list, to which another list refers.

    A reference may be text where the id is a number, or a number where it is text, unless two ids have the same text.
    """

    def __init__(self, ids: Mapping[int | str, Any]) -> None:
        by_text = {str(known): known for known in ids}
        self._ids, self._by_text = ids, by_text if len(by_text) == len(ids) else {}

    def find(self, reference: int | str | None) -> int | str | None:
        """Return the id of a reference, or None if there is none."""
        if reference is None or reference in self._ids:
            return reference
        return self._by_text.get(str(reference))

    def __str__(self) -> str:
        """Return a few of the ids, for a message."""
        few = ", ".join(shown(known, 30) for known in list(self._ids)[:3])
        return f"{few}, ... ({len(self._ids)} in all)" if len(self._ids) > 3 else few or "none"


def known_ids(values: Iterable[Any]) -> dict[int | str, None]:
    """Return the values that are valid ids, in order."""
    found: dict[int | str, None] = {}
    for value in values:
        try:
            found[identity(value)] = None
        except ValueError:
            continue  # reported where its record is read
    return found

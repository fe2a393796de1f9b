"""Masks of labels and detections, validated because pycocotools reads past the end of malformed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as mask_api

from moco_d2.detection.labels.fields import numbers, whole

# Characters of a packed number: seven hold a run of 2^35 pixels.
_LONGEST = 7


def polygons(value: Any, size: tuple[int, int]) -> list[list[float]]:
    """Return a mask's polygons; the same object if nothing needs conversion.

    Args:
        value: the mask in the labels.
        size: width and height of the picture.

    Raises:
        ValueError: the value is not a list of polygons; the message completes "has ...".
    """
    try:
        found = [numbers(polygon) for polygon in value] if isinstance(value, list) else None
    except ValueError:
        found = None
    if not found:
        raise ValueError(
            "a segmentation that is neither a list of polygons [[x, y, x, y, ...], ...] nor a run-length mask"
        )
    if all(len(polygon) == 2 for polygon in found) and len(found) >= 3:
        raise ValueError("points [[x, y], ...] for a segmentation; a list of polygons is [[x, y, x, y, ...], ...]")
    if not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in found):
        raise ValueError("a polygon of fewer than three points (x, y), or with half a point")
    # Points outside the picture are clipped, but drawing a polygon that is far larger takes pycocotools hours and all
    # memory.
    for polygon in found:
        for along, length in zip((polygon[::2], polygon[1::2]), size, strict=True):
            if min(along) < -length or max(along) > 2 * length:
                raise ValueError(f"a polygon far outside the image of {size[0]} x {size[1]}")
    return value if all(new is old for new, old in zip(found, value, strict=True)) else found


def run_lengths(value: Mapping[str, Any], size: tuple[int, int], empty: bool = False) -> Mapping[str, Any]:
    """Return a run-length mask; the same object if nothing needs conversion.

    Args:
        value: the mask in the labels.
        size: width and height of the picture.
        empty: whether the mask may have no pixel. A detection's may; an object's would be left out of training.

    Raises:
        ValueError: the value is not a mask of this picture; the message completes "has ...".
    """
    height_width, counts = [size[1], size[0]], value.get("counts") or ()
    if not isinstance(value.get("size"), list) or value["size"] != height_width:
        raise ValueError(f"a run-length mask of size {value.get('size')!r}; it must be {height_width}, the image's")
    try:
        runs = unpacked(counts) if isinstance(counts, str) else np.array([whole(run) for run in counts], np.int64)
    except (ValueError, TypeError):
        raise ValueError("a run-length mask whose counts are neither whole numbers nor COCO's packed text") from None
    if len(runs) and runs.min() < 0:
        raise ValueError("a run-length mask with a negative count")
    if (total := sum(runs.tolist())) != size[0] * size[1]:
        raise ValueError(f"a run-length mask of {total} pixels for an image of {size[0]} x {size[1]}")
    if not empty and not runs[1::2].any():
        raise ValueError("a run-length mask without a pixel")
    if isinstance(counts, str) or {*map(type, counts)} == {int}:
        return value
    return {"size": height_width, "counts": runs.tolist()}


def unpacked(counts: str) -> npt.NDArray[np.int64]:
    """Return the run lengths that COCO packs into text.

    Each character holds five bits of a number, lowest first, and a flag that another character follows. The top bit of
    the last character is the sign. From the fourth number on, each is the difference to the number two before it.

    Raises:
        ValueError: the text is malformed.
    """
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if not len(codes):
        raise ValueError("empty")
    last = np.flatnonzero(codes & 0x20 == 0)
    if codes.min() < 0 or codes.max() > 0x3F or not len(last) or last[-1] != len(codes) - 1:
        raise ValueError("malformed")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _LONGEST:
        raise ValueError("a number is too long")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(first, lengths))
    runs = np.add.reduceat((codes & 0x1F) << shifts, first)
    runs -= (codes[last] & 0x10 != 0).astype(np.int64) << (5 * lengths)
    for start in (1, 2):
        runs[start::2] = np.cumsum(runs[start::2])
    return runs


def packed(mask: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run-length mask with its counts packed as text, the form that libraries expect of detections."""
    if isinstance(mask["counts"], str):
        return dict(mask)
    code = mask_api.frPyObjects(dict(mask), *mask["size"])
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def area(mask: Any, size: tuple[int, int]) -> float:
    """Return the number of pixels of a validated mask."""
    if isinstance(mask, Mapping):
        return float(mask_api.area(packed(mask)))
    return float(mask_api.area(mask_api.merge(mask_api.frPyObjects(mask, size[1], size[0]))))


def is_blank(value: Sequence[Sequence[float]], size: tuple[int, int]) -> bool:
    """Return whether validated polygons cover no pixel of a picture of (width, height)."""
    # Drawing all polygons of a large data set takes minutes, so only those that are thin or cross the border are drawn.
    return not any(_is_broad(polygon, size) for polygon in value) and area(value, size) == 0


def _is_broad(polygon: Sequence[float], size: tuple[int, int]) -> bool:
    x, y = polygon[::2], polygon[1::2]
    if min(x) < 0 or min(y) < 0 or max(x) > size[0] or max(y) > size[1]:
        return False
    twice = sum(a * d - b * c for a, b, c, d in zip(x, y, [*x[1:], x[0]], [*y[1:], y[0]], strict=True))
    return abs(twice) / 2 > 2 * max(max(x) - min(x), max(y) - min(y)) + 4

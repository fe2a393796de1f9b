"""Detections in files, from this project or others, read and checked before they are evaluated.

Without the check, a detection with an unknown category or an invalid box would count as a miss or crash a library.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moco_d2.detection.labels.fields import Ids, identity
from moco_d2.detection.labels.files import read_json, shown
from moco_d2.detection.labels.masks import packed, run_lengths
from moco_d2.detection.labels.sets import listed

Detection = dict[str, Any]
_NEEDED = ("image_id", "category_id", "score")
# A detection has at least one of these.
_SHAPES = ("bbox", "segmentation", "keypoints")


def read_detections(
    path: str | os.PathLike[str],
    images: Mapping[Any, Mapping[str, Any]],
    categories: Mapping[Any, str],
    name: str,
    left_out: Collection[Any] = (),
) -> list[Detection]:
    """Return the detections of a file in COCO's format.

    Args:
        path: the file.
        images: the data set's images by id.
        categories: the names of its categories by id.
        name: the data set's name.
        left_out: ids of categories whose objects, and detections, are left out.

    Raises:
        ValueError: the file has another format, or records are wrong; the message names the first and counts them.
    """
    content, _ = read_json(Path(path))
    if not isinstance(content, list) or not all(isinstance(found, dict) for found in content):
        raise ValueError(
            f"{path} does not hold detections in COCO's format: a list of objects with {', '.join(sorted(_NEEDED))} "
            "and bbox, segmentation or keypoints"
        )
    reader = _Reader(name, images, categories, left_out, content)
    detections, wrong = [], []
    for index, found in enumerate(content):
        try:
            detection = reader.detection(found)
        except ValueError as error:
            wrong.append(f"record {index} {error}")
            continue
        if detection["category_id"] not in left_out:
            detections.append(detection)
    if wrong:
        more = f" ({len(wrong)} of {len(content)} records are wrong)" if len(wrong) > 1 else ""
        raise ValueError(f"{path}: {wrong[0]}{more}")
    return detections


class _Reader:
    """The rules for a detection in COCO's format."""

    def __init__(
        self,
        name: str,
        images: Mapping[Any, Mapping[str, Any]],
        categories: Mapping[Any, str],
        left_out: Collection[Any],
        content: Sequence[Detection],
    ) -> None:
        self.name, self.images, self.categories = name, images, categories
        self.image_ids, self.category_ids = Ids(images), Ids({**categories, **dict.fromkeys(left_out)})
        # Libraries infer from the first detection what all of them have, so all must have the same.
        self.shapes = [key for key in _SHAPES if any(found.get(key) is not None for found in content)]
        self.points = next((len(f["keypoints"]) for f in content if isinstance(f.get("keypoints"), list)), 3)
        self.as_indices = _as_indices(content, categories)

    def detection(self, found: Detection) -> Detection:
        """Return a normalised detection.

        Raises:
            ValueError: what is wrong; the message continues a sentence that begins with the record.
        """
        missing = [key for key in (*_NEEDED, *(self.shapes or ("bbox",))) if found.get(key) is None]
        if missing:
            others = ", but other records have" if missing[0] in _SHAPES and self.shapes else ""
            raise ValueError(f"has no {missing[0]}{others}")
        image = self.image_ids.find(_id(found, "image_id"))
        if image is None:
            given = shown(found["image_id"])
            raise ValueError(f"has image_id {given}, which is not in {self.name!r}; its ids are {self.image_ids}")
        category = self.category_ids.find(_id(found, "category_id"))
        if category is None:
            known = listed([f"{own!r} ({name})" for own, name in self.categories.items()])
            raise ValueError(
                f"has category_id {shown(found['category_id'])}, which is not in {self.name!r}; its ids are {known}"
                f"{self.as_indices}"
            )
        _numbers(found, "score", [found["score"]], 1)
        detection = {**found, "image_id": image, "category_id": category}
        if "bbox" in self.shapes:
            box = _numbers(found, "bbox", found["bbox"], 4)
            if min(box[2:]) < 0:
                raise ValueError(f"has bbox {box}; it must be [x, y, width, height] with width and height of 0 or more")
        if "keypoints" in self.shapes:
            points = _numbers(found, "keypoints", found["keypoints"], self.points)
            if not points or len(points) % 3:
                raise ValueError(f"has {len(points)} numbers in keypoints; it must have x, y, score of each keypoint")
        if "segmentation" in self.shapes:
            detection["segmentation"] = self._mask(found["segmentation"], image)
        return detection

    def _mask(self, mask: Any, image: Any) -> dict[str, Any]:
        if not isinstance(mask, dict):
            raise ValueError(f"has segmentation {shown(mask)}; it must be a run-length mask with size and counts")
        size = self.images[image].get("width"), self.images[image].get("height")
        if None in size and isinstance(mask.get("size"), list) and len(mask["size"]) == 2:
            size = mask["size"][1], mask["size"][0]  # label files may lack the sizes of their images
        try:
            return packed(run_lengths(mask, size, empty=True))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"has {error}") from None


def _id(found: Detection, key: str) -> int | str:
    try:
        return identity(found[key])
    except ValueError:
        raise ValueError(f"has {key} {shown(found[key])}; it must be one of the data set's ids") from None


def _numbers(found: Detection, key: str, values: Any, count: int) -> list[float]:
    """Return the values, which must be ``count`` finite numbers. Numbers as text are refused: a program wrote them."""
    if isinstance(values, list) and len(values) == count and all(map(_is_finite, values)):
        return values
    what = "a finite number" if key == "score" else f"a list of {count} finite numbers"
    raise ValueError(f"has {key} {shown(found[key])}; it must be {what}")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # false for nan; works for an int of any length


def _as_indices(content: Iterable[Detection], categories: Mapping[Any, str]) -> str:
    """Return the remedy for detections that have class numbers (from 0) in place of category ids."""
    given = {found.get("category_id") for found in content if type(found.get("category_id")) is int}
    if 0 in categories or not given or not given <= set(range(len(categories))):
        return ""
    first, last = (list(categories.items())[at] for at in (0, -1))
    return (
        f". All category ids of the file are between 0 and {len(categories) - 1}, so they may be class numbers: write "
        f"the data set's ids instead, {first[0]} ({first[1]}) for 0 to {last[0]} ({last[1]}) for {len(categories) - 1}"
    )


def read_voc_detections(
    path: str | os.PathLike[str], classes: Sequence[str], images: Collection[str]
) -> dict[str, list[list[Any]]]:
    """Return the rows [image, score, x0, y0, x1, y1] of each class from a file that a VOC evaluation saved.

    Args:
        path: the file.
        classes: names of the data set's classes.
        images: names of its images.

    Raises:
        ValueError: the file has another format; the message names the first wrong row.
    """
    content, _ = read_json(Path(path))
    if not isinstance(content, dict) or {*content} != {*classes}:
        raise ValueError(
            f"{path} does not hold detections of this VOC set: its keys must be the classes {listed(classes)}, each "
            "with a list of [image, score, x0, y0, x1, y1]"
        )
    for name, rows in content.items():
        for index, row in enumerate(rows if isinstance(rows, list) else [rows]):
            problem = _row_problem(row, images)
            if problem:
                raise ValueError(f"{path}: row {index} of {name!r} {problem}")
    return content


def _row_problem(row: Any, images: Collection[str]) -> str | None:
    if not isinstance(row, list) or len(row) != 6 or not isinstance(row[0], str):
        return f"is {shown(row)}; it must be [image, score, x0, y0, x1, y1]"
    if not all(map(_is_finite, row[1:])):
        return f"is {shown(row)}; score and corners must be finite numbers"
    return None if row[0] in images else f"is of image {row[0]!r}, which is not in the test set"

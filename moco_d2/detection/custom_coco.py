"""COCO files as labelling tools write them, read, checked and made plain."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_api

from moco_d2.detection.custom import Entry, Needs, Report, box_problem, listed, size_problem
from moco_d2.io.pictures import picture_size


class JsonFile:
    """The lists of a COCO file, and messages that name a record's line, index and id."""

    def __init__(self, path: Path, report: Report) -> None:
        self.path, self._report = path, report
        self.text = path.read_text(encoding="utf-8-sig")
        self.content = json.loads(self.text)
        self._lines: dict[str, list[int]] = {}
        if not isinstance(self.content, dict):
            report(f"{path}:1: COCO labels are an object with images, annotations and categories")
            self.content = {}

    def records(self, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield index and record of a list; what is no record is reported."""
        records = self.content.get(key) or []
        if not isinstance(records, list):
            self._report(f"{self.path}: {key} must be a list")
            return
        for index, record in enumerate(records):
            if isinstance(record, dict):
                yield index, record
            else:
                self.problem(key, index, f"is {record!r} instead of an object")

    def problem(self, key: str, index: int, what: str) -> None:
        """Report a problem of a record."""
        if key not in self._lines:  # only now: good files never pay for it
            self._lines[key] = record_lines(self.text, key)
        record = self.content[key][index]
        said = f" (id {record.get('id')!r})" if isinstance(record, dict) else ""
        self._report(f"{self.path}:{self._lines[key][index]}: {key}[{index}]{said} {what}")


def record_lines(text: str, key: str) -> list[int]:
    """Return the line on which each record of a top-level list begins, in text that is valid JSON."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        found = between.match(text, at)
        assert found is not None
        return found.end()

    at = skip(text.index("{") + 1)
    while text[at] != "}":
        name, at = decode(text, at)
        at = skip(at)
        if name != key:
            at = skip(decode(text, at)[1])
            continue
        lines, line, counted = [], 1, 0
        at = skip(at + 1)
        while text[at] != "]":
            line, counted = line + text.count("\n", counted, at), at
            lines.append(line)
            at = skip(decode(text, at)[1])
        return lines
    return []


@dataclass(frozen=True)
class CocoLabels:
    """A COCO file made plain.

    Attributes:
        content: images, annotations and categories.
        changed: whether it differs from the file.
        classes: in the order of the detector's outputs.
    """

    content: dict[str, list[dict[str, Any]]]
    changed: bool
    classes: list[str]


def read_coco(entry: Entry, needs: Needs, report: Report) -> CocoLabels | None:
    """Read and check COCO labels; None when the file cannot be read at all."""
    path, folder = entry.json, entry.images
    assert folder is not None
    if path is None:
        report(f"data set {entry.name!r}: json is missing, the file with the labels (or give root and split)")
        return None
    try:
        file = JsonFile(path, report)
    except OSError as error:
        report(f"data set {entry.name!r}: cannot read {path}: {error.strerror}")
        return None
    except ValueError as error:  # of JSON or of its encoding
        report(f"{path}:{getattr(error, 'lineno', 1)}: no valid JSON: {error}")
        return None
    categories, classes, new_category = _coco_categories(file, entry.classes)
    images, new_image = _coco_images(file, folder, needs, report)
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    points = {c["id"]: len(c.get("keypoints", ())) for c in categories}
    annotations = _coco_annotations(file, needs, new_category, new_image, sizes, points)
    if not images:
        report(f"{path}: empty split: no image of it can be used")
    elif not annotations:
        report(f"{path}: empty split: none of its {len(images)} images has a usable object")
    content = {"images": images, "annotations": annotations, "categories": categories}
    changed = any(content[key] != file.content.get(key) for key in content)
    return CocoLabels(content, changed, classes)


def _coco_categories(file: JsonFile, classes: Sequence[str]) -> tuple[list[dict[str, Any]], list[str], dict[Any, Any]]:
    """Return plain categories in the order of their ids, the classes, and the file's ids -> plain ids.

    A category that ``classes`` leaves out maps to :class:`_Left`; it is a problem once an object is of it.
    """
    found: dict[Any, dict[str, Any]] = {}
    names: set[str] = set()
    for index, record in file.records("categories"):
        if not _is_id(record.get("id")) or not isinstance(record.get("name"), str):
            file.problem("categories", index, "needs an id and a name")
        elif record["id"] in found or record["name"] in names:
            file.problem("categories", index, f"has the id or the name ({record['name']!r}) of another: duplicate id")
        else:
            found[record["id"]] = record
            names.add(record["name"])
    ids = sorted(found, key=lambda i: (isinstance(i, str), i))
    if not classes:
        classes = [found[i]["name"] for i in ids]
    in_order = [found[i]["name"] for i in ids] == list(classes) and all(type(i) is int for i in ids)
    if in_order:
        return [found[i] for i in ids], list(classes), {i: i for i in ids}
    by_name = {record["name"]: record for record in found.values()}
    categories = [{**by_name.get(name, {}), "id": n, "name": name} for n, name in enumerate(classes, 1)]
    number = {name: n for n, name in enumerate(classes, 1)}
    return categories, list(classes), {i: number.get(found[i]["name"], _Left(found[i]["name"])) for i in ids}


@dataclass(frozen=True)
class _Left:
    """The name of a category that ``classes`` leaves out."""

    name: str


def _coco_images(
    file: JsonFile, folder: Path, needs: Needs, report: Report
) -> tuple[list[dict[str, Any]], dict[Any, int]]:
    """Return plain images, and the file's ids -> plain ids."""
    found: dict[Any, dict[str, Any]] = {}
    names: set[str] = set()
    if not folder.is_dir():
        report(f"{file.path}: no folder {folder} for its images")
    for index, record in file.records("images"):
        image_id, name = record.get("id"), record.get("file_name")
        if not _is_id(image_id) or not isinstance(name, str) or not name:
            file.problem("images", index, "needs an id and a file_name")
            continue
        if image_id in found or name in names:
            same = "id" if image_id in found else f"file_name {name}"
            file.problem("images", index, f"has the {same} of another image: duplicate id")
            continue
        name = name if (folder / name).is_file() else name.replace("\\", "/")  # written on Windows
        plain = {**record, "file_name": name}
        problem = _coco_image_problem(plain, folder, needs)
        if problem:
            file.problem("images", index, problem)
        else:
            found[image_id] = plain
            names.add(name)
    if all(type(i) is int for i in found):
        return list(found.values()), {i: i for i in found}
    for number, plain in enumerate(found.values(), 1):
        plain["id"] = number
    return list(found.values()), {i: plain["id"] for i, plain in found.items()}


def _coco_image_problem(record: dict[str, Any], folder: Path, needs: Needs) -> str | None:
    """Return what is wrong with an image, or None; a size that is not given is filled in."""
    path = folder / record["file_name"]
    if not path.is_file():
        near = folder / path.name
        hint = f"; there is {near}: set file_name or images so that they join" if near.is_file() else ""
        return f"missing image {path}{hint}"
    said = (record.get("width"), record.get("height"))
    if not any(said):
        try:
            record["width"], record["height"] = picture_size(path)
        except OSError as error:
            return f"{path} cannot be read as a picture: {error}"
    elif not all(type(side) is int and side > 0 for side in said):
        return f"has width {said[0]!r} and height {said[1]!r}; they must be positive integers"
    elif needs.sizes:
        return size_problem(path, (record["width"], record["height"]))
    return None


def _coco_annotations(
    file: JsonFile,
    needs: Needs,
    new_category: Mapping[Any, Any],
    new_image: Mapping[Any, int],
    sizes: Mapping[int, tuple[int, int]],
    points: Mapping[int, int],
) -> list[dict[str, Any]]:
    """Return the plain annotations; those of images that were left out are left out, too."""
    known = {record["id"] for _, record in file.records("images") if _is_id(record.get("id"))}
    names = [str(c.get("name")) for _, c in file.records("categories")]
    found, ids = [], set()
    for index, record in file.records("annotations"):
        number, image_id, category = (record.get(key) for key in ("id", "image_id", "category_id"))
        new = new_category.get(category) if _is_id(category) else None
        problem: str | None
        if number is not None and (not _is_id(number) or number in ids):
            problem = "has the id of another annotation: duplicate id" if _is_id(number) else "has no proper id"
        elif not _is_id(image_id) or image_id not in known:
            problem = f"belongs to image_id {image_id!r}, which is not among the images"
        elif new is None:
            problem = f"has the unknown class category_id {category!r}; categories holds {listed(names)}"
        elif isinstance(new, _Left):
            problem = f"has the unknown class {new.name!r}: it is not in classes"
        elif image_id not in new_image:
            continue  # its image was a problem already
        else:
            plain = {**record, "image_id": new_image[image_id], "category_id": new}
            problem = _coco_object_problem(plain, sizes[plain["image_id"]], needs, points.get(new, 0))
            if not problem:
                found.append(plain)
        ids.add(number if _is_id(number) else None)
        if problem:
            file.problem("annotations", index, problem)
    # pycocotools takes an id of 0 for "not matched".
    if not all(type(a.get("id")) is int and a["id"] > 0 for a in found):
        for number, plain in enumerate(found, 1):
            plain["id"] = number
    return found


def _coco_object_problem(record: dict[str, Any], size: tuple[int, int], needs: Needs, points: int) -> str | None:
    """Return what is wrong with an object, or None; fields with a certain meaning that it lacks are filled in."""
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        return f"has bbox {box!r}; it must be [x, y, width, height]"
    x, y, width, height = box
    problem = box_problem((x, y, x + width, y + height), *size)
    if problem:
        return f"has a box {box} that {problem}"
    if record.get("ignore"):
        return "has ignore set, which Detectron2 does not support; mark regions to ignore with iscrowd"
    record.setdefault("iscrowd", 0)
    problem = _mask_problem(record, size, needs)
    if problem:
        return problem
    if "area" not in record:
        record["area"] = _area(record, size)
    if needs.keypoints:
        return _keypoint_problem(record, needs.keypoints, points)
    return None


def _mask_problem(record: dict[str, Any], size: tuple[int, int], needs: Needs) -> str | None:
    mask = record.get("segmentation")
    problem = None
    if not mask:
        problem = "has no segmentation, which MODEL.MASK_ON needs"
    elif isinstance(mask, dict):
        if list(mask.get("size", ())) != [size[1], size[0]] or not isinstance(mask.get("counts"), (list, str)):
            problem = f"has a run-length mask of size {mask.get('size')!r}; it must be [height, width] of the image"
        elif needs.polygons and not record["iscrowd"]:
            problem = "has a run-length mask: set INPUT.MASK_FORMAT bitmask"
    elif not isinstance(mask, list) or not all(isinstance(p, list) and all(map(_is_number, p)) for p in mask):
        problem = "has a segmentation that is neither a list of polygons [[x, y, x, y, ...], ...] nor a run-length mask"
    elif not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
        problem = "has a polygon without three (x, y) points"
    if problem and needs.masks and not (record["iscrowd"] and not mask):
        return problem
    if problem and not needs.masks and mask and "MASK_FORMAT" not in problem:
        del record["segmentation"]  # Detectron2 would leave out the box with the mask
    return None


def _area(record: Mapping[str, Any], size: tuple[int, int]) -> float:
    mask = record.get("segmentation")
    if not mask:
        return float(record["bbox"][2] * record["bbox"][3])
    if isinstance(mask, dict) and isinstance(mask["counts"], str):
        return float(mask_api.area(mask))
    codes = mask_api.frPyObjects(mask, size[1], size[0])
    return float(mask_api.area(mask_api.merge(codes) if isinstance(codes, list) else codes))


def _keypoint_problem(record: dict[str, Any], wanted: int, named: int) -> str | None:
    if named != wanted:
        return f"has a category of {named} keypoints, but MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {wanted}"
    points = record.setdefault("keypoints", [0] * 3 * wanted)
    if not isinstance(points, list) or len(points) != 3 * wanted or not all(map(_is_number, points)):
        return f"must have {wanted} keypoints of three numbers (x, y, visibility)"
    record.setdefault("num_keypoints", sum(seen > 0 for seen in points[2::3]))
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and value == value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def keypoint_metadata(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return Detectron2's metadata on keypoints, from the names and skeleton of the first category that has them.

    A point whose name says left is the mirror image of the one that says right.
    """
    category = next((c for c in categories if c.get("keypoints")), None)
    if category is None:
        return {}
    names = list(category["keypoints"])
    swap = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
    mirrored = [(a, a.replace(old, new)) for a in names for old, new in swap.items() if old in a]
    bones = [(a - 1, b - 1) for a, b in category.get("skeleton") or () if 0 < min(a, b) <= max(a, b) <= len(names)]
    return {
        "keypoint_names": names,
        "keypoint_flip_map": [pair for pair in mirrored if pair[1] in names],
        "keypoint_connection_rules": [(names[a], names[b], (255, 128, 0)) for a, b in bones],
    }

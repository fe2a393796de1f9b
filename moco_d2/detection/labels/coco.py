"""Reader of COCO files as labelling tools write them: validates and normalises them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

from moco_d2.data.listing import EXTENSIONS
from moco_d2.detection.labels import masks
from moco_d2.detection.labels.categories import Categories, read_categories
from moco_d2.detection.labels.fields import Ids, known_ids, normalised, replaced
from moco_d2.detection.labels.files import JsonFile, shown
from moco_d2.detection.labels.keypoints import keypoint_metadata, normalised_keypoints, without_keypoints
from moco_d2.detection.labels.sets import Entry, Faults, Needs, Report, Setting, box_problem, size_problem
from moco_d2.io.pictures import picture_size

__all__ = ["CocoLabels", "keypoint_metadata", "picture_name", "read_coco"]

Record = dict[str, Any]
# Programs that read an id as a float lose the last digits of a larger one.
_LARGEST_ID = 2**53


@dataclass(frozen=True)
class CocoLabels:
    """A normalised COCO file.

    Attributes:
        content: images, categories and, unless the file has no labels, annotations.
        changed: whether ``content`` differs from the file.
        classes: their names, in the order of the detector's outputs.
        own_ids: ``image_id`` and ``category_id``, if they differ from the file's: normalised id -> id in the file.
        left_out_ids: ids, in the file, of the categories whose objects are left out.
        notes: what was left out or recognised, for the log.
        dropped: the faults of the objects that were dropped, a line each.
    """

    content: dict[str, list[Record]]
    changed: bool
    classes: list[str]
    own_ids: dict[str, dict[int, int | str]]
    left_out_ids: list[int | str]
    notes: list[str]
    dropped: list[str]


def read_coco(entry: Entry, needs: Needs, report: Report) -> CocoLabels | None:
    """Read and validate COCO labels; None if the file cannot be read at all."""
    path, folder = entry.json, entry.images
    assert folder is not None
    if path is None:
        report(
            f"data set {entry.name!r}: json is missing; it must be the file with the labels (or give root and split)"
        )
        return None
    if not folder.is_dir():
        report(f"data set {entry.name!r}: {folder} is not a folder; images must be the folder of the pictures")
        return None
    try:
        file = JsonFile(path, report)
    except ValueError as error:
        report(str(error))
        return None
    categories = read_categories(file, entry, needs, report)
    faults = Faults(entry, report)
    images, new_image = _images(file, folder, needs, faults)
    faults.settle()
    faults = Faults(entry, report)
    annotations, left_out = _annotations(file, needs, categories, images, new_image, faults)
    dropped = faults.settle()
    content = {"images": images, "annotations": annotations, "categories": categories.records}
    notes = categories.notes + [f"{count} objects of {name} are left out" for name, count in sorted(left_out.items())]
    if not images:
        report(f"{path}: no usable image; the list images must name at least one")
    elif not needs.trains and not file.content.get("annotations"):
        del content["annotations"]  # which tells Detectron2 that there is nothing to evaluate
        notes.append("no labels: detections are saved, but not evaluated")
    elif faults.refused:
        pass  # What is left of such a set says nothing more about it.
    elif not annotations:
        report(f"{path}: none of the {len(images)} images has a usable object")
    elif all(record["iscrowd"] for record in annotations):
        report(
            f"{path}: all objects of the {len(images)} images are crowds, which are neither trained on nor evaluated; "
            "set iscrowd to 0 for single objects" + ", or remove annotations to save detections" * (not needs.trains)
        )
    if needs.masks:
        notes += _blank_masks(images, annotations)
    own_ids = {
        key: {new: own for own, new in ids.items()}
        for key, ids in (("image_id", new_image), ("category_id", categories.new))
        if any(own != new for own, new in ids.items())
    }
    changed = not file.utf8 or any(
        (key in content) != (key in file.content) or not _same(content.get(key), file.content.get(key))
        for key in ("images", "annotations", "categories")
    )
    return CocoLabels(content, changed, categories.classes, own_ids, list(categories.left_out), notes, dropped)


def _blank_masks(images: Iterable[Record], annotations: Iterable[Record]) -> list[str]:
    """Return a note on the objects whose polygons cover no pixel, if any."""
    by_id = {image["id"]: image for image in images}
    blank = []
    for record in annotations:
        image, mask = by_id[record["image_id"]], record["segmentation"]
        drawn = isinstance(mask, list) and not record["iscrowd"]
        if drawn and masks.is_blank(mask, (image["width"], image["height"])):
            blank.append(f"bbox {record['bbox']} in {image['file_name']}")
    if not blank:
        return []
    return [
        f"number of objects whose polygons cover no pixel: {len(blank)}, the first with {blank[0]}; no detection can "
        "match such a mask, and with INPUT.MASK_FORMAT bitmask the object is not trained on"
    ]


def _same(plain: list[Record] | None, own: Any) -> bool:
    """Return whether a list holds the file's own records; a changed record is a new object."""
    if plain is None or not isinstance(own, list):
        return plain is own
    return len(plain) == len(own) and all(a is b for a, b in zip(plain, own, strict=True))


def picture_name(folder: Path, name: str) -> str | None:
    """Return a picture's file name on this disk, relative to ``images``, or None if it does not exist.

    Names written on Windows have backslashes; macOS may compose accented letters from other characters.
    """
    slashes = name.replace("\\", "/")
    for option in dict.fromkeys((name, slashes, normalize("NFC", slashes), normalize("NFD", slashes))):
        if os.path.isfile(folder / option):
            return option
    return None


def missing_picture(folder: Path, name: str) -> str:
    """Return the message for a missing picture; it names an existing one with nearly the same name."""
    path = folder / name.replace("\\", "/")
    stem = path.parent / (path.stem if path.suffix.lower() in EXTENSIONS else path.name)
    endings = [ending for extension in EXTENSIONS for ending in (extension, extension.upper())]
    near = [str(folder / path.name), *(f"{stem}{ending}" for ending in endings)]
    there = next((option for option in near if os.path.isfile(option)), None)
    hint = f"; {there} exists: correct file_name, or images in the entry of DATASETS.CUSTOM" if there else ""
    return f"missing image: {path} does not exist{hint}"


def _images(file: JsonFile, folder: Path, needs: Needs, faults: Faults) -> tuple[list[Record], dict[Any, int]]:
    """Return the normalised images, and id in the file -> normalised id."""
    found: dict[Any, Record] = {}
    names: set[str] = set()
    for index, record in file.records("images"):
        faults.total += 1
        plain, problem = normalised("images", record)
        if not problem and not {"id", "file_name"} <= plain.keys():
            problem = "needs an id and a file_name"
        elif not problem and plain["id"] in found:
            problem = "has the id of another image; give it its own"
        elif not problem:
            plain, problem = _image(plain, folder, needs)
        if not problem and os.path.normpath(plain["file_name"]) in names:
            problem = f"has the file_name {plain['file_name']} of another image; list each picture once"
        if problem:
            faults.add(file.place("images", index), problem)
        else:
            found[plain["id"]] = plain
            names.add(os.path.normpath(plain["file_name"]))
    if all(type(i) is int and 0 <= i < _LARGEST_ID for i in found):
        return list(found.values()), {own: own for own in found}
    new = {own: number for number, own in enumerate(found, 1)}
    return [replaced(plain, id=new[own]) for own, plain in found.items()], new


def _image(record: Record, folder: Path, needs: Needs) -> tuple[Record, str | None]:
    """Return an image with its picture's file name and its size, and its problem or None."""
    name = picture_name(folder, record["file_name"])
    if name is None:
        return record, missing_picture(folder, record["file_name"])
    path, width, height = folder / name, record.get("width"), record.get("height")
    if width is None or height is None:
        try:
            found = picture_size(path)
        except (OSError, ValueError) as error:
            return record, f"{path} cannot be read as a picture: {error}"
        if (width or found[0], height or found[1]) != found:
            return record, f"has width {width} and height {height}, but {path} has {found[0]} x {found[1]} pixels"
        width, height = found
    elif needs.sizes and (problem := size_problem(path, (width, height))):
        return record, problem
    return replaced(record, file_name=name, width=width, height=height), None


def _annotations(
    file: JsonFile,
    needs: Needs,
    categories: Categories,
    images: Iterable[Record],
    new_image: Mapping[Any, int],
    faults: Faults,
) -> tuple[list[Record], Counter[str]]:
    """Return the normalised annotations, and how many objects of each class in ``leave_out`` were left out.

    Annotations of images that were reported are left out as well.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in images}
    image_ids = Ids(known_ids(file.values("images", "id")))
    found: list[Record] = []
    ids: set[int | str] = set()
    left_out: Counter[str] = Counter()
    for index, record in file.records("annotations"):
        faults.total += 1
        plain, problem = normalised("annotations", record)
        image, category, bad = None, None, True
        if not problem:
            image, category = image_ids.find(plain.get("image_id")), categories.ids.find(plain.get("category_id"))
            if plain.get("id") in ids:
                problem, bad = "has the id of another annotation; give it its own", False
            elif image is None:
                missing = shown(record.get("image_id"))
                problem = f"has image_id {missing}, but no image has that id; the ids of the images are {image_ids}"
            else:
                problem, bad = categories.problem(category, record.get("category_id")), False
        if not problem:
            ids |= {plain["id"]} if "id" in plain else set()
            if category in categories.left_out:
                left_out[categories.left_out[category]] += 1
            elif image in new_image and category in categories.new:  # otherwise they were reported themselves
                new = {"image_id": new_image[image], "category_id": categories.new[category]}
                names = categories.keypoints[new["category_id"]]
                plain, problem = _object(replaced(plain, **new), sizes[new["image_id"]], needs, names)
                bad = True
                found += [] if problem else [plain]
        if problem:
            faults.add(file.place("annotations", index), problem, bad)
    # For pycocotools an id of 0 means "not matched".
    if not all(type(a.get("id")) is int and 0 < a["id"] < _LARGEST_ID for a in found):
        found = [replaced(plain, id=number) for number, plain in enumerate(found, 1)]
    return found, left_out


def _object(record: Record, size: tuple[int, int], needs: Needs, names: Iterable[str]) -> tuple[Record, str | None]:
    """Return an object with its optional fields filled in, and its problem or None."""
    if "bbox" not in record:
        return record, f"has bbox {record.get('bbox')!r}; it must be [x, y, width, height], four numbers"
    x, y, width, height = record["bbox"]
    problem = box_problem((x, y, x + width, y + height), *size)
    if problem:
        return record, f"has a box {record['bbox']} that {problem}"
    if record.get("ignore"):
        return record, "has ignore set, which Detectron2 does not support; mark regions to ignore with iscrowd 1"
    record = replaced(record, ignore=None, iscrowd=record.get("iscrowd", 0))
    record, problem = _with_mask(record, size, needs)
    if problem:
        return record, problem
    if "area" not in record:
        mask = record.get("segmentation")
        record = replaced(record, area=masks.area(mask, size) if mask else float(width * height))
    elif record["area"] > (size[0] + 2) * (size[1] + 2):
        pixels = f"{size[0]} x {size[1]} pixels"
        return record, f"has area {record['area']}, but its image has {pixels}; if you remove area, it is computed"
    if needs.keypoints:
        return normalised_keypoints(record, size, needs.keypoints, tuple(names))
    return without_keypoints(record), None


def _with_mask(record: Record, size: tuple[int, int], needs: Needs) -> tuple[Record, str | None]:
    """Return an object with a normalised mask, or without an unreadable mask that is not needed; and its problem."""
    mask = record.get("segmentation")
    if not mask:
        if not needs.masks:
            return replaced(record, segmentation=None) if "segmentation" in record and mask is None else record, None
        if not record["iscrowd"]:
            return record, "has no segmentation; add a mask, or pass MODEL.MASK_ON False"
        # A crowd's mask is not learned, but the evaluation needs its pixels.
        x, y, width, height = record["bbox"]
        return replaced(record, segmentation=[[x, y, x + width, y, x + width, y + height, x, y + height]]), None
    if isinstance(mask, dict) and needs.masks and needs.polygons and not record["iscrowd"]:
        return record, Setting("has a run-length mask; pass INPUT.MASK_FORMAT bitmask")
    try:
        plain = (masks.run_lengths if isinstance(mask, dict) else masks.polygons)(mask, size)
    except ValueError as error:
        # With such a mask Detectron2 would leave out the box, too.
        return (record, f"has {error}") if needs.masks else (replaced(record, segmentation=None), None)
    return replaced(record, segmentation=plain), None

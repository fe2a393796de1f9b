"""Files that a data set lists and that are not on the disk or cannot be read, found before a run and not amid it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from moco_d2.builtin_sets import DATASETS
from moco_d2.detection.datasets import ROOT
from moco_d2.detection.labels.coco import read_coco
from moco_d2.detection.labels.sets import Entry, Needs
from moco_d2.detection.labels.voc import read_voc

_NAMED = 5  # files in a message


def needed_files(dataset_name: str) -> list[str]:
    """Return the files and folders that a registered data set must have; its metadata name them unless it is built in.

    Those of the user's own sets have been checked when they were registered.
    """
    meta = MetadataCatalog.get(dataset_name)
    if meta.get("custom"):
        return []
    if dataset_name in DATASETS:
        return [os.path.join(ROOT, path) for path in DATASETS[dataset_name].needed]
    if is_voc_list(dataset_name):
        return [_voc_list(dataset_name), *(os.path.join(meta.dirname, part) for part in ("Annotations", "JPEGImages"))]
    keys = ("split_file", "json_file", "image_root", "sem_seg_root", "image_dir", "gt_dir", "panoptic_root")
    return [meta.get(key) for key in keys if meta.get(key)]


def missing_files(dataset_name: str, paths: Iterable[str]) -> str:
    """Return which files of a data set are not there; empty if all are.

    Each folder is listed once: asking for every file takes minutes on a network's disk.
    """
    names = functools.cache(_files_in)
    total, missing = 0, []
    for path in dict.fromkeys(paths):
        total += 1
        folder, name = os.path.split(path)
        # The disk has the last word: it may take more spellings of a name than a listing shows.
        if not (("://" not in path and name in names(folder)) or PathManager.isfile(path)):
            missing.append(path)
    if not missing:
        return ""
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return (
        f"data set {dataset_name!r}: {len(missing)} of the {total} files that it lists are not there: "
        f"{', '.join(missing[:_NAMED])}{more}. Fetch them, or take them off the list"
    )


def _files_in(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def listed_files(dataset_name: str) -> Iterator[str]:
    """Yield the files that a registered data set lists: pictures, and label files of their own.

    Raises:
        OSError: and whatever else its loader raises where its labels cannot be read.
    """
    meta = MetadataCatalog.get(dataset_name)
    if is_voc_list(dataset_name):  # without parsing what may be missing
        with PathManager.open(_voc_list(dataset_name)) as file:
            for name in file.read().split("\n"):
                if name.strip():
                    yield os.path.join(meta.dirname, "Annotations", f"{name.split()[0]}.xml")
                    yield os.path.join(meta.dirname, "JPEGImages", f"{name.split()[0]}.jpg")
        return
    for record in DatasetCatalog.get(dataset_name):
        yield record["file_name"]
        if "sem_seg_file_name" in record:
            yield record["sem_seg_file_name"]


def unreadable(dataset_name: str, error: Exception) -> str:
    """Say why a registered data set cannot be read, by file and record if its labels are in COCO's or VOC's form.

    Args:
        dataset_name: the data set.
        error: what its loader raised, which often names neither.
    """
    meta, problems = MetadataCatalog.get(dataset_name), list[str]()
    with contextlib.suppress(Exception):  # of a reader that is made for other data sets, and only looks for the cause
        if is_voc_list(dataset_name):
            root, classes = Path(meta.dirname), tuple(meta.thing_classes)
            entry = Entry(dataset_name, "voc", root, None, None, meta.split, classes)
            read_voc(entry, Needs(trains=False), problems.append)
        elif meta.get("evaluator_type") == "coco":
            images = Path(meta.image_root)
            entry = Entry(dataset_name, "coco", images, Path(meta.json_file), images, "", ())
            read_coco(entry, Needs(trains=False), problems.append)
    why = problems[0] if problems else f"{type(error).__name__}: {error}"
    return f"data set {dataset_name!r} cannot be read: {why}"


def is_voc_list(dataset_name: str) -> bool:
    """Return whether a data set is one of Detectron2's VOC sets, whose pictures a text file lists."""
    meta = MetadataCatalog.get(dataset_name)
    return bool(meta.get("dirname") and meta.get("split") and not meta.get("custom"))


def _voc_list(dataset_name: str) -> str:
    meta = MetadataCatalog.get(dataset_name)
    return os.path.join(meta.dirname, "ImageSets", "Main", f"{meta.split}.txt")

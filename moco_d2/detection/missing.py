"""Checks before a run that a data set's files exist and can be read."""

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

_NAMED = 5  # files that a message names


def needed_files(dataset_name: str) -> list[str]:
    """Return the files and folders that a registered data set needs, as its record or its metadata name them.

    The list is empty for an entry of ``DATASETS.CUSTOM``, which was checked when it was registered.
    """
    meta = MetadataCatalog.get(dataset_name)
    if meta.get("custom"):
        return []
    keys = ("split_file", "json_file", "image_root", "sem_seg_root", "image_dir", "gt_dir", "panoptic_root")
    paths = [meta.get(key) for key in keys if meta.get(key)]
    if is_voc_list(dataset_name):
        paths = [_voc_list(dataset_name), *(os.path.join(meta.dirname, part) for part in ("Annotations", "JPEGImages"))]
    record = DATASETS.get(dataset_name)
    if record and all(path.startswith(ROOT) for path in paths):  # unless others registered the name for other files
        return [os.path.join(ROOT, path) for path in record.needed]
    return paths


def missing_files(dataset_name: str, paths: Iterable[str]) -> str:
    """Return a message that names the files of a data set that do not exist; empty if all do.

    Each folder is listed once, because asking for every file takes minutes on a network disk.
    """
    names = functools.cache(_files_in)
    total, missing = 0, []
    for path in dict.fromkeys(paths):
        total += 1
        folder, name = os.path.split(path)
        # The file system decides: it may accept other spellings of a listed name.
        if not (("://" not in path and name in names(folder)) or PathManager.isfile(path)):
            missing.append(path)
    if not missing:
        return ""
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return (
        f"data set {dataset_name!r}: {len(missing)} of the {total} files that its labels name do not exist: "
        f"{', '.join(missing[:_NAMED])}{more}. Add the files, or remove them from the labels"
    )


def _files_in(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def listed_files(dataset_name: str) -> Iterator[str]:
    """Yield the pictures that a registered data set lists, and each picture's own label file.

    Raises:
        Exception: the labels cannot be read; the class depends on the data set's loader.
    """
    meta = MetadataCatalog.get(dataset_name)
    if is_voc_list(dataset_name):  # Its loader would parse annotations, some of which may be missing.
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
    """Return why a registered data set cannot be read. For COCO and VOC labels the message names file and record.

    Args:
        dataset_name: the data set.
        error: what its loader raised; often it names neither.
    """
    meta, problems = MetadataCatalog.get(dataset_name), list[str]()
    with contextlib.suppress(Exception):  # The reader of custom sets is only used to find the cause.
        if is_voc_list(dataset_name):
            root, classes = Path(meta.dirname), tuple(meta.thing_classes)
            entry = Entry(dataset_name, "voc", root, None, None, meta.split, classes, bad_labels="")
            read_voc(entry, Needs(trains=False), problems.append)
        elif meta.get("evaluator_type") == "coco":
            images = Path(meta.image_root)
            entry = Entry(dataset_name, "coco", images, Path(meta.json_file), images, "", (), bad_labels="")
            read_coco(entry, Needs(trains=False), problems.append)
    why = problems[0] if problems else f"{type(error).__name__}: {error}"
    return f"data set {dataset_name!r} cannot be read: {why}"


def is_voc_list(dataset_name: str) -> bool:
    """Return whether a data set is read by Detectron2's VOC loader: a text file lists its pictures."""
    meta = MetadataCatalog.get(dataset_name)
    return bool(meta.get("dirname") and meta.get("split") and not meta.get("custom"))


def _voc_list(dataset_name: str) -> str:
    meta = MetadataCatalog.get(dataset_name)
    return os.path.join(meta.dirname, "ImageSets", "Main", f"{meta.split}.txt")

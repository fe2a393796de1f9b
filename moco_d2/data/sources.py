"""Where images come from: a folder of any shape, or a name in Detectron2's DatasetCatalog."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Source(Protocol):
    """Encoded image files by number."""

    def __len__(self) -> int:
        """Return how many there are."""

    def name(self, index: int) -> str:
        """Return what a person calls the image: its path."""

    def read(self, index: int) -> bytes:
        """Return the file's bytes.

        Raises:
            OSError: it cannot be read.
        """


class FileSource:
    """Image files, by their paths."""

    def __init__(self, files: Sequence[str]) -> None:
        # Detectron2's list holds one serialised buffer, which worker processes share without copying.
        self.files = DatasetFromList(list(files), copy=False)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self.files[index])

    def read(self, index: int) -> bytes:
        """Return the file's bytes."""
        return Path(self.files[index]).read_bytes()


def list_images(sources: Sequence[str]) -> list[str]:
    """List the image files of datasets, without duplicates, in a fixed order.

    Args:
        sources: each a folder (flat, or an ImageFolder tree: subfolders are searched, labels ignored) or a name
            registered in DatasetCatalog (``imagenet_train``, ``coco_2017_train``, ``voc_2007_trainval``, ...).

    Raises:
        ValueError: no source, a name that is neither, or a source without images; the message says what was looked for.
    """
    if not sources:
        raise ValueError("DATASETS.TRAIN is empty; name a folder of images or a registered dataset")
    files: dict[str, None] = {}
    for source in sources:
        files.update(dict.fromkeys(_list_one(source)))
    return list(files)


def _list_one(source: str) -> list[str]:
    if source in DatasetCatalog:
        return _list_registered(source)
    if os.path.isdir(source):
        return list_folder(source)
    near = difflib.get_close_matches(source, DatasetCatalog.list(), n=3)
    hint = f"; nearest names: {', '.join(near)}" if near else ""
    raise ValueError(f"DATASETS.TRAIN names {source!r}, which is neither a folder nor a registered dataset{hint}")


def _list_registered(name: str) -> list[str]:
    # A user's own data set lists its pictures without its labels, which pretraining does not need.
    list_pictures = MetadataCatalog.get(name).get("list_pictures")
    try:
        if list_pictures:
            return list(list_pictures())
        records = DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise ValueError(
            f"dataset {name!r} is registered but its files are not there: {error}. "
            f"Datasets are looked for under $DETECTRON2_DATASETS ({root}); datasets/README.md shows the layout"
        ) from error
    if not records:
        raise ValueError(f"dataset {name!r} has no images")
    return [record["file_name"] for record in records]


def list_folder(folder: str | os.PathLike[str]) -> list[str]:
    """List the images in a folder and its subfolders, sorted.

    Raises:
        ValueError: there are none.
    """
    found, others = [], 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        images = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
        found += [os.path.join(parent, name) for name in images]
        others += len(names) - len(images)
    if not found:
        raise ValueError(
            f"no images in {os.fspath(folder)} or its subfolders: looked for {' '.join(EXTENSIONS)} and found "
            f"{others} other file(s)"
        )
    return found


def _imagenet_train() -> list[dict[str, str]]:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser() / "imagenet" / "train"
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    return [{"file_name": name} for name in list_folder(root)]


if "imagenet_train" not in DatasetCatalog:
    DatasetCatalog.register("imagenet_train", _imagenet_train)
    MetadataCatalog.get("imagenet_train").set(evaluator_type="none")

"""Labelled sets, for probes: a folder per class, ImageNet, CIFAR-10, or the objects of a detection data set.

Pretraining never reads labels.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from moco_d2.data.listing import EXTENSIONS, Listing, is_hidden
from moco_d2.io.errors import some
from moco_d2.io.paths import expand_variable
from moco_d2.io.pictures import MAX_PIXELS, naming, read_image
from moco_d2.messages import did_you_mean

logger = logging.getLogger(__name__)

# Folders that hold each half of a set, in the order in which they are looked for.
_HALVES = {"train": ("train",), "val": ("val", "test")}
# A box of an object is enlarged by this part of its sides for context, and smaller ones (in pixels) are left out.
_CONTEXT, _SMALLEST = 0.1, 16


@dataclass(frozen=True)
class LabelledSet:
    """Pictures and their classes.

    Attributes:
        name: what the user called it.
        files: path of each picture, or what names it in messages.
        labels: (N,) int64 in [0, len(classes)).
        classes: names; a class may have no pictures.
        boxes: (N, 4) x0, y0, x1, y1 in pixels of the part that is the picture; None for whole pictures.
        arrays: (N, H, W, 3) uint8 of pictures that are no files of their own; else None.
    """

    name: str
    files: Sequence[str]
    labels: torch.Tensor
    classes: tuple[str, ...]
    boxes: np.ndarray | None = None
    arrays: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """Return a picture, upright RGB.

        Raises:
            PictureError: it cannot be read.
        """
        if self.arrays is not None:
            return Image.fromarray(self.arrays[index])
        image = read_image(self.files[index], max_pixels)
        return image if self.boxes is None else image.crop(tuple(self.boxes[index].round().astype(int)))

    def part(self, numbers: Sequence[int]) -> LabelledSet:
        """Return the set of some of the pictures, in the order of their numbers given here."""
        if list(numbers) == list(range(len(self))):
            return self
        chosen = np.asarray(numbers, np.int64)
        boxes, arrays = (None if of is None else of[chosen] for of in (self.boxes, self.arrays))
        files = [self.files[number] for number in numbers]
        return replace(self, files=files, labels=self.labels[torch.from_numpy(chosen)], boxes=boxes, arrays=arrays)

    def without_pictures(self) -> list[str]:
        """Return the names of the classes that have no pictures."""
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts.tolist(), strict=True) if not count]


def open_labelled(name: str, split: str) -> LabelledSet:
    """Open a labelled set.

    Args:
        name: ``imagenet_train`` or ``imagenet_val``; CIFAR-10 as ``.npz`` or as torchvision's folder; a folder of one
            folder per class, or one that holds ``train`` and ``val`` (or ``test``) of that form; or a registered data
            set, of which every object's box is a picture.
        split: ``train`` or ``val``: the half, where a name stands for both.

    Raises:
        ValueError: there is no such set, or it has no labelled pictures; the message says what was looked for.
    """
    path = Path(name)
    if name in ("imagenet_train", "imagenet_val"):
        root = Path(expand_variable("DETECTRON2_DATASETS", "datasets"))
        return _folder(name, root / "imagenet" / name.removeprefix("imagenet_"))
    if path.suffix == ".npz" and path.is_file():
        return _cifar_archive(name, path, split)
    if path.is_dir():
        if _is_cifar(path):
            return _cifar(name, path, split)
        return _folder(name, _half(name, path, split))
    if name in DatasetCatalog:
        return _objects(name)
    raise ValueError(
        f"{name!r} is no labelled set: it must be imagenet_train or imagenet_val, a folder with a folder per class, "
        "CIFAR-10 (torchvision's folder, or an .npz), or a detection data set, registered or in the config's "
        f"DATASETS.CUSTOM{did_you_mean(name, DatasetCatalog.list())}"
    )


def open_pictures(name: str) -> LabelledSet:
    """Open pictures to look at: their "labels" are their numbers in the set, so that unreadable ones shift nothing.

    Args:
        name: a folder of pictures of any shape, or what :func:`open_labelled` takes (of both halves, ``val``).

    Raises:
        ValueError: there is no such set, or no picture in it.
    """
    path = Path(name)
    if path.is_dir() and not _is_cifar(path):
        if not (files := Listing(path).files):
            raise ValueError(f"{name} has no pictures ({' '.join(EXTENSIONS[:4])} ...)")
        return LabelledSet(name, files, torch.arange(len(files)), ("",))
    found = open_labelled(name, "val")
    return replace(found, labels=torch.arange(len(found)))


def open_pair(train: str, val: str) -> tuple[LabelledSet, LabelledSet]:
    """Open the two sets of a probe, and warn of classes without pictures.

    Raises:
        ValueError: a set cannot be opened, their classes differ, or a picture is in both.
    """
    sets = open_labelled(train, "train"), open_labelled(val, "val")
    first, second = (one.classes for one in sets)
    if first != second:
        only = [some(sorted(set(a) - set(b))) or "no other" for a, b in ((first, second), (second, first))]
        how = (
            "the same classes in another order"
            if set(first) == set(second)
            else f"other classes: only the first has {only[0]}; only the second has {only[1]}"
        )
        raise ValueError(
            f"{train!r} has {len(first)} classes and {val!r} has {len(second)}, {how}; both must have the same ones"
        )
    known = set(sets[0].files)
    if shared := next((file for file in sets[1].files if file in known), ""):
        raise ValueError(
            f"{shared} is in both {train!r} and {val!r}, and a picture is its own nearest neighbour: the second set "
            "must be held out"
        )
    for one, missing in zip(sets, map(LabelledSet.without_pictures, sets), strict=True):
        if missing:
            logger.warning(
                "%s has no pictures of %d of its %d classes: %s",
                one.name, len(missing), len(one.classes), some(missing),
            )  # fmt: skip
    return sets


def _is_cifar(path: Path) -> bool:
    return any((folder / "batches.meta").is_file() for folder in (path, path / "cifar-10-batches-py"))


def _half(name: str, path: Path, split: str) -> Path:
    """Return the folder of a half, or the folder itself if it has no halves."""
    folders = _subfolders(path)
    halves = {half: next((path / f for f in names if f in folders), None) for half, names in _HALVES.items()}
    if not all(halves.values()) and set(folders) - {"train", "val", "test"}:
        return path  # `train` alone may be a class
    found = halves[split]
    if found is None and folders:
        wanted = " or ".join(_HALVES[split])
        raise ValueError(f"the labelled set {name!r} has no folder {wanted}, only {some(folders)}")
    return found or path


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and not is_hidden(entry.name))


def _folder(name: str, root: Path) -> LabelledSet:
    """Read a folder of one folder per class; classes are numbered in the order of their names."""
    if not root.is_dir():
        raise ValueError(f"the labelled set {name!r}: there is no folder {root}")
    files = Listing(root).files
    places = [Path(file).relative_to(root).parts for file in files]
    loose = [file for file, place in zip(files, places, strict=True) if len(place) < 2]
    if not files or loose:
        found = (
            f"{len(loose)} pictures lie in none of them, such as {loose[0]}"
            if loose
            else f"no picture was found ({' '.join(EXTENSIONS[:4])} ...)"
        )
        raise ValueError(f"the labelled set {name!r}: {root} must hold a folder of pictures per class, but {found}")
    classes = _subfolders(root)
    number = {name: place for place, name in enumerate(classes)}
    return LabelledSet(name, files, torch.tensor([number[place[0]] for place in places]), tuple(classes))


def _cifar(name: str, root: Path, split: str) -> LabelledSet:
    """Read CIFAR-10 as torchvision downloads it; torchvision checks the files' checksums before it opens them."""
    from torchvision.datasets import CIFAR10

    try:
        images = CIFAR10(str(root.parent if root.name == CIFAR10.base_folder else root), train=split == "train")
    except RuntimeError as error:
        raise ValueError(f"the labelled set {name!r}: {error}") from error
    names = [f"{name}:{split}/{index}" for index in range(len(images.data))]
    return LabelledSet(name, names, torch.tensor(images.targets), tuple(images.classes), arrays=images.data)


def _cifar_archive(name: str, path: Path, split: str) -> LabelledSet:
    """Read an ``.npz`` with ``classes`` and, for ``train`` and ``test``, ``_label`` and ``_data``.

    The data are arrays (N, H, W, 3), or the bytes of JPEG files: their common ``head``, then what follows it in each
    file, one after the other, with ``_length`` bytes each.
    """
    half = "train" if split == "train" else "test"
    keys = ("classes", f"{half}_label", f"{half}_data", f"{half}_length", "head")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = {key: archive[key] for key in keys if key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"the labelled set {name!r}: {path} cannot be read ({error}); make or download it anew"
        ) from error
    whole = f"{half}_data" in found and found[f"{half}_data"].ndim == 4
    if missing := [key for key in keys[: 3 if whole else 5] if key not in found]:
        raise ValueError(
            f"the labelled set {name!r}: {path} has no {', '.join(missing)}, only {some(found) or 'other arrays'}"
        )
    classes, labels, arrays = (found[key] for key in keys[:3])
    if not whole:
        with naming(path):
            arrays = _decoded(arrays, found[f"{half}_length"], found["head"].tobytes())
    names = [f"{name}:{half}/{index}" for index in range(len(labels))]
    return LabelledSet(name, names, torch.from_numpy(labels.astype(np.int64)), tuple(map(str, classes)), arrays=arrays)


def _decoded(data: np.ndarray, lengths: np.ndarray, head: bytes) -> np.ndarray:
    ends = np.cumsum(lengths.astype(np.int64))
    starts = ends - lengths
    files = (head + data[start:end].tobytes() for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
    return np.stack([np.asarray(read_image(BytesIO(file))) for file in files])


def _objects(name: str) -> LabelledSet:
    """Make a picture of every object of a detection set: its box, with a little context."""
    files, labels, boxes, seen = list[str](), list[int](), [], 0
    for record in DatasetCatalog.get(name):
        for thing in record.get("annotations", ()):
            seen += 1
            box = _box(thing, record)
            if not thing.get("iscrowd", 0) and box is not None:
                files.append(record["file_name"])
                labels.append(thing["category_id"])
                boxes.append(box)
    if not files:
        found = f"none of its {seen} objects has" if seen else "it has no labels of objects with"
        raise ValueError(f"the labelled set {name!r}: {found} a box of at least {_SMALLEST} x {_SMALLEST} pixels")
    classes = MetadataCatalog.get(name).get("thing_classes") or [str(n) for n in range(max(labels) + 1)]
    return LabelledSet(name, files, torch.tensor(labels), tuple(classes), np.array(boxes))


def _box(thing: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """Return an object's box with its context, inside the picture; None if the object is too small."""
    x, y, w, h = BoxMode.convert(list(thing["bbox"]), thing["bbox_mode"], BoxMode.XYWH_ABS)
    if min(w, h) < _SMALLEST:
        return None
    across, down = _CONTEXT * w, _CONTEXT * h
    right, bottom = min(x + w + across, record["width"]), min(y + h + down, record["height"])
    return max(0, x - across), max(0, y - down), right, bottom

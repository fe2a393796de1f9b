"""Labelled pictures, for probes: a folder per class, ImageNet, CIFAR-10, or the objects of a detection data set.

Pretraining never reads labels. Names are looked up in this order: ``imagenet_train`` and ``imagenet_val``, a file
``.npz``, a folder, a data set of detection, whose boxes become pictures of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from moco_d2.data.listing import EXTENSIONS, Listing
from moco_d2.facts import Pixels
from moco_d2.io import timeouts
from moco_d2.io.paths import expand_variable
from moco_d2.io.pictures import MAX_PIXELS, read_image

# Folders that hold the pictures for testing, in the order in which they are looked for.
_TESTED = ("val", "test")
# A box of an object is enlarged by this part of its sides for context, and smaller ones (in pixels) are left out.
_CONTEXT, _SMALLEST = 0.1, 16


@dataclass(frozen=True)
class LabelledSet:
    """Pictures and their classes.

    Attributes:
        name: what the user called it.
        files: path of each picture, or what names it in messages.
        labels: (N,) int64 in [0, len(classes)).
        classes: names.
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


def open_labelled(name: str, split: str) -> LabelledSet:
    """Open a labelled set.

    Args:
        name: ``imagenet_train`` or ``imagenet_val``; CIFAR-10 as ``.npz`` or as torchvision's folder; a folder of one
            folder per class, or one that holds ``train`` and ``val`` (or ``test``) of that form; or a registered data
            set, of which every object's box is a picture.
        split: ``train`` or ``val``; says which half is meant where a name stands for both.

    Raises:
        ValueError: there is no such set, or it has no labelled pictures; the message says what was looked for.
    """
    path = Path(os.path.expanduser(name))
    if name in ("imagenet_train", "imagenet_val"):
        root = Path(expand_variable("DETECTRON2_DATASETS", "datasets")) / "imagenet" / name.removeprefix("imagenet_")
        return _folder(name, root)
    if path.suffix == ".npz" and path.is_file():
        return _cifar_archive(name, path, split)
    if path.is_dir():
        if any((folder / "batches.meta").is_file() for folder in (path, path / "cifar-10-batches-py")):
            return _cifar(name, path, split)
        return _folder(name, _half(path, split))
    if name in DatasetCatalog:
        return _objects(name)
    raise ValueError(
        f"{name!r} is no labelled set: it must be imagenet_train or imagenet_val, a folder with a folder per class, "
        "CIFAR-10 (torchvision's folder, or an .npz), or a registered detection data set"
    )


def _half(path: Path, split: str) -> Path:
    halves = ["train"] if split == "train" else [name for name in _TESTED if (path / name).is_dir()][:1]
    return path / halves[0] if halves and (path / halves[0]).is_dir() else path


def _folder(name: str, root: Path) -> LabelledSet:
    """Read a folder of one folder per class; classes are numbered in the order of their names."""
    if not root.is_dir():
        raise ValueError(f"the labelled set {name!r}: there is no folder {root}")
    files = Listing(root).files
    places = [Path(file).relative_to(root).parts for file in files]
    loose = [file for file, place in zip(files, places, strict=True) if len(place) < 2]
    if not files or loose:
        found = f"{loose[0]} lies in none" if loose else f"no picture was found ({' '.join(EXTENSIONS[:4])} ...)"
        raise ValueError(f"the labelled set {name!r}: {root} must hold a folder of pictures per class, but {found}")
    classes = sorted({place[0] for place in places})
    number = {name: place for place, name in enumerate(classes)}
    return LabelledSet(name, files, torch.tensor([number[place[0]] for place in places]), tuple(classes))


def _cifar(name: str, root: Path, split: str) -> LabelledSet:
    """Read CIFAR-10 as torchvision downloads it, which checks the files' sums before it opens them."""
    from torchvision.datasets import CIFAR10

    try:
        images = CIFAR10(str(root.parent if root.name == CIFAR10.base_folder else root), train=split == "train")
    except RuntimeError as error:
        raise ValueError(f"the labelled set {name!r}: {error}") from error
    names = [f"{name}:{split}/{index}" for index in range(len(images.data))]
    return LabelledSet(name, names, torch.tensor(images.targets), tuple(images.classes), arrays=images.data)


def _cifar_archive(name: str, path: Path, split: str) -> LabelledSet:
    """Read an ``.npz`` with ``classes`` and, for ``train`` and ``test``, arrays of pictures or JPEG files end to end."""
    half = "train" if split == "train" else "test"
    with np.load(path, allow_pickle=False) as archive:
        wanted = {"classes", f"{half}_label", f"{half}_data"}
        if missing := sorted(wanted - set(archive.files)):
            raise ValueError(f"the labelled set {name!r}: {path} has no {', '.join(missing)}; it has {archive.files}")
        classes, labels, data = (archive[key] for key in ("classes", f"{half}_label", f"{half}_data"))
        arrays = data if data.ndim == 4 else _decoded(data, archive[f"{half}_length"], archive["head"].tobytes())
    names = [f"{name}:{half}/{index}" for index in range(len(labels))]
    return LabelledSet(name, names, torch.from_numpy(labels.astype(np.int64)), tuple(map(str, classes)), arrays=arrays)


def _decoded(data: np.ndarray, lengths: np.ndarray, head: bytes) -> np.ndarray:
    """Decode JPEG files that have their header in common."""
    from io import BytesIO

    ends = np.cumsum(lengths.astype(np.int64))
    starts = ends - lengths
    files = (head + data[start:end].tobytes() for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
    return np.stack([np.asarray(read_image(BytesIO(file))) for file in files])


def _objects(name: str) -> LabelledSet:
    """Make a picture of every object of a detection set: its box, with a little context."""
    files, labels, boxes = [], [], []
    for record in DatasetCatalog.get(name):
        for thing in record.get("annotations", ()):
            x, y, w, h = _xywh(thing)
            if thing.get("iscrowd", 0) or min(w, h) < _SMALLEST:
                continue
            files.append(record["file_name"])
            labels.append(thing["category_id"])
            more = _CONTEXT * w, _CONTEXT * h
            low, high = (max(0, x - more[0]), max(0, y - more[1])), (x + w + more[0], y + h + more[1])
            boxes.append((*low, min(high[0], record["width"]), min(high[1], record["height"])))
    if not files:
        raise ValueError(f"the labelled set {name!r} has no objects with boxes of {_SMALLEST} pixels or more")
    classes = MetadataCatalog.get(name).get("thing_classes") or [str(n) for n in range(max(labels) + 1)]
    return LabelledSet(name, files, torch.tensor(labels), tuple(classes), np.array(boxes))


def _xywh(thing: dict[str, object]) -> tuple[float, float, float, float]:
    from detectron2.structures import BoxMode

    x, y, w, h = BoxMode.convert(list(thing["bbox"]), BoxMode(thing["bbox_mode"]), BoxMode.XYWH_ABS)  # type: ignore[call-overload]
    return x, y, w, h


class _TestPictures(Dataset[tuple[torch.Tensor, int, int]]):
    """Pictures under the test transform, as 8-bit tensors."""

    def __init__(self, pictures: LabelledSet, resize: int, size: int, bicubic: bool, max_pixels: int) -> None:
        self.pictures, self.resize, self.size, self.max_pixels = pictures, resize, size, max_pixels
        self.mode = F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        image = self.pictures.picture(index, self.max_pixels)
        if self.pictures.boxes is not None:  # an object fills the picture, whatever its shape
            image = F.resize(image, [self.size, self.size], self.mode)
        else:
            image = F.center_crop(F.resize(image, self.resize, self.mode), [self.size, self.size])
        return F.pil_to_tensor(image), int(self.pictures.labels[index]), index


def batches(
    pictures: LabelledSet,
    pixels: Pixels,
    size: int,
    *,
    resize: int = 0,
    bicubic: bool = False,
    batch: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (N, 3, size, size) normalised pictures with (N,) labels, in the set's order, each picture once.

    The transform is the published codes': the shorter side is resized, the centre is cropped. Objects of a detection
    set are resized to the square instead.

    Args:
        pictures: the set.
        pixels: how the network is fed.
        size: side of the crop in pixels (224 in the papers).
        resize: the shorter side before it; 0 for ``size`` * 256 / 224, the papers' proportion.
        bicubic: interpolation (DINO), else bilinear.
        batch: N at most.
        workers: number of loader processes.
        max_pixels: ``DATA.MAX_PIXELS``.
        device: where the pictures go.

    Raises:
        PictureError: a picture cannot be read; it is named.
    """
    dataset = _TestPictures(pictures, resize or round(size * 256 / 224), size, bicubic, max_pixels)
    options = {"timeout": timeouts.limit()} if workers else {}
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (pixels.mean, pixels.std))
    # A generator of its own: a DataLoader draws a seed, which would shift the draws of a run that is being watched.
    loader = DataLoader(dataset, batch, num_workers=workers, generator=torch.Generator(), **options)
    for images, labels, _ in loader:
        images = images.to(device).float()
        yield (images if pixels.order == "RGB" else images.flip(1)).sub_(mean).div_(std), labels.to(device)

"""From image files to batches of views: the authors' loader against this project's backends, one thread."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from moco_d2.data import EpochSampler, FileSource, ViewDataset, ViewLoader, build_backend, build_recipe, list_folder
from moco_d2.data.augment import Box
from moco_d2.data.backends import CV2_STEPS, PIL_STEPS, to_levels
from moco_d2.data.batched import DEVICE_STEPS
from moco_d2.data.decode import Picture, read_image
from moco_d2.data.loader import collate

RECIPE = "moco_v2"
BATCH = 16
CPU = torch.device("cpu")
AUTHORS = "the authors' loader"
# A value of each step from the middle of its range, and how often MoCo v2 does it.
STEPS = {
    "brightness": (1.2, 0.8), "contrast": (1.2, 0.8), "saturation": (1.2, 0.8), "hue": (0.05, 0.8),
    "grey": (0.0, 0.2), "blur": (1.05, 0.5), "flip": (0.0, 0.5),
}  # fmt: skip


class AuthorsBlur:
    """The GaussianBlur of MoCo v2's code."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        return image.filter(ImageFilter.GaussianBlur(radius=np.random.default_rng().uniform(0.1, 2.0)))


def authors_loader(files: Sequence[str], size: int) -> Callable[[Sequence[int]], object]:
    """Return what makes a batch as the authors do: PIL decodes, torchvision's PIL transforms make two views."""
    view = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([AuthorsBlur()], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )

    def batch(indices: Sequence[int]) -> object:
        samples = []
        for index in indices:
            with open(files[index], "rb") as file:
                image = Image.open(file).convert("RGB")
            samples.append((view(image), view(image)))
        return [torch.stack(views) for views in zip(*samples, strict=True)]

    return batch


def our_loader(files: Sequence[str], size: int, backend: str, finish: bool) -> Callable[[Sequence[int]], object]:
    """Return what makes a batch through a backend, as worker and training process do, or as a worker alone."""
    dataset = ViewDataset(FileSource(files), build_recipe(RECIPE, size), 0, build_backend(backend, CPU))
    loader = ViewLoader(dataset, EpochSampler(len(files), 1, seed=0), 0, CPU)

    def batch(indices: Sequence[int]) -> object:
        made = collate(dataset.__getitems__([(0, index) for index in indices]))
        return loader.finish(made) if finish else made

    return batch


def loader_rows(files: Sequence[str], size: int, repeats: int) -> list[dict[str, Any]]:
    """Time every loader on the same files, one after the other in each round; medians."""
    loaders = {
        AUTHORS: authors_loader(files, size),
        "pil": our_loader(files, size, "pil", True),
        "cv2": our_loader(files, size, "cv2", True),
        "device: a worker's part": our_loader(files, size, "device", False),
        "device: all on the CPU": our_loader(files, size, "device", True),
    }
    chunks = [range(first, min(first + BATCH, len(files))) for first in range(0, len(files), BATCH)]
    taken: dict[str, list[float]] = {name: [] for name in loaders}
    for repeat in range(repeats + 1):
        for name, batch in loaders.items():
            before = time.process_time()
            for chunk in chunks:
                batch(chunk)
            if repeat:  # the first round warms up
                taken[name].append((time.process_time() - before) / len(files))
    rows = []
    for name, seconds in taken.items():
        ratio = statistics.median(a / b for a, b in zip(taken[AUTHORS], seconds, strict=True))
        middle = statistics.median(seconds)
        rows.append({"what": name, "images/s/core": 1 / middle, "ms an image": 1e3 * middle, "ratio": ratio})
    return rows


def part_rows(files: Sequence[str], size: int, repeats: int) -> list[dict[str, Any]]:
    """Time each operation alone: CPU milliseconds of one image's decoding or one view's operation, medians."""
    data = [Path(file).read_bytes() for file in files[:BATCH]]
    pictures = [Picture(one) for one in data]
    whole = [read_image(file) for file in files[:BATCH]]
    boxes = [Box(p.height // 8, p.width // 8, p.height * 3 // 4, p.width * 3 // 4) for p in pictures]
    views = [picture.crops([box], size)[0] for picture, box in zip(pictures, boxes, strict=True)]
    pil_views, levels = [Image.fromarray(view) for view in views], to_levels(torch.from_numpy(np.stack(views)))
    cropped = list(zip(pictures, whole, boxes, strict=True))

    def each(work: Callable[[Any], object], items: Sequence[Any]) -> float:
        def once() -> float:
            before = time.process_time()
            for item in items:
                work(item)
            return 1e3 * (time.process_time() - before) / len(items)

        return statistics.median(once() for _ in range(repeats))

    def pil_crop(item: tuple[Picture, Image.Image, Box]) -> object:
        return T.functional.resized_crop(item[1], *item[2], [size, size])

    decode = each(lambda one: Picture(one).decode(), data)
    both = each(lambda one: Picture(one[0]).crops([one[1]], size), list(zip(data, boxes, strict=True)))
    rows = [
        {"what": "decode", "times an image": 1.0, "pil": each(lambda file: read_image(file), files[:BATCH]),
         "cv2": decode, "device": decode},
        {"what": "crop", "times an image": 2.0, "pil": each(pil_crop, cropped), "cv2": both - decode,
         "device": both - decode},
    ]  # fmt: skip
    for kind, (value, probability) in STEPS.items():
        pil, opencv = partial(_second, PIL_STEPS[kind], value), partial(_second, CV2_STEPS[kind], value)
        values = torch.full((len(views), 1, 1, 1), value, dtype=torch.float64)
        rows.append(
            {
                "what": kind,
                "times an image": 2 * probability,
                "pil": each(pil, pil_views),
                "cv2": each(opencv, views),
                "device": each(partial(_second, DEVICE_STEPS[kind], values), [levels]) / len(views),
            }
        )
    return rows


def _second(step: Callable[[Any, Any], object], value: object, view: object) -> object:
    return step(view, value)


def bottleneck(rows: Sequence[dict[str, Any]]) -> str:
    """Say what takes most of each backend's time."""
    said = []
    for backend in ("pil", "cv2"):
        spent = {row["what"]: row["times an image"] * row[backend] for row in rows}
        largest = sorted(spent, key=spent.__getitem__, reverse=True)[:3]
        shares = ", ".join(f"{name} {spent[name] / sum(spent.values()):.0%}" for name in largest)
        said.append(f"{backend}: {shares}")
    return "; ".join(said) + "; device, a worker's part: decode"


def draw_photo(seed: int, path: Path, width: int = 500, height: int = 375) -> None:
    """Write a JPEG with a photograph's spectrum: shapes of every size, saturated and dull colours, grain."""
    rng = np.random.default_rng(seed)
    image = rng.normal(120, 3, (height, width, 3))
    for octave in range(7):
        rows, columns = max(2, height >> (7 - octave)), max(2, width >> (7 - octave))
        noise = rng.normal(size=(rows, columns, 3)) * rng.uniform(15, 65, 3) / (1 + octave) ** 0.8
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def measure(folder: str, images: int, size: int, repeats: int) -> dict[str, Any]:
    """Measure on a folder's first images, or on drawn ones (empty)."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as drawn:
        if not folder:
            for number in range(images):
                draw_photo(number, Path(drawn) / f"{number}.jpg")
        files = list_folder(folder or drawn)
        files = files[:: max(1, len(files) // images)][:images]
        parts = part_rows(files, size, repeats)
        return {"loader": loader_rows(files, size, repeats), "parts, ms": parts, "bottleneck": bottleneck(parts)}

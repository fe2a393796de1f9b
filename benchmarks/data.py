"""Benchmark of loading, from image files to batches of views: the authors' loader and this project's backends."""

from __future__ import annotations

import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from benchmarks.traffic import Traffic
from moco_d2.data import (
    EpochSampler,
    FileSource,
    ViewDataset,
    ViewLoader,
    build_augmentation,
    build_backend,
    list_folder,
)
from moco_d2.data.augment import Box, Plan
from moco_d2.data.backends import BACKENDS, finish, pack, run, run_masked, to_float
from moco_d2.data.decode import EncodedImage
from moco_d2.data.loader import collate
from moco_d2.data.operations import OPERATIONS
from moco_d2.io.pictures import read_image

AUGMENTATION = "moco_v2"
BATCH = 16
CPU = torch.device("cpu")
AUTHORS = "the authors' loader"
LIGHTLY = "lightly's loader"
# Each operation's values in MoCo v2, and its probability; solarise, which MoCo v2 lacks, at its usual threshold.
RANGES = {
    "brightness": (0.6, 1.4, 0.8), "contrast": (0.6, 1.4, 0.8), "saturation": (0.6, 1.4, 0.8), "hue": (-0.1, 0.1, 0.8),
    "grey": (0.0, 0.0, 0.2), "blur": (0.1, 2.0, 0.5), "flip": (0.0, 0.0, 0.5), "solarise": (128, 128, 0.0),
}  # fmt: skip


def authors_transforms(size: int) -> list[Callable[[Any], Any]]:
    """Return MoCo v2's augmentation as its authors compose it, from PIL image to PIL image."""
    return [
        T.RandomResizedCrop(size, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))], p=0.5),
        T.RandomHorizontalFlip(),
    ]


def authors_loader(files: Sequence[str], size: int) -> Callable[[Sequence[int]], object]:
    """Return a function that makes a batch as the authors do: PIL decodes, torchvision's transforms make two views."""
    view = T.Compose(
        [*authors_transforms(size), T.ToTensor(), T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])]
    )

    def batch(indices: Sequence[int]) -> object:
        samples = []
        for index in indices:
            with open(files[index], "rb") as file:
                image = Image.open(file).convert("RGB")
            samples.append((view(image), view(image)))
        return [torch.stack(views) for views in zip(*samples, strict=True)]

    return batch


def lightly_loader(files: Sequence[str], size: int) -> Callable[[Sequence[int]], object]:
    """Return a function that makes a batch as lightly does: PIL decodes, its ``MoCoV2Transform`` makes two views."""
    from lightly.transforms.moco_transform import MoCoV2Transform

    views = MoCoV2Transform(input_size=size)

    def batch(indices: Sequence[int]) -> object:
        samples = []
        for index in indices:
            with open(files[index], "rb") as file:
                samples.append(views(Image.open(file).convert("RGB")))
        return [torch.stack(made) for made in zip(*samples, strict=True)]

    return batch


def our_loader(
    files: Sequence[str], size: int, backend: str, complete: bool, reduced: bool = False
) -> Callable[[Sequence[int]], object]:
    """Return a function that does a backend's work for a batch, either all of it or a worker's part."""
    augmentation = build_augmentation(AUGMENTATION, size)
    dataset = ViewDataset(FileSource(files), augmentation, 0, build_backend(backend, CPU), reduced=reduced)
    loader = ViewLoader(dataset, EpochSampler(len(files), 1, seed=0), 0, CPU)

    def batch(indices: Sequence[int]) -> object:
        made = collate(dataset.__getitems__([(0, index) for index in indices]))
        return loader.finish(made) if complete else made

    return batch


def loader_rows(files: Sequence[str], size: int, repeats: int) -> list[dict[str, Any]]:
    """Time every loader on the same files, alternating in each round; medians."""
    loaders = {
        AUTHORS: authors_loader(files, size),
        LIGHTLY: lightly_loader(files, size),
        "pil": our_loader(files, size, "pil", True),
        "cv2": our_loader(files, size, "cv2", True),
        "cv2, reduced decoding": our_loader(files, size, "cv2", True, reduced=True),
        "device: a worker's part": our_loader(files, size, "device", False),
        "device: a worker's part, reduced decoding": our_loader(files, size, "device", False, reduced=True),
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
        rows.append({"what": name, "images/s/core": 1 / middle, "ms an image": 1e3 * middle, "times as fast": ratio})
    return rows


def part_rows(files: Sequence[str], size: int, repeats: int) -> list[dict[str, Any]]:
    """Time each operation alone: CPU milliseconds of one image's decoding or one view's operation, medians."""
    data = [Path(file).read_bytes() for file in files[:BATCH]]
    pictures = [EncodedImage(one) for one in data]
    whole = [read_image(file) for file in files[:BATCH]]
    boxes = [Box(p.height // 8, p.width // 8, p.height * 3 // 4, p.width * 3 // 4) for p in pictures]
    views = [picture.crops([Plan(box, (), size)])[0] for picture, box in zip(pictures, boxes, strict=True)]
    pil_views, floats = [Image.fromarray(view) for view in views], to_float(torch.from_numpy(np.stack(views)))
    cropped = list(zip(pictures, whole, boxes, strict=True))

    def each(work: Callable[[Any], object], items: Sequence[Any]) -> float:
        def once() -> float:
            before = time.process_time()
            for item in items:
                work(item)
            return 1e3 * (time.process_time() - before) / len(items)

        return statistics.median(once() for _ in range(repeats))

    def pil_crop(item: tuple[EncodedImage, Image.Image, Box]) -> object:
        return T.functional.resized_crop(item[1], *item[2], [size, size])

    # Decoding and cropping are one call: the time of a crop is what eight more of them add.
    boxed = list(zip(data, boxes, strict=True))
    one, nine = (each(partial(_crops, size, count), boxed) for count in (1, 9))
    crop = (nine - one) / 8
    rows = [
        {"what": "decode", "times an image": 1.0, "pil": each(lambda file: read_image(file), files[:BATCH]),
         "cv2": one - crop, "device": one - crop},
        {"what": "crop", "times an image": 2.0, "pil": each(pil_crop, cropped), "cv2": crop, "device": crop},
    ]  # fmt: skip
    for name, (low, high, probability) in RANGES.items():
        if not probability:
            continue
        value = low + 0.75 * (high - low)
        known = OPERATIONS[name]
        pil, opencv = partial(_second, known.pil, value), partial(_second, known.cv2, value)
        values = torch.full((len(views), 1, 1, 1), value, dtype=torch.float64)
        rows.append(
            {
                "what": name,
                "times an image": 2 * probability,
                "pil": each(pil, pil_views),
                "cv2": each(opencv, views),
                "device": each(partial(_second, known.device, values), [floats]) / len(views),
            }
        )
    return rows


def _crops(size: int, count: int, item: tuple[bytes, Box]) -> object:
    return EncodedImage(item[0]).crops([Plan(item[1], (), size)] * count)


def _second(executor: Callable[[Any, Any], object], value: object, view: object) -> object:
    return executor(view, value)


def device_rows(size: int, batch: int = 256) -> list[dict[str, Any]]:
    """Count the device's part of a batch: kernels without the compiler, and the gigabytes that they read and write."""
    rows = []
    for name in (AUGMENTATION, "swav_2x6", "dino_2x8"):
        made = build_augmentation(name, size)
        plans = [made.plan(375, 500, seed) for seed in range(batch)]
        sides = [view.crop.size for view in made.views]
        lists, masks = Traffic("meta"), Traffic("meta")
        for side in dict.fromkeys(sides):
            numbers = [number for number, own in enumerate(sides) if own == side]
            ops = pack([plan[number].ops for number in numbers for plan in plans])
            views, there = torch.zeros(len(ops), 3, side, side, device="meta"), ops.to("meta")
            with lists:
                run(views, ops)
            with masks:
                run_masked(views, there, made.names(numbers))
        row: dict[str, Any] = {"what": name}
        for way, counted in (("index lists", lists), ("masks", masks)):
            row |= {f"{way}: kernels": counted.operations, f"{way}: GB": counted.bytes / 1e9}
        rows.append(row)
    return rows


def equality_rows(files: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Compare with PIL on the same pictures, in pixel values: each operation's largest and mean difference."""
    pictures = [EncodedImage(Path(file).read_bytes()) for file in files[:BATCH]]
    boxes = [Box(p.height // 8, p.width // 8, p.height * 3 // 4, p.width * 3 // 4) for p in pictures]
    whole = list(zip(map(read_image, files), files, boxes, strict=False))
    half = min(min(box.height, box.width) for box in boxes) // 2  # at this size of view a JPEG is decoded at a half
    rows = []
    for name, side, reduced in (("crop", size, False), ("crop of a JPEG decoded at a half", half, True)):
        theirs = np.stack([np.asarray(T.functional.resized_crop(image, *box, [side, side])) for image, _, box in whole])
        again = [EncodedImage(Path(file).read_bytes(), reduced=reduced) for _, file, _ in whole]
        ours = np.stack([picture.crops([Plan(box, (), side)])[0] for picture, box in zip(again, boxes, strict=True)])
        rows.append(_differences(name, theirs, ours, ours))
    views = np.stack([np.asarray(T.functional.resized_crop(image, *box, [size, size])) for image, _, box in whole])
    augmentation = build_augmentation(AUGMENTATION, size)
    plans = [augmentation.plan(picture.height, picture.width, seed) for seed, picture in enumerate(pictures)]
    made = []
    for name in BACKENDS:
        backend = build_backend(name, CPU)
        prepared = [backend.prepare(*both)[0] for both in zip(pictures, plans, strict=True)]
        ops = pack([first.ops if backend.on_device else () for first, _ in plans])
        made.append(finish(torch.from_numpy(np.stack(prepared)), ops).permute(0, 2, 3, 1).numpy())
    alone = [_differences(name, *_executed(name, views)) for name in RANGES]
    return [*rows, *alone, _differences("the whole augmentation", *made)]


def _executed(name: str, views: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views after an operation with values over its range, by PIL, OpenCV and torch."""
    (low, high, _), known = RANGES[name], OPERATIONS[name]
    values = np.linspace(low, high, 9).tolist() if high > low else [low]
    floats, count = to_float(torch.from_numpy(views)), (len(views), 1, 1, 1)
    yield np.stack([np.asarray(known.pil(Image.fromarray(view), value)) for value in values for view in views])
    yield np.stack([known.cv2(view, value) for value in values for view in views])
    done = [known.device(floats, torch.full(count, value, dtype=torch.float64)) for value in values]
    yield torch.cat(done).permute(0, 2, 3, 1).numpy()


def _differences(what: str, pil: np.ndarray, opencv: np.ndarray, device: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what}
    for name, views in (("cv2", opencv), ("device", device)):
        difference = np.abs(views.astype(np.float32) - pil)
        row |= {f"{name} largest": float(difference.max()), f"{name} mean": float(difference.mean())}
    return row


def bottleneck(rows: Sequence[dict[str, Any]]) -> str:
    """Return, in words, the three most expensive parts of each backend."""
    words = []
    for backend in ("pil", "cv2"):
        spent = {row["what"]: row["times an image"] * row[backend] for row in rows}
        largest = sorted(spent, key=spent.__getitem__, reverse=True)[:3]
        shares = ", ".join(f"{name} {spent[name] / sum(spent.values()):.0%}" for name in largest)
        words.append(f"{backend}: {shares}")
    return "; ".join(words) + "; device, a worker's part: decode"


def draw_photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Return a JPEG with a photograph's spectrum: shapes of every size, bright and dull colours, grain."""
    rng = np.random.default_rng(seed)
    image = rng.normal(120, 3, (height, width, 3))
    for octave in range(7):
        rows, columns = max(2, height >> (7 - octave)), max(2, width >> (7 - octave))
        noise = rng.normal(size=(rows, columns, 3)) * rng.uniform(15, 65, 3) / (1 + octave) ** 0.8
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(folder: str, images: int, size: int, repeats: int) -> dict[str, Any]:
    """Measure on images of a folder, or on drawn ones if it is empty."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as drawn:
        if not folder:
            for number in range(images):
                (Path(drawn) / f"{number}.jpg").write_bytes(draw_photo(number))
        files = list_folder(folder or drawn)
        files = files[:: max(1, len(files) // images)][:images]
        parts = part_rows(files, size, repeats)
        return {
            "loader": loader_rows(files, size, repeats),
            "parts, ms": parts,
            "bottleneck": bottleneck(parts),
            "the device's part of a batch of 256": device_rows(size),
            "difference to PIL, pixel values": equality_rows(files, size),
        }

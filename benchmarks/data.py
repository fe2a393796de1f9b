"""From image files to batches of views: the authors' loader against this project's backends, one thread."""

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

from moco_d2.data import EpochSampler, FileSource, ViewDataset, ViewLoader, build_backend, build_recipe, list_folder
from moco_d2.data.augment import Box, Plan
from moco_d2.data.backends import BACKENDS, CV2_STEPS, PIL_STEPS, to_levels
from moco_d2.data.batched import DEVICE_STEPS, pack_steps
from moco_d2.data.decode import Picture
from moco_d2.data.loader import collate
from moco_d2.io.pictures import read_image

RECIPE = "moco_v2"
BATCH = 16
CPU = torch.device("cpu")
AUTHORS = "the authors' loader"
# Each step's range in MoCo v2, and how often it is done; solarise, which is not, at its usual threshold.
STEPS = {
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
    """Return what makes a batch as the authors do: PIL decodes, torchvision's PIL transforms make two views."""
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
        rows.append({"what": name, "images/s/core": 1 / middle, "ms an image": 1e3 * middle, "times as fast": ratio})
    return rows


def part_rows(files: Sequence[str], size: int, repeats: int) -> list[dict[str, Any]]:
    """Time each operation alone: CPU milliseconds of one image's decoding or one view's operation, medians."""
    data = [Path(file).read_bytes() for file in files[:BATCH]]
    pictures = [Picture(one) for one in data]
    whole = [read_image(file) for file in files[:BATCH]]
    boxes = [Box(p.height // 8, p.width // 8, p.height * 3 // 4, p.width * 3 // 4) for p in pictures]
    views = [picture.crops([Plan(box, (), size)])[0] for picture, box in zip(pictures, boxes, strict=True)]
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

    # JPEGs may be decoded smaller for their crops, so that only what further crops add can be told apart.
    boxed = list(zip(data, boxes, strict=True))
    one, nine = (each(partial(_crops, size, count), boxed) for count in (1, 9))
    crop = (nine - one) / 8
    rows = [
        {"what": "decode", "times an image": 1.0, "pil": each(lambda file: read_image(file), files[:BATCH]),
         "cv2": one - crop, "device": one - crop},
        {"what": "crop", "times an image": 2.0, "pil": each(pil_crop, cropped), "cv2": crop, "device": crop},
    ]  # fmt: skip
    for kind, (low, high, probability) in STEPS.items():
        if not probability:
            continue
        value = low + 0.75 * (high - low)
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


def _crops(size: int, count: int, item: tuple[bytes, Box]) -> object:
    return Picture(item[0]).crops([Plan(item[1], (), size)] * count)


def _second(step: Callable[[Any, Any], object], value: object, view: object) -> object:
    return step(view, value)


def equality_rows(files: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Compare with PIL on the same pictures, in levels of 255: each step's largest and mean difference."""
    pictures = [Picture(Path(file).read_bytes()) for file in files[:BATCH]]
    boxes = [Box(p.height // 8, p.width // 8, p.height * 3 // 4, p.width * 3 // 4) for p in pictures]
    whole = list(zip(map(read_image, files), files, boxes, strict=False))
    half = min(min(box.height, box.width) for box in boxes) // 2  # views so large are cut from JPEGs of half the size
    rows = []
    for name, side, reduced in (("crop", size, False), ("crop of a JPEG decoded at a half", half, True)):
        theirs = np.stack([np.asarray(T.functional.resized_crop(image, *box, [side, side])) for image, _, box in whole])
        again = [Picture(Path(file).read_bytes(), reduced=reduced) for _, file, _ in whole]
        ours = np.stack([picture.crops([Plan(box, (), side)])[0] for picture, box in zip(again, boxes, strict=True)])
        rows.append(_differences(name, theirs, ours, ours))
    views = np.stack([np.asarray(T.functional.resized_crop(image, *box, [size, size])) for image, _, box in whole])
    recipe = build_recipe(RECIPE, size)
    plans = [recipe.plan(picture.height, picture.width, seed) for seed, picture in enumerate(pictures)]
    made = []
    for name in BACKENDS:
        backend = build_backend(name, CPU)
        prepared = [backend.prepare(*both)[0] for both in zip(pictures, plans, strict=True)]
        steps = pack_steps([first.steps for first, _ in plans])
        made.append(backend.finish(torch.from_numpy(np.stack(prepared)), steps).permute(0, 2, 3, 1).numpy())
    steps_alone = [_differences(kind, *_with_step(kind, views)) for kind in STEPS]
    return [*rows, *steps_alone, _differences("the whole recipe", *made)]


def _with_step(kind: str, views: np.ndarray) -> Iterator[np.ndarray]:
    """Yield views after a step with values over its range, as PIL, OpenCV and torch do it."""
    low, high, _ = STEPS[kind]
    values = np.linspace(low, high, 9).tolist() if high > low else [low]
    levels, count = to_levels(torch.from_numpy(views)), (len(views), 1, 1, 1)
    yield np.stack([np.asarray(PIL_STEPS[kind](Image.fromarray(view), value)) for value in values for view in views])
    yield np.stack([CV2_STEPS[kind](view, value) for value in values for view in views])
    done = [DEVICE_STEPS[kind](levels, torch.full(count, value, dtype=torch.float64)) for value in values]
    yield torch.cat(done).permute(0, 2, 3, 1).numpy()


def _differences(what: str, pil: np.ndarray, opencv: np.ndarray, device: np.ndarray) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what}
    for name, views in (("cv2", opencv), ("device", device)):
        difference = np.abs(views.astype(np.float32) - pil)
        row |= {f"{name} largest": float(difference.max()), f"{name} mean": float(difference.mean())}
    return row


def bottleneck(rows: Sequence[dict[str, Any]]) -> str:
    """Say what takes most of each backend's time."""
    said = []
    for backend in ("pil", "cv2"):
        spent = {row["what"]: row["times an image"] * row[backend] for row in rows}
        largest = sorted(spent, key=spent.__getitem__, reverse=True)[:3]
        shares = ", ".join(f"{name} {spent[name] / sum(spent.values()):.0%}" for name in largest)
        said.append(f"{backend}: {shares}")
    return "; ".join(said) + "; device, a worker's part: decode"


def draw_photo(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Return a JPEG with a photograph's spectrum: shapes of every size, saturated and dull colours, grain."""
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
    """Measure on a folder's first images, or on drawn ones (empty)."""
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
            "difference to PIL, levels of 255": equality_rows(files, size),
        }

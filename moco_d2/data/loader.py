"""From a list of files to batches of views: reading, per-sample seeds, the resumable sampler, the loader."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from moco_d2.data.augment import Recipe

logger = logging.getLogger(__name__)

# How many other images to try in place of an unreadable one before the dataset is called broken.
MAX_REPLACEMENTS = 100


def read_image(path: str) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette and CMYK images are converted; 16-bit samples keep their high byte
    (PIL's own conversion would clip them to white).

    Raises:
        OSError: the file cannot be read or decoded.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16-bit grey: PIL says "I;16" or "I" depending on the format
            values = np.asarray(image)
            image = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns when a palette's transparency is dropped in one step
        return image.convert("RGB")


@dataclass(frozen=True)
class Sample:
    """One image's views, and the path of the unreadable image it replaces, if any."""

    views: list[torch.Tensor]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Batch:
    """A batch of views: V tensors (N, 3, H_v, W_v), and the paths that could not be read."""

    views: list[torch.Tensor]
    skipped: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory (torch's DataLoader calls this)."""
        return Batch([view.pin_memory() for view in self.views], self.skipped)


class ViewDataset(Dataset[Sample]):
    """Image files as views. An item's randomness depends on (seed, epoch, index) only.

    So the views are the same with any number of workers, and a resumed run sees what an uninterrupted one would have.
    """

    def __init__(self, files: Sequence[str], recipe: Recipe, seed: int) -> None:
        # Detectron2's list holds one serialised buffer, which worker processes share without copying.
        self.files = DatasetFromList(list(files), copy=False)
        self.recipe = recipe
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of a sampler's key (epoch, index); an unreadable image is replaced by the next."""
        epoch, index = key
        skipped = []
        for attempt in range(min(MAX_REPLACEMENTS, len(self.files))):
            path = self.files[(index + attempt) % len(self.files)]
            try:
                image = read_image(path)
            except Exception:  # A damaged file makes decoders raise anything: OSError, SyntaxError, struct.error...
                skipped.append(path)
                continue
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(stream_seed(self.seed, epoch, index))
                return Sample(self.recipe(image), tuple(skipped))
        raise RuntimeError(f"{len(skipped)} images in a row cannot be read; the first is {skipped[0]}")


def stream_seed(*parts: int) -> int:
    """Mix integers into one well-spread 63-bit seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """An endless stream of this process's batches that can start at any step.

    Epoch e visits a permutation drawn from (seed, e); the images that do not fill a batch are dropped, as with the
    authors' ``drop_last``. Step t's batch does not depend on the number of processes: R processes take R consecutive
    parts of it.
    """

    def __init__(self, size: int, batch: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0) -> None:
        """Sample ``size`` images in batches of ``batch`` over all processes, from step ``start`` on."""
        self.size, self.batch, self.seed, self.start = size, batch, seed, start
        share = batch // world_size
        self.part = slice(rank * share, (rank + 1) * share)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self.size // self.batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.start, self.steps_per_epoch)
        while True:
            order = np.random.default_rng(stream_seed(self.seed, epoch)).permutation(self.size)
            for step in range(first, self.steps_per_epoch):
                batch = order[step * self.batch : (step + 1) * self.batch]
                yield [(epoch, int(index)) for index in batch[self.part]]
            epoch, first = epoch + 1, 0


def collate(samples: list[Sample]) -> Batch:
    """Stack samples view by view."""
    views = [torch.stack(view) for view in zip(*(sample.views for sample in samples), strict=True)]
    return Batch(views, tuple(path for sample in samples for path in sample.skipped))


class ViewLoader:
    """Batches on the training device, with unreadable images logged once each and counted.

    Attributes:
        unreadable: paths that could not be read so far, in this process.
    """

    def __init__(self, dataset: ViewDataset, sampler: EpochSampler, workers: int, device: torch.device) -> None:
        self.dataset, self.sampler, self.workers, self.device = dataset, sampler, workers, device
        self.unreadable: dict[str, None] = {}

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        # Its own generator: a DataLoader draws a seed when it starts, which would shift a resumed step's randomness.
        options["generator"] = torch.Generator()
        for batch in DataLoader(self.dataset, batch_sampler=self.sampler, collate_fn=collate, **options):
            for path in batch.skipped:
                if path not in self.unreadable:
                    self.unreadable[path] = None
                    logger.warning("cannot read %s; another image takes its place", path)
            yield [view.to(self.device, non_blocking=True) for view in batch.views]

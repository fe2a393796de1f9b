"""From a source of image files to batches of views: the dataset and the loader."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from moco_d2.data.augment import Recipe
from moco_d2.data.decode import read_image
from moco_d2.data.sampler import EpochSampler, stream_seed
from moco_d2.data.sources import Source

logger = logging.getLogger(__name__)

# How many other images to try in place of an unreadable one before the dataset is called broken.
MAX_REPLACEMENTS = 100


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

    def __init__(self, source: Source, recipe: Recipe, seed: int) -> None:
        self.source, self.recipe, self.seed = source, recipe, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of a sampler's key (epoch, index); an unreadable image is replaced by the next."""
        epoch, index = key
        skipped = []
        for attempt in range(min(MAX_REPLACEMENTS, len(self.source))):
            position = (index + attempt) % len(self.source)
            try:
                image = read_image(io.BytesIO(self.source.read(position)))
            except Exception:  # A damaged file makes decoders raise anything: OSError, SyntaxError, struct.error...
                skipped.append(self.source.name(position))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.random.default_generator.manual_seed(stream_seed(self.seed, epoch, index))
                return Sample(self.recipe(image), tuple(skipped))
        raise RuntimeError(f"{len(skipped)} images in a row cannot be read; the first is {skipped[0]}")


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

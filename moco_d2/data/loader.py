"""From a source of image files to batches of views: the dataset and the loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from moco_d2.data.augment import Plan, Recipe
from moco_d2.data.backends import Backend
from moco_d2.data.batched import pack_steps
from moco_d2.data.decode import Picture
from moco_d2.data.sampler import EpochSampler, stream_seed
from moco_d2.data.skipped import Skip, SkipLog
from moco_d2.data.sources import Source
from moco_d2.io import timeouts
from moco_d2.io.pictures import MAX_PIXELS, describe
from moco_d2.layers.views import Views


@dataclass(frozen=True)
class Sample:
    """One image's views as a backend prepared them, and the unreadable images it stands for.

    Without views, if there was nothing to stand for them.

    Attributes:
        views: V arrays (H_v, W_v, 3) uint8.
        plans: their drawn parameters.
        skipped: what could not be read.
        position: number of the image that is shown.
        boxes: (V, 4), see :class:`~moco_d2.layers.views.Views`.
    """

    views: list[np.ndarray]
    plans: list[Plan]
    skipped: tuple[Skip, ...]
    position: int = -1
    boxes: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.float32))


@dataclass(frozen=True)
class Batch:
    """A batch as workers send it.

    Attributes:
        views: V tensors (N, H, W, 3) uint8: a quarter of what floats would take between processes and to the device.
        steps: V tensors (N, S, 2), the drawn parameters; they stay on the host.
        index: (N,) int64, numbers of the images that are shown.
        boxes: (V, N, 4) float32, see :class:`~moco_d2.layers.views.Views`.
        skipped: what could not be read.
        replaced: number of images that stand for one that could not be read.
    """

    views: list[torch.Tensor]
    steps: list[torch.Tensor]
    index: torch.Tensor
    boxes: torch.Tensor
    skipped: tuple[Skip, ...]
    replaced: int

    def pin_memory(self) -> Batch:
        """Return the batch with its views in pinned memory (torch's DataLoader calls this)."""
        views = [view.pin_memory() for view in self.views]
        return replace(self, views=views, index=self.index.pin_memory(), boxes=self.boxes.pin_memory())


class ViewDataset(Dataset[Sample]):
    """Images as views. An item's randomness depends on (seed, epoch, index) only.

    So the views are the same with any number of workers, and a resumed run sees what an uninterrupted one would have.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        seed: int,
        backend: Backend,
        max_pixels: int = MAX_PIXELS,
        reduced: bool = False,
    ) -> None:
        """Set up; ``max_pixels`` and ``reduced`` are :class:`~moco_d2.data.decode.Picture`'s."""
        self.source, self.recipe, self.seed, self.backend = source, recipe, seed, backend
        self.max_pixels, self.reduced = max_pixels, reduced

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of a sampler's key (epoch, index); an unreadable image is replaced by one near it."""
        epoch, index = key
        skipped: list[Skip] = []
        for position in replacements(index, len(self.source)):
            try:
                return self._sample(position, *self._plan(position, key), tuple(skipped))
            except Exception as error:  # A damaged file makes decoders raise anything: OSError, SyntaxError, ...
                reason = f"{type(error).__name__}: {describe(error)}"
                skipped.append(Skip(self.source.name(position), reason, epoch))
        return Sample([], [], tuple(skipped))

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """Return a batch's samples: first every file's header and plans, then the pixels.

        What alternates with decoding finds the processor's caches cold each time: two passes save a tenth of the time.
        """
        planned: list[tuple[Picture, list[Plan]] | None] = []
        for key in keys:
            try:
                planned.append(self._plan(key[1], key))
            except Exception:
                planned.append(None)
        planned.reverse()  # An image that PIL decoded stays in its Picture: each is dropped before the next.
        return [self._decoded(key[1], planned.pop()) or self[key] for key in keys]

    def _decoded(self, position: int, planned: tuple[Picture, list[Plan]] | None) -> Sample | None:
        """Return a sample, None where :meth:`__getitem__` has to find out why there is none."""
        try:
            return self._sample(position, *planned) if planned else None
        except Exception:
            return None

    def _plan(self, position: int, key: tuple[int, int]) -> tuple[Picture, list[Plan]]:
        picture = Picture(self.source.read(position), self.max_pixels, self.reduced)
        return picture, self.recipe.plan(picture.height, picture.width, stream_seed(self.seed, *key))

    def _sample(self, position: int, picture: Picture, plans: list[Plan], skipped: tuple[Skip, ...] = ()) -> Sample:
        boxes = np.array([_corners(plan, picture) for plan in plans], np.float32)
        return Sample(self.backend.prepare(picture, plans), plans, skipped, position, boxes)


def _corners(plan: Plan, picture: Picture) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of a view's crop in parts of the image, x0 and x1 exchanged where it is mirrored."""
    box = plan.box
    x0, x1 = box.left / picture.width, (box.left + box.width) / picture.width
    if plan.flipped:
        x0, x1 = x1, x0
    return x0, box.top / picture.height, x1, (box.top + box.height) / picture.height


def replacements(index: int, size: int) -> Iterator[int]:
    """Yield an image and those that may stand for it: 1, 3, 7, 15, ... further, then its next neighbours.

    Doubled steps leave a run of a thousand lost images, such as the end of a shard, in ten attempts, and stay in the
    shard if it has any image to give.
    """
    steps = [2**attempt - 1 for attempt in range(size.bit_length())]
    yield from dict.fromkeys((index + step) % size for step in [*steps, *range(min(size, 100))])


def collate(samples: list[Sample]) -> Batch:
    """Stack samples view by view; no views if one of them has none."""
    whole = samples if all(sample.views for sample in samples) else []
    views = [default_collate(list(view)) for view in zip(*(sample.views for sample in whole), strict=True)]
    plans = zip(*(sample.plans for sample in whole), strict=True)
    steps = [pack_steps([plan.steps for plan in view]) for view in plans]
    index = torch.tensor([sample.position for sample in whole])
    boxes = torch.from_numpy(np.stack([sample.boxes for sample in whole], 1)) if whole else torch.empty(0)
    skipped = tuple(skip for sample in samples for skip in sample.skipped)
    return Batch(views, steps, index, boxes, skipped, sum(bool(sample.skipped) for sample in samples))


class ViewLoader:
    """Batches on the training device; unreadable images are written down, and end the run where they are too many.

    Attributes:
        skips: what this process could not read so far.
    """

    def __init__(
        self,
        dataset: ViewDataset,
        sampler: EpochSampler,
        workers: int,
        device: torch.device,
        skips: SkipLog | None = None,
    ) -> None:
        self.dataset, self.sampler, self.workers, self.device = dataset, sampler, workers, device
        self.skips = skips or SkipLog()
        pixels = dataset.recipe.pixels
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (pixels.mean, pixels.std))

    def __iter__(self) -> Iterator[Views]:
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        # Its own generator: a DataLoader draws a seed when it starts, which would shift a resumed step's randomness.
        options["generator"] = torch.Generator()
        options["worker_init_fn"] = _one_thread
        if self.workers:
            options["timeout"] = timeouts.limit()
        batches = DataLoader(self.dataset, batch_sampler=self.sampler, collate_fn=collate, **options)
        for iteration, batch in enumerate(batches, self.sampler.start):
            self.skips.record(batch.skipped, iteration)
            self.skips.count(self.sampler.share, batch.replaced)
            if not batch.views:
                self.skips.stop()
            yield self.finish(batch)

    def finish(self, batch: Batch) -> Views:
        """Return a batch on the device, its steps done and normalised."""
        images = [self._finish(view, steps) for view, steps in zip(batch.views, batch.steps, strict=True)]
        index, boxes = (x.to(self.device, non_blocking=True) for x in (batch.index, batch.boxes))
        return Views(images, index, boxes)

    def _finish(self, views: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        levels = self.dataset.backend.finish(views.to(self.device, non_blocking=True), steps)
        return levels.sub_(self._mean).div_(self._std)


def _one_thread(_: int) -> None:
    """Keep OpenCV from starting threads in every worker; torch sees to its own."""
    cv2.setNumThreads(0)

"""Dataset and loader: from a source of image files to batches of views on the training device."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from moco_d2.data.augment import Augmentation, Plan
from moco_d2.data.backends import Backend, finish, pack, run_masked, to_float
from moco_d2.data.decode import EncodedImage
from moco_d2.data.operations import AugmentationError, Op, View8
from moco_d2.data.sampler import EpochSampler
from moco_d2.data.skipped import Skip, SkipLog
from moco_d2.data.sources import ImageSource
from moco_d2.io import timeouts
from moco_d2.io.pictures import MAX_PIXELS, describe
from moco_d2.layers.views import Views
from moco_d2.seeding import stream_seed

PINNED = 2  # batches that wait in pinned memory, which the system cannot use otherwise


@dataclass(frozen=True)
class Sample:
    """One image's views as a backend prepared them; without views if no replacement for an unreadable image was found.

    Attributes:
        views: V arrays (H_v, W_v, 3) uint8.
        ops: V sequences of operations that are left to the device.
        skipped: the unreadable images that this one replaces.
        position: number of the image that is shown.
        boxes: (V, 4), see :class:`~moco_d2.layers.views.Views`.
    """

    views: list[View8]
    ops: list[tuple[Op, ...]]
    skipped: tuple[Skip, ...]
    position: int = -1
    boxes: np.ndarray = field(default_factory=lambda: np.empty((0, 4), np.float32))


@dataclass(frozen=True)
class Batch:
    """A batch as workers send it.

    Attributes:
        views: a tensor (M, H, W, 3) uint8 for each size, of all images' views of that size, one view after another: a
            quarter of the bytes that floats would take on the way to the device.
        ops: a tensor (M, S, 2) for each size, the operations that are left to the device.
        numbers: for each size, the numbers of the views that have it.
        index: (N,) int64, numbers of the images that are shown.
        boxes: (V, N, 4) float32, see :class:`~moco_d2.layers.views.Views`.
        skipped: the unreadable images.
        replaced: number of images that replace an unreadable one.
    """

    views: list[torch.Tensor]
    ops: list[torch.Tensor]
    numbers: list[list[int]]
    index: torch.Tensor
    boxes: torch.Tensor
    skipped: tuple[Skip, ...]
    replaced: int

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory (torch's DataLoader calls this)."""
        views, ops = ([x.pin_memory() for x in both] for both in (self.views, self.ops))
        return replace(self, views=views, ops=ops, index=self.index.pin_memory(), boxes=self.boxes.pin_memory())


class ViewDataset(Dataset[Sample]):
    """Images as views. An item's randomness depends on (seed, epoch, index) only.

    So the views are the same with any number of workers, and a resumed run sees the views of an uninterrupted one.
    """

    def __init__(
        self,
        source: ImageSource,
        augmentation: Augmentation,
        seed: int,
        backend: Backend,
        max_pixels: int = MAX_PIXELS,
        reduced: bool = False,
    ) -> None:
        """Set up; ``max_pixels`` and ``reduced`` are those of :class:`~moco_d2.data.decode.EncodedImage`."""
        self.source, self.augmentation, self.seed, self.backend = source, augmentation, seed, backend
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
            except AugmentationError:
                raise
            except Exception as error:  # A damaged file makes decoders raise anything: OSError, SyntaxError, ...
                reason = f"{type(error).__name__}: {describe(error)}"
                skipped.append(Skip(self.source.name(position), reason, epoch))
        return Sample([], [], tuple(skipped))

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        """Return a batch's samples: first every file's header and plans, then the pixels.

        Interpreter code that alternates with decoding finds the processor's caches cold each time; two passes save a
        tenth of the time.
        """
        planned: list[tuple[EncodedImage, list[Plan]] | None] = []
        for key in keys:
            try:
                planned.append(self._plan(key[1], key))
            except Exception:
                planned.append(None)
        planned.reverse()  # PIL keeps the pixels that it decoded in the image: each is dropped before the next.
        return [self._decoded(key[1], planned.pop()) or self[key] for key in keys]

    def _decoded(self, position: int, planned: tuple[EncodedImage, list[Plan]] | None) -> Sample | None:
        """Return a sample, or None on any error: then :meth:`__getitem__` finds the reason and a replacement."""
        try:
            return self._sample(position, *planned) if planned else None
        except Exception:
            return None

    def _plan(self, position: int, key: tuple[int, int]) -> tuple[EncodedImage, list[Plan]]:
        image = EncodedImage(self.source.read(position), self.max_pixels, self.reduced)
        try:
            return image, self.augmentation.plan(image.height, image.width, stream_seed(self.seed, *key))
        except Exception as error:
            message = f"the augmentation cannot draw its parameters: {type(error).__name__}: {error}"
            raise AugmentationError(message) from error

    def _sample(self, position: int, image: EncodedImage, plans: list[Plan], skipped: tuple[Skip, ...] = ()) -> Sample:
        boxes = np.array([_corners(plan, image) for plan in plans], np.float32)
        ops = [plan.ops if self.backend.on_device else () for plan in plans]
        return Sample(self.backend.prepare(image, plans), ops, skipped, position, boxes)


def _corners(plan: Plan, image: EncodedImage) -> tuple[float, float, float, float]:
    """Return x0, y0, x1, y1 of a view's crop in parts of the image; x0 and x1 are swapped in a mirrored view."""
    box = plan.box
    x0, x1 = box.left / image.width, (box.left + box.width) / image.width
    if plan.flipped:
        x0, x1 = x1, x0
    return x0, box.top / image.height, x1, (box.top + box.height) / image.height


def replacements(index: int, size: int) -> Iterator[int]:
    """Yield an image's number, then those of its replacements: 1, 3, 7, 15, ... further, then the next neighbours.

    Doubled steps leave a run of a thousand lost images, such as the end of a shard, in ten attempts, and find an image
    of the same shard if it has a readable one near.
    """
    steps = [2**attempt - 1 for attempt in range(size.bit_length())]
    yield from dict.fromkeys((index + step) % size for step in [*steps, *range(min(size, 100))])


def collate(samples: list[Sample]) -> Batch:
    """Stack samples size by size; the batch has no views if one of its samples has none."""
    complete = samples if all(sample.views for sample in samples) else []
    sizes: dict[int, list[int]] = {}
    for number, view in enumerate(complete[0].views if complete else ()):
        sizes.setdefault(len(view), []).append(number)
    views = [default_collate([s.views[number] for number in same for s in complete]) for same in sizes.values()]
    ops = [pack([s.ops[number] for number in same for s in complete]) for same in sizes.values()]
    index = torch.tensor([sample.position for sample in complete])
    boxes = torch.from_numpy(np.stack([sample.boxes for sample in complete], 1)) if complete else torch.empty(0)
    skipped = tuple(skip for sample in samples for skip in sample.skipped)
    replaced = sum(bool(sample.skipped) for sample in samples)
    return Batch(views, ops, list(sizes.values()), index, boxes, skipped, replaced)


class ViewLoader:
    """Batches on the training device. Unreadable images are logged; too many of them end the run.

    On a GPU, the next batch is copied and augmented beside the step, on a stream of its own.

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
        compiled: bool = False,
    ) -> None:
        """Set up.

        Args:
            dataset: the images as views.
            sampler: their order; the first batch is that of its step ``start``.
            workers: number of worker processes; 0: this process prepares the views.
            device: where the batches go.
            skips: the log of unreadable images.
            compiled: compile the operations that are left to the device: few kernels in place of hundreds, but the
                first batch takes a minute, and a pixel may differ by one value.
        """
        self.dataset, self.sampler, self.workers, self.device = dataset, sampler, workers, device
        self.skips = skips or SkipLog()
        pixels = dataset.augmentation.pixels
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (pixels.mean, pixels.std))
        self._masked = torch.compile(masked, dynamic=False) if compiled and dataset.backend.on_device else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __iter__(self) -> Iterator[Views]:
        begun: Iterator[tuple[Batch, Views, torch.cuda.Event | None]] = map(self._begin, self._batches())
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which has made the mean and std
            begun = one_ahead(begun)
        iteration = self.sampler.start
        for batch, views, done in begun:
            # Here and not where the batch is begun: what is logged is what was trained on.
            self.skips.record(batch.skipped, iteration)
            self.skips.count(self.sampler.share, batch.replaced)
            if not batch.views:
                self.skips.stop()
            if done:
                wait_for(done, views)
            yield views
            del batch, views, done  # before the next one is made: enumerate would keep them, too
            iteration += 1

    def _batches(self) -> Iterator[Batch]:
        options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        # A generator of its own: a DataLoader draws a seed when it starts, which would shift a resumed step's draws.
        options["generator"] = torch.Generator()
        options["worker_init_fn"] = one_thread
        if self.workers:
            options["timeout"] = timeouts.limit()
        return few_pinned(DataLoader(self.dataset, batch_sampler=self.sampler, collate_fn=collate, **options))

    def _begin(self, batch: Batch) -> tuple[Batch, Views, torch.cuda.Event | None]:
        """Return a batch, its views, which may still be computed, and an event after that."""
        if self._stream is None:
            return batch, self.finish(batch), None
        with torch.cuda.stream(self._stream):
            views = self.finish(batch)
        return batch, views, self._stream.record_event()

    def finish(self, batch: Batch) -> Views:
        """Return a batch on the device, its operations executed and its pixels normalised."""
        images: dict[int, torch.Tensor] = {}
        for numbers, pixels, ops in zip(batch.numbers, batch.views, batch.ops, strict=True):
            same = self._finish(pixels.to(self.device, non_blocking=True), ops, numbers)
            images |= zip(numbers, same.chunk(len(numbers)), strict=True)
        index, boxes = (x.to(self.device, non_blocking=True) for x in (batch.index, batch.boxes))
        return Views([images[number] for number in sorted(images)], index, boxes)

    def _finish(self, views: torch.Tensor, ops: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        if self._masked:
            names = self.dataset.augmentation.names(numbers)
            return self._masked(views, ops.to(self.device, non_blocking=True), names, self._mean, self._std)
        return finish(views, ops).sub_(self._mean).div_(self._std)


def masked(
    views: torch.Tensor, ops: torch.Tensor, names: Sequence[Sequence[str]], mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Return prepared views normalised, with packed operations executed in a way that suits the compiler."""
    return (run_masked(to_float(views), ops, names) - mean) / std


Item = TypeVar("Item")


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, each after the next one has been taken. An error in taking an item is raised in its turn."""
    end = object()
    error: Exception | None = None
    following: Any = next(items, end)
    while following is not end:
        current = following
        try:
            following = next(items, end)
        except Exception as problem:
            following, error = end, problem
        yield current
        del current
    if error:
        raise error


def wait_for(done: torch.cuda.Event, views: Views) -> None:
    """Let the present stream use views that another one computes, from an event on."""
    stream = torch.cuda.current_stream(views.index.device)
    stream.wait_event(done)
    for tensor in (*views.images, views.index, views.boxes):
        tensor.record_stream(stream)  # so that its memory is not given away before this stream has used it


def few_pinned(loader: Iterable[Batch]) -> Iterator[Batch]:
    """Yield a DataLoader's batches, of which at most :data:`PINNED` wait in pinned memory, if it pins any."""
    batches = iter(loader)
    pinned = getattr(batches, "_data_queue", None)  # filled by the thread that pins; torch sets no bound
    if not isinstance(pinned, queue.Queue):
        yield from batches
        return
    pinned.maxsize = PINNED
    try:
        yield from batches
    finally:  # a thread that waits for room sees only every five seconds that it should end
        with pinned.not_full:
            pinned.maxsize = sys.maxsize
            pinned.not_full.notify_all()


def one_thread(_: int) -> None:
    """Keep OpenCV from starting threads in every worker; torch limits its own."""
    cv2.setNumThreads(0)

"""Which image comes when: per-sample seeds and the resumable sampler."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Indices = npt.NDArray[np.int64]


def stream_seed(*parts: int) -> int:
    """Mix integers into one well-spread 63-bit seed; zeros at the end make no difference."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """An endless stream of this process's batches that can start at any step.

    A set is a sequence of spans of images that lie together: shards, or one span for a set of files. Epoch e visits the
    spans in an order drawn from (seed, e); its images are permuted within windows of ``window`` spans. So a set of one
    span has a plain permutation, and for a billion images no more than a window's is ever held.

    The epoch is cut into ``lanes`` equally long parts that run side by side: every batch takes its share of each, and
    R processes take R consecutive parts of the batch. So step t's batch depends on the number of lanes but not of
    processes, and where the lanes are a multiple of the processes, each process needs the spans of its own lanes only.
    The images that do not fill a batch are dropped, as with the authors' ``drop_last``.

    Attributes:
        share: images of a batch in this process.
    """

    def __init__(
        self,
        spans: int | Sequence[int] | Indices,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        window: int = 0,
        lanes: int = 1,
        prepare: Callable[[list[int], list[int]], None] | None = None,
        fingerprint: int | None = None,
    ) -> None:
        """Sample a set in batches of ``batch`` over all processes, from step ``start`` on.

        Args:
            spans: number of images, in each span if there are several.
            batch: images of a step, in all processes; a multiple of ``world_size`` and of ``lanes``.
            seed: of the order.
            rank: this process.
            world_size: number of processes.
            start: the first step.
            window: spans that are permuted together; 0: all of them.
            lanes: parts of the epoch that run side by side.
            prepare: called when a lane enters a window, with that window's spans and the next one's.
            fingerprint: of the images.
        """
        self.spans = np.atleast_1d(np.asarray(spans, np.int64))
        self.size, self.firsts = int(self.spans.sum()), np.cumsum(self.spans) - self.spans
        self.batch, self.seed, self.start, self.prepare = batch, seed, start, prepare
        self.fingerprint = fingerprint
        self.window, self.lanes = window or len(self.spans), lanes
        self.share = batch // world_size
        self.part = slice(rank * self.share, (rank + 1) * self.share)

    @property
    def steps_per_epoch(self) -> int:
        """Number of whole batches in an epoch."""
        return self.size // self.batch

    def settings(self) -> dict[str, int]:
        """Return what the batches depend on besides seed, batch and number of images."""
        found = {} if self.fingerprint is None else {"fingerprint of the images' names": self.fingerprint}
        if len(self.spans) == self.lanes == 1:  # a plain permutation
            return found
        return {**found, "DATA.LANES": self.lanes, "DATA.SHUFFLE_SHARDS": self.window}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.lanes
        lanes = range(self.part.start // share, -(-self.part.stop // share))  # those this process has a part of
        part = slice(self.part.start - lanes.start * share, self.part.stop - lanes.start * share)
        epoch, first = divmod(self.start, self.steps_per_epoch)
        while True:
            steps = zip(*(self._shares(epoch, lane, first) for lane in lanes), strict=False)
            for shares in itertools.islice(steps, self.steps_per_epoch - first):
                yield [(epoch, int(index)) for index in np.concatenate(shares)[part]]
            epoch, first = epoch + 1, 0

    def _shares(self, epoch: int, lane: int, first: int) -> Iterator[Indices]:
        """Yield a lane's share of each batch of an epoch from step ``first`` on."""
        share = self.batch // self.lanes
        indices = np.empty(0, np.int64)
        for window in self._windows(epoch, lane, first * share):
            indices = np.concatenate([indices, window])
            whole = len(indices) // share * share
            yield from indices[:whole].reshape(-1, share)
            indices = indices[whole:]

    def _windows(self, epoch: int, lane: int, skipped: int) -> Iterator[Indices]:
        """Yield a lane's images window by window, without the first ``skipped``."""
        plan = self.plan(epoch, lane)
        for number, pieces in enumerate(plan):
            length = sum(stop - start for _, start, stop in pieces)
            if skipped >= length:
                skipped -= length
                continue
            if self.prepare:
                after = plan[number + 1] if number + 1 < len(plan) else self.plan(epoch + 1, lane)[0]
                self.prepare([span for span, *_ in pieces], [span for span, *_ in after])
            indices = np.concatenate([self.firsts[span] + np.arange(start, stop) for span, start, stop in pieces])
            yield np.random.default_rng(stream_seed(self.seed, epoch, lane, number)).permutation(indices)[skipped:]
            skipped = 0

    def plan(self, epoch: int, lane: int) -> list[list[tuple[int, int, int]]]:
        """Return a lane's windows: lists of (span, first, end) with positions inside the span."""
        order = np.random.default_rng(stream_seed(self.seed, epoch, 0, 0, 1)).permutation(len(self.spans))
        ends = np.cumsum(self.spans[order])
        low, high = (part * self.size // self.lanes for part in (lane, lane + 1))
        first, last = np.searchsorted(ends, [low, high - 1], side="right")
        pieces = []
        for span, end in zip(order[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True):
            begin = end - int(self.spans[span])
            pieces.append((span, max(low - begin, 0), min(high, end) - begin))
        return [pieces[i : i + self.window] for i in range(0, len(pieces), self.window)]

"""Resumable sampler: which image comes when, as a function of seed, epoch and step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from moco_d2.seeding import stream_seed

Indices = npt.NDArray[np.int64]


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """An endless sequence of this process's batches that can start at any step.

    A set is a sequence of shards; a set of files is one shard. Epoch e visits the shards in an order drawn from
    (seed, e); its images are permuted within windows of ``window`` shards. So a set of one shard has a plain
    permutation, and for a billion images no more than a few windows are ever in memory.

    The epoch is cut into ``streams`` parts of equal length that run side by side: every batch takes its share of each,
    and R processes take R consecutive parts of the batch. So a step's batch depends on the number of streams but not on
    the number of processes. If the streams are a multiple of the processes, each process needs the shards of its own
    streams only. The images that do not fill a batch are dropped, as with the authors' ``drop_last``.

    Attributes:
        share: images of a batch in this process.
    """

    def __init__(
        self,
        lengths: int | Sequence[int] | Indices,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        window: int = 0,
        streams: int = 1,
        prepare: Callable[[list[int], list[int]], None] | None = None,
        fingerprint: int | None = None,
    ) -> None:
        """Sample a set in batches of ``batch`` over all processes, from step ``start`` on.

        Args:
            lengths: number of images, or that of each shard.
            batch: images of a step, in all processes; a multiple of ``world_size`` and of ``streams``.
            seed: of the order.
            rank: this process.
            world_size: number of processes.
            start: the first step.
            window: shards whose images are permuted together (``DATA.SHUFFLE_SHARDS``); 0: all of them.
            streams: parts of the epoch that run side by side (``DATA.LANES``).
            prepare: called when a stream enters a window, with the numbers of that window's shards and the next one's.
            fingerprint: of the images.
        """
        self.lengths = np.atleast_1d(np.asarray(lengths, np.int64))
        self.size, self.firsts = int(self.lengths.sum()), np.cumsum(self.lengths) - self.lengths
        self.batch, self.seed, self.start, self.prepare = batch, seed, start, prepare
        self.fingerprint = fingerprint
        self.window, self.streams = window or len(self.lengths), streams
        self.share = batch // world_size
        self.part = slice(rank * self.share, (rank + 1) * self.share)

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch."""
        return self.size // self.batch

    def settings(self) -> dict[str, int]:
        """Return what the batches depend on besides seed, batch and number of images."""
        found = {} if self.fingerprint is None else {"fingerprint of the images' names": self.fingerprint}
        if len(self.lengths) == self.streams == 1:  # a plain permutation
            return found
        return {**found, "DATA.LANES": self.streams, "DATA.SHUFFLE_SHARDS": self.window}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.streams
        mine = range(self.part.start // share, -(-self.part.stop // share))  # streams that this process has a part of
        part = slice(self.part.start - mine.start * share, self.part.stop - mine.start * share)
        epoch, first = divmod(self.start, self.steps_per_epoch)
        while True:
            steps = zip(*(self._shares(epoch, stream, first) for stream in mine), strict=False)
            for shares in itertools.islice(steps, self.steps_per_epoch - first):
                yield [(epoch, int(index)) for index in np.concatenate(shares)[part]]
            epoch, first = epoch + 1, 0

    def _shares(self, epoch: int, stream: int, first: int) -> Iterator[Indices]:
        """Yield a stream's share of each batch of an epoch from step ``first`` on."""
        share = self.batch // self.streams
        indices = np.empty(0, np.int64)
        for window in self._windows(epoch, stream, first * share):
            indices = np.concatenate([indices, window])
            full = len(indices) // share * share
            yield from indices[:full].reshape(-1, share)
            indices = indices[full:]

    def _windows(self, epoch: int, stream: int, skipped: int) -> Iterator[Indices]:
        """Yield a stream's images window by window, without the first ``skipped``."""
        plan = self.plan(epoch, stream)
        for number, pieces in enumerate(plan):
            length = sum(stop - start for _, start, stop in pieces)
            if skipped >= length:
                skipped -= length
                continue
            if self.prepare:
                after = plan[number + 1] if number + 1 < len(plan) else self.plan(epoch + 1, stream)[0]
                self.prepare([shard for shard, *_ in pieces], [shard for shard, *_ in after])
            indices = np.concatenate([self.firsts[shard] + np.arange(start, stop) for shard, start, stop in pieces])
            yield np.random.default_rng(stream_seed(self.seed, epoch, stream, number)).permutation(indices)[skipped:]
            skipped = 0

    def plan(self, epoch: int, stream: int) -> list[list[tuple[int, int, int]]]:
        """Return a stream's windows: lists of (shard, first, end) with positions inside the shard."""
        order = np.random.default_rng(stream_seed(self.seed, epoch, 0, 0, 1)).permutation(len(self.lengths))
        ends = np.cumsum(self.lengths[order])
        low, high = (part * self.size // self.streams for part in (stream, stream + 1))
        first, last = np.searchsorted(ends, [low, high - 1], side="right")
        pieces = []
        for shard, end in zip(order[first : last + 1].tolist(), ends[first : last + 1].tolist(), strict=True):
            begin = end - int(self.lengths[shard])
            pieces.append((shard, max(low - begin, 0), min(high, end) - begin))
        return [pieces[i : i + self.window] for i in range(0, len(pieces), self.window)]

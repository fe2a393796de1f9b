"""Which image comes when: per-sample seeds and the resumable sampler."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


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

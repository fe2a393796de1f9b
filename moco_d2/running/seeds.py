"""Randomness that follows from the seed and the place in the run, so that resuming needs no generator's state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.engine import HookBase

from moco_d2.seeding import stream_seed


class StepSeed(HookBase):
    """Seed every generator (Python, numpy, torch on each device) before every step from (seed, iteration, stream).

    So a step's randomness does not depend on the past.
    """

    def __init__(self, *seed: int, stream: int = 0) -> None:
        """Take what the draws follow from.

        Args:
            seed: in one part or several (seed, rank).
            stream: another number in each process that shall draw other values; 0 draws as (seed, iteration) alone.
        """
        self.seed, self.stream = seed, [stream] if stream else []

    def before_step(self) -> None:
        """Seed the step."""
        seed_all(stream_seed(*self.seed, self.trainer.iter, *self.stream))


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002, the generator that Detectron2's augmentations draw from
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators (torch's on the CPU) for a block, and give them back as they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002, see above
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002, see above
        torch.random.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002, see above

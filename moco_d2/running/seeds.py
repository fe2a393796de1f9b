"""Seeds that follow from ``SEED`` and the iteration, so that resuming needs no state of a generator."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.engine import HookBase

from moco_d2.layers.distributed import share_stream
from moco_d2.seeding import stream_seed


class StepSeed(HookBase):
    """Seeds every generator (Python, numpy, torch on each device) before each step from (seed, iteration, stream).

    A step's randomness therefore does not depend on earlier steps.
    """

    def __init__(self, *seed: int, stream: int | None = None) -> None:
        """Create the hook.

        Args:
            seed: one number or several (seed, rank).
            stream: a number per process, if processes must draw different values; 0 is the stream of (seed, iteration).
                What all processes draw alike (:func:`~moco_d2.layers.distributed.share_stream`) then follows from
                (seed, iteration), too.
        """
        self.seed, self.stream, self.shares = seed, [stream] if stream else [], stream is not None

    def before_step(self) -> None:
        """Seed the step."""
        seed_all(stream_seed(*self.seed, self.trainer.iter, *self.stream))
        if self.shares:
            share_stream(stream_seed(*self.seed, self.trainer.iter))


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002, Detectron2's augmentations draw from it
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators (torch's on the CPU) for a block, and restore their states afterwards."""
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

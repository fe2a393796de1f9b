"""Check of every picture in a dry run, decoded as the run would decode it, by all processes and their workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from moco_d2.io import timeouts
from moco_d2.running.dry_run import duration

_EVERY = 10.0  # seconds between two lines of progress
_BATCH = 8  # pictures that a worker checks before it reports


class _Checks(Dataset[str]):
    def __init__(self, check: Callable[[int], str], numbers: Sequence[int]) -> None:
        self.check, self.numbers = check, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> str:
        return self.check(self.numbers[place])


def check_each(
    check: Callable[[int], str], numbers: Sequence[int], workers: int
) -> Generator[tuple[str, str], None, list[str]]:
    """Check pictures; yield progress from time to time, as a dry run's finding, and return all complaints.

    Every process must call this: each checks its share, and all get the same result.

    Args:
        check: returns the complaint about the picture of an index, empty if there is none.
        numbers: indices of the pictures.
        workers: ``DATALOADER.NUM_WORKERS``.
    """
    mine = numbers[comm.get_rank() :: comm.get_world_size()]
    loader = DataLoader(
        _Checks(check, mine), batch_size=_BATCH, num_workers=workers, collate_fn=list,
        timeout=timeouts.limit() if workers else 0,
    )  # fmt: skip
    found: list[str] = []
    begun = reported = time.monotonic()
    for batch, answers in enumerate(loader, 1):
        found += filter(None, answers)
        now = time.monotonic()
        if now - reported > _EVERY:
            reported, part = now, min(1.0, batch * _BATCH / len(mine))
            left = duration((now - begun) * (1 - part) / part)
            yield (
                "pictures",
                f"{part:.0%} of {len(numbers)} checked, about {left} left (DATA.DRY_RUN_PICTURES checks fewer)",
            )
    return [problem for theirs in comm.all_gather(found) for problem in theirs]


def evenly(total: int, most: int) -> list[int]:
    """Return the indices of at most ``most`` of ``total`` pictures, evenly spaced; 0 for all."""
    return list(range(total)) if not 0 < most < total else np.linspace(0, total - 1, most).round().astype(int).tolist()

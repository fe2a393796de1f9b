"""The dry runs' look at every picture, decoded as the run would decode it, in all processes and their workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

import numpy as np
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from moco_d2.io import timeouts
from moco_d2.running.dry_run import duration

_EVERY = 10.0  # seconds between two lines about how far the check is
_BATCH = 8  # pictures that a worker checks before it says so


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
    """Check pictures; yield now and then how far it is, as a dry run's finding, and return what is wrong.

    Every process must call this: each checks its share, and all get the same answer.

    Args:
        check: returns what is wrong with the picture of a number, empty for nothing.
        numbers: of the pictures.
        workers: ``DATALOADER.NUM_WORKERS``.
    """
    mine = numbers[comm.get_rank() :: comm.get_world_size()]
    loader = DataLoader(
        _Checks(check, mine), batch_size=_BATCH, num_workers=workers, collate_fn=list,
        timeout=timeouts.limit() if workers else 0,
    )  # fmt: skip
    found: list[str] = []
    begun = said = time.monotonic()
    for batch, answers in enumerate(loader, 1):
        found += filter(None, answers)
        now = time.monotonic()
        if now - said > _EVERY:
            said, part = now, min(1.0, batch * _BATCH / len(mine))
            left = duration((now - begun) * (1 - part) / part)
            yield (
                "pictures",
                f"{part:.0%} of {len(numbers)} checked, about {left} left (DATA.DRY_RUN_PICTURES checks fewer)",
            )
    return [problem for theirs in comm.all_gather(found) for problem in theirs]


def evenly(total: int, most: int) -> list[int]:
    """Return the numbers of at most ``most`` pictures, evenly spaced; of all for 0."""
    return list(range(total)) if not 0 < most < total else np.linspace(0, total - 1, most).round().astype(int).tolist()

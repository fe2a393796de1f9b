"""What the processes of a launched run do in tests of lost processes: a script beside the tests that launch it.

    ranks.py SECONDS_OF_TIMEOUT HOW

Each rank says its process id, and those of its loader's workers, and then sums batches over all ranks for ever, or
(``ask``, ``sleep``) until it is asked to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from moco_d2.running.launch import launch
from moco_d2.running.preemption import StopWhenAsked


class Numbers(Dataset[int]):
    """Enough of them."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> int:
        return index


def main(args: Any) -> None:
    """Work as one rank."""
    rank = dist.get_rank()
    stop = StopWhenAsked(SimpleNamespace(save=lambda: None))
    stop.before_train()
    batches = iter(DataLoader(Numbers(), batch_size=4, num_workers=2))
    next(batches)
    workers = [worker.pid for worker in batches._workers]
    sys.stdout.write(f"rank {rank} {os.getpid()} {' '.join(map(str, workers))}\n")
    sys.stdout.flush()
    for step, batch in enumerate(batches):
        if rank == 1 and step == 20:
            if args.how == "raise":
                raise KeyError("a mistake in rank one")
            if args.how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            if args.how == "worker":
                os.kill(workers[0], signal.SIGKILL)
            if args.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if args.how == "sleep":
                time.sleep(10**6)
        if args.how in ("ask", "sleep"):
            stop.trainer = SimpleNamespace(iter=step, max_iter=10**9)
            stop.after_step()
        else:
            dist.all_reduce(torch.as_tensor(batch))
        time.sleep(0.01)


if __name__ == "__main__":
    launch(main, 2, args=SimpleNamespace(how=sys.argv[2]), timeout=float(sys.argv[1]))

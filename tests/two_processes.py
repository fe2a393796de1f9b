"""Calls of a function in two or more processes of one group, as a training on as many devices has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm


def in_two_processes(work: Callable[..., None], *args: Any) -> None:
    """Call ``work(*args)`` in two forks of this process, which need not import the libraries again."""
    in_processes(2, work, *args)


def in_processes(count: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(*args)`` in as many forks."""
    with TemporaryDirectory() as folder:
        passed = (count, folder, work, args)
        torch.multiprocessing.start_processes(_one_of_them, passed, nprocs=count, start_method="fork")


def _one_of_them(rank: int, count: int, folder: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=count)
    comm.create_local_process_group(count)
    work(*args)
    dist.barrier()  # gloo aborts a process whose peer goes before it
    dist.destroy_process_group()

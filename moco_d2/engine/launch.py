"""Start a function in every process, whoever starts the processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm


def launch(
    main: Callable[[Any], None],
    num_gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Any = None,
) -> None:
    """Run ``main(args)`` in ``num_gpus`` processes per machine, on GPUs (NCCL) or, without any, on the CPU (gloo).

    Under ``torchrun`` the processes exist already: the process group is made from its environment, and the counts are
    torchrun's.

    Raises:
        ValueError: more processes asked for than there are GPUs, or a bad machine count.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _join_torchrun()
        try:
            main(args)
        finally:
            dist.destroy_process_group()
        return
    available = torch.cuda.device_count()
    if num_gpus < 1 or num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--num-gpus {num_gpus} --num-machines {num_machines} --machine-rank {machine_rank}: counts start at 1, "
            "and ranks run from 0 to num-machines - 1"
        )
    if available and num_gpus > available:
        raise ValueError(f"--num-gpus is {num_gpus}, but this machine has {available}")
    if num_machines > 1 and dist_url == "auto":
        raise ValueError("several machines need --dist-url tcp://HOST:PORT of the first machine")
    detectron2_launch(main, num_gpus, num_machines, machine_rank, dist_url, args=(args,))


def _join_torchrun() -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))

"""Collectives for one process or several, on CUDA (NCCL) and on the CPU (gloo)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_Pictures = TypeVar("_Pictures", torch.Tensor, Sequence[int])


def world_size() -> int:
    """Return the number of processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank (0 without a process group)."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate every process's ``x`` in rank order, without gradient.

    Args:
        x: (N, ...), the same shape in every process.

    Returns:
        (world_size * N, ...); ``x`` itself in one process.
    """
    if world_size() == 1:
        return x
    everyone = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


def own_part(batch: torch.Tensor) -> torch.Tensor:
    """Return this process's rows (N, ...) of those of all processes (R * N, ...)."""
    own: torch.Tensor = batch.unflatten(0, (world_size(), -1))[rank()]
    return own


def share(pictures: _Pictures) -> _Pictures:
    """Return this process's share: shares are contiguous, in rank order, and their lengths differ by 1 at most.

    Args:
        pictures: their numbers, or a row for each.

    Raises:
        ValueError: there are fewer pictures than processes.
    """
    count, processes = len(pictures), world_size()
    if count < processes:
        raise ValueError(f"{count} pictures cannot be divided among {processes} processes: use fewer processes")
    return pictures[rank() * count // processes : (rank() + 1) * count // processes]


@torch.no_grad()
def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Concatenate every process's rows, of which each may have another number, in rank order, without gradient.

    Args:
        x: (N, ...), in every process the same shape but for N.

    Returns:
        The rows of all processes; ``x`` itself in one process.
    """
    if world_size() == 1:
        return x
    counts = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    everyone = x.new_empty(sum(counts), *x.shape[1:])
    # Sent one after the other into their place: padded to the same length, a large bank would be there twice.
    for source, rows in enumerate(everyone.split(counts)):
        if source == rank():
            rows.copy_(x)
        dist.broadcast(rows, source)
    return everyone


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate every process's ``x`` in rank order, with gradient.

    The gradient of a process's rows is the sum of all processes' gradients for them. DDP averages the gradients of
    the processes' losses. Two kinds of loss therefore have exactly the gradient of one process with the whole batch: a
    loss of a process's own anchors against gathered features, and a loss that every process computes alike from
    gathered features. With :func:`all_gather` their gradient would be another one.

    Args:
        x: (N, ...), the same shape in every process.

    Returns:
        (world_size * N, ...); ``x`` itself in one process.
    """
    if world_size() == 1:
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of every process's ``x``, with gradient (see :func:`gather`); ``x`` itself in one process.

    Args:
        x: any shape, the same in every process.
    """
    if world_size() == 1:
        return x
    total: torch.Tensor = torch.distributed.nn.functional.all_reduce(x)
    return total


@torch.no_grad()
def total(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of every process's ``x``, without gradient; ``x`` itself is unchanged."""
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


@torch.no_grad()
def shared_permutation(n: int, device: torch.device) -> torch.Tensor:
    """Draw a permutation of ``range(n)`` in rank 0 and send it to all processes.

    The draw is made on the CPU, so that it does not depend on the device. The copy from pinned memory does not wait for
    the GPU's running work.

    Returns:
        (n,) int64.
    """
    return _from_rank_0(torch.randperm(n, pin_memory=device.type == "cuda"), device)


@torch.no_grad()
def shared_draw(n: int, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Draw numbers of ``range(n)``, uniformly and with replacement, in rank 0 and send them to all processes.

    A method that takes its part (:func:`own_part`) of a draw for all processes computes what one process does.

    Returns:
        ``shape``, int64.
    """
    return _from_rank_0(torch.randint(n, shape, pin_memory=device.type == "cuda"), device)


def _from_rank_0(drawn: torch.Tensor, device: torch.device) -> torch.Tensor:
    drawn = drawn.to(device, non_blocking=True)
    if world_size() > 1:
        dist.broadcast(drawn, src=0)
    return drawn


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers (the queue among them) to every process, so that all start equal."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Wrap a module in DistributedDataParallel, on a GPU or the CPU; in one process return the module itself.

    Buffers are not broadcast at every step: batch statistics belong to each process, as in the authors' per-GPU BN, and
    queues stay equal because all processes apply the same updates.
    """
    if world_size() == 1:
        return module
    broadcast_module(module)
    device = next(module.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)

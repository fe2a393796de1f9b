"""Collectives that are also right in one process, on CUDA (NCCL) and on the CPU (gloo)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def world_size() -> int:
    """Return the number of processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0 (0 without a process group)."""
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


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate every process's ``x`` in rank order, with gradient.

    DDP averages the gradients of the processes' losses. A loss of a process's own anchors against gathered features,
    and a loss that every process computes alike from gathered features, then both have exactly the gradient of one
    process that holds the whole batch. With :func:`all_gather` they do not.

    Args:
        x: (N, ...), the same shape in every process.

    Returns:
        (world_size * N, ...); ``x`` itself in one process. A process receives the sum of all processes' gradients for
        its own rows.
    """
    if world_size() == 1:
        return x
    return torch.cat(torch.distributed.nn.functional.all_gather(x.contiguous()))


def sum_over_processes(x: torch.Tensor) -> torch.Tensor:
    """Add up every process's ``x``, with gradient (see :func:`gather`); ``x`` itself in one process.

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
    """Draw one permutation of ``range(n)`` in rank 0 and give it to all.

    The draw is made on the CPU, so that it does not depend on the kind of device. From pinned memory it reaches a GPU
    without waiting for what that one is computing.

    Returns:
        (n,) int64.
    """
    permutation = torch.randperm(n, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    if world_size() > 1:
        dist.broadcast(permutation, src=0)
    return permutation


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every process, so that all start equal (the queue above all)."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Wrap a module in DistributedDataParallel, on either kind of device; unchanged in one process.

    Buffers are not broadcast at every step: batch statistics are each process's own, as with the authors' per-GPU BN,
    and a queue is kept equal by construction.
    """
    if world_size() == 1:
        return module
    broadcast_module(module)
    device = next(module.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False)

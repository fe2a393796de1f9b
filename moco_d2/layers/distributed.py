"""Collectives for one process or several, on CUDA (NCCL) and on the CPU (gloo)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
def exchange(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return this process's rows of the joined batch in another order: ``own_part(all_gather(x)[order])``.

    A process receives its N rows only, where :func:`all_gather` gives it R * N.

    Args:
        x: (N, ...), the same shape in each of the R processes. It has no gradient.
        order: (R * N,) int64 on the CPU, a permutation, the same in all processes.

    Returns:
        (N, ...).
    """
    if world_size() == 1:
        return x[to_device(order, x.device)]
    # wanted[d] are the rows that process d receives; a row's number tells which process has it, and where.
    wanted, n = order.unflatten(0, (world_size(), -1)), len(x)  # (R, N)
    sources = wanted // n
    mine = sources == rank()
    # Row by row, so for one receiver after the other, and for each in the order in which it wants them.
    sent = x[to_device(wanted[mine] - rank() * n, x.device)].contiguous()
    received = torch.empty_like(sent)
    counts = sources[rank()].bincount(minlength=world_size()).tolist()
    dist.all_to_all_single(received, sent, counts, mine.sum(dim=1).tolist())
    # They arrive sorted by their source.
    return received[to_device(sources[rank()].argsort(stable=True).argsort(), x.device)]


def to_device(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU; to a GPU from pinned memory, which does not wait for the GPU's running work."""
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


_stream: torch.Generator | None = None  # see share_stream


def share_stream(seed: int) -> None:
    """Seed what :func:`shared_permutation` and :func:`shared_draw` draw from, so that no process waits for another's.

    Every process must call this with the same seed, before each step if steps shall not depend on earlier ones.
    Without it rank 0 draws, from torch's global generator, and sends what it has drawn to all.
    """
    global _stream
    # One process draws from torch's generator: it has nobody to agree with.
    _stream = torch.Generator().manual_seed(seed) if world_size() > 1 else None


def shared_permutation(n: int) -> torch.Tensor:
    """Draw a permutation of ``range(n)``, the same in all processes (see :func:`share_stream`).

    Returns:
        (n,) int64, on the CPU, so that it does not depend on the device.
    """
    return _alike(lambda generator: torch.randperm(n, generator=generator))


def shared_draw(n: int, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Draw numbers of ``range(n)``, uniformly and with replacement, the same in all processes.

    A method that takes its part (:func:`own_part`) of a draw for all processes computes what one process does. The draw
    is made on the CPU, as that of :func:`shared_permutation`.

    Returns:
        ``shape``, int64, on the device.
    """
    return to_device(_alike(lambda generator: torch.randint(n, shape, generator=generator)), device)


@torch.no_grad()
def shared_normal_(x: torch.Tensor, std: float) -> None:
    """Fill a tensor with normal numbers of mean 0, the same in all processes; drawn as those of :func:`shared_draw`."""
    x.copy_(_alike(lambda generator: torch.empty(x.shape, dtype=x.dtype).normal_(0, std, generator=generator)))


@torch.no_grad()
def _alike(draw: Callable[[torch.Generator | None], torch.Tensor]) -> torch.Tensor:
    if world_size() == 1 or _stream is not None:
        return draw(_stream if world_size() > 1 else None)
    drawn = draw(None)
    drawn = drawn.cuda() if dist.get_backend() == "nccl" else drawn
    dist.broadcast(drawn, src=0)
    return drawn.cpu()


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers (the queue among them) to every process, so that all start equal."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def wrap_ddp(module: nn.Module) -> nn.Module:
    """Wrap a module in DistributedDataParallel, on a GPU or the CPU; in one process return the module itself.

    Buffers are not broadcast at every step: batch statistics belong to each process, as in the authors' per-GPU BN, and
    queues stay equal because all processes apply the same updates. Gradients are views of the buckets in which DDP sums
    them, which saves their memory once and a copy.
    """
    if world_size() == 1:
        return module
    broadcast_module(module)
    device = next(module.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)

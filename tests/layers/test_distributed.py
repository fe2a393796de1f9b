"""Collectives in two and four processes: rows exchanged, draws shared, gradients in DDP's buckets."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from moco_d2.layers import distributed
from moco_d2.layers.distributed import (
    all_gather,
    exchange,
    own_part,
    rank,
    share_stream,
    shared_draw,
    shared_normal_,
    shared_permutation,
    world_size,
    wrap_ddp,
)  # fmt: skip
from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.shuffle import encode_shuffled
from moco_d2.layers.views import Views
from moco_d2.methods import DenseCL
from tests.two_processes import in_processes, in_two_processes

ROWS = 6  # of each process


class Traffic:
    """Counts the bytes that arrive at this process, by wrapping what torch sends with."""

    def __init__(self) -> None:
        self.bytes = {"all_to_all_single": 0, "all_gather_into_tensor": 0, "broadcast": 0}
        for name in self.bytes:
            setattr(dist, name, functools.partial(self._count, name, getattr(dist, name)))

    def _count(self, name: str, send: Any, received: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self.bytes[name] += received.numel() * received.element_size()
        send(received, *args, **kwargs)


def rows(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank())
    return torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64).to(dtype)


def exchanging() -> None:
    joined = world_size() * ROWS
    orders = [torch.randperm(joined, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    orders += [torch.arange(joined), torch.arange(joined).roll(ROWS), torch.arange(joined).flip(0)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        for order in orders:
            x = rows(dtype, (3, 5, 4)).contiguous(memory_format=torch.channels_last)
            expected = own_part(all_gather(x)[order])
            traffic = Traffic()
            given = exchange(x, order)
            assert torch.equal(given, expected) and given.dtype == dtype
            share = ROWS * x[0].numel() * x.element_size()
            sent = {"all_to_all_single": share, "all_gather_into_tensor": 0, "broadcast": 0}
            assert traffic.bytes == sent, "a process's own share, and nothing else"
            assert torch.equal(exchange(given, order.argsort()), x), "the inverse order puts them back"


def drawing() -> None:
    torch.manual_seed(rank())
    drawn = shared_permutation(50), shared_draw(9, (4, 3), torch.device("cpu"))
    torch.manual_seed(0)
    theirs = torch.randperm(50), torch.randint(9, (4, 3))
    assert all(map(torch.equal, drawn, theirs)), "rank 0 draws, if nothing else is said"
    traffic = Traffic()
    torch.manual_seed(rank())
    share_stream(0)
    drawn = shared_permutation(50), shared_draw(9, (4, 3), torch.device("cpu"))
    assert all(map(torch.equal, drawn, theirs)), "the same numbers, drawn by each process"
    weight = torch.empty(30, 4)
    share_stream(0)
    shared_normal_(weight, 0.01)
    assert torch.equal(weight, torch.empty(30, 4).normal_(0, 0.01, generator=torch.Generator().manual_seed(0)))
    assert not any(traffic.bytes.values()) and torch.initial_seed() == rank()


def encoding() -> None:
    """Compare shuffling with that of gathered pictures, which are then encoded under autocast: the same to the bit."""
    network = build_resnet("resnet18", width=0.125)
    x = rows(torch.float32, (3, 32, 32))
    share_stream(3)
    order = shared_permutation(world_size() * ROWS)
    batch = all_gather(x)
    share_stream(3)
    traffic = Traffic()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = all_gather(network(batch[own_part(order)]))[order.argsort()]
        traffic.bytes["all_gather_into_tensor"] = 0
        assert torch.equal(encode_shuffled(network, x), expected)
    assert traffic.bytes["all_to_all_single"] == 2 * x.numel(), "two bytes a number"
    assert traffic.bytes["all_gather_into_tensor"] == expected.numel() * expected.element_size(), "features only"


def exchange_draw_and_encode() -> None:
    torch.manual_seed(0)
    exchanging()
    drawing()
    encoding()


@pytest.mark.parametrize("processes", [2, 4])
def test_rows_are_exchanged_without_gathering_them_all_and_draws_are_shared_without_sending(processes: int) -> None:
    in_processes(processes, exchange_draw_and_encode)


def test_one_process_draws_from_torchs_generator_and_exchanges_with_itself() -> None:
    share_stream(5)
    assert distributed._stream is None
    x, order = torch.randn(6, 3), torch.randperm(6)
    assert torch.equal(exchange(x, order), x[order])


def dense_loss(groups: int, folder: Any) -> None:
    """Save the losses of two shuffled steps of DenseCL, each process with its part of the batch."""
    torch.manual_seed(0)
    encoder = functools.partial(build_resnet, "resnet18", width=0.125)
    method = DenseCL(encoder, dim=16, queue_size=24, bn_groups=groups).double()
    network = wrap_ddp(method)
    sgd = torch.optim.SGD(method.encoder_q.parameters(), lr=0.1)
    losses = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        batch = [torch.randn(8, 3, 64, 64, dtype=torch.float64, generator=generator) for _ in range(2)]
        torch.manual_seed(step)
        own = [own_part(view) for view in batch]
        given = network(Views(own, torch.arange(len(own[0])), torch.zeros(2, len(own[0]), 4)))
        sgd.zero_grad()
        sum(given.values()).backward()
        sgd.step()
        losses.append(all_gather(torch.stack(list(given.values())).detach()).view(world_size(), -1).mean(0))
    torch.save(torch.stack(losses), folder / f"{world_size()}-{rank()}.pth")


def test_densecl_puts_cells_and_keys_back_in_two_processes(tmp_path: Any) -> None:
    dense_loss(2, tmp_path)
    in_two_processes(dense_loss, 1, tmp_path)
    one, two = torch.load(tmp_path / "1-0.pth"), torch.load(tmp_path / "2-0.pth")
    torch.testing.assert_close(two, one, rtol=1e-9, atol=0)


def clipped_steps(plain: bool) -> list[torch.Tensor]:
    """Return the weights after steps in channels_last order with clipping and a layer whose gradient is dropped."""
    torch.manual_seed(0)
    network = build_resnet("resnet18", width=0.125, num_classes=4).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(network, broadcast_buffers=False) if plain else wrap_ddp(network)
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
    for step in range(4):
        torch.manual_seed(10 * step + rank())
        # The pictures come in either order, as from a loader and from an exchange.
        order = torch.channels_last if step % 2 else torch.contiguous_format
        x = torch.randn(4, 3, 32, 32).contiguous(memory_format=order)
        sgd.zero_grad()
        ddp(x).square().mean().backward()
        if step == 1:
            network.fc.weight.grad = None  # as methods that hold a layer still
        for parameter in (p for p in network.parameters() if p.grad is not None):
            torch.nn.utils.clip_grad_norm_(parameter, 0.1)
        if not plain:
            shared = [p for p in network.parameters() if p.grad is not None and p.grad._is_view()]
            assert len(shared) >= len(list(network.parameters())) - 1, "views of the buckets, no copies of them"
        sgd.step()
    return [value.clone() for value in network.state_dict().values()]


def with_and_without_views() -> None:
    assert all(map(torch.equal, clipped_steps(plain=False), clipped_steps(plain=True)))


def test_gradients_in_ddps_buckets_train_the_same_without_a_warning() -> None:
    in_two_processes(with_and_without_views)

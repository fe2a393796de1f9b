"""Every method in small: the arguments and the views with which the contract tests train it on a CPU."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.views import Views
from moco_d2.methods import SSLMethod, build_method

IMAGES = 32  # of the data set
BATCH = 8  # in all processes


class Small(NamedTuple):
    """How a method is built for these tests.

    Attributes:
        args: ``SSL.ARGS`` that make it small.
        sizes: side of each view, large ones first.
        norm: the encoder's norm. With SyncBN, two processes can equal one.
        depth: the encoder.
        width: the encoder's. Group norm needs 0.5.
    """

    args: dict[str, Any]
    sizes: tuple[int, ...] = (32, 32)
    norm: str = "SyncBN"
    depth: str = "resnet18"
    width: float = 0.125


SMALL: dict[str, Small] = {
    "MoCo": Small({"dim": 16, "queue_size": 24, "mlp": True, "momentum": 0.9, "shuffle": False}),
    "DenseCL": Small({"dim": 16, "queue_size": 24, "momentum": 0.9, "shuffle": False}, sizes=(64, 64)),
    "CMC": Small({"dim": 16, "loss": "nce", "negatives": 12}, sizes=(32,)),
    "CPC": Small(
        {"patch": 8, "stride": 8, "hidden": 8, "steps": 1, "skip": 0, "negatives": 5, "directions": 4}
        | {"drop_colours": True},
        sizes=(16,),
        norm="GN",
        width=0.5,
    ),
    "PixPro": Small({"dim": 16, "hidden": 32, "momentum": 0.9}, sizes=(64, 64)),
}


def build(name: str, seed: int = 0, **args: object) -> SSLMethod:
    """Return a method of float64 in training mode, with the small arguments and those given."""
    torch.manual_seed(seed)
    small = SMALL[name]
    encoder = functools.partial(build_resnet, small.depth, width=small.width, norm=small.norm)
    return build_method(name, encoder, {**small.args, **args}, images=IMAGES).double()


def make_views(name: str, step: int, n: int = BATCH) -> Views:
    """Return the views of a step: coloured noise, images that differ from step to step, crops with boxes."""
    generator = torch.Generator().manual_seed(1000 + step)
    sizes = SMALL[name].sizes
    images = [torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator) for size in sizes]
    index = torch.randperm(IMAGES, generator=generator)[:n]
    corner, side = torch.rand(2, len(sizes), n, 2, generator=generator)
    boxes = torch.cat([corner * 0.4, corner * 0.4 + 0.4 + side * 0.2], dim=2)  # x0, y0, x1, y1
    mirrored = torch.rand(len(sizes), n, generator=generator) < 0.5
    boxes[mirrored] = boxes[mirrored][:, [2, 1, 0, 3]]
    return Views(images, index, boxes)


def part(views: Views, rank: int, processes: int) -> Views:
    """Return a process's part of a batch."""
    images = [view.chunk(processes)[rank] for view in views.images]
    return Views(images, views.index.chunk(processes)[rank], views.boxes.chunk(processes, dim=1)[rank])


def six_losses(name: str, **args: object) -> list[float]:
    """Return the losses of six steps in float64, which no refactoring may change."""
    method = build(name, **args)
    sgd = torch.optim.SGD([p for group in method.param_groups() for p in group["params"]], lr=0.05, momentum=0.9)
    losses = []
    for step in range(6):
        torch.manual_seed(step)
        method.before_step(step / 6, step / 2)
        loss = sum(method(make_views(name, step)).values())
        sgd.zero_grad(), loss.backward(), method.after_backward(), sgd.step(), method.after_step()
        losses.append(loss.item())
    return losses

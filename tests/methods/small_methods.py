"""Every method in small: the arguments and the views with which the contract tests train it on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.views import Views
from moco_d2.layers.vit import build_vit
from moco_d2.methods import SSLMethod, build_method

IMAGES = 32  # of the data set
BATCH = 8  # in all processes
# Losses of six steps may differ by this part from one processor to another: draws in float32 do, and steps magnify it.
# Between AVX2 and AVX-512 it was 3e-7 for DINO, 6e-8 for SimSiam and less for the others.
ROUNDING = 1e-6


class Small(NamedTuple):
    """How a method is built for these tests.

    Attributes:
        args: ``SSL.ARGS`` that make it small.
        sizes: side of each view, large ones first.
        norm: the encoder's norm. With SyncBN, two processes can equal one.
        depth: the encoder.
        width: the encoder's. Group norm needs 0.5.
        vit: whether the encoder is a small ViT instead of a ResNet.
    """

    args: dict[str, Any]
    sizes: tuple[int, ...] = (32, 32)
    norm: str = "SyncBN"
    depth: str = "resnet18"
    width: float = 0.125
    vit: bool = False


VIT = {"dim": 24, "depth": 2, "heads": 2, "patch": 8, "image": 32}

# By method; a method may be there again with a second encoder: ``DINO ViT``.
SMALL: dict[str, Small] = {
    "MoCo": Small({"dim": 16, "queue_size": 24, "mlp": True, "momentum": 0.9, "shuffle": False}),
    "SwAV": Small(
        {"dim": 16, "hidden": 16, "prototypes": 12, "queue_size": 16, "queue_start": 0.0, "freeze": 0.5},
        sizes=(32, 32, 16, 16),
    ),
    "DeepClusterV2": Small(
        {"dim": 16, "hidden": 16, "clusters": 5, "clusterings": 3, "iterations": 3}, sizes=(32, 32, 16, 16)
    ),
    "DINO": Small(
        {"outputs": 24, "hidden": 16, "bottleneck": 8, "freeze": 0.5, "temperature_epochs": 3, "momentum": 0.9},
        sizes=(32, 32, 16, 16),
    ),
    "EndToEnd": Small({"dim": 16, "shuffle": False}),
    "InstDisc": Small({"dim": 16, "negatives": 12, "proximal": 0.1}, sizes=(32,)),
    "SimCLR": Small({"dim": 16, "head_layers": 3}),
    "InvaSpread": Small({"dim": 16}),
    "BYOL": Small({"dim": 16, "hidden_dim": 32, "momentum": 0.9}),
    "SimSiam": Small({"dim": 16, "hidden_dim": 32, "predictor_dim": 8}),
    "BarlowTwins": Small({"dim": 16, "hidden_dim": 32}),
    "VICReg": Small({"dim": 16, "hidden_dim": 32}),
    "MoCoV3": Small({"dim": 16, "hidden_dim": 32, "momentum": 0.9, "temperature": 0.5}),
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
SMALL["MoCoV3 ViT"] = Small(SMALL["MoCoV3"].args | {"projector_layers": 3, "predictor_norm": True}, vit=True)
SMALL["DINO ViT"] = SMALL["DINO"]._replace(args=SMALL["DINO"].args | {"head_norm": False}, vit=True)


def build(name: str, seed: int = 0, **args: object) -> SSLMethod:
    """Return a method of float64 in training mode, with the small arguments and those given."""
    torch.manual_seed(seed)
    small = SMALL[name]
    return build_method(name.split()[0], encoder_of(small), {**small.args, **args}, images=IMAGES).double()


def encoder_of(small: Small) -> Callable[..., nn.Module]:
    """Return the builder of a small method's encoder."""
    if small.vit:
        return functools.partial(build_vit, **VIT, init="moco_v3", position="sincos", freeze_patches=True)
    return functools.partial(build_resnet, small.depth, width=small.width, norm=small.norm)


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


class Tiny(nn.Module):
    """An encoder of 4 x 4 pictures, which trains in no time."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def train_tiny(method: SSLMethod, steps: int, lr: float = 0.1) -> None:
    """Train a method of :class:`Tiny` on two noisy views of 32 random pictures."""
    torch.manual_seed(0)
    pictures = torch.randn(32, 3, 4, 4)
    sgd = torch.optim.SGD(method.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        views = [pictures + 0.5 * torch.randn_like(pictures) for _ in range(2)]
        method.before_step(step / steps, step / 10)
        loss = sum(method(Views(views, torch.arange(32), torch.zeros(2, 32, 4))).values())
        sgd.zero_grad(), loss.backward(), method.after_backward(), sgd.step(), method.after_step()


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

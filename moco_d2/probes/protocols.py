"""Protocols of linear classification on frozen features, as their authors published them.

All of them train one Linear, with weights from N(0, .01) and bias 0, on a backbone in evaluation mode; on random
resized crops (torchvision's default scale) and flips of 224 pixels; and test on the centre crop.

To add a protocol, put a record into ``PROTOCOLS``.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class LinearProtocol:
    """How a linear classifier is trained.

    Attributes:
        lr: at a batch of 256; it is multiplied by batch / 256.
        batch: pictures of a step, in all processes.
        epochs: length.
        milestones: epochs at which the lr is divided by 10; empty: a cosine to 0. Both once per epoch.
        optimizer: ``sgd`` or ``larc`` (:class:`~moco_d2.layers.lars.Lars`), with momentum .9.
        weight_decay: of weights and bias.
        bicubic: interpolation of the test transform, else bilinear.
        size: side of the crops in pixels.
        cached: the features of the test transform are computed once, and nothing is augmented.
        source: where this is published.
    """

    lr: float
    batch: int
    epochs: int
    milestones: tuple[int, ...] = ()
    optimizer: str = "sgd"
    weight_decay: float = 0.0
    bicubic: bool = False
    size: int = 224
    cached: bool = False
    source: str = ""

    @property
    def scaled_lr(self) -> float:
        """The first lr."""
        return self.lr * self.batch / 256

    def lr_at(self, epoch: int) -> float:
        """Return the lr of an epoch, from 0."""
        if self.milestones:
            return self.scaled_lr * 0.1 ** bisect.bisect_right(self.milestones, epoch)
        return self.scaled_lr * (0.5 * (1 + math.cos(math.pi * epoch / self.epochs)))


_MOCO = LinearProtocol(30.0, 256, 100, (60, 80), source="facebookresearch/moco main_lincls.py")

PROTOCOLS: dict[str, LinearProtocol] = {
    "moco": _MOCO,
    "moco_v3": LinearProtocol(0.1, 1024, 90, source="facebookresearch/moco-v3 main_lincls.py, ResNet-50"),
    "simsiam": LinearProtocol(0.1, 4096, 90, optimizer="larc", source="facebookresearch/simsiam main_lincls.py"),
    "swav": LinearProtocol(0.3, 256, 100, weight_decay=1e-6, source="facebookresearch/swav eval_linear.py"),
    "barlow_twins": LinearProtocol(
        0.3, 256, 100, weight_decay=1e-6, source="facebookresearch/barlowtwins evaluate.py, frozen weights"
    ),
    "dino": LinearProtocol(
        0.001, 1024, 100, bicubic=True, source="facebookresearch/dino eval_linear.py, average-pooled ResNet-50"
    ),
    "moco_cached": replace(_MOCO, cached=True, source="no paper: moco's classifier on features without augmentation"),
}


def changed(name: str, **values: Any) -> tuple[LinearProtocol, str, list[str]]:
    """Return a protocol with other values, its name and what differs; with a difference the name says ``modified``.

    Args:
        name: a key of ``PROTOCOLS``.
        values: of fields; None keeps the published value. If ``epochs`` differs, milestones move in proportion.

    Raises:
        ValueError: a value out of range.
    """
    published = PROTOCOLS[name]
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if not value > 0:
            raise ValueError(f"--{key} is {value}; it must be positive")
    protocol = replace(published, **given)
    if "epochs" in given:
        moved = tuple(round(m * protocol.epochs / published.epochs) for m in published.milestones)
        protocol = replace(protocol, milestones=moved)
    differ = [
        f"{field.name} {getattr(protocol, field.name)} instead of {getattr(published, field.name)}"
        for field in fields(published)
        if getattr(protocol, field.name) != getattr(published, field.name)
    ]
    return protocol, name + " (modified)" * bool(differ), differ

"""Protocols of classification as their authors published them: linear on frozen features, and semi-supervised.

All of them train on random resized crops (torchvision's default scale) and flips of 224 pixels, and test on the centre
crop. ``PROTOCOLS`` train one Linear on a backbone in evaluation mode. ``SEMI_PROTOCOLS`` train the backbone as well, on
a small part of the labels; its batch norms use the statistics of the whole batch.

To add a protocol, put a record into one of the two tables.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class LinearProtocol:
    """How a linear classifier is trained, alone or together with the backbone.

    Attributes:
        lr: of the classifier at a batch of 256; it is multiplied by batch / 256.
        batch: pictures of a step, in all processes.
        epochs: length.
        milestones: epochs at which the lr is multiplied by ``decay``; empty: a cosine to 0. Both once per epoch.
        optimizer: ``sgd`` or ``larc`` (:class:`~moco_d2.layers.lars.Lars`), with momentum .9.
        weight_decay: of weights and bias.
        bicubic: interpolation of the test transform, else bilinear.
        size: side of the crops in pixels.
        cached: the features of the test transform are computed once, and nothing is augmented.
        decay: factor of the lr at a milestone.
        backbone_lr: of the backbone at a batch of 256; 0: it is frozen.
        percent: of the training set that is labelled; it is recorded, and 0 stands for all.
        blocks: 0, or number of a ViT's last blocks whose class tokens, concatenated, are the features.
        default_init: the classifier starts as torch's Linear does, else with weights from N(0, .01) and bias 0.
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
    decay: float = 0.1
    backbone_lr: float = 0.0
    percent: float = 0.0
    blocks: int = 0
    default_init: bool = False
    source: str = ""

    @property
    def scaled_lr(self) -> float:
        """The classifier's first lr."""
        return self.lr * self.batch / 256

    def lrs_at(self, epoch: int) -> tuple[float, float]:
        """Return the lrs of classifier and backbone in an epoch, from 0."""
        if self.milestones:
            factor = self.decay ** bisect.bisect_right(self.milestones, epoch)
        else:
            factor = 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return self.scaled_lr * factor, self.backbone_lr * self.batch / 256 * factor


_MOCO = LinearProtocol(30.0, 256, 100, (60, 80), source="facebookresearch/moco main_lincls.py")

PROTOCOLS: dict[str, LinearProtocol] = {
    "moco": _MOCO,
    "moco_v3": LinearProtocol(0.1, 1024, 90, source="facebookresearch/moco-v3 main_lincls.py, ResNet-50"),
    "moco_v3_vit": LinearProtocol(3.0, 1024, 90, source="facebookresearch/moco-v3 CONFIG.md, ViT-S and ViT-B"),
    "simsiam": LinearProtocol(0.1, 4096, 90, optimizer="larc", source="facebookresearch/simsiam main_lincls.py"),
    "swav": LinearProtocol(0.3, 256, 100, weight_decay=1e-6, source="facebookresearch/swav eval_linear.py"),
    "barlow_twins": LinearProtocol(
        0.3, 256, 100, weight_decay=1e-6, source="facebookresearch/barlowtwins evaluate.py, frozen weights"
    ),
    "dino": LinearProtocol(
        0.001, 1024, 100, bicubic=True, source="facebookresearch/dino eval_linear.py, average-pooled ResNet-50"
    ),
    "dino_vit_s": LinearProtocol(
        0.001,
        1024,
        100,
        bicubic=True,
        blocks=4,
        source="facebookresearch/dino eval_linear.py, ViT-S: class tokens of the last four blocks",
    ),
    "moco_cached": replace(_MOCO, cached=True, source="no paper: moco's classifier on features without augmentation"),
}

# A sweep (BYOL) is no protocol, and neither are settings that keep a layer of the projection head (SimCLR v2).
_SWAV = LinearProtocol(
    5.0, 256, 20, (12, 16), decay=0.2, backbone_lr=0.02, percent=1, default_init=True,
    source="facebookresearch/swav eval_semisup.py, the README's commands",
)  # fmt: skip
_BARLOW_TWINS = LinearProtocol(
    0.5, 256, 20, (12, 16), decay=0.2, backbone_lr=0.002, percent=1,
    source="Barlow Twins (arXiv 2103.03230), appendix; its code has a cosine and, at times, another lr",
)  # fmt: skip
_VICREG = LinearProtocol(
    0.08, 256, 20, backbone_lr=0.03, percent=1, source="facebookresearch/vicreg evaluate.py, the README's commands"
)

SEMI_PROTOCOLS: dict[str, LinearProtocol] = {
    "swav_1": _SWAV,
    "swav_10": replace(_SWAV, lr=0.2, backbone_lr=0.01, percent=10),
    "barlow_twins_1": _BARLOW_TWINS,
    "barlow_twins_10": replace(_BARLOW_TWINS, percent=10),
    "vicreg_1": _VICREG,
    "vicreg_10": replace(_VICREG, lr=0.1, backbone_lr=0.01, percent=10),
}


def changed(name: str, **values: Any) -> tuple[LinearProtocol, str, list[str]]:
    """Return a protocol with other values, its name and what differs; with a difference the name says ``modified``.

    Args:
        name: a key of ``PROTOCOLS`` or ``SEMI_PROTOCOLS``.
        values: of fields; None keeps the published value. If ``epochs`` differs, milestones move in proportion.

    Raises:
        ValueError: a value out of range.
    """
    published = (PROTOCOLS | SEMI_PROTOCOLS)[name]
    given = {key: value for key, value in values.items() if value is not None}
    for key, value in given.items():
        if not value > 0:
            raise ValueError(f"--{key.replace('_', '-')} is {value}; it must be positive")
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

"""Features of the two sets of a probe, under the test transform."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode

from moco_d2.data.labelled import LabelledSet
from moco_d2.data.labelled_loader import LabelledLoader
from moco_d2.layers.features import extract
from moco_d2.probes.backbone import Backbone
from moco_d2.running.progress import Countdown

logger = logging.getLogger(__name__)

SIZE = 224  # of the papers' crops


@dataclass(frozen=True)
class Features:
    """Features of a set.

    Attributes:
        values: (N, C), not normalised.
        labels: (N,) int64.
        unreadable: number of pictures that were left out.
    """

    values: torch.Tensor
    labels: torch.Tensor
    unreadable: int


def side(pictures: LabelledSet) -> int:
    """Return the side of the crops in pixels: that of CIFAR's pictures themselves, else the papers' 224."""
    return SIZE if pictures.arrays is None else int(pictures.arrays.shape[1])


def features_of(
    backbone: Backbone,
    pictures: LabelledSet,
    cfg: CfgNode,
    size: int,
    *,
    bicubic: bool = False,
    batch: int = 256,
    dtype: torch.dtype = torch.float32,
    part: Sequence[int] | None = None,
) -> Features:
    """Compute the features of a set's pictures under the test transform, and log the progress.

    Args:
        backbone: on ``MODEL.DEVICE``.
        pictures: the set.
        cfg: DATALOADER.NUM_WORKERS, DATA.MAX_PIXELS, DATA.MAX_SKIPPED and MODEL.DEVICE.
        size: side of the crop in pixels.
        bicubic: interpolation, else bilinear.
        batch: pictures at a time.
        dtype: of the features.
        part: numbers of the pictures; None: all.

    Raises:
        PictureError: too many pictures cannot be read.
    """
    loader = LabelledLoader(
        pictures, backbone.facts.pixels, size, bicubic=bicubic, batch=batch, workers=cfg.DATALOADER.NUM_WORKERS,
        max_pixels=cfg.DATA.MAX_PIXELS, max_skipped=cfg.DATA.MAX_SKIPPED, device=cfg.MODEL.DEVICE, part=part,
    )  # fmt: skip
    countdown = Countdown(f"features of {pictures.name}", "pictures", len(loader))
    values, labels = extract(backbone.network, loader, len(loader), countdown.seen, dtype)
    return Features(values, labels, loader.unreadable)

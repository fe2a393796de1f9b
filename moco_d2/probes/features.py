"""Features of the two sets of a probe, under the test transform."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from moco_d2.data.labelled import LabelledSet
from moco_d2.data.labelled_loader import LabelledLoader
from moco_d2.facts import BackboneFacts, ViTFacts
from moco_d2.layers.distributed import gather_rows, share
from moco_d2.layers.features import extract
from moco_d2.probes.backbone import Backbone
from moco_d2.running.progress import Countdown
from moco_d2.running.workers import worker_count

logger = logging.getLogger(__name__)

SIZE = 224  # of the papers' crops


@dataclass(frozen=True)
class Features:
    """Features of a set.

    Attributes:
        values: (N, C), not normalised.
        labels: (N,) int64.
        unreadable: number of pictures of the whole set that were left out.
    """

    values: torch.Tensor
    labels: torch.Tensor
    unreadable: int

    def gathered(self) -> Features:
        """Return the features of all processes' shares, in the set's order."""
        return Features(gather_rows(self.values), gather_rows(self.labels), self.unreadable)


def side(pictures: LabelledSet, facts: BackboneFacts | None = None) -> int:
    """Return the side of the crops in pixels.

    It is that of CIFAR's pictures themselves; else, if the facts are a ViT's, that of its pretraining; else 224.
    """
    if pictures.arrays is not None:
        return int(pictures.arrays.shape[1])
    return facts.image if isinstance(facts, ViTFacts) else SIZE


def features_of(
    backbone: Backbone,
    pictures: LabelledSet,
    cfg: CfgNode,
    size: int,
    *,
    bicubic: bool = False,
    batch: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Compute the features of this process's share of a set under the test transform, and log the progress.

    Every process must call this.

    Args:
        backbone: on ``MODEL.DEVICE``.
        pictures: the set.
        cfg: DATALOADER.NUM_WORKERS, DATA.MAX_PIXELS, DATA.MAX_SKIPPED and MODEL.DEVICE.
        size: side of the crop in pixels.
        bicubic: interpolation, else bilinear.
        batch: pictures at a time.
        dtype: of the features.

    Raises:
        PictureError: too many pictures cannot be read.
        ValueError: there are fewer pictures than processes.
    """
    own = pictures.part(share(range(len(pictures))))
    loader = LabelledLoader(
        own, backbone.facts.pixels, size, bicubic=bicubic, batch=batch, workers=worker_count(cfg),
        max_pixels=cfg.DATA.MAX_PIXELS, max_skipped=cfg.DATA.MAX_SKIPPED, device=cfg.MODEL.DEVICE, whole=len(pictures),
    )  # fmt: skip
    countdown = Countdown(f"features of {pictures.name}", "pictures", len(loader))
    values, labels = extract(backbone.network, loader, len(loader), countdown.seen, dtype)
    unreadable = sum(comm.all_gather(loader.unreadable))
    loader.check(unreadable)
    return Features(values, labels, unreadable)

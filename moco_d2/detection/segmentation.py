"""Semantic segmentation as in the MoCo paper (sec. 4.3, appendix): an FCN-16s-like head, random scale and crop."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from moco_d2.detection.mapper import PictureMapper

_DILATION = 6


@SEM_SEG_HEADS_REGISTRY.register()
class FCN16sHead(nn.Module):
    """Two dilated 3x3 convolutions with norm and ReLU, and a 1x1 convolution to the classes, on features of stride 16.

    Logits are enlarged bilinearly to the picture's size, in training too: the loss is the mean cross-entropy over its
    pixels. A feature's centre is the pixel at its index times the stride; hence crops of 16 n + 1 pixels (513, 769).
    """

    @configurable
    def __init__(
        self, *, in_channels: int, stride: int, channels: int, norm: str, num_classes: int, ignore_value: int
    ) -> None:
        """Build the head.

        Args:
            in_channels: channels of the features.
            stride: stride of the features.
            channels: channels of the two convolutions (paper: 256).
            norm: norm of the two convolutions.
            num_classes: number of classes, background included.
            ignore_value: label of pixels without ground truth.
        """
        super().__init__()
        self.stride, self.ignore_value = stride, ignore_value
        widths = [in_channels, channels, channels]
        self.convs = nn.Sequential(*(
            Conv2d(
                before, after, 3, padding=_DILATION, dilation=_DILATION, bias=not norm, norm=get_norm(norm, after),
                activation=F.relu,
            )
            for before, after in itertools.pairwise(widths)
        ))  # fmt: skip
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        for layer in (*self.convs, self.predictor):
            weight_init.c2_msra_fill(layer)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the arguments of the constructor from ``MODEL.SEM_SEG_HEAD``."""
        head = cfg.MODEL.SEM_SEG_HEAD
        (feature,) = head.IN_FEATURES
        return {
            "in_channels": input_shape[feature].channels,
            "stride": input_shape[feature].stride,
            "channels": head.CONVS_DIM,
            "norm": head.NORM,
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return logits (N, classes, H, W) when predicting, the loss when training.

        Args:
            features: one entry (N, C, H/16, W/16).
            targets: labels (N, H, W).
        """
        (feature,) = features.values()
        logits = self._enlarge(self.predictor(self.convs(feature)).float())
        if not self.training:
            return logits, {}
        assert targets is not None
        logits = logits[:, :, : targets.shape[-2], : targets.shape[-1]]
        return None, {"loss_sem_seg": F.cross_entropy(logits, targets.long(), ignore_index=self.ignore_value)}

    def _enlarge(self, logits: Tensor) -> Tensor:
        """Enlarge (N, C, h, w) to (N, C, stride h, stride w); beyond the last centre its value is repeated."""
        size = [(n - 1) * self.stride + 1 for n in logits.shape[-2:]]
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        return F.pad(logits, (0, self.stride - 1, 0, self.stride - 1), mode="replicate")


class RandomScaleCrop(T.Augmentation):
    """Scale a picture by a random factor, then cut out a window at random; pixels outside the picture are void."""

    def __init__(self, scale: tuple[float, float], size: tuple[int, int], fill: float, void: int) -> None:
        """Set up.

        Args:
            scale: range from which the factor is drawn uniformly.
            size: height and width of the window in pixels.
            fill: pixel value of the padding.
            void: label of the padding.
        """
        super().__init__()
        self.scale, self.size, self.fill, self.void = scale, size, fill, void

    def get_transform(self, image: np.ndarray) -> T.TransformList:
        """Draw factor and window for a picture (H, W, 3)."""
        height, width = image.shape[:2]
        factor = self._rand_range(*self.scale)
        new = max(1, round(height * factor)), max(1, round(width * factor))
        inside = min(new[0], self.size[0]), min(new[1], self.size[1])
        top, left = (int(self._rand_range(0, n - i + 1)) for n, i in zip(new, inside, strict=True))
        return T.TransformList([
            T.ResizeTransform(height, width, *new),
            T.CropTransform(left, top, inside[1], inside[0]),
            T.PadTransform(
                0, 0, self.size[1] - inside[1], self.size[0] - inside[0], inside[1], inside[0], self.fill, self.void
            ),
        ])  # fmt: skip


def build_segmentation_mapper(cfg: CfgNode) -> PictureMapper:
    """Return the mapper of training pictures under ``INPUT.RANDOM_SCALE`` and ``INPUT.CROP``.

    Raises:
        ValueError: the range or the crop is invalid.
    """
    scale, crop = tuple(cfg.INPUT.RANDOM_SCALE), cfg.INPUT.CROP
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(
            f"INPUT.RANDOM_SCALE is {scale}; it must be two positive factors, the smaller first, such as (0.5, 2.0)"
        )
    if not crop.ENABLED or crop.TYPE != "absolute":
        raise ValueError(
            "INPUT.RANDOM_SCALE needs INPUT.CROP.ENABLED True and INPUT.CROP.TYPE absolute; they are "
            f"{crop.ENABLED} and {crop.TYPE}"
        )
    fill = sum(cfg.MODEL.PIXEL_MEAN) / 3  # grey, close to the mean pixel, in either channel order
    size = tuple(int(side) for side in crop.SIZE)
    augmentations = [
        RandomScaleCrop(scale, (size[0], size[1]), fill, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE),
        T.RandomFlip(),
    ]
    return PictureMapper(cfg, is_train=True, augmentations=augmentations)

"""Backbones that Detectron2 lacks."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import BACKBONE_REGISTRY, Backbone, build_resnet_backbone
from fvcore.nn import weight_init
from torch import Tensor
from torch.nn import functional as F

from moco_d2.basic_resnet import basic_resnet_problems
from moco_d2.facts import BASIC_BUILDER, BASIC_DEPTHS, DILATED_BUILDER, FULL_WIDTH, FULL_WIDTH_BUILDERS, VIT_BUILDER
from moco_d2.vit_pyramid import vit_problems

MSRA = "ImageNetPretrained/MSRA/"  # in the addresses of Caffe's ResNets in Detectron2's zoo
_CHANNELS = 512  # MoCo paper, appendix


class DilatedC5(Backbone):
    """A ResNet whose conv5 is dilated, and a 3x3 convolution with norm on top: "R50-dilated-C5" of the MoCo paper.

    Detectron2's DilatedC5 config has no convolution on top, and therefore another box head.

    Attributes:
        bottom_up: the ResNet, under the name that it has in an FPN, so that the same weights fit.
    """

    def __init__(self, bottom_up: Backbone, norm: str) -> None:
        """Add the convolution after the ResNet's ``res5``.

        Args:
            bottom_up: a ResNet with ``RES5_DILATION`` 2, whose conv5 keeps conv4's stride of 16.
            norm: norm of the convolution (``MODEL.RESNETS.NORM``).
        """
        super().__init__()
        self.bottom_up = bottom_up
        self.top = Conv2d(
            bottom_up.output_shape()["res5"].channels, _CHANNELS, 3, padding=1, bias=not norm,
            norm=get_norm(norm, _CHANNELS), activation=F.relu,
        )  # fmt: skip
        weight_init.c2_msra_fill(self.top)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Map images (N, 3, H, W) to ``{"c5": (N, 512, H/16, W/16)}``."""
        return {"c5": self.top(self.bottom_up(image)["res5"])}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of the output."""
        return {"c5": ShapeSpec(channels=_CHANNELS, stride=self.bottom_up.output_shape()["res5"].stride)}


@BACKBONE_REGISTRY.register()
def build_resnet_dilated_c5_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DilatedC5:
    """Build :class:`DilatedC5` from a config with ``MODEL.RESNETS.RES5_DILATION`` 2."""
    return DilatedC5(build_resnet_backbone(cfg, input_shape), cfg.MODEL.RESNETS.NORM)


def backbone_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield why ``MODEL.BACKBONE.NAME`` cannot build a ResNet of basic blocks, or a ViT."""
    if cfg.MODEL.BACKBONE.NAME == VIT_BUILDER:
        yield from vit_problems(cfg)
        yield from _vit_input_problems(cfg)
        return
    name, resnets = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS
    basic = resnets.DEPTH in BASIC_DEPTHS
    if basic and name in FULL_WIDTH_BUILDERS and resnets.RES2_OUT_CHANNELS != FULL_WIDTH:
        yield (
            f"MODEL.BACKBONE.NAME is {name}, which builds a ResNet-{resnets.DEPTH} with {FULL_WIDTH} channels in res2 "
            f"only, but MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}: pass MODEL.BACKBONE.NAME "
            f"{BASIC_BUILDER}"
        )
    if name == BASIC_BUILDER or (basic and name in (*FULL_WIDTH_BUILDERS, DILATED_BUILDER)):
        yield from basic_resnet_problems(cfg)


def _vit_input_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield pictures that are larger than the square that they are padded to, and weights that are a ResNet's."""
    inputs, square = cfg.INPUT, cfg.MODEL.VIT.SQUARE_PAD
    train = "JITTER.SIZE" if inputs.JITTER.SCALE else "MAX_SIZE_TRAIN"
    sizes = {train: inputs.JITTER.SIZE if inputs.JITTER.SCALE else inputs.MAX_SIZE_TRAIN}
    sizes |= {"MAX_SIZE_TEST": inputs.MAX_SIZE_TEST}
    for key, size in sizes.items():
        if 0 < square < size:
            yield f"INPUT.{key} is {size}; it must be at most MODEL.VIT.SQUARE_PAD, {square}, or pass that as 0"
    if MSRA in cfg.MODEL.WEIGHTS:
        yield (
            f"MODEL.WEIGHTS is {cfg.MODEL.WEIGHTS}, a ResNet, but MODEL.BACKBONE.NAME is {VIT_BUILDER}: no supervised "
            "ViT comes with Detectron2. Use the config without the suffix _supervised, and pass MODEL.WEIGHTS, a "
            "supervised ViT (DeiT's, timm's) that moco-d2 convert wrote"
        )

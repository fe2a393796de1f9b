"""ResNet-18 and 34 of any width as Detectron2's backbones, plain or with a feature pyramid.

Detectron2's own builders accept these depths with 64 channels in res2 only. The network here is made of Detectron2's
parts and, with 64 channels, is Detectron2's own. Detectors and the proof of a conversion build it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock

from moco_d2.facts import BASIC_BUILDER, BASIC_DEPTHS
from moco_d2.layers.resnet import DEPTHS


@BACKBONE_REGISTRY.register()
def build_basic_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Build a ResNet of basic blocks from Detectron2's keys: ``MODEL.RESNETS`` and ``MODEL.BACKBONE.FREEZE_AT``.

    With ``MODEL.FPN.IN_FEATURES`` a feature pyramid is on top: RetinaNet's if that is the architecture, or else the one
    of Faster and Mask R-CNN. So one name serves every detector that the weights are used in.

    Args:
        cfg: config of the detector; ``RES2_OUT_CHANNELS`` may be any number, and each stage above res2 doubles it.
        input_shape: the pictures' number of channels.

    Raises:
        ValueError: see :func:`basic_resnet_problems`; or RetinaNet's ``OUT_FEATURES`` lack res5.
    """
    problems = list(basic_resnet_problems(cfg))
    if problems:
        raise ValueError("\n".join(problems))
    resnets, fpn = cfg.MODEL.RESNETS, cfg.MODEL.FPN
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    bottom_up = ResNet(
        stem, [basic_stage(cfg, stage) for stage in (2, 3, 4, 5)],
        out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )  # fmt: skip
    if not fpn.IN_FEATURES:
        return bottom_up
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        if "res5" not in resnets.OUT_FEATURES:
            raise ValueError(
                f"MODEL.RESNETS.OUT_FEATURES is {resnets.OUT_FEATURES}; it must contain res5, on which RetinaNet's "
                "upper levels are built"
            )
        top = LastLevelP6P7(bottom_up.output_shape()["res5"].channels, fpn.OUT_CHANNELS)
    else:
        top = LastLevelMaxPool()
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, top_block=top, fuse_type=fpn.FUSE_TYPE)


def basic_stage(cfg: CfgNode, stage: int) -> list[Any]:
    """Return the basic blocks of a stage, 2 (``res2``) to 5 (``res5``)."""
    resnets = cfg.MODEL.RESNETS
    blocks = DEPTHS[resnets.DEPTH][1][stage - 2]
    channels = resnets.RES2_OUT_CHANNELS * 2 ** (stage - 2)
    first = stage == 2
    return ResNet.make_stage(
        BasicBlock, blocks, stride_per_block=[1 if first else 2] + [1] * (blocks - 1),
        in_channels=resnets.STEM_OUT_CHANNELS if first else channels // 2, out_channels=channels, norm=resnets.NORM,
    )  # fmt: skip


def basic_resnet_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield the keys of ``MODEL.RESNETS`` that ask for what Detectron2's basic blocks do not have."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in BASIC_DEPTHS:
        known = " or ".join(map(str, BASIC_DEPTHS))
        yield f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; with MODEL.BACKBONE.NAME {BASIC_BUILDER} it must be {known}"
    rules = {
        "NUM_GROUPS": (resnets.NUM_GROUPS == 1, "1", "groups"),
        "RES5_DILATION": (resnets.RES5_DILATION == 1, "1", "dilation"),
        "DEFORM_ON_PER_STAGE": (
            not any(resnets.DEFORM_ON_PER_STAGE), "False for every stage", "deformable convolutions",
        ),
    }  # fmt: skip
    for name, (holds, rule, lacking) in rules.items():
        if not holds:
            yield (
                f"MODEL.RESNETS.{name} is {resnets[name]}; it must be {rule}, because the basic blocks of "
                f"ResNet-18 and 34 have no {lacking}"
            )

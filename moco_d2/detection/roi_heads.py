"""ROI heads that Detectron2 lacks."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn

from moco_d2.basic_resnet import basic_stage
from moco_d2.facts import BASIC_DEPTHS


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The R50-C4 box head of the MoCo paper (He et al. 2020, section 4.2): conv5 followed by one more norm layer.

    Depths 18 and 34 have a conv5 of basic blocks; Detectron2's heads build bottlenecks for every depth.

    Pretrained weights do not fill the norm. Its parameters are ``roi_heads.res5.norm.*``, as in the authors'
    ``detection/train_net.py``, so detectors trained with their code load here.
    """

    @configurable
    def __init__(self, *, extra_norm: str, **kwargs: Any) -> None:
        """Build Detectron2's heads, then add the norm.

        Args:
            extra_norm: Detectron2's name of the norm after conv5 (``MODEL.RESNETS.NORM``); not empty.
            **kwargs: see :class:`detectron2.modeling.roi_heads.Res5ROIHeads`.

        Raises:
            ValueError: ``extra_norm`` is empty, so the head would be Detectron2's own.
        """
        super().__init__(**kwargs)
        if not extra_norm:
            raise ValueError(
                "MODEL.RESNETS.NORM is empty, but Res5ROIHeadsExtraNorm needs a norm: set one, or pass "
                "MODEL.ROI_HEADS.NAME Res5ROIHeads"
            )
        self.res5.add_module("norm", get_norm(extra_norm, self.res5[-1].out_channels))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Read the constructor's arguments from a config."""
        return {**super().from_config(cfg, input_shape), "extra_norm": cfg.MODEL.RESNETS.NORM}

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        if cfg.MODEL.RESNETS.DEPTH not in BASIC_DEPTHS:
            return super()._build_res5_block(cfg)
        blocks = basic_stage(cfg, 5)
        return nn.Sequential(*blocks), blocks[-1].out_channels

"""Detectron2's plain ViT with a simple feature pyramid (ViTDet, arXiv 2203.16527) as a backbone of yacs configs.

Detectron2 has both networks, but no builder that reads a yacs config. They need timm, which is imported only when a
detector on a ViT is built.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import nn

from moco_d2.facts import VIT_BUILDER

_SCALES = (4.0, 2.0, 1.0, 0.5)  # those that Detectron2's pyramid can build
_STRIDES = tuple(2**level for level in range(1, 8))


class ViTPyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid, which also pads pictures of any size as its levels need.

    Detectron2's own misspells the key by which it would ask for that, so that it works with square pictures only.
    """

    @property
    def size_divisibility(self) -> int:
        """The number of pixels that sides of pictures are padded to a multiple of: the coarsest level's stride."""
        return int(self._size_divisibility)


@BACKBONE_REGISTRY.register()
def build_vit_sfp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ViTPyramid:
    """Build a ViT with a simple feature pyramid from ``MODEL.VIT``, ``MODEL.FPN.OUT_CHANNELS`` and ``MODEL.FPN.NORM``.

    The levels are called by their strides, as an FPN's: ``p2`` has stride 4. The last is a max-pooling of the one
    before.

    Args:
        cfg: config of the detector.
        input_shape: the pictures' number of channels.

    Raises:
        ValueError: see :func:`vit_problems`.
    """
    problems = list(vit_problems(cfg))
    if problems:
        raise ValueError("\n".join(problems))
    from moco_d2.layers.timm_vit import EPS, MLP_RATIO, import_former_place

    import_former_place()

    vit, fpn = cfg.MODEL.VIT, cfg.MODEL.FPN
    network = ViT(
        img_size=vit.IMAGE_SIZE, patch_size=vit.PATCH_SIZE, in_chans=input_shape.channels, embed_dim=vit.EMBED_DIM,
        depth=vit.DEPTH, num_heads=vit.NUM_HEADS, mlp_ratio=MLP_RATIO, drop_path_rate=vit.DROP_PATH,
        norm_layer=functools.partial(nn.LayerNorm, eps=EPS), use_rel_pos=vit.REL_POS, window_size=vit.WINDOW_SIZE,
        window_block_indexes=[block for block in range(vit.DEPTH) if block not in vit.GLOBAL_BLOCKS],
        pretrain_img_size=vit.PRETRAIN_IMAGE_SIZE, pretrain_use_cls_token=vit.PRETRAIN_CLASS_TOKEN,
    )  # fmt: skip
    # As LastLevelMaxPool, but on the coarsest level, which is not p5 for every patch.
    top = LastLevelMaxPool()
    top.in_feature = f"p{int(math.log2(vit.PATCH_SIZE / vit.SCALES[-1]))}"
    return ViTPyramid(
        network, in_feature="last_feat", out_channels=fpn.OUT_CHANNELS, scale_factors=tuple(vit.SCALES), top_block=top,
        norm=fpn.NORM, square_pad=vit.SQUARE_PAD,
    )  # fmt: skip


def vit_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield the keys of ``MODEL.VIT`` that cannot be built, and timm if it is missing."""
    vit = cfg.MODEL.VIT
    if importlib.util.find_spec("timm") is None:
        yield f"MODEL.BACKBONE.NAME is {VIT_BUILDER}, which needs timm: pip install 'moco_d2[vit]'"
    for key in ("PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS", "PRETRAIN_IMAGE_SIZE", "IMAGE_SIZE"):
        if vit[key] < 1:
            yield f"MODEL.VIT.{key} is {vit[key]}; it must be positive"
            return
    strides = [vit.PATCH_SIZE / scale for scale in vit.SCALES]
    halved = all(coarse == 2 * fine for fine, coarse in itertools.pairwise(strides))
    rules = {
        "EMBED_DIM": (vit.EMBED_DIM % vit.NUM_HEADS == 0, f"a multiple of NUM_HEADS, {vit.NUM_HEADS}"),
        "PRETRAIN_IMAGE_SIZE": (
            vit.PRETRAIN_IMAGE_SIZE % vit.PATCH_SIZE == 0, f"a multiple of PATCH_SIZE, {vit.PATCH_SIZE}",
        ),
        "IMAGE_SIZE": (vit.IMAGE_SIZE % vit.PATCH_SIZE == 0, f"a multiple of PATCH_SIZE, {vit.PATCH_SIZE}"),
        "WINDOW_SIZE": (vit.WINDOW_SIZE >= 0, "a number of patches, or 0 for global attention in all blocks"),
        "GLOBAL_BLOCKS": (
            all(0 <= block < vit.DEPTH for block in vit.GLOBAL_BLOCKS), f"numbers of blocks, 0 to {vit.DEPTH - 1}",
        ),
        "DROP_PATH": (0 <= vit.DROP_PATH < 1, "in [0, 1)"),
        "SCALES": (
            bool(strides) and set(vit.SCALES) <= set(_SCALES) and set(strides) <= set(_STRIDES) and halved,
            f"among {', '.join(map(str, _SCALES))}, each half of the one before, and PATCH_SIZE a power of 2",
        ),
        "SQUARE_PAD": (
            vit.SQUARE_PAD >= 0 and (not strides or vit.SQUARE_PAD % max(strides) == 0),
            "0, or a multiple of the pyramid's coarsest stride",
        ),
    }  # fmt: skip
    yield from (
        f"MODEL.VIT.{key} is {vit[key]}; it must be {rule}" for key, (holds, rule) in rules.items() if not holds
    )

"""timm's vision transformer as an encoder. Only a program that builds one imports this module, and so needs timm."""

from __future__ import annotations

import functools
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import nn

EPS = 1e-6  # of every layer norm
MLP_RATIO = 4


class ViT(VisionTransformer):
    """timm's ViT for pictures of any size; its output is that of ``head``, a Linear, on the class token.

    The arguments are timm's.
    """

    head_name = "head"

    def __init__(self, **kwargs: Any) -> None:
        norm = functools.partial(nn.LayerNorm, eps=EPS)
        super().__init__(mlp_ratio=MLP_RATIO, norm_layer=norm, global_pool="token", dynamic_img_size=True, **kwargs)

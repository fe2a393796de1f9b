"""timm's vision transformer as an encoder. Only a program that builds one imports this module, and so needs timm."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

EPS = 1e-6  # of every layer norm
MLP_RATIO = 4


class ViT(VisionTransformer):
    """timm's ViT for pictures of any size; its output is that of ``head``, a Linear, on the class token's ``norm``.

    Rows and columns of pixels that do not fill a patch, at the bottom and on the right, are not seen, as in DINO's
    code. The position embedding is resized by DINO's rule, see :meth:`position`. The arguments are timm's.
    """

    head_name = "head"
    cls_token: nn.Parameter | None  # None: without class token, as in Detectron2
    pos_embed: nn.Parameter

    def __init__(self, **kwargs: Any) -> None:
        norm = functools.partial(nn.LayerNorm, eps=EPS)
        super().__init__(mlp_ratio=MLP_RATIO, norm_layer=norm, global_pool="token", dynamic_img_size=True, **kwargs)
        self.patch_embed.img_size = None  # timm would refuse sizes that are no multiple of a patch

    def position(self, rows: int, columns: int) -> torch.Tensor:
        """Return the position embedding (1, 1 + rows * columns, D) of a grid of patches.

        For another grid than that of pretraining it is resized by bicubic interpolation, as in DINO, for every ViT. The
        scale is (rows + .1) / side: DINO adds the tenth against a wrong size by rounding, and the values depend on it.
        """
        side, _ = self.patch_embed.grid_size
        if rows == columns == side:
            return self.pos_embed
        first = self.num_prefix_tokens  # 1, the class token
        grid = self.pos_embed[:, first:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        scale = (rows + 0.1) / side, (columns + 0.1) / side
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :first], grid.flatten(2).transpose(1, 2)], dim=1)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens (N, 1 + h w, D) of patches (N, h, w, D): timm's name for this step."""
        position = self.position(x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        return tokens + position


def import_former_place() -> None:
    """Import the part of timm that Detectron2's ViT uses, without timm's warning of its old place.

    Detectron2 imports it again from there, and then nothing warns.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Importing from timm\.models\.layers is deprecated", FutureWarning)
        import timm.models.layers  # noqa: F401

"""Optimizers of detectors: Detectron2's SGD, and AdamW with layer-wise lr decay for ViTs (ViTDet, arXiv 2203.16527)."""

from __future__ import annotations

import functools

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

OPTIMIZERS = ("sgd", "adamw")  # values of SOLVER.OPTIMIZER in fine-tuning


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of a detector.

    With ``adamw`` a parameter of block l of L has ``SOLVER.LAYER_DECAY ** (L - l)`` of the lr (l from 0), the
    embeddings of patches and positions ``LAYER_DECAY ** (L + 1)``, everything above the ViT all of it. Position
    embeddings have no weight decay; ``SOLVER.WEIGHT_DECAY_NORM`` and ``WEIGHT_DECAY_BIAS`` apply as with SGD.

    Args:
        cfg: config of the detector.
        model: the detector.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "sgd":
        return build_sgd(cfg, model)
    decay = functools.partial(get_vit_lr_decay_rate, lr_decay_rate=solver.LAYER_DECAY, num_layers=cfg.MODEL.VIT.DEPTH)
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=None if solver.LAYER_DECAY == 1 else decay,
        overrides={"pos_embed": {"weight_decay": 0.0}},
    )
    adamw = torch.optim.AdamW(params, solver.BASE_LR, betas=(0.9, 0.999), weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, adamw)

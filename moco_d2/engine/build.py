"""Construction of the method that a config describes."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from moco_d2.layers.encoders import encoder_builder
from moco_d2.methods import SSLMethod, build_method


def configured_method(cfg: CfgNode, images: int = 1) -> SSLMethod:
    """Return the method that a config describes, with random weights.

    Args:
        cfg: config of a pretraining run.
        images: number of images in the data set.
    """
    ssl = cfg.SSL
    encoder = encoder_builder(ssl.ENCODER.NAME, ssl.ENCODER.ARGS)
    return build_method(ssl.METHOD, encoder, dict(ssl.ARGS), images)


def outline(cfg: CfgNode) -> SSLMethod:
    """Return the method on the meta device: shapes without values, which take no memory."""
    with torch.device("meta"):
        return configured_method(cfg)

"""The proof of a conversion: one image, two networks, the same features.

A wrong name, a wrong stride or a wrong shape of block gives other features, whatever the key counts say. The source
network is torchvision's with the tensors that were read; the other is Detectron2's own, built from the facts, with
the tensors that were written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch

from moco_d2.facts import BackboneFacts
from moco_d2.layers.resnet import network_for

STAGES = ("res2", "res3", "res4", "res5")
# Two frameworks' orders of summation differ in the last bits of float32 (1e-7); any mistake differs by percents.
TOLERANCE = 1e-5
_IMAGES = (2, 3, 64, 96)  # not square, so that a swap of height and width shows


class ProofError(ValueError):
    """The converted network does not compute what its source computes, or the proof cannot be made."""


def can_prove() -> bool:
    """Return whether Detectron2, which the proof needs, is installed."""
    return importlib.util.find_spec("detectron2") is not None


def prove(
    facts: BackboneFacts, source: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Compare the source network with Detectron2's, stage by stage, in eval mode on a seeded random image.

    Args:
        facts: what both networks are built from.
        source: the tensors that were read, under torchvision's names.
        written: the tensors that were written, under Detectron2's names.

    Returns:
        Stage name -> max|a - b| / max|a| over all features of the stage.

    Raises:
        ProofError: a difference reaches ``TOLERANCE``, a network cannot hold its tensors, or Detectron2 is missing.
    """
    if not can_prove():
        raise ProofError("the proof was not made: detectron2 is not installed")
    image = torch.randn(_IMAGES, generator=torch.Generator().manual_seed(0))  # (N, 3, H, W)
    with torch.no_grad():
        wanted = _source_features(facts, source, image)
        got = _detectron2_features(facts, written, image)
    differences = {}
    for stage in STAGES:
        a, b = wanted[stage], got[stage]  # (N, C, H', W')
        if a.shape != b.shape:
            raise ProofError(f"the proof failed: {stage} is {tuple(b.shape)}, in the source {tuple(a.shape)}")
        largest = a.abs().max().item()
        if not 0 < largest < float("inf"):
            raise ProofError(
                f"the proof cannot be made: the source network's {stage} is zero or not finite ({largest})"
            )
        differences[stage] = (a - b).abs().max().item() / largest
    # Written as "not <" so that a NaN fails.
    if wrong := {stage: d for stage, d in differences.items() if not d < TOLERANCE}:
        shown = ", ".join(f"{stage} by {d:.1e}" for stage, d in wrong.items())
        raise ProofError(f"the proof failed: features differ at {shown} (limit {TOLERANCE:.0e})")
    return differences


def _source_features(
    facts: BackboneFacts, tensors: Mapping[str, torch.Tensor], image: torch.Tensor
) -> dict[str, torch.Tensor]:
    network = network_for(facts).eval()
    _load(network, tensors, "the source network")
    x = network.maxpool(network.relu(network.bn1(network.conv1(image))))  # (N, C, H/4, W/4)
    features = {}
    for stage, layer in zip(STAGES, (network.layer1, network.layer2, network.layer3, network.layer4), strict=True):
        features[stage] = x = layer(x)
    return features


def _detectron2_features(
    facts: BackboneFacts, tensors: Mapping[str, torch.Tensor], image: torch.Tensor
) -> dict[str, torch.Tensor]:
    # Here and not above: conversion itself works without Detectron2.
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_resnet_backbone

    cfg: Any = get_cfg()
    settings: dict[str, Any] = {
        **facts.config(),
        "MODEL.RESNETS.OUT_FEATURES": list(STAGES),
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
    }
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    network = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    _load(network, tensors, "Detectron2's network")
    features: dict[str, torch.Tensor] = network(image)
    return features


def _load(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], which: str) -> None:
    """Load strictly, but for the batch counters, which were dropped on purpose."""
    try:
        keys = network.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:  # a shape
        raise ProofError(
            f"the proof failed: {which} cannot hold the tensors: {' '.join(str(error).split())}"
        ) from error
    missing = [key for key in keys.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or keys.unexpected_keys:
        raise ProofError(f"the proof failed: {which} misses {missing} and does not know {keys.unexpected_keys}")

"""Backbones to be probed: any file that the converter reads, a name of the catalogue, or random weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from moco_d2.convert import convert_state
from moco_d2.convert.catalog import PREFIX, fetch
from moco_d2.convert.checks import check_values
from moco_d2.data import build_augmentation
from moco_d2.facts import BackboneFacts, ResNetFacts
from moco_d2.io.checkpoints import (
    CheckpointError,
    backbone_in,
    checkpoint_sha256,
    facts_in,
    forget_checkpoint,
    read_checkpoint,
    some,
)
from moco_d2.layers.encoders import ENCODERS, encoder_builder, network_for
from moco_d2.layers.heads import without_head
from moco_d2.running.seeds import seeded

logger = logging.getLogger(__name__)

RANDOM = "random"
_STEMS = ("conv1.weight", "patch_embed.proj.weight")  # of a ResNet and of a ViT, in files of ours

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Backbone:
    """A backbone with its facts.

    Attributes:
        network: (N, 3, H, W) -> (N, C), a ResNet's after global average pooling, a ViT's of the class token; in
            evaluation mode and without gradients.
        facts: what it is, and how it is fed.
        path: as the user wrote it.
        sha256: of the file; empty for random weights.
        read_as: which kind of file it was taken for.
        source_sha256: of the file that it was converted from, if it says so.
    """

    network: nn.Module
    facts: BackboneFacts
    path: str
    sha256: str
    read_as: str
    source_sha256: str = ""

    def record(self) -> dict[str, Any]:
        """Return what results say about the weights."""
        return {
            "path": self.path, "sha256": self.sha256, "source_sha256": self.source_sha256, "read_as": self.read_as,
            "facts": self.facts.as_dict(),
        }  # fmt: skip


def load_backbone(weights: str, cfg: CfgNode) -> Backbone:
    """Read a backbone and build the network that gives its features.

    Of a detector, the backbone alone is taken.

    Args:
        weights: a file that the converter reads (of ours or anyone's), ``moco-d2://NAME`` of the catalogue, or
            ``random`` for the untrained encoder that a config describes.
        cfg: for ``random``: SSL.ENCODER, DATA.AUGMENTATION (the pixel mean and std) and SEED.

    Raises:
        CheckpointError: the file cannot be read, or has no backbone; the message says what to do.
        ValueError: the config describes no encoder.
    """
    if weights == RANDOM:
        return _frozen(*_random(cfg), RANDOM, "", "random weights")
    path = fetch(weights.removeprefix(PREFIX)) if weights.startswith(PREFIX) else weights
    content = read_checkpoint(path)
    state, facts, read_as = _own(content, path) or _converted(content, path)
    network: Any = network_for(facts)
    # The CIFAR stem, which cannot be converted, can be probed.
    if isinstance(facts, ResNetFacts) and state["conv1.weight"].shape[2] == 3:
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.load_state_dict({name: state[name] for name in network.state_dict() if name in state})
    logger.info("%s: read as %s; input %s", weights, read_as, facts.pixels)
    backbone = _frozen(network, facts, weights, checkpoint_sha256(path), read_as)
    forget_checkpoint()
    return replace(backbone, source_sha256=str(content.get("source_sha256", "")))


def _frozen(network: nn.Module, facts: BackboneFacts, path: str, sha256: str, read_as: str) -> Backbone:
    return Backbone(network.eval().requires_grad_(False), facts, path, sha256, read_as)


def _random(cfg: CfgNode) -> tuple[nn.Module, BackboneFacts]:
    encoder, seed = cfg.SSL.ENCODER, max(cfg.SEED, 0)
    with seeded(seed):
        network = without_head(encoder_builder(encoder.NAME, encoder.ARGS)(num_classes=1))
    pixels = build_augmentation(cfg.DATA.AUGMENTATION, cfg.DATA.CROP_SIZE).pixels
    return network, ENCODERS[encoder.NAME].describe(network, pixels, origin=f"random weights, seed {seed}")


def _own(content: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[State, BackboneFacts, str] | None:
    """Take the backbone of a file of ours, which need not be convertible: ``backbone.pth`` or ``model_*.pth``."""
    facts, place = facts_in(content, path), backbone_in(content, path)
    if facts is None:
        return None
    state, read_as = content.get("state_dict"), "backbone.pth of this project"
    if place is not None:
        if place.prefix is None:
            raise CheckpointError(
                f"{path}: the backbone of {place.method} is no part of its checkpoint; give the backbone.pth in the "
                "same folder"
            )
        read_as, start = f"checkpoint of {place.method}, a pretraining of this project", place.prefix
        state = {k.removeprefix(start): v for k, v in content["model"].items() if k.startswith(start)}
    if not isinstance(state, Mapping) or not any(name in state for name in _STEMS):
        return None
    _check(state, facts, path)
    return state, facts, read_as


def _check(state: State, facts: BackboneFacts, path: str | os.PathLike[str]) -> None:
    """Refuse a file that lacks tensors of the network that its facts describe, or holds values that are no weights."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in network_for(facts).state_dict().items()}
    # The stem is not among the facts: 7x7, or 3x3 for small pictures.
    wrong = [
        name
        for name, shape in shapes.items()
        if name not in state or (state[name].shape != shape and (name != "conv1.weight" or state[name].shape[2] != 3))
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors are missing or do not fit its facts (a {facts.network}): {some(wrong)}"
            "; the file is incomplete or was edited"
        )
    check_values({name: state[name] for name in shapes if not name.endswith("num_batches_tracked")}, path)


def _converted(content: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[State, BackboneFacts, str]:
    conversion = convert_state(content, path)
    return conversion.source_tensors, conversion.facts, conversion.source.name

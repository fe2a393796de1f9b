"""Backbones to be probed: any file that the converter reads, a name of the catalogue, or random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moco_d2.convert import convert_state
from moco_d2.convert.catalog import PREFIX, fetch
from moco_d2.facts import BackboneFacts
from moco_d2.io.checkpoints import CheckpointError, facts_in, read_checkpoint
from moco_d2.layers.resnet import network_for


def load_backbone(weights: str | os.PathLike[str]) -> tuple[nn.Module, BackboneFacts]:
    """Read a backbone and build the network that gives its features.

    Args:
        weights: a file that the converter reads (of ours or anyone's), or ``moco-d2://NAME`` of the catalogue.

    Returns:
        A network (N, 3, H, W) -> (N, C), after global average pooling, in evaluation mode; and the facts, which say
        how it is fed.

    Raises:
        CheckpointError: the file cannot be read, or is no backbone; the message says what to do.
    """
    name = os.fspath(weights)
    path = fetch(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else weights
    content = read_checkpoint(path)
    state, facts = _own(content, path) or _converted(content, path)
    network = network_for(facts)
    if tuple(state["conv1.weight"].shape[2:]) == (3, 3):  # the CIFAR stem, which cannot be converted, can be probed
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    network.load_state_dict(dict(state))
    return network.eval(), facts


def _own(
    content: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[Mapping[str, torch.Tensor], BackboneFacts] | None:
    """Return a ``backbone.pth`` of ours; it need not be convertible."""
    facts, state = facts_in(content, path), content.get("state_dict")
    if facts is None or not isinstance(state, Mapping) or "conv1.weight" not in state:
        return None
    return state, facts


def _converted(
    content: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[Mapping[str, torch.Tensor], BackboneFacts]:
    conversion = convert_state(content, path)
    if conversion.norm != "BN":
        raise CheckpointError(f"{path}: a network with {conversion.norm}; probes read networks with BatchNorm")
    return conversion.source_tensors, conversion.facts

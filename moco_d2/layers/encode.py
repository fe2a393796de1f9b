"""Forward passes of an encoder: to unit vectors, for views of several sizes, and one that ends before the pooling.

Letters: V views, N images, D features of the encoder, C of its head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


def unit_features(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return L2-normalised features (N, D) of (N, 3, H, W), in float32 or wider.

    Contrastive losses are computed in float32 even under autocast, because exp(1 / temperature) is large.
    """
    features = network(x)
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)


def by_resolution(network: Callable[[torch.Tensor], torch.Tensor], images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Encode views of several sizes; adjacent views of the same size share a pass, as in SwAV and DINO.

    Batch norm then normalises all views of a pass together, which is part of those methods.

    Args:
        network: maps (M, 3, H, W) to (M, D).
        images: V views, each (N, 3, H_v, W_v).

    Returns:
        (V * N, D), in the order of the views.
    """
    passes = itertools.groupby(images, key=lambda view: view.shape[2:])
    return torch.cat([network(torch.cat(list(views))) for _, views in passes])


def embed(encoder: nn.Module, head: nn.Module, images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return unit vectors (V * N, C) of V views: the encoder runs once per size, the head once on all views.

    The head's batch norm so sees all views together, as in SwAV. The vectors are float32 or wider.
    """
    return unit_features(head, by_resolution(encoder, images))


_TO_THE_MAP = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def check_feature_map(network: nn.Module) -> None:
    """Raise ValueError if a network is no ResNet, and so has no :func:`feature_map`."""
    if not all(hasattr(network, name) for name in _TO_THE_MAP):
        raise ValueError("SSL.METHOD contrasts places of a ResNet's last feature map: set SSL.ENCODER.NAME to a ResNet")


def feature_map(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the features of a ResNet (torchvision's names) before its global pooling.

    Args:
        network: has ``conv1`` to ``layer4``.
        x: (N, 3, H, W).

    Returns:
        (N, D, H / 32, W / 32) for the ImageNet stem.
    """
    for name in _TO_THE_MAP:
        x = getattr(network, name)(x)
    return x

"""Features of labelled pictures: what a backbone gives after global average pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


@torch.no_grad()
def extract(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    seen: Callable[[int], None] = lambda count: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (N, C) and labels (N,) of all batches, on the batches' device.

    The network is in evaluation mode meanwhile, and afterwards in the mode it was in.

    Args:
        network: gives (n, C) features of (n, 3, H, W) pictures.
        batches: pictures with labels.
        seen: told the number of pictures after each batch.
        dtype: of the features; float16 halves the memory of a large bank.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    features, labels, count = [], [], 0
    try:
        for images, classes in batches:
            features.append(network(images).flatten(1).to(dtype))
            labels.append(classes)
            count += len(classes)
            seen(count)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return torch.cat(features), torch.cat(labels)

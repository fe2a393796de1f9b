"""Features of labelled pictures: what a backbone gives after global average pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


@torch.no_grad()
def extract(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    most: int,
    seen: Callable[[int], None] = lambda count: None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (N, C) and labels (N,) of all batches, on the batches' device.

    The network is in evaluation mode meanwhile, and afterwards in the mode it was in.

    Args:
        network: gives (n, C) features of (n, 3, H, W) pictures.
        batches: pictures with labels.
        most: N at most.
        seen: told the number of pictures after each batch.
        dtype: of the features; float16 halves the memory of a large bank.

    Raises:
        ValueError: there are no batches.
    """
    modes = {module: module.training for module in network.modules()}
    network.eval()
    features, labels, count = torch.empty(0), torch.empty(0, dtype=torch.int64), 0
    try:
        for images, classes in batches:
            found = network(images).flatten(1)
            if not count:  # allocated once: to join all batches at the end would need twice the memory
                features, labels = found.new_empty(most, found.shape[1], dtype=dtype), classes.new_empty(most)
            features[count : count + len(found)], labels[count : count + len(found)] = found, classes
            count += len(found)
            seen(count)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("there are no readable pictures to compute features of")
    return features[:count], labels[:count]

"""MoCo's dictionary: a first-in-first-out ring of keys."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)


class FeatureQueue(nn.Module):
    """A ring of the last K keys, saved and resumed with the model.

    It starts with random unit vectors, as the authors' does, and takes any number of keys at a time: it wraps around,
    and of more than K keys it keeps the last K.

    Attributes:
        features: (K, C) buffer of L2-normalised keys.
        pointer: (1,) buffer, the row that the next key overwrites.
    """

    features: torch.Tensor
    pointer: torch.Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        """Make a queue of ``size`` keys (K >= 1) of ``dim`` features (C >= 1), held as ``dtype``."""
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs at least one key of one feature, got queue_size={size}, dim={dim}")
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self._told = False

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Overwrite the oldest keys.

        Args:
            keys: (N, C), L2-normalised, the same in every process.
        """
        size = len(self.features)
        if len(keys) > size:
            if not self._told:
                logger.warning(
                    "a step brings %d keys but the queue holds %d: it keeps the last %d of each step only",
                    len(keys), size, size,
                )  # fmt: skip
                self._told = True
            keys = keys[-size:]
        rows = (self.pointer + torch.arange(len(keys), device=self.pointer.device)) % size
        self.features.index_copy_(0, rows, keys.to(self.features.dtype))
        self.pointer.add_(len(keys)).remainder_(size)

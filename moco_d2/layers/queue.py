"""MoCo's dictionary: a first-in-first-out queue of keys."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import nn

logger = logging.getLogger(__name__)


class FeatureQueue(nn.Module):
    """A ring buffer of the last K keys, saved and resumed with the model.

    It starts with random unit vectors, as in the authors' code. It takes any number of keys at a time; of more than K
    keys it keeps the last K.

    Attributes:
        features: (K, C) buffer of L2-normalised keys.
        pointer: (1,) buffer, number of the row that the next key overwrites.
    """

    features: torch.Tensor
    pointer: torch.Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        """Make a queue of ``size`` keys (K >= 1) of ``dim`` components (C >= 1), stored as ``dtype``."""
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs queue_size >= 1 and dim >= 1; got queue_size {size}, dim {dim}")
        self.register_buffer("features", F.normalize(torch.randn(size, dim), dim=1).to(dtype))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        self._warned = False

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Overwrite the oldest keys.

        Args:
            keys: (N, C), L2-normalised, the same in every process.
        """
        size = len(self.features)
        if len(keys) > size:
            if not self._warned:
                logger.warning(
                    "a step has %d keys, but the queue holds %d: only the last %d keys of each step are kept",
                    len(keys), size, size,
                )  # fmt: skip
                self._warned = True
            keys = keys[-size:]
        rows = (self.pointer + torch.arange(len(keys), device=self.pointer.device)) % size
        self.features.index_copy_(0, rows, keys.to(self.features.dtype))
        self.pointer.add_(len(keys)).remainder_(size)

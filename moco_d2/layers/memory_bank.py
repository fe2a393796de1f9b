"""Memory bank: an old feature of each image of the data set (Wu et al., arXiv 1805.01978).

Letters: n images of the set, N images per process, C feature dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import all_gather


class MemoryBank(nn.Module):
    """A moving average of each image's feature, equal in all processes, saved and resumed with the model.

    Rows start with values drawn uniformly from +-1/sqrt(C/3). A row is first normalised when its image is seen, as in
    the published code.

    Attributes:
        features: (n, C) buffer; row i belongs to image i.
    """

    features: torch.Tensor

    def __init__(self, images: int, dim: int, momentum: float = 0.5, dtype: torch.dtype = torch.float32) -> None:
        """Make a bank.

        Args:
            images: n >= 1, number of images of the data set.
            dim: C >= 1, size of a feature.
            momentum: m in [0, 1], the share of the old feature.
            dtype: type in which the features are stored.

        Raises:
            ValueError: an argument is out of range.
        """
        super().__init__()
        if images < 1 or dim < 1 or not 0 <= momentum <= 1:
            raise ValueError(
                f"a memory bank needs images >= 1, dim >= 1 and momentum in [0, 1]; got images {images}, dim {dim}, "
                f"momentum {momentum}"
            )
        self.momentum = momentum
        bound = (dim / 3) ** -0.5
        self.register_buffer("features", torch.empty(images, dim).uniform_(-bound, bound).to(dtype))

    @torch.no_grad()
    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Return a copy of the features of images.

        Args:
            index: (...) int64, image numbers.

        Returns:
            (..., C) float32 or wider.
        """
        rows = self.features[index]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    @torch.no_grad()
    def update(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Move rows towards new features and normalise them: M_i <- normalise(m M_i + (1 - m) f_i).

        Every process applies the updates of all processes in rank order, so that the banks stay equal. An image can
        occur several times, because it replaces unreadable ones; its last feature counts.

        Args:
            features: (N, C), L2-normalised; the same N in every process.
            index: (N,) int64, the numbers of the images.
        """
        features, index = all_gather(features.detach()), all_gather(index)
        # On a GPU index_copy_ writes duplicates in any order, so only the last of each is passed.
        order = torch.arange(len(index), device=index.device)
        last = (index[:, None] == index).long().mul(order).amax(dim=1) == order
        index, features = index[last], features[last]
        moved = self.momentum * self.rows(index) + (1 - self.momentum) * features
        self.features.index_copy_(0, index, F.normalize(moved, dim=1).to(self.features.dtype))

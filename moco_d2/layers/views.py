"""What data hands to a method: the views of a batch of images, and where they come from.

Letters: V views, N images per process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Views(NamedTuple):
    """A batch. A tuple, because DDP rebuilds its inputs and keeps a named tuple's type.

    Attributes:
        images: V tensors (N, 3, H_v, W_v), normalised. Sizes may differ between views; the recipe's order is kept, in
            which large views come first.
        index: (N,) int64, the number of the image that is shown, from 0. Two may be equal, because an unreadable image
            is replaced by one near it.
        boxes: (V, N, 4) float32, the crops as x0, y0, x1, y1 in parts of the upright image; x0 > x1 where the view is
            mirrored.
    """

    images: list[torch.Tensor]
    index: torch.Tensor  # type: ignore[assignment]  # tuple has a method of this name, which nobody needs here
    boxes: torch.Tensor

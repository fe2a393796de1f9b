"""The batch that a method receives: views of images, the images' numbers, and the crops' places.

Letters: V views, N images per process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Views(NamedTuple):
    """A batch of views. DDP rebuilds its inputs and keeps the type of a named tuple, but not of other classes.

    Attributes:
        images: V tensors (N, 3, H_v, W_v), normalised. Sizes may differ between views; they are in the augmentation's
            order, large views first.
        index: (N,) int64, the number of the image that is shown, from 0. Two can be equal, because an unreadable image
            is replaced by a nearby one.
        boxes: (V, N, 4) float32, the crops' x0, y0, x1, y1 as fractions of the upright image's width and height;
            x0 > x1 if the view is mirrored.
    """

    images: list[torch.Tensor]
    index: torch.Tensor  # type: ignore[assignment]  # tuple has a method of this name, which nobody needs here
    boxes: torch.Tensor

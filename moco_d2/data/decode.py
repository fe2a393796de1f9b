"""Decoding of image files: header first, pixels when they are wanted."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from moco_d2.data.augment import Plan
from moco_d2.io.pictures import MAX_PIXELS, open_picture, turn, upright_rgb, upright_size

_REDUCTIONS = (8, 4, 2)  # a JPEG decoder makes 1/8, 1/4 and 1/2 of the size in less time than the whole


class EncodedImage:
    """An image file whose header is read and whose pixels are not decoded yet.

    Attributes:
        height: of the upright image (EXIF orientation applied), in pixels.
        width: of the upright image.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS, reduced: bool = False) -> None:
        """Read the header.

        Args:
            data: the file.
            max_pixels: a larger image is refused, before memory is spent on it.
            reduced: whether :meth:`crops` may decode at a reduced size.

        Raises:
            OSError: it is not an image, too large, or of a kind that is not supported.
        """
        self._data, self._reduced = data, reduced
        self._opened = open_picture(io.BytesIO(data), max_pixels)
        self._turn = turn(self._opened)
        self.width, self.height = upright_size(self._opened)

    def decode(self) -> torch.Tensor:
        """Return the upright image, (3, H, W) uint8 RGB, equal to :func:`moco_d2.io.pictures.read_image` to the bit.

        The memory order is channels last, as decoders give it.

        Raises:
            OSError: the file is damaged.
        """
        if self._is_plain_jpeg():
            encoded = torch.frombuffer(bytearray(self._data), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):  # PIL decides whether the file is damaged.
                image = decode_jpeg(encoded, ImageReadMode.RGB)
                # Not turned by the decoder, which finds the orientation in fewer places than PIL.
                return image if self._turn is None else _turned(image, self._turn)
        return torch.from_numpy(np.array(upright_rgb(self._opened))).permute(2, 0, 1)

    def crops(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        """Decode once and return each plan's box resized with antialiasing, (plan.size, plan.size, 3) uint8.

        With ``reduced``, a JPEG is decoded at the smallest of 1/2, 1/4 and 1/8 of its size at which every box is at
        least as large as its view. Such crops are close to those of the whole image, but not equal.

        Raises:
            OSError: the file is damaged.
        """
        if reduction := self._reduction(plans):
            return self._reduced_crops(plans, reduction)
        image = self.decode()
        parts = [(plan, plan.box) for plan in plans]
        return [_resize(image[:, b.top : b.top + b.height, b.left : b.left + b.width], plan) for plan, b in parts]

    def _is_plain_jpeg(self) -> bool:
        # MPO is a JPEG with more images behind the first. CMYK needs PIL's colour conversion.
        return self._opened.format in ("JPEG", "MPO") and self._opened.mode in ("L", "RGB")

    def _reduction(self, plans: Sequence[Plan]) -> int:
        """Return the largest reduction at which no box is smaller than its view; 0 if there is none."""
        if not self._reduced or not self._is_plain_jpeg():
            return 0
        sides = [(min(plan.box.height, plan.box.width), plan.size) for plan in plans]
        return next((r for r in _REDUCTIONS if all(side // r >= size for side, size in sides)), 0)

    def _reduced_crops(self, plans: Sequence[Plan], reduction: int) -> list[np.ndarray]:
        width, height = self._opened.size
        self._opened.draft("RGB", (width // reduction, height // reduction))
        image = upright_rgb(self._opened)
        crops = []
        for plan in plans:
            top, left, height, width = plan.box
            edges = (left, top, min(left + width, image.width * reduction), min(top + height, image.height * reduction))
            part = (edges[0] / reduction, edges[1] / reduction, edges[2] / reduction, edges[3] / reduction)
            mode = Image.Resampling.BICUBIC if plan.bicubic else Image.Resampling.BILINEAR
            crops.append(np.array(image.resize((plan.size, plan.size), mode, box=part)))
        return crops


def _turned(image: torch.Tensor, how: Image.Transpose) -> torch.Tensor:
    upright = Image.fromarray(image.permute(1, 2, 0).numpy()).transpose(how)
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def _resize(part: torch.Tensor, plan: Plan) -> np.ndarray:
    """Resize (3, H, W) uint8 as PIL's filters do: (plan.size, plan.size, 3)."""
    part = part[None].contiguous(memory_format=torch.channels_last)  # resizing is fastest in this order
    mode = "bicubic" if plan.bicubic else "bilinear"
    part = interpolate(part, (plan.size, plan.size), mode=mode, antialias=True)
    return np.ascontiguousarray(part[0].permute(1, 2, 0).numpy())

"""From the bytes of an image file to pixels. Every way of decoding is behind :class:`Picture`."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from moco_d2.data.augment import Plan

ORIENTATION = 0x0112  # EXIF's tag
# How an image is turned upright: whether rows and columns change places, then the axes that are reversed.
TURNS: dict[Any, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
REDUCTIONS = (8, 4, 2)  # what a JPEG decoder leaves out for less than it costs: 1/8, 1/4, 1/2 of the size


class Picture:
    """An image file whose size is known and whose pixels are not decoded yet.

    Attributes:
        height, width: of the upright image (EXIF orientation applied). They come from the header, so that a caller can
            refuse an image before memory is spent on it.
    """

    def __init__(self, data: bytes) -> None:
        """Read the header.

        Raises:
            OSError: it is no image.
        """
        self._data = data
        self._opened = Image.open(io.BytesIO(data))
        # Whatever PIL takes for it: from EXIF or XMP, and no number at all in some files.
        self._swapped, self._reversed = TURNS.get(self._opened.getexif().get(ORIENTATION), (False, ()))
        size = self._opened.size
        # PIL's TIFF reader states the upright size itself.
        self.width, self.height = reversed(size) if self._swapped and self._opened.format != "TIFF" else size

    def decode(self) -> torch.Tensor:
        """Return the upright image, (3, H, W) uint8 RGB, equal to :func:`read_image` to the bit.

        The memory is that of rows of pixels (channels last), as decoders give it.

        Raises:
            OSError: the file is damaged.
        """
        if self._is_plain_jpeg():
            encoded = torch.frombuffer(bytearray(self._data), dtype=torch.uint8)
            with contextlib.suppress(RuntimeError):  # PIL has the last word on what is damaged.
                return self._turned(decode_jpeg(encoded, ImageReadMode.RGB))
        return torch.from_numpy(np.array(_upright_rgb(self._opened))).permute(2, 0, 1)

    def _turned(self, image: torch.Tensor) -> torch.Tensor:
        """Turn (3, H, W) upright; not the decoder, which reads the orientation from fewer places than PIL."""
        pixels = image.permute(1, 2, 0)
        pixels = pixels.transpose(0, 1) if self._swapped else pixels
        return pixels.flip(self._reversed).contiguous().permute(2, 0, 1) if self._swapped or self._reversed else image

    def crops(self, plans: Sequence[Plan]) -> list[np.ndarray]:
        """Decode once and return each plan's box resized with antialiasing, (plan.size, plan.size, 3) uint8.

        A JPEG of which every box stays at least as large as its view is decoded at 1/2, 1/4 or 1/8 of its size, the
        smallest such; then a crop is that of the reduced image, near to but not that of the whole.

        Raises:
            OSError: the file is damaged.
        """
        if reduction := self._reduction(plans):
            return self._reduced_crops(plans, reduction)
        image = self.decode()
        parts = [(plan, plan.box) for plan in plans]
        return [_resize(image[:, b.top : b.top + b.height, b.left : b.left + b.width], plan) for plan, b in parts]

    def _is_plain_jpeg(self) -> bool:
        # MPO is a JPEG with more pictures behind the first. CMYK needs PIL's colours.
        return self._opened.format in ("JPEG", "MPO") and self._opened.mode in ("L", "RGB")

    def _reduction(self, plans: Sequence[Plan]) -> int:
        """Return the largest reduction at which no box gets smaller than its view; 0 for none."""
        sides = [(min(plan.box.height, plan.box.width), plan.size) for plan in plans]
        fits = (r for r in REDUCTIONS if self._is_plain_jpeg() and all(side // r >= size for side, size in sides))
        return next(fits, 0)

    def _reduced_crops(self, plans: Sequence[Plan], reduction: int) -> list[np.ndarray]:
        width, height = self._opened.size
        self._opened.draft("RGB", (width // reduction, height // reduction))
        image = _upright_rgb(self._opened)
        crops = []
        for plan in plans:
            top, left, height, width = plan.box
            edges = (left, top, min(left + width, image.width * reduction), min(top + height, image.height * reduction))
            part = (edges[0] / reduction, edges[1] / reduction, edges[2] / reduction, edges[3] / reduction)
            mode = Image.Resampling.BICUBIC if plan.bicubic else Image.Resampling.BILINEAR
            crops.append(np.array(image.resize((plan.size, plan.size), mode, box=part)))
        return crops


def read_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette and CMYK images are converted; 16-bit samples keep their high byte
    (PIL's own conversion would clip them to white).

    Raises:
        OSError: the file cannot be read or decoded.
    """
    with Image.open(file) as opened:
        return _upright_rgb(opened)


def _upright_rgb(opened: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):  # 16-bit grey: PIL says "I;16" or "I" depending on the format
        values = np.asarray(image)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns when a palette's transparency is dropped in one step
    return image.convert("RGB")


def _resize(part: torch.Tensor, plan: Plan) -> np.ndarray:
    """Resize (3, H, W) uint8 as PIL's filters do: (plan.size, plan.size, 3)."""
    part = part[None].contiguous(memory_format=torch.channels_last)  # the resizing is fastest on whole pixels
    mode = "bicubic" if plan.bicubic else "bilinear"
    part = interpolate(part, (plan.size, plan.size), mode=mode, antialias=True)
    return np.ascontiguousarray(part[0].permute(1, 2, 0).numpy())

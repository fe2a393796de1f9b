"""From the bytes of an image file to pixels."""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps


def read_image(file: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    """Read an image file as 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette and CMYK images are converted; 16-bit samples keep their high byte
    (PIL's own conversion would clip them to white).

    Raises:
        OSError: the file cannot be read or decoded.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16-bit grey: PIL says "I;16" or "I" depending on the format
            values = np.asarray(image)
            image = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns when a palette's transparency is dropped in one step
        return image.convert("RGB")

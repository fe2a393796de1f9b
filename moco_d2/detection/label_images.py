"""Label images of semantic segmentation: one class index a pixel, with a colour palette or without."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import IO, Any

from detectron2.utils.file_io import PathHandler
from PIL import Image


class LabelIndexHandler(PathHandler):
    """Opens ``label-index://FILE``, a label image, without its palette, so that its pixels are class indices.

    VOC's label images have colour palettes. Detectron2's mapper converts label images to grey, so that it would train
    on the brightness of each pixel's colour instead of its class.
    """

    PREFIX = "label-index://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return path.removeprefix(self.PREFIX)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return os.path.exists(path.removeprefix(self.PREFIX))

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(path.removeprefix(self.PREFIX))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[bytes]:
        plain, file = path.removeprefix(self.PREFIX), io.BytesIO()
        with Image.open(plain) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"{plain} has mode {image.mode}; a label image must hold class indices (mode P or L)")
            # BMP, because the image is read from memory at once.
            Image.frombytes("L", image.size, image.tobytes()).save(file, "BMP")
        file.seek(0)
        return file


def load_sem_seg(images: str, labels: str, split: str) -> list[dict[str, Any]]:
    """Return the records, in Detectron2's format, of the pictures that a split's text file lists."""
    with open(split) as file:
        # Some editions of train_aug.txt list pairs of files instead of names.
        names = [Path(line.split()[0]).stem for line in file if line.strip()]
    return [
        {
            "file_name": os.path.join(images, f"{name}.jpg"),
            "image_id": name,
            "sem_seg_file_name": LabelIndexHandler.PREFIX + os.path.join(labels, f"{name}.png"),
        }
        for name in names
    ]

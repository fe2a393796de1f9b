"""Pairs of views of labelled pictures: the same random views each time, to compare networks by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from moco_d2.data.augment import Augmentation
from moco_d2.data.backends import Cv2Backend
from moco_d2.data.decode import EncodedImage
from moco_d2.data.labelled import LabelledSet
from moco_d2.data.loader import one_thread
from moco_d2.io import timeouts
from moco_d2.io.pictures import MAX_PIXELS
from moco_d2.seeding import stream_seed


class _Pairs(Dataset[torch.Tensor]):
    def __init__(
        self, pictures: LabelledSet, numbers: Sequence[int], augmentation: Augmentation, max_pixels: int
    ) -> None:
        self.pictures, self.numbers, self.max_pixels = pictures, numbers, max_pixels
        # Both from the distribution of the first view: other views may have another size.
        self.augmentation = replace(augmentation, views=augmentation.views[:1] * 2)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> torch.Tensor:
        number = self.numbers[place]
        image = self.pictures.picture(number, self.max_pixels)
        plans = self.augmentation.plan(image.height, image.width, stream_seed(number))
        file = BytesIO()  # Backends take files, and objects and arrays are none; PNG without compression is quick.
        image.save(file, "PNG", compress_level=0)
        views = Cv2Backend().prepare(EncodedImage(file.getvalue(), self.max_pixels), plans)
        return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)  # (2, 3, H, W)


def view_pairs(
    pictures: LabelledSet,
    numbers: Sequence[int],
    augmentation: Augmentation,
    *,
    batch: int = 256,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    device: str | torch.device = "cpu",
) -> Iterator[torch.Tensor]:
    """Yield (2 N, 3, H, W) normalised views: the two of the first picture, the two of the second, and so on.

    A picture's views depend on its number only.

    Args:
        pictures: the set.
        numbers: which of its pictures.
        augmentation: its first view is drawn twice.
        batch: 2 N at most.
        workers: number of loader processes.
        max_pixels: ``DATA.MAX_PIXELS``.
        device: where the views go.

    Raises:
        PictureError: a picture cannot be read; it is named.
    """
    pixels = augmentation.pixels
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (pixels.mean, pixels.std))
    loader = DataLoader(
        _Pairs(pictures, numbers, augmentation, max_pixels), max(1, batch // 2), num_workers=workers,
        timeout=timeouts.limit() if workers else 0, worker_init_fn=one_thread,
        generator=torch.Generator(),  # of its own: a DataLoader draws a seed, which would shift a run's draws
    )  # fmt: skip
    for views in loader:
        yield views.flatten(0, 1).to(device).float().sub_(mean).div_(std)

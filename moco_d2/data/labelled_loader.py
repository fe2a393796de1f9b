"""Loaders of labelled pictures: the test transform of probes, and the source for random crops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from moco_d2.data.augment import Apply, Augmentation, Crop, View
from moco_d2.data.labelled import LabelledSet
from moco_d2.data.skipped import Skip, SkipLog
from moco_d2.data.sources import FileSource
from moco_d2.facts import Pixels
from moco_d2.io import timeouts
from moco_d2.io.pictures import MAX_PIXELS, PictureError

# A picture (None: unreadable), its label, and why it cannot be read.
_Sample = tuple[torch.Tensor | None, int, Skip | None]


class _TestPictures(Dataset[_Sample]):
    """Pictures under the test transform, as 8-bit tensors."""

    def __init__(self, pictures: LabelledSet, resize: int, size: int, bicubic: bool, max_pixels: int) -> None:
        self.pictures, self.resize, self.size, self.max_pixels = pictures, resize, size, max_pixels
        self.mode = F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> _Sample:
        label = int(self.pictures.labels[index])
        try:
            image = self.pictures.picture(index, self.max_pixels)
        except PictureError as error:
            path = self.pictures.files[index]
            return None, label, Skip(path, str(error).removeprefix(f"{path}: "), -1)
        if self.pictures.boxes is not None:  # an object fills the picture, whatever its shape
            image = F.resize(image, [self.size, self.size], self.mode)
        else:
            image = F.center_crop(F.resize(image, self.resize, self.mode), [self.size, self.size])
        return F.pil_to_tensor(image), label, None


class LabelledLoader:
    """Normalised pictures (N, 3, size, size) with labels (N,), in the set's order, each picture once.

    The transform is the published codes': the shorter side is resized, and the centre is cropped. Objects of a
    detection set are resized to the square. Unreadable pictures are logged and left out.

    Attributes:
        unreadable: number of pictures that were left out so far.
    """

    def __init__(
        self,
        pictures: LabelledSet,
        pixels: Pixels,
        size: int,
        *,
        bicubic: bool = False,
        batch: int = 256,
        workers: int = 0,
        max_pixels: int = MAX_PIXELS,
        max_skipped: float = 0.0,
        device: str | torch.device = "cpu",
        whole: int | None = None,
    ) -> None:
        """Set up.

        Args:
            pictures: the set.
            pixels: how the network is fed.
            size: side of the crop in pixels (224 in the papers). The shorter side is resized to size * 256 / 224, the
                papers' proportion; pictures in arrays that have the size already are not resized.
            bicubic: interpolation (DINO), else bilinear.
            batch: N at most.
            workers: number of loader processes.
            max_pixels: ``DATA.MAX_PIXELS``.
            max_skipped: ``DATA.MAX_SKIPPED``, the fraction of the pictures that may be unreadable.
            device: where the pictures go.
            whole: if the set is a process's share of another one, the number of pictures of that one, of which
                ``max_skipped`` is a fraction.
        """
        fits = pictures.arrays is not None and pictures.arrays.shape[1:3] == (size, size)
        self.dataset = _TestPictures(pictures, size if fits else round(size * 256 / 224), size, bicubic, max_pixels)
        self.pictures, self.pixels, self.whole = pictures, pixels, whole or len(pictures)
        self.max_skipped, self.device, self.unreadable = max_skipped, device, 0
        # A generator of its own: a DataLoader draws a seed, which would shift the draws of a run that is being watched.
        self._options: dict[str, Any] = {"num_workers": workers, "generator": torch.Generator(), "batch_size": batch}
        if workers:
            self._options["timeout"] = timeouts.limit()
        self._skips = SkipLog()

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches.

        Raises:
            PictureError: more pictures are unreadable than ``max_skipped`` allows.
        """
        self.unreadable = 0
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.pixels.mean, self.pixels.std))
        for images, labels, skips in DataLoader(self.dataset, collate_fn=_collate, **self._options):
            self._record(skips)
            if len(labels):
                pixels = images.to(self.device).float()
                pixels = pixels if self.pixels.order == "RGB" else pixels.flip(1)
                yield pixels.sub_(mean).div_(std), labels.to(self.device)

    def _record(self, skips: Sequence[Skip]) -> None:
        self._skips.record(skips)
        self.unreadable += len(skips)
        self.check(self.unreadable, f"; the last is {skips[-1].path}: {skips[-1].error}" if skips else "")

    def check(self, unreadable: int, example: str = "") -> None:
        """Check a number of unreadable pictures, such as that of all processes.

        Raises:
            PictureError: there are more than ``max_skipped`` allows.
        """
        if unreadable > self.max_skipped * self.whole:
            raise PictureError(
                f"{unreadable} of the {self.whole} pictures of {self.pictures.name} cannot be read, more than "
                f"DATA.MAX_SKIPPED {self.max_skipped:g} allows{example}. "
                "Repair or remove these files, or raise DATA.MAX_SKIPPED"
            )


def _collate(samples: Sequence[_Sample]) -> tuple[torch.Tensor, torch.Tensor, list[Skip]]:
    readable = [(image, label) for image, label, _ in samples if image is not None]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    return images, torch.tensor([label for _, label in readable]), [skip for *_, skip in samples if skip]


class LabelledSource(FileSource):
    """Labelled pictures as image files, for :class:`~moco_d2.data.ViewDataset`."""

    def __init__(self, pictures: LabelledSet, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__(pictures.files)
        self.pictures, self.max_pixels = pictures, max_pixels
        self.encoded = pictures.arrays is None and pictures.boxes is None

    def read(self, index: int) -> bytes:
        """Return the file's bytes; arrays and objects become a bitmap, which loses nothing."""
        if self.encoded:
            return super().read(index)
        bitmap = BytesIO()
        self.pictures.picture(index, self.max_pixels).save(bitmap, "bmp")
        return bitmap.getvalue()


def crop_and_flip(size: int, pixels: Pixels) -> Augmentation:
    """Return the augmentation of linear classifiers: RandomResizedCrop (torchvision's default scale) and a flip.

    The views are RGB. A network that takes BGR needs their channels reversed, after they are normalised with its own
    mean and std.
    """
    (a, b, c), (d, e, f) = pixels.mean, pixels.std
    rgb = pixels if pixels.order == "RGB" else Pixels("RGB", (c, b, a), (f, e, d))
    return Augmentation((View(Crop(size), (Apply("flip", 0.5),)),), rgb)

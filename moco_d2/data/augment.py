"""Augmentation recipes, op for op as published, on PIL images through torchvision.

A recipe is a function of the view's size that returns a :class:`Recipe`. All randomness comes from torch's CPU
generator, so that one seed fixes a sample's views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from moco_d2.facts import IMAGENET_RGB, Pixels

View = Callable[[Image.Image], torch.Tensor]

CIFAR_RGB = Pixels("RGB", (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255))


@dataclass(frozen=True)
class Recipe:
    """How an image becomes views.

    Attributes:
        views: one transform a view, each RGB image -> float tensor (3, size, size), normalised.
        pixels: the normalisation, which becomes the weights' input convention.
    """

    views: tuple[View, ...]
    pixels: Pixels

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        """Return the image's views in order."""
        return [view(image) for view in self.views]


class GaussianBlur:
    """PIL's blur with a radius drawn from U(low, high), as MoCo v2 and SimCLR's PyTorch ports use it."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        radius = torch.empty(1).uniform_(self.low, self.high).item()
        return image.filter(ImageFilter.GaussianBlur(radius=radius))

    def __repr__(self) -> str:
        return f"GaussianBlur(radius=U({self.low}, {self.high}))"


def _to_tensor(pixels: Pixels) -> list[Callable[..., torch.Tensor]]:
    mean, std = ([round(v / 255, 6) for v in values] for values in (pixels.mean, pixels.std))
    return [T.ToTensor(), T.Normalize(mean, std)]


def moco_v1(size: int) -> Recipe:
    """MoCo v1: crop, grayscale, colour jitter, flip, in this order (that of the authors' code, which is InstDisc's)."""
    view = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomGrayscale(p=0.2),
            T.ColorJitter(0.4, 0.4, 0.4, 0.4),
            T.RandomHorizontalFlip(),
            *_to_tensor(IMAGENET_RGB),
        ]
    )
    return Recipe((view, view), IMAGENET_RGB)


def moco_v2(size: int) -> Recipe:
    """MoCo v2's "aug+": crop, jitter (p .8, hue .1), grayscale, blur (p .5), flip, in this order."""
    view = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([GaussianBlur(0.1, 2.0)], p=0.5),
            T.RandomHorizontalFlip(),
            *_to_tensor(IMAGENET_RGB),
        ]
    )
    return Recipe((view, view), IMAGENET_RGB)


def moco_cifar(size: int) -> Recipe:
    """The authors' CIFAR-10 demo: crop (torchvision's default scale), flip, jitter, grayscale; no blur."""
    view = T.Compose(
        [
            T.RandomResizedCrop(size),
            T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            *_to_tensor(CIFAR_RGB),
        ]
    )
    return Recipe((view, view), CIFAR_RGB)


RECIPES: dict[str, Callable[[int], Recipe]] = {"moco_v1": moco_v1, "moco_v2": moco_v2, "moco_cifar": moco_cifar}


def build_recipe(name: str, size: int) -> Recipe:
    """Return a recipe by name for views of ``size`` pixels.

    Raises:
        ValueError: unknown name, or a size below 1.
    """
    if name not in RECIPES:
        raise ValueError(f"DATA.RECIPE is {name!r}; known recipes are {', '.join(RECIPES)}")
    if size < 1:
        raise ValueError(f"DATA.CROP_SIZE is {size}; a view needs at least one pixel")
    return RECIPES[name](size)

"""The augmentations of the recipes, op for op as published."""

from __future__ import annotations

from moco_d2.data.augment import Apply, Augmentation, Crop, Jitter, View, register_augmentation
from moco_d2.facts import Pixels

CIFAR_RGB = Pixels("RGB", (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255))


@register_augmentation
def moco_v1(size: int) -> Augmentation:
    """MoCo v1: crop, grayscale, colour jitter, flip, in this order (that of the authors' code, which is InstDisc's)."""
    view = View(Crop(size, scale=(0.2, 1.0)), (Apply("grey", 0.2), Jitter(0.4, 0.4, 0.4, 0.4), Apply("flip", 0.5)))
    return Augmentation((view, view))


@register_augmentation
def moco_v2(size: int) -> Augmentation:
    """MoCo v2's "aug+": crop, jitter (p .8, hue .1), grayscale, blur (p .5), flip, in this order."""
    ops = (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Apply("grey", 0.2), Apply("blur", 0.5, (0.1, 2.0)), Apply("flip", 0.5))
    view = View(Crop(size, scale=(0.2, 1.0)), ops)
    return Augmentation((view, view))


@register_augmentation
def moco_cifar(size: int) -> Augmentation:
    """The authors' CIFAR-10 demo: crop (torchvision's default scale), flip, jitter, grayscale; no blur."""
    view = View(Crop(size), (Apply("flip", 0.5), Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Apply("grey", 0.2)))
    return Augmentation((view, view), CIFAR_RGB)


@register_augmentation
def pixpro(size: int) -> Augmentation:
    """PixPro: BYOL's two views, blurred (p 1, .1), solarised (p 0, .2); bilinear, the flip directly after the crop."""

    def view(blur: float, solarise: float) -> View:
        colours = (Jitter(0.4, 0.4, 0.2, 0.1, p=0.8), Apply("grey", 0.2))
        ops = (Apply("flip", 0.5), *colours, Apply("blur", blur, (0.1, 2.0)), Apply("solarise", solarise, 128.0))
        return View(Crop(size), ops)

    return Augmentation((view(1.0, 0.0), view(0.1, 0.2)))


@register_augmentation
def cmc(size: int) -> Augmentation:
    """CMC: one view, a crop (torchvision's default scale) and a flip; the method splits it by colour."""
    return Augmentation((View(Crop(size), (Apply("flip", 0.5),)),))


@register_augmentation
def cpc(size: int) -> Augmentation:
    """CPC: one view, a square at a random place, then a flip. Its side is 256 of 300 pixels (recalled)."""
    part = (256 / 300) ** 2
    return Augmentation((View(Crop(size, scale=(part, part), ratio=(1.0, 1.0)), (Apply("flip", 0.5),)),))

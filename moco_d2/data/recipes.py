"""The augmentations of the recipes, op for op as published."""

from __future__ import annotations

from moco_d2.data.augment import Apply, Augmentation, Crop, Jitter, RandomOp, View, register_augmentation
from moco_d2.facts import IMAGENET_RGB, Pixels

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


# SwAV's code divides by .228 in red, where the usual value is .229; its weights expect that.
SWAV_RGB = Pixels("RGB", IMAGENET_RGB.mean, (0.228 * 255, 0.224 * 255, 0.225 * 255))


def _small(size: int) -> int:
    """Return the side of the small views of a multi-crop: 96 pixels if the large ones have 224."""
    return max(1, round(size * 96 / 224))


def _swav(crop: Crop, jitter: Jitter, blur: float) -> View:
    return View(crop, (Apply("flip", 0.5), jitter, Apply("grey", 0.2), Apply("blur", blur, (0.1, 2.0))))


_SWAV_JITTER = Jitter(0.8, 0.8, 0.8, 0.2, p=0.8)


@register_augmentation
def swav_2x6(size: int) -> Augmentation:
    """SwAV's multi-crop: two large views and six small ones; flip, strong jitter, grayscale, blur (p .5)."""
    large = _swav(Crop(size, scale=(0.14, 1.0)), _SWAV_JITTER, 0.5)
    small = _swav(Crop(_small(size), scale=(0.05, 0.14)), _SWAV_JITTER, 0.5)
    return Augmentation((large,) * 2 + (small,) * 6, SWAV_RGB)


@register_augmentation
def swav_2(size: int) -> Augmentation:
    """SwAV without multi-crop: two large views of a wider range of areas."""
    view = _swav(Crop(size), _SWAV_JITTER, 0.5)
    return Augmentation((view, view), SWAV_RGB)


@register_augmentation
def swav_cifar(size: int) -> Augmentation:
    """Two views of 32-pixel pictures: SwAV's large crops, half its jitter, no blur."""
    view = _swav(Crop(size, scale=(0.14, 1.0)), Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), 0.0)
    return Augmentation((view, view), CIFAR_RGB)


def _dino(crop: Crop, blur: float, solarise: float = 0.0) -> View:
    ops = (
        Apply("flip", 0.5), Jitter(0.4, 0.4, 0.2, 0.1, p=0.8), Apply("grey", 0.2), Apply("blur", blur, (0.1, 2.0)),
        Apply("solarise", solarise, 128),
    )  # fmt: skip
    return View(crop, ops)


def _dino_multi_crop(size: int, border: float, count: int) -> Augmentation:
    """Return two large views, of areas from ``border`` to 1, and small ones of areas from .05 to ``border``."""
    large = Crop(size, scale=(border, 1.0), bicubic=True)
    small = Crop(_small(size), scale=(0.05, border), bicubic=True)
    return Augmentation((_dino(large, 1.0), _dino(large, 0.1, 0.2)) + (_dino(small, 0.5),) * count)


@register_augmentation
def dino_2x8(size: int) -> Augmentation:
    """DINO's default multi-crop: two large views (area .4-1) and eight small ones (.05-.4), bicubic.

    Flip, jitter, grayscale; blur with probability 1, .1 (large) and .5 (small); the second large view is solarised
    with probability .2.
    """
    return _dino_multi_crop(size, 0.4, 8)


@register_augmentation
def dino_2x6_r50(size: int) -> Augmentation:
    """DINO's multi-crop for ResNet-50: areas .14-1 and .05-.14 as in SwAV, six small views."""
    return _dino_multi_crop(size, 0.14, 6)


@register_augmentation
def dino_cifar(size: int) -> Augmentation:
    """Two views of 32-pixel pictures: DINO's large ones without blur."""
    crop = Crop(size, scale=(0.4, 1.0), bicubic=True)
    return Augmentation((_dino(crop, 0.0), _dino(crop, 0.0, 0.2)), CIFAR_RGB)


@register_augmentation
def instdisc(size: int) -> Augmentation:
    """InstDisc: one view of ``moco_v1``."""
    return Augmentation(moco_v1(size).views[:1])


@register_augmentation
def moco_cifar_single(size: int) -> Augmentation:
    """One view of ``moco_cifar``, for a memory bank on CIFAR-10."""
    return Augmentation(moco_cifar(size).views[:1], CIFAR_RGB)


@register_augmentation
def invaspread(size: int) -> Augmentation:
    """InvaSpread on CIFAR-10: crop, colour jitter, grayscale, flip, in this order."""
    view = View(Crop(size, scale=(0.2, 1.0)), (Jitter(0.4, 0.4, 0.4, 0.4), Apply("grey", 0.2), Apply("flip", 0.5)))
    return Augmentation((view, view), CIFAR_RGB)


@register_augmentation
def simclr(size: int) -> Augmentation:
    """SimCLR: bicubic crop, flip, jitter (p .8, strength 1), grayscale, blur (p .5); pixels in [0, 1], no mean or std.

    Brightness is multiplied, as in v2 and in torchvision; v1 added to it.
    """
    ops = (Apply("flip", 0.5), Jitter(0.8, 0.8, 0.8, 0.2, p=0.8), Apply("grey", 0.2), Apply("blur", 0.5, (0.1, 2.0)))
    view = View(Crop(size, bicubic=True), ops)
    return Augmentation((view, view), Pixels("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)))


@register_augmentation
def byol(size: int) -> Augmentation:
    """BYOL, Barlow Twins, VICReg: crop (bicubic), flip, jitter, grayscale, blur, solarise; the two views differ."""
    crop, flip = Crop(size, bicubic=True), Apply("flip", 0.5)
    return Augmentation(tuple(View(crop, (flip, *ops)) for ops in _two_sets_of_colours()))


@register_augmentation
def moco_v3(size: int) -> Augmentation:
    """MoCo v3 for ResNets: BYOL's operations, but crops of at least a fifth, bilinear, and the flip at the end."""
    return _moco_v3(Crop(size, scale=(0.2, 1.0)))


@register_augmentation
def moco_v3_vit(size: int) -> Augmentation:
    """MoCo v3 for ViTs: the same with crops of torchvision's default scale, at least 8 %."""
    return _moco_v3(Crop(size))


def _moco_v3(crop: Crop) -> Augmentation:
    return Augmentation(tuple(View(crop, (*ops, Apply("flip", 0.5))) for ops in _two_sets_of_colours()))


def _two_sets_of_colours() -> list[tuple[RandomOp, ...]]:
    """Return BYOL's operations on colours: the first view is always blurred, the second seldom, but solarised."""
    colours = (Jitter(0.4, 0.4, 0.2, 0.1, p=0.8), Apply("grey", 0.2))
    return [
        (*colours, Apply("blur", 1.0, (0.1, 2.0))),
        (*colours, Apply("blur", 0.1, (0.1, 2.0)), Apply("solarise", 0.2, 128)),
    ]


@register_augmentation
def pixpro(size: int) -> Augmentation:
    """PixPro: BYOL's two views, blurred (p 1, .1), solarised (p 0, .2); bilinear, the flip directly after the crop."""
    crop, flip = Crop(size), Apply("flip", 0.5)
    return Augmentation(tuple(View(crop, (flip, *ops)) for ops in _two_sets_of_colours()))


@register_augmentation
def cmc(size: int) -> Augmentation:
    """CMC: one view, a crop (torchvision's default scale) and a flip; the method splits it by colour."""
    return Augmentation((View(Crop(size), (Apply("flip", 0.5),)),))


@register_augmentation
def cpc(size: int) -> Augmentation:
    """CPC: one view, a square at a random place, then a flip. Its side is 256 of 300 pixels (recalled)."""
    part = (256 / 300) ** 2
    return Augmentation((View(Crop(size, scale=(part, part), ratio=(1.0, 1.0)), (Apply("flip", 0.5),)),))

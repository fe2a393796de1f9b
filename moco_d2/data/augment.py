"""Augmentations as data, and the drawing of a view's random parameters.

Drawing is apart from executing (:mod:`moco_d2.data.backends`): every backend takes the same :class:`Plan`, so a seed
gives the same views, up to rounding, on each of them. The distributions are those of torchvision's transforms, which
the authors' code uses. An augmentation is a function ``size -> Augmentation`` under :func:`register_augmentation`;
:mod:`moco_d2.data.recipes` has those of the recipes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from moco_d2.data.operations import SKIP, Op, check_values
from moco_d2.facts import IMAGENET_RGB, Pixels
from moco_d2.messages import unknown_name


class Box(NamedTuple):
    """A part of the upright image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """A view's drawn parameters.

    Attributes:
        box: the crop.
        ops: the operations in their order; a view of an augmentation always has the same number, skipped ones included.
        size: side of the view in pixels.
        bicubic: whether the crop is resized by bicubic interpolation, else bilinear.
    """

    box: Box
    ops: tuple[Op, ...]
    size: int
    bicubic: bool = False

    @property
    def flipped(self) -> bool:
        """Whether the view is mirrored."""
        return sum(op.name == "flip" for op in self.ops) % 2 == 1


class RandomOp(Protocol):
    """A record of an augmentation: it turns ``draws`` numbers from [0, 1) into operations."""

    @property
    def draws(self) -> int:
        """Number of random numbers that it takes."""

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The names that each of its operations can have, besides that of :data:`SKIP`."""

    def drawn(self, numbers: Iterator[float]) -> list[Op]:
        """Return the operations, always the same number of them."""


@dataclass(frozen=True)
class Crop:
    """torchvision's RandomResizedCrop: area as a part of the image's, aspect ratio log-uniform, ten tries.

    Attributes:
        size: side of the view in pixels.
        scale: least and largest area, as a part of the image's.
        ratio: least and largest width / height.
        bicubic: resize by bicubic interpolation, else bilinear.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    bicubic: bool = False
    tries: ClassVar[int] = 10
    draws: ClassVar[int] = 4 * tries

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"the size of a view is {self.size}; it must be at least 1: raise DATA.CROP_SIZE")
        if not (0 < self.scale[0] <= self.scale[1] and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError(f"a crop has scale {self.scale} and ratio {self.ratio}; each must be positive and rise")

    def box(self, numbers: Sequence[float], height: int, width: int) -> Box:
        """Return the first try that fits into the image, else torchvision's central crop."""
        low, high = map(math.log, self.ratio)
        for first in range(0, self.draws, 4):
            area, aspect, y, x = numbers[first : first + 4]
            pixels = height * width * _between(self.scale, area)
            aspect = math.exp(_between((low, high), aspect))
            w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return Box((height - h) // 2, (width - w) // 2, h, w)


@dataclass(frozen=True)
class Apply:
    """One operation with probability ``p``: torchvision's RandomApply, RandomGrayscale, RandomHorizontalFlip, ...

    Attributes:
        name: a key of :data:`~moco_d2.data.operations.OPERATIONS`, which explains its values.
        p: probability.
        value: a fixed value, or the range of a uniform one.
    """

    name: str
    p: float
    value: float | tuple[float, float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"the probability of {self.name} is {self.p}; it must be in [0, 1]")
        check_values(self.name, *(self.value if isinstance(self.value, tuple) else (self.value, self.value)))

    @property
    def draws(self) -> int:
        """One for the chance, one more for a value from a range."""
        return 1 + isinstance(self.value, tuple)

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Its own, if it can occur."""
        return ((self.name,) if self.p else (),)

    def drawn(self, numbers: Iterator[float]) -> list[Op]:
        """Return one operation."""
        applied = next(numbers) < self.p
        value = _between(self.value, next(numbers)) if isinstance(self.value, tuple) else self.value
        return [Op(self.name, value) if applied else SKIP]


@dataclass(frozen=True)
class Jitter:
    """ColorJitter with probability p: four operations, in an order drawn anew for each view."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 1.0
    draws: ClassVar[int] = 9

    def __post_init__(self) -> None:
        for name, values in self._ranges().items():
            check_values(name, *values)

    def _ranges(self) -> dict[str, tuple[float, float]]:
        """Return the range of each value; factors are about 1 and not negative."""
        factors = {name: getattr(self, name) for name in ("brightness", "contrast", "saturation")}
        ranges = {name: (max(0.0, 1.0 - strength), 1.0 + strength) for name, strength in factors.items()}
        return {**ranges, "hue": (-self.hue, self.hue)}

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Those that have a strength, at each of the four places."""
        ranges = self._ranges()
        return (tuple(name for name in ranges if getattr(self, name)),) * len(ranges)

    def drawn(self, numbers: Iterator[float]) -> list[Op]:
        """Return the four in their order."""
        applied = next(numbers) < self.p
        ops = []
        for name, values in self._ranges().items():
            value = _between(values, next(numbers))
            ops.append(Op(name, value) if applied and getattr(self, name) else SKIP)
        keys = [next(numbers) for _ in ops]
        return [ops[i] for i in sorted(range(len(ops)), key=keys.__getitem__)]


@dataclass(frozen=True)
class View:
    """How one view is made: a crop, then operations in their published order."""

    crop: Crop
    ops: tuple[RandomOp, ...]

    def plan(self, height: int, width: int, generator: torch.Generator) -> Plan:
        """Draw a view's parameters for an upright image of this size.

        The number of draws does not depend on the size, nor on chance.
        """
        count = self.crop.draws + sum(op.draws for op in self.ops)
        numbers = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
        rest = iter(numbers[self.crop.draws :])
        ops = tuple(drawn for op in self.ops for drawn in op.drawn(rest))
        return Plan(self.crop.box(numbers, height, width), ops, self.crop.size, self.crop.bicubic)


@dataclass(frozen=True)
class Augmentation:
    """How an image becomes views.

    Attributes:
        views: one record a view; sizes may differ, and large views come first.
        pixels: the normalisation, which becomes the weights' input convention.
    """

    views: tuple[View, ...]
    pixels: Pixels = IMAGENET_RGB

    def plan(self, height: int, width: int, seed: int) -> list[Plan]:
        """Draw every view's parameters from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return [view.plan(height, width, generator) for view in self.views]

    def names(self, views: Sequence[int]) -> tuple[tuple[str, ...], ...]:
        """Return, for each place of an operation, the names that it can have in some of these views."""
        each = ([names for op in self.views[number].ops for names in op.names] for number in views)
        return tuple(tuple(dict.fromkeys(itertools.chain(*at))) for at in itertools.zip_longest(*each, fillvalue=()))


def _between(ends: tuple[float, float], number: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * number


AUGMENTATIONS: dict[str, Callable[[int], Augmentation]] = {}


def register_augmentation(build: Callable[[int], Augmentation]) -> Callable[[int], Augmentation]:
    """Function decorator: make an augmentation available as ``DATA.AUGMENTATION``, under the function's name.

    The function takes ``DATA.CROP_SIZE``, the side of the large views; it sets the sizes of smaller ones itself.
    """
    AUGMENTATIONS[build.__name__] = build
    return build


def build_augmentation(name: str, size: int) -> Augmentation:
    """Return an augmentation by name, with large views of ``size`` pixels.

    Raises:
        ValueError: unknown name, or a size below 1.
    """
    if name not in AUGMENTATIONS:
        raise ValueError(unknown_name("DATA.AUGMENTATION", name, AUGMENTATIONS))
    if size < 1:
        raise ValueError(f"DATA.CROP_SIZE is {size}; a view needs at least one pixel")
    return AUGMENTATIONS[name](size)

"""Augmentation recipes as data, op for op as published, and the drawing of a view's random parameters.

Drawing is apart from executing (:mod:`moco_d2.data.backends`): every backend takes the same :class:`Plan`, so that a
seed gives the same views, up to rounding, whoever makes them. The distributions are those of torchvision's transforms
with which the authors' code is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from moco_d2.facts import IMAGENET_RGB, Pixels
from moco_d2.messages import unknown_name

LARGEST_BLUR = 2.4  # radius; batched.REACH holds the box of no larger one
CIFAR_RGB = Pixels("RGB", (125.307, 122.961, 113.8575), (51.5865, 50.847, 51.255))


class Step(NamedTuple):
    """One thing to do to a view: a kind and its value; ``skip`` where chance left an op out.

    The values: ``brightness``, ``contrast``, ``saturation`` a factor; ``hue`` a part of the colour circle; ``blur``
    PIL's radius (a standard deviation); ``solarise`` the level from which a sample is inverted; ``grey`` and ``flip``
    none.
    """

    kind: str
    value: float = 0.0


SKIP = Step("skip")


class Box(NamedTuple):
    """A part of the upright image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """A view's drawn parameters. Each view of a recipe has its own fixed number of steps, skipped ones included.

    Attributes:
        box: the crop.
        steps: what is done to the view.
        size: side of the view in pixels.
        bicubic: whether the crop is resized by bicubic interpolation, else bilinear.
    """

    box: Box
    steps: tuple[Step, ...]
    size: int
    bicubic: bool = False

    @property
    def flipped(self) -> bool:
        """Whether the view is mirrored."""
        return sum(step.kind == "flip" for step in self.steps) % 2 == 1


class Op(Protocol):
    """A record of a recipe: it turns ``draws`` numbers from [0, 1) into steps."""

    draws: ClassVar[int]

    def steps(self, draw: Iterator[float]) -> list[Step]:
        """Return the steps, always the same number of them."""


@dataclass(frozen=True)
class Crop:
    """torchvision's RandomResizedCrop: area as a part of the image's, aspect ratio log-uniform, ten tries.

    Attributes:
        size: side of the view in pixels.
        scale: least and largest area, as a part of the image's.
        ratio: least and largest width / height.
        bicubic: interpolation of the resizing; bilinear otherwise.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    bicubic: bool = False
    tries: ClassVar[int] = 10
    draws: ClassVar[int] = 4 * tries

    def box(self, drawn: Sequence[float], height: int, width: int) -> Box:
        """Return the first try that fits into the image, else torchvision's central crop."""
        low, high = map(math.log, self.ratio)
        for first in range(0, self.draws, 4):
            area, aspect, y, x = drawn[first : first + 4]
            pixels = height * width * _between(self.scale, area)
            aspect = math.exp(_between((low, high), aspect))
            w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(y * (height - h + 1)), int(x * (width - w + 1)), h, w)
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        return Box((height - h) // 2, (width - w) // 2, h, w)


@dataclass(frozen=True)
class Jitter:
    """ColorJitter with probability p: four factors, applied in an order drawn anew for each view."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 1.0
    draws: ClassVar[int] = 9

    def steps(self, draw: Iterator[float]) -> list[Step]:
        """Return the four in their order."""
        applied = next(draw) < self.p
        steps = []
        for kind, centre in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0)):
            strength, drawn = getattr(self, kind), next(draw)
            low = -strength if kind == "hue" else max(0.0, centre - strength)
            value = _between((low, centre + strength), drawn)
            steps.append(Step(kind, value) if applied and strength else SKIP)
        keys = [next(draw) for _ in steps]
        return [steps[i] for i in sorted(range(len(steps)), key=keys.__getitem__)]


@dataclass(frozen=True)
class Grey:
    """RandomGrayscale: three equal channels, PIL's luminance."""

    p: float
    draws: ClassVar[int] = 1

    def steps(self, draw: Iterator[float]) -> list[Step]:
        """Return one."""
        return [Step("grey") if next(draw) < self.p else SKIP]


@dataclass(frozen=True)
class Blur:
    """PIL's GaussianBlur with a radius from U(low, high) and probability p, as MoCo v2 uses it."""

    low: float
    high: float
    p: float
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= LARGEST_BLUR:
            raise ValueError(f"Blur's radii are {self.low} to {self.high}; they must rise, within [0, {LARGEST_BLUR}]")

    def steps(self, draw: Iterator[float]) -> list[Step]:
        """Return one."""
        applied, radius = next(draw) < self.p, _between((self.low, self.high), next(draw))
        return [Step("blur", radius) if applied else SKIP]


@dataclass(frozen=True)
class Flip:
    """RandomHorizontalFlip."""

    p: float = 0.5
    draws: ClassVar[int] = 1

    def steps(self, draw: Iterator[float]) -> list[Step]:
        """Return one."""
        return [Step("flip") if next(draw) < self.p else SKIP]


@dataclass(frozen=True)
class Solarise:
    """RandomSolarize: samples from ``threshold`` (0..255) on are inverted."""

    threshold: int
    p: float
    draws: ClassVar[int] = 1

    def steps(self, draw: Iterator[float]) -> list[Step]:
        """Return one."""
        return [Step("solarise", self.threshold) if next(draw) < self.p else SKIP]


@dataclass(frozen=True)
class View:
    """How one view is made: a crop, then ops in their published order."""

    crop: Crop
    ops: tuple[Op, ...]

    def plan(self, height: int, width: int, generator: torch.Generator) -> Plan:
        """Draw a view's parameters for an upright image of this size.

        The number of draws does not depend on the size, nor on chance.
        """
        count = self.crop.draws + sum(op.draws for op in self.ops)
        drawn = torch.rand(count, dtype=torch.float64, generator=generator).tolist()
        rest = iter(drawn[self.crop.draws :])
        steps = tuple(step for op in self.ops for step in op.steps(rest))
        return Plan(self.crop.box(drawn, height, width), steps, self.crop.size, self.crop.bicubic)


@dataclass(frozen=True)
class Recipe:
    """How an image becomes views.

    Attributes:
        views: one record a view; sizes may differ, and large views come first.
        pixels: the normalisation, which becomes the weights' input convention.
    """

    views: tuple[View, ...]
    pixels: Pixels

    def plan(self, height: int, width: int, seed: int) -> list[Plan]:
        """Draw every view's parameters from a seed."""
        generator = torch.Generator().manual_seed(seed)
        return [view.plan(height, width, generator) for view in self.views]


def _between(ends: tuple[float, float], drawn: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * drawn


def moco_v1(size: int) -> Recipe:
    """MoCo v1: crop, grayscale, colour jitter, flip, in this order (that of the authors' code, which is InstDisc's)."""
    view = View(Crop(size, scale=(0.2, 1.0)), (Grey(0.2), Jitter(0.4, 0.4, 0.4, 0.4), Flip()))
    return Recipe((view, view), IMAGENET_RGB)


def moco_v2(size: int) -> Recipe:
    """MoCo v2's "aug+": crop, jitter (p .8, hue .1), grayscale, blur (p .5), flip, in this order."""
    ops = (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grey(0.2), Blur(0.1, 2.0, p=0.5), Flip())
    view = View(Crop(size, scale=(0.2, 1.0)), ops)
    return Recipe((view, view), IMAGENET_RGB)


def moco_cifar(size: int) -> Recipe:
    """The authors' CIFAR-10 demo: crop (torchvision's default scale), flip, jitter, grayscale; no blur."""
    view = View(Crop(size), (Flip(), Jitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grey(0.2)))
    return Recipe((view, view), CIFAR_RGB)


RECIPES: dict[str, Callable[[int], Recipe]] = {"moco_v1": moco_v1, "moco_v2": moco_v2, "moco_cifar": moco_cifar}


def build_recipe(name: str, size: int) -> Recipe:
    """Return a recipe by name for views of ``size`` pixels.

    Raises:
        ValueError: unknown name, or a size below 1.
    """
    if name not in RECIPES:
        raise ValueError(unknown_name("DATA.RECIPE", name, RECIPES))
    if size < 1:
        raise ValueError(f"DATA.CROP_SIZE is {size}; a view needs at least one pixel")
    return RECIPES[name](size)

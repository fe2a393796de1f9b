"""Augmentation operations: one table, each entry with its three executors (PIL, OpenCV, a batch on the device).

PIL's result is the reference, rounding included. The executors of a batch are plain torch: every view has a value of
its own, which torchvision does not offer, and nothing is read back from the device. To add an operation, add an entry
to :data:`OPERATIONS`; the contract tests run over the table.

Letters: M views of a batch, (H, W) their size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.nn.functional import conv2d, pad
from torchvision.transforms import functional as F

from moco_d2.messages import unknown_name

View8 = np.ndarray  # (H, W, 3) uint8
Array = TypeVar("Array", np.ndarray, torch.Tensor)

# L = (19595 R + 38470 G + 7471 B + 2^15) / 2^16, PIL's luminance; every sum is below 2^24, so exact in float32.
LUMINANCE = (19595, 38470, 7471)
# PIL's blur cuts its weights to 24 bits, so a result halfway between two pixel values goes to the lower one.
TIES_DOWN = 1e-4
# The largest radius of a blur, and the distance that its box reaches.
LARGEST_BLUR, REACH = 2.4, 2
# PIL truncates to a pixel value where OpenCV rounds; the small part keeps whole numbers, inexact in floats.
TRUNCATE = 1e-4 - 0.5
# OpenCV's float HSV (degrees, 0..1, 0..255) in PIL's 8-bit units, before truncation.
TO_PIL_HSV = np.array([[255 / 360, 0, 0, 1e-3], [0, 255, 0, 1e-3], [0, 0, 1, 0]], np.float32)


class Op(NamedTuple):
    """A drawn operation: a name in :data:`OPERATIONS` and a value, or :data:`SKIP` if chance left it out."""

    name: str
    value: float = 0.0


SKIP = Op("skip")


@dataclass(frozen=True)
class Operation:
    """One operation, as three executors that agree up to rounding.

    Attributes:
        pil: PIL image and value -> PIL image; the reference.
        cv2: (H, W, 3) uint8 and value -> (H, W, 3) uint8.
        device: (M, 3, H, W) float32, whole numbers 0..255, and (M, 1, 1, 1) float64 values -> the same form.
        low: smallest value that the executors take.
        high: largest value.
        largest: largest difference of a pixel from PIL's, in pixel values.
        mean: largest mean difference of a view from PIL's.
    """

    pil: Callable[[Image.Image, float], Image.Image]
    cv2: Callable[[View8, float], View8]
    device: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    low: float = 0.0
    high: float = 0.0
    largest: int = 0
    mean: float = 0.0


class AugmentationError(RuntimeError):
    """The code of an augmentation or operation failed. The picture is not at fault, so it is not skipped."""


def check_values(name: str, low: float, high: float) -> None:
    """Check the values that an augmentation draws for an operation.

    Raises:
        ValueError: unknown operation, or values that its executors do not take.
    """
    if name not in OPERATIONS:
        raise ValueError(unknown_name("the operation", name, OPERATIONS))
    known = OPERATIONS[name]
    if not known.low <= low <= high <= known.high:
        rule = f"they must rise and lie within [{known.low:g}, {known.high:g}]"
        raise ValueError(f"the values of {name} are {low:g} to {high:g}; {rule}")


def _cv2_brightness(view: View8, factor: float) -> View8:
    return np.asarray(cv2.addWeighted(view, factor, view, 0, TRUNCATE))


def _cv2_contrast(view: View8, factor: float) -> View8:
    mean = int(cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return np.asarray(cv2.addWeighted(view, factor, view, 0, (1 - factor) * mean + TRUNCATE))


def _cv2_saturation(view: View8, factor: float) -> View8:
    return np.asarray(cv2.addWeighted(view, factor, _cv2_grey(view), 1 - factor, TRUNCATE))


def _cv2_grey(view: View8, _: float = 0.0) -> View8:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _cv2_hue(view: View8, shift: float) -> View8:
    hsv = cv2.transform(cv2.cvtColor(view.astype(np.float32), cv2.COLOR_RGB2HSV), TO_PIL_HSV).astype(np.uint8)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def _cv2_blur(view: View8, radius: float) -> View8:
    """PIL's three box blurs along rows, then three along columns, each rounded to 8 bits."""
    weights = box_weights(np.array([[radius]]), np.arange(-REACH, REACH + 1)).astype(np.float32)
    if weights[0, 0] == 0:
        weights = weights[:, 1:-1]
    for kernel in (weights, weights.T):
        for _ in range(3):
            view = cv2.filter2D(view, -1, kernel, delta=-TIES_DOWN, borderType=cv2.BORDER_REPLICATE)
    return view


def _cv2_solarise(view: View8, threshold: float) -> View8:
    table = np.arange(256, dtype=np.uint8)
    return np.asarray(cv2.LUT(view, np.where(table < threshold, table, 255 - table)))


def _luminance(x: torch.Tensor) -> torch.Tensor:
    """(M, 3, H, W) -> (M, 1, H, W)."""
    red, green, blue = (x[:, i : i + 1] * weight for i, weight in enumerate(LUMINANCE))
    return ((red + green + blue + 2**15) / 2**16).floor_()


def _blend(x: torch.Tensor, degenerate: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """PIL's blend of an image and a degenerate one, truncated to pixel values."""
    return (degenerate + factor.float() * (x - degenerate)).clamp_(0, 255).floor_()


def _device_contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = _luminance(x).mean((1, 2, 3), keepdim=True)
    return _blend(x, (mean + 0.5).floor(), factor)


def _device_hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Turn PIL's 8-bit hue, which is truncated, as is its saturation, and wraps around at 256."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = value - low
    scale = 1 / spread.clamp(min=1)
    red, green, blue = x.split(1, 1)
    sextant = torch.where(
        red == value,
        (green - blue) * scale,
        torch.where(green == value, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = (sextant / 6).remainder(1).mul_(255).add_(1e-3).floor_()
    hue = torch.where(spread > 0, hue, 0.0)
    saturation = (spread * 255 / value.clamp(min=1)).floor_()
    sextant = (hue + (shift * 255).trunc().float()).remainder_(256).mul_(6 / 255)
    # Each channel falls from the value where its own colour is far; the sextants of red, green and blue start apart.
    start = 5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)  # made on the device: a copy to it would wait
    place = (start + sextant).remainder_(6)
    fall = torch.minimum(place, 4 - place).clamp_(0, 1)
    return (value - value * (saturation / 255) * fall).add_(0.5).floor_()


def _device_blur(x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Three box blurs along rows, then three along columns, each rounded to pixel values, as PIL does."""
    weights = box_weights(radius.view(-1, 1), torch.arange(-REACH, REACH + 1, device=x.device)).float()
    weights = weights.repeat_interleave(3, 0)  # (3M, L)
    planes = x.reshape(1, -1, *x.shape[2:])
    for axis, padding in ((3, (REACH, REACH, 0, 0)), (2, (0, 0, REACH, REACH))):
        for _ in range(3):
            padded = pad(planes, padding, mode="replicate")
            planes = _filtered(padded, weights, axis).add_(0.5 - TIES_DOWN).floor_()
    return planes.view_as(x)


def _filtered(planes: torch.Tensor, weights: torch.Tensor, axis: int) -> torch.Tensor:
    """Filter planes (1, P, H, W) along an axis, each with weights of its own (P, L); the axis becomes L - 1 shorter."""
    if torch.compiler.is_compiling():  # the compiler fuses this sum with what surrounds it, but no convolution
        length = planes.shape[axis] - 2 * REACH
        taps = (w[:, None, None] * planes.narrow(axis, i, length) for i, w in enumerate(weights.unbind(1)))
        return functools.reduce(torch.add, taps)
    return conv2d(planes, weights[:, None].unsqueeze(5 - axis), groups=len(weights))


def box_weights(radius: Array, distance: Array) -> Array:
    """Return the weights of the box filter that PIL applies three times in place of a Gaussian.

    Args:
        radius: (M, 1), the Gaussian's standard deviation.
        distance: (L,), of samples from the middle, in the array library of ``radius``.

    Returns:
        (M, L): equal inside, a part of that at the two ends.
    """
    variance = radius**2 / 3
    whole = ((12 * variance + 1) ** 0.5 - 1) / 2 // 1
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    half = whole + part
    return (half + 1 - abs(distance)).clip(0, 1) / (2 * half + 1)


# The values: brightness, contrast and saturation a factor; hue a part of the colour circle; blur PIL's radius (a
# standard deviation); solarise the pixel value from which values are inverted; grey and flip none.
OPERATIONS: dict[str, Operation] = {
    "brightness": Operation(
        F.adjust_brightness,
        _cv2_brightness,
        lambda x, factor: _blend(x, 0.0, factor),
        low=0, high=3, largest=1, mean=0.02,
    ),
    "contrast": Operation(F.adjust_contrast, _cv2_contrast, _device_contrast, low=0, high=3, largest=1, mean=0.02),
    "saturation": Operation(
        F.adjust_saturation,
        _cv2_saturation,
        lambda x, factor: _blend(x, _luminance(x), factor),
        low=0, high=3, largest=2, mean=0.02,
    ),
    "hue": Operation(F.adjust_hue, _cv2_hue, _device_hue, low=-0.5, high=0.5, largest=6, mean=0.005),
    "grey": Operation(
        lambda view, _: F.rgb_to_grayscale(view, num_output_channels=3),
        _cv2_grey,
        lambda x, _: _luminance(x).expand_as(x),
        largest=1, mean=0.005,
    ),
    "blur": Operation(
        lambda view, radius: view.filter(ImageFilter.GaussianBlur(radius)),
        _cv2_blur,
        _device_blur,
        low=0, high=LARGEST_BLUR, largest=2, mean=0.1,
    ),
    "flip": Operation(
        lambda view, _: F.hflip(view), lambda view, _: np.asarray(cv2.flip(view, 1)), lambda x, _: x.flip(-1)
    ),
    "solarise": Operation(
        F.solarize,
        _cv2_solarise,
        lambda x, threshold: torch.where(x < threshold, x, 255 - x),
        low=0, high=255,
    ),
}  # fmt: skip

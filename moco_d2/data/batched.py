"""A recipe's steps on a batch of views at once, with parameters and order of each sample's own, in plain torch.

No library does this: torchvision draws once for a batch, kornia one colour order for a batch. Everything that depends
on chance is known on the host, so the device is never waited for; the number of kernels does not grow with the batch.

Letters: N views of a batch, M of them to which a step applies, S steps, (H, W) size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.nn.functional import conv2d, pad

from moco_d2.data.augment import Step

# L = (19595 R + 38470 G + 7471 B + 2^15) / 2^16, PIL's luminance; every sum is below 2^24, so exact in float32.
LUMINANCE = (19595, 38470, 7471)
# PIL's blur has weights cut to 24 bits, so that what lies halfway between levels goes to the lower one.
TIES_DOWN = 1e-4
# How far a box may reach: enough for augment.LARGEST_BLUR.
REACH = 2

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def pack_steps(steps: Sequence[Sequence[Step]]) -> torch.Tensor:
    """Write views' steps as numbers: (N, S, 2) float64, a kind's number in ``DEVICE_STEPS`` (-1: skip) and value."""
    number = {kind: i for i, kind in enumerate(DEVICE_STEPS)} | {"skip": -1}
    table = [[(number[step.kind], step.value) for step in view] for view in steps]
    return torch.tensor(table, dtype=torch.float64).reshape(len(steps), -1, 2)


def run_steps(levels: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Do each view's steps in its order.

    Args:
        levels: (N, 3, H, W) float32, whole numbers 0..255; changed in place.
        steps: of :func:`pack_steps`, on the host.
    """
    kinds, values = steps[..., 0].T, steps[..., 1].T  # each (S, N)
    groups = [(slot, number) for slot, here in enumerate(kinds.tolist()) for number in sorted({*here} - {-1.0})]
    rows = [(kinds[slot] == number).nonzero()[:, 0] for slot, number in groups]
    chosen = [values[slot][row] for (slot, _), row in zip(groups, rows, strict=True)]
    if not groups:
        return levels
    counts = [len(row) for row in rows]
    # Two transfers for everything, so small that they are staged and neither waits.
    rows_there = torch.cat(rows).to(levels.device, non_blocking=True).split(counts)
    values_there = torch.cat(chosen).to(levels.device, non_blocking=True).split(counts)
    operations = list(DEVICE_STEPS.values())
    for (_, number), row, value in zip(groups, rows_there, values_there, strict=True):
        levels.index_copy_(0, row, operations[int(number)](levels.index_select(0, row), value.view(-1, 1, 1, 1)))
    return levels


def _luminance(x: torch.Tensor) -> torch.Tensor:
    """(M, 3, H, W) -> (M, 1, H, W)."""
    red, green, blue = (x[:, i : i + 1] * weight for i, weight in enumerate(LUMINANCE))
    return ((red + green + blue + 2**15) / 2**16).floor_()


def _blend(x: torch.Tensor, degenerate: torch.Tensor | float, factor: torch.Tensor) -> torch.Tensor:
    """PIL's blend of an image and a degenerate one: truncated to a level."""
    return (degenerate + factor.float() * (x - degenerate)).clamp_(0, 255).floor_()


def _contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = _luminance(x).mean((1, 2, 3), keepdim=True)
    return _blend(x, (mean + 0.5).floor(), factor)


def _hue(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
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
    start = 5 - 2 * torch.arange(3, device=x.device).view(1, 3, 1, 1)  # made there: a transfer would wait
    place = (start + sextant).remainder_(6)
    fall = torch.minimum(place, 4 - place).clamp_(0, 1)
    return (value - value * (saturation / 255) * fall).add_(0.5).floor_()


def _blur(x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Three box blurs along rows, then three along columns, each rounded to levels, as PIL does."""
    weights = box_weights(radius.view(-1, 1), torch.arange(-REACH, REACH + 1, device=x.device)).float()
    weights = weights.repeat_interleave(3, 0)[:, None]  # (3M, 1, L)
    planes = x.reshape(1, -1, *x.shape[2:])
    for kernel, padding in ((weights[:, :, None], (REACH, REACH, 0, 0)), (weights[..., None], (0, 0, REACH, REACH))):
        for _ in range(3):
            padded = pad(planes, padding, mode="replicate")
            planes = conv2d(padded, kernel, groups=len(kernel)).add_(0.5 - TIES_DOWN).floor_()
    return planes.view_as(x)


def _solarise(x: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(x < threshold, x, 255 - x)


# What PIL_STEPS and CV2_STEPS do with one view: (M, 3, H, W) levels and (M, 1, 1, 1) values -> levels.
DEVICE_STEPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": lambda x, factor: _blend(x, 0.0, factor),
    "contrast": _contrast,
    "saturation": lambda x, factor: _blend(x, _luminance(x), factor),
    "hue": _hue,
    "grey": lambda x, _: _luminance(x).expand_as(x),
    "blur": _blur,
    "flip": lambda x, _: x.flip(-1),
    "solarise": _solarise,
}


def box_weights(radius: Array, distance: Array) -> Array:
    """Return the weights of the box which, applied three times, PIL takes for a Gaussian.

    Args:
        radius: (M, 1), the Gaussian's standard deviation.
        distance: (L,), of samples from the middle, as the array library of ``radius``.

    Returns:
        (M, L): equal inside, a part of that at the two ends.
    """
    variance = radius**2 / 3
    whole = ((12 * variance + 1) ** 0.5 - 1) / 2 // 1
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    half = whole + part
    return (half + 1 - abs(distance)).clip(0, 1) / (2 * half + 1)

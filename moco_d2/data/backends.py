"""What executes a recipe's plans: PIL as the authors do, OpenCV, or a batch at a time on the training device.

A worker process calls :meth:`Backend.prepare` for each image and sends 8-bit views; the training process calls
:meth:`Backend.finish` once a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import cv2
import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as F

from moco_d2.data.augment import Plan
from moco_d2.data.batched import REACH, TIES_DOWN, box_weights, run_steps
from moco_d2.data.decode import Picture
from moco_d2.messages import unknown_name

Pixels8 = np.ndarray  # (H, W, 3) uint8


class Backend(Protocol):
    """One way to make views."""

    def prepare(self, picture: Picture, plans: Sequence[Plan]) -> list[Pixels8]:
        """Return an image's views so far, each (plan.size, plan.size, 3) uint8; one CPU thread.

        Raises:
            OSError: the file is damaged.
        """

    def finish(self, views: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Return a batch of prepared views (N, H, W, 3), with their plans' steps, as levels 0..255 (N, 3, H, W)."""


class PilBackend:
    """The authors' operations: decoding apart, what their loader computes, to the bit."""

    def prepare(self, picture: Picture, plans: Sequence[Plan]) -> list[Pixels8]:
        """Crop, then do every step, with PIL."""
        whole = Image.fromarray(picture.decode().permute(1, 2, 0).numpy())
        views = []
        for plan in plans:
            mode = F.InterpolationMode.BICUBIC if plan.bicubic else F.InterpolationMode.BILINEAR
            view = F.resized_crop(whole, *plan.box, [plan.size, plan.size], mode)
            for kind, value in plan.steps:
                view = PIL_STEPS[kind](view, value)
            views.append(np.array(view))
        return views

    def finish(self, views: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Convert to float."""
        return to_levels(views)


class Cv2Backend:
    """torchvision's decoding and resizing, then OpenCV and tables, 8 bits throughout."""

    def prepare(self, picture: Picture, plans: Sequence[Plan]) -> list[Pixels8]:
        """Crop, then do every step."""
        views = picture.crops(plans)
        for number, plan in enumerate(plans):
            for kind, value in plan.steps:
                views[number] = CV2_STEPS[kind](views[number], value)
        return views

    def finish(self, views: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Convert to float."""
        return to_levels(views)


class DeviceBackend:
    """The workers decode and crop; the steps are done on the training device, a batch at a time."""

    def prepare(self, picture: Picture, plans: Sequence[Plan]) -> list[Pixels8]:
        """Crop."""
        return picture.crops(plans)

    def finish(self, views: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Do every step."""
        return run_steps(to_levels(views), steps)


BACKENDS: dict[str, Callable[[], Backend]] = {"pil": PilBackend, "cv2": Cv2Backend, "device": DeviceBackend}


def build_backend(name: str, device: torch.device) -> Backend:
    """Return a backend by name; ``auto`` is ``device`` on a GPU and ``cv2`` on the CPU.

    Raises:
        ValueError: unknown name.
    """
    if name == "auto":
        name = "cv2" if device.type == "cpu" else "device"
    if name not in BACKENDS:
        raise ValueError(unknown_name("DATA.BACKEND", name, ("auto", *BACKENDS)))
    return BACKENDS[name]()


def to_levels(views: torch.Tensor) -> torch.Tensor:
    """Convert (N, H, W, 3) uint8 to (N, 3, H, W) float32."""
    return views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


PIL_STEPS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "skip": lambda view, _: view,
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
    "grey": lambda view, _: F.rgb_to_grayscale(view, num_output_channels=3),
    "blur": lambda view, radius: view.filter(ImageFilter.GaussianBlur(radius)),
    "flip": lambda view, _: F.hflip(view),
    "solarise": F.solarize,
}

# PIL truncates to a level where OpenCV rounds; the small part keeps whole numbers, inexact in floats, where they are.
EXACT = 1e-4
TRUNCATE = EXACT - 0.5
# OpenCV's float HSV (degrees, 0..1, level) in PIL's 8-bit units, before truncation.
TO_PIL_HSV = np.array([[255 / 360, 0, 0, 1e-3], [0, 255, 0, 1e-3], [0, 0, 1, 0]], np.float32)


def _brightness(view: Pixels8, factor: float) -> Pixels8:
    return np.asarray(cv2.addWeighted(view, factor, view, 0, TRUNCATE))


def _contrast(view: Pixels8, factor: float) -> Pixels8:
    mean = int(cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return np.asarray(cv2.addWeighted(view, factor, view, 0, (1 - factor) * mean + TRUNCATE))


def _saturation(view: Pixels8, factor: float) -> Pixels8:
    return np.asarray(cv2.addWeighted(view, factor, _grey(view), 1 - factor, TRUNCATE))


def _grey(view: Pixels8, _: float = 0.0) -> Pixels8:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def _hue(view: Pixels8, shift: float) -> Pixels8:
    hsv = cv2.transform(cv2.cvtColor(view.astype(np.float32), cv2.COLOR_RGB2HSV), TO_PIL_HSV).astype(np.uint8)
    hsv[..., 0] += np.uint8(int(shift * 255) % 256)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL))


def _blur(view: Pixels8, radius: float) -> Pixels8:
    """PIL's three box blurs along rows, then three along columns, each rounded to 8 bits."""
    weights = box_weights(np.array([[radius]]), np.arange(-REACH, REACH + 1)).astype(np.float32)
    if weights[0, 0] == 0:
        weights = weights[:, 1:-1]
    for kernel in (weights, weights.T):
        for _ in range(3):
            view = cv2.filter2D(view, -1, kernel, delta=-TIES_DOWN, borderType=cv2.BORDER_REPLICATE)
    return view


def _solarise(view: Pixels8, threshold: float) -> Pixels8:
    levels = np.arange(256, dtype=np.uint8)
    return np.asarray(cv2.LUT(view, np.where(levels < threshold, levels, 255 - levels)))


CV2_STEPS: dict[str, Callable[[Pixels8, float], Pixels8]] = {
    "skip": lambda view, _: view,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
    "grey": _grey,
    "blur": _blur,
    "flip": lambda view, _: np.asarray(cv2.flip(view, 1)),
    "solarise": _solarise,
}

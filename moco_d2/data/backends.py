"""Backends, which execute plans: with PIL as the authors do, with OpenCV, or a batch at a time on the training device.

A worker process calls :meth:`Backend.prepare` for each image and sends 8-bit views. The training process calls
:func:`finish` once a batch, which executes the operations that the backend has left to the device.

Letters: M views of a batch, S operations a view, (H, W) size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import functional as F

from moco_d2.data.augment import Plan
from moco_d2.data.decode import EncodedImage
from moco_d2.data.operations import OPERATIONS, SKIP, AugmentationError, Op, View8
from moco_d2.messages import unknown_name

AnyView = TypeVar("AnyView", Image.Image, View8)


class Backend(Protocol):
    """One way to make views.

    Attributes:
        on_device: whether the operations are left to the training device.
    """

    on_device: ClassVar[bool]

    def prepare(self, image: EncodedImage, plans: Sequence[Plan]) -> list[View8]:
        """Return an image's views, each (plan.size, plan.size, 3) uint8; one CPU thread.

        Raises:
            OSError: the file is damaged.
        """


class PilBackend:
    """The authors' operations: apart from decoding, what their loader computes, to the bit."""

    on_device: ClassVar[bool] = False

    def prepare(self, image: EncodedImage, plans: Sequence[Plan]) -> list[View8]:
        """Crop, then execute every operation, with PIL."""
        whole = Image.fromarray(image.decode().permute(1, 2, 0).numpy())
        views = []
        for plan in plans:
            mode = F.InterpolationMode.BICUBIC if plan.bicubic else F.InterpolationMode.BILINEAR
            view = F.resized_crop(whole, *plan.box, [plan.size, plan.size], mode)
            for op in _applied(plan):
                view = _execute(op, OPERATIONS[op.name].pil, view)
            views.append(np.array(view))
        return views


class Cv2Backend:
    """torchvision's decoding and resizing, then OpenCV and tables, 8 bits throughout."""

    on_device: ClassVar[bool] = False

    def prepare(self, image: EncodedImage, plans: Sequence[Plan]) -> list[View8]:
        """Crop, then execute every operation."""
        views = image.crops(plans)
        for number, plan in enumerate(plans):
            for op in _applied(plan):
                views[number] = _execute(op, OPERATIONS[op.name].cv2, views[number])
        return views


class DeviceBackend:
    """The workers decode and crop; the training device executes the operations, a batch at a time."""

    on_device: ClassVar[bool] = True

    def prepare(self, image: EncodedImage, plans: Sequence[Plan]) -> list[View8]:
        """Crop."""
        return image.crops(plans)


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


def _applied(plan: Plan) -> list[Op]:
    return [op for op in plan.ops if op != SKIP]


def _execute(op: Op, executor: Callable[[AnyView, float], AnyView], view: AnyView) -> AnyView:
    try:
        return executor(view, op.value)
    except Exception as error:
        message = f"the operation {op.name} failed for the value {op.value:g}: {type(error).__name__}: {error}"
        raise AugmentationError(message) from error


def to_float(views: torch.Tensor) -> torch.Tensor:
    """Convert (M, H, W, 3) uint8 to (M, 3, H, W) float32."""
    return views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def finish(views: torch.Tensor, ops: torch.Tensor) -> torch.Tensor:
    """Return prepared views (M, H, W, 3) as floats 0..255 (M, 3, H, W), with packed operations executed."""
    return run(to_float(views), ops)


def pack(ops: Sequence[Sequence[Op]]) -> torch.Tensor:
    """Encode views' operations: (M, S, 2) float64, the position in ``OPERATIONS`` (-1: skipped) and the value.

    S is the longest sequence's length; SKIP is added to the others.
    """
    number = {name: i for i, name in enumerate(OPERATIONS)} | {SKIP.name: -1}
    columns = itertools.zip_longest(*ops, fillvalue=SKIP)
    table = [[(number[op.name], op.value) for op in column] for column in columns]
    return torch.tensor(table, dtype=torch.float64).reshape(len(table), len(ops), 2).transpose(0, 1).contiguous()


def run(views: torch.Tensor, ops: torch.Tensor) -> torch.Tensor:
    """Execute each view's own operations in its own order, on a batch at once.

    Everything that depends on chance is known on the host, so nothing waits for the device; the number of kernels does
    not grow with the batch.

    Args:
        views: (M, 3, H, W) float32, whole numbers 0..255; changed in place.
        ops: of :func:`pack`, on the host.
    """
    kinds, values = ops[..., 0].T, ops[..., 1].T  # each (S, M)
    groups = [(slot, number) for slot, here in enumerate(kinds.tolist()) for number in sorted({*here} - {-1.0})]
    if not groups:
        return views
    rows = [(kinds[slot] == number).nonzero()[:, 0] for slot, number in groups]
    chosen = [values[slot][row] for (slot, _), row in zip(groups, rows, strict=True)]
    counts = [len(row) for row in rows]
    # Two copies to the device for everything, so small that they are staged and neither waits.
    rows_there = torch.cat(rows).to(views.device, non_blocking=True).split(counts)
    values_there = torch.cat(chosen).to(views.device, non_blocking=True).split(counts)
    operations = list(OPERATIONS.values())
    for (_, number), row, value in zip(groups, rows_there, values_there, strict=True):
        done = operations[int(number)].device(views.index_select(0, row), value.view(-1, 1, 1, 1))
        views.index_copy_(0, row, done)
    return views


def run_masked(views: torch.Tensor, ops: torch.Tensor, names: Sequence[Sequence[str]]) -> torch.Tensor:
    """Do what :func:`run` does, by executing every operation on all views and keeping it where it was drawn.

    No shape depends on chance, so that the compiler makes few kernels of it. Without the compiler it is slower than
    :func:`run`, because it computes what is not needed.

    Args:
        views: (M, 3, H, W) float32, whole numbers 0..255.
        ops: of :func:`pack`, on the views' device.
        names: for each place of an operation, the names that it can have.
    """
    numbers = {name: i for i, name in enumerate(OPERATIONS)}
    for place, possible in enumerate(names):
        kind, value = (ops[:, place, column].view(-1, 1, 1, 1) for column in range(2))
        before = views
        for name in possible:
            known, drawn = OPERATIONS[name], kind == numbers[name]
            # The others' values may be outside this operation's range.
            done = known.device(before, torch.where(drawn, value, known.low))
            views = torch.where(drawn, done, views)
    return views

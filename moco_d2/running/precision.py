"""Precision of float32 arithmetic on a GPU (``ENGINE.TF32``), for both stages."""

from __future__ import annotations

import torch

# What may round the inputs of float32 products to TF32, by value of ENGINE.TF32: (convolutions, matrix products).
TF32 = {"none": (False, False), "convolutions": (True, False), "all": (True, True)}


def use_tf32(where: str) -> None:
    """Let float32 convolutions and matrix products on a GPU use TF32, or not; it applies to the whole process.

    TF32 has float32's range and 10 bits of mantissa. Autocast and the CPU are not affected.

    Args:
        where: a key of ``TF32``, or empty to leave torch's settings alone.
    """
    if where:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = TF32[where]

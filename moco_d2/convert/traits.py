"""What a network's first layers show of how it was trained: the pixels' scale, folded norms, whose code it was."""

from __future__ import annotations

import math

import torch

from moco_d2.convert.trunk import Trunk, as_tensor, is_plain

# A pixel of a picture resembles its neighbour by 0.95, and its own other colours by 0.9: natural pictures' statistics.
_NEIGHBOURS, _COLOURS = 0.95, 0.9
# Inputs that vary by more are not divided by a std; measured: 0.4 to 2 for divided ones, 67 for Caffe.
_UNDIVIDED = 15.0


def input_scale(trunk: Trunk) -> float:
    """Estimate the standard deviation of the pixels that a network was trained with, from its first two layers.

    A norm's running variance is the variance of its convolution's outputs, which follows from the kernel and from the
    statistics of natural pictures, but for the pixels' scale. 0 where it cannot be told.
    """
    tensors = trunk.tensors()
    kernel = as_tensor(tensors["conv1.weight"]).double()
    if trunk.naming.height_first:
        kernel = kernel.permute(3, 2, 0, 1)
    if "bn1.running_var" not in tensors or kernel.ndim != 4 or kernel.shape[1:] != (3, 7, 7):
        return 0.0
    variance = as_tensor(tensors["bn1.running_var"]).double().reshape(-1)  # (C,)
    if len(variance) != len(kernel) or not torch.isfinite(kernel).all():
        return 0.0
    offsets = torch.arange(7.0, dtype=torch.float64)
    line = _NEIGHBOURS ** (offsets[:, None] - offsets[None]).abs()
    colours = torch.full((3, 3), _COLOURS, dtype=torch.float64).fill_diagonal_(1)
    flat = kernel.reshape(len(kernel), -1)  # (C, 3 * 7 * 7)
    expected = ((flat @ torch.kron(colours, torch.kron(line, line))) * flat).sum(1)
    norms = flat.norm(dim=1)
    alive = (norms > 0.05 * norms.max()) & (expected > 0)
    ratio = (variance[alive] / expected[alive]).median().item() if alive.any() else 0.0
    return math.sqrt(ratio) if 0 < ratio < math.inf else 0.0


def caffe(trunk: Trunk) -> bool:
    """Return whether the input was not divided by a std, or the statistics are folded away, as in Caffe's files."""
    stem = [as_tensor(value) for name, value in trunk.tensors().items() if name.startswith(("conv1.", "bn1."))]
    if not all(is_plain(tensor) for tensor in stem):  # refused later, with the reason
        return False
    return input_scale(trunk) > _UNDIVIDED or _folded(trunk)


def _folded(trunk: Trunk) -> bool:
    """Return whether bn1 has mean 0 and variance 1 though it is trained: an affine layer of Caffe's."""
    tensors = {name: as_tensor(value).reshape(-1) for name, value in trunk.tensors().items() if name.startswith("bn1.")}
    if "bn1.running_var" not in tensors:
        return False
    fresh = bool((tensors["bn1.weight"] == 1).all())
    # Detectron2 takes its epsilon off a variance of 1.
    unit = bool(((tensors["bn1.running_var"] - 1).abs() < 2e-5).all())
    bias = trunk.keys.get(f"{trunk.prefix}conv1.bias")
    # Folded here, or left to a bias in the convolution.
    return unit and not bool(tensors["bn1.running_mean"].any()) and (not fresh or bias is not None)


def shortcut_first(trunk: Trunk) -> bool:
    """Return whether a block's shortcut stands before its convolutions in the file, as in tonylins' SimCLR."""
    order = {key: index for index, key in enumerate(trunk.keys)}
    prefix = f"{trunk.prefix}layer1.0."
    shortcut, conv = order.get(f"{prefix}downsample.0.weight"), order.get(f"{prefix}conv1.weight")
    return shortcut is not None and conv is not None and shortcut < conv


# Those that a source's record may name.
TRAITS = {"caffe": caffe, "shortcut first": shortcut_first}

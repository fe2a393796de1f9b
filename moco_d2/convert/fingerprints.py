"""Fingerprints of a network's training, in its first layers: the pixels' scale, folded norms, the order of keys."""

from __future__ import annotations

import math

import torch

from moco_d2.convert.find import Backbone, is_plain

# Statistics of natural pictures: the correlation of a pixel with its neighbour, and with its own other colours.
_NEIGHBOURS, _COLOURS = 0.95, 0.9
# Inputs that vary by more are not divided by a std. Measured: 0.4 to 2 for divided ones, 67 for Caffe.
_UNDIVIDED = 15.0
_STEM = ("conv1.", "bn1.")


def input_scale(backbone: Backbone) -> float:
    """Estimate the standard deviation of the pixels that a network was trained with, from its first two layers.

    The running variance of bn1 is the variance of conv1's outputs. That follows from the kernel and from the statistics
    of natural pictures, except for the pixels' scale. 0: these layers do not show it.
    """
    tensors = backbone.tensors(_STEM)
    if not all(map(is_plain, tensors.values())):  # refused later, with the reason
        return 0.0
    kernel = tensors["conv1.weight"].double()
    if backbone.naming.height_first:
        kernel = kernel.permute(3, 2, 0, 1)
    if "bn1.running_var" not in tensors or kernel.ndim != 4 or kernel.shape[1:] != (3, 7, 7):
        return 0.0
    variance = tensors["bn1.running_var"].double().reshape(-1)  # (C,)
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


def caffe(backbone: Backbone) -> bool:
    """Return whether the input was not divided by a std, or the statistics are folded away, as in Caffe's files."""
    if not all(map(is_plain, backbone.tensors(_STEM).values())):
        return False
    return input_scale(backbone) > _UNDIVIDED or _folded(backbone)


def _folded(backbone: Backbone) -> bool:
    """Return whether bn1 has mean 0 and variance 1 though it is trained: an affine layer of Caffe's."""
    tensors = {name: tensor.reshape(-1) for name, tensor in backbone.tensors(("bn1.",)).items()}
    if "bn1.running_var" not in tensors:
        return False
    fresh = bool((tensors["bn1.weight"] == 1).all())
    # Detectron2 takes its epsilon off a variance of 1.
    unit = bool(((tensors["bn1.running_var"] - 1).abs() < 2e-5).all())
    bias = backbone.keys.get(f"{backbone.prefix}conv1.bias")
    # The statistics are folded into bn1, or into a bias of the convolution.
    return unit and not bool(tensors["bn1.running_mean"].any()) and (not fresh or bias is not None)


def shortcut_first(backbone: Backbone) -> bool:
    """Return whether a block's shortcut comes before its convolutions in the file, as in tonylins' SimCLR."""
    order = {key: index for index, key in enumerate(backbone.keys)}
    prefix = f"{backbone.prefix}layer1.0."
    shortcut, conv = order.get(f"{prefix}downsample.0.weight"), order.get(f"{prefix}conv1.weight")
    return shortcut is not None and conv is not None and shortcut < conv


# Those that a source's record may name.
FINGERPRINTS = {"caffe": caffe, "shortcut first": shortcut_first}

"""Baking: weights for another input, with channel order and divisor folded into the first convolution.

A network that was trained on RGB divided by a standard deviation computes the same from BGR divided by 1 if its
``conv1`` is reordered and divided instead. The mean cannot be folded: the zero padding that follows it stands for the
mean colour, so both inputs must have the same mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch

from moco_d2.convert.conversion import Conversion
from moco_d2.convert.names import DETECTRON2, TORCHVISION
from moco_d2.facts import CAFFE_BGR, Pixels, ResNetFacts
from moco_d2.io.checkpoints import CheckpointError

DETECTRON2_INPUT = CAFFE_BGR  # what Detectron2's default config feeds

_SAME_MEAN = 1e-4  # in 0..255; a float32 rounds by less
_STEMS = (f"{DETECTRON2.stem}.weight", f"{TORCHVISION.stem}.weight")


def check_bakeable(facts: ResNetFacts, pixels: Pixels = DETECTRON2_INPUT) -> None:
    """Check that weights can be folded for another input exactly.

    Raises:
        ValueError: the means differ.
    """
    own = _in_order(facts.pixels.mean, facts.pixels.order, pixels.order)
    if max(abs(a - b) for a, b in zip(own, pixels.mean, strict=True)) > _SAME_MEAN:
        what = "no mean (pixels from 0 to 1)" if not any(own) else f"the mean {list(own)} (as {pixels.order})"
        raise ValueError(
            f"it cannot be baked exactly: the weights were trained with {what}, but the wanted input subtracts "
            f"{list(pixels.mean)}. Convolutions pad with zeros, which would then be another colour, so every feature "
            "near a border would change; convert without --bake and use the config lines that are printed"
        )


def bake(
    tensors: Mapping[str, torch.Tensor], facts: ResNetFacts, pixels: Pixels = DETECTRON2_INPUT
) -> tuple[dict[str, torch.Tensor], ResNetFacts]:
    """Fold the difference between two inputs into the first convolution.

    Weights do not decide where bottlenecks stride: ``stride_in_1x1`` stays, and its config key must be set as before.

    Args:
        tensors: a ResNet under Detectron2's or torchvision's names.
        facts: what it is; ``facts.pixels`` is its input now.
        pixels: the input to fold for.

    Returns:
        The tensors, ``conv1`` replaced, and the facts with the new input.

    Raises:
        ValueError: it cannot be exact (:func:`check_bakeable`).
    """
    check_bakeable(facts, pixels)
    stem = next(name for name in _STEMS if name in tensors)
    weight = tensors[stem].double()  # (C, 3, 7, 7)
    weight = weight / torch.tensor(facts.pixels.std, dtype=torch.float64).view(1, 3, 1, 1)
    if facts.pixels.order != pixels.order:
        weight = weight.flip(1)
    weight = weight * torch.tensor(pixels.std, dtype=torch.float64).view(1, 3, 1, 1)
    return {**tensors, stem: weight.to(tensors[stem].dtype)}, replace(facts, pixels=pixels)


def baked(conversion: Conversion, path: str | os.PathLike[str]) -> Conversion:
    """Return a conversion with its weights baked for Detectron2's input; ``path`` is for messages.

    The source's tensors are unchanged: the proof compares both networks on the same pictures.

    Raises:
        CheckpointError: it cannot be exact.
    """
    before = conversion.facts
    if not isinstance(before, ResNetFacts):
        raise CheckpointError(
            f"{path}: only ResNets are baked; this is a {before.network}: use its config without --bake"
        )
    pixels = before.pixels
    try:
        tensors, facts = bake(conversion.tensors, before)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    notes = [f"baked: conv1 takes Detectron2's default input; it was {pixels}"]
    if not facts.stride_in_1x1:
        notes.append("baked: MODEL.RESNETS.STRIDE_IN_1X1 False must still be set; weights do not decide the strides")
    return replace(conversion, tensors=tensors, facts=facts, source_pixels=pixels, notes=(*conversion.notes, *notes))


def _in_order(values: tuple[float, float, float], order: str, wanted: str) -> tuple[float, ...]:
    return values if order == wanted else values[::-1]

"""Weights for another input: channel order and divisor move into the first convolution.

A network that was trained on RGB divided by a standard deviation computes the same from BGR divided by 1, once its
``conv1`` is reordered and divided instead. The mean cannot move: behind it lies the zero padding, which stands for the
mean colour, so both inputs must have the same mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from moco_d2.convert.load import CheckpointError, facts_in
from moco_d2.convert.names import DETECTRON2, TORCHVISION, rename_table
from moco_d2.convert.prove import STAGES, TOLERANCE, ProofError, _detectron2_features, _source_features, can_prove
from moco_d2.facts import CAFFE_BGR, BackboneFacts, Pixels

DETECTRON2_INPUT = CAFFE_BGR  # what Detectron2's default config feeds

_SAME_MEAN = 1e-4  # of 0..255: the rounding of a float32, not another convention
_STEMS = (f"{DETECTRON2.stem}.weight", f"{TORCHVISION.stem}.weight")


def check_bakeable(facts: BackboneFacts, pixels: Pixels = DETECTRON2_INPUT) -> None:
    """Check that weights can be made to take another input exactly.

    Raises:
        ValueError: the means differ; the message says what to do instead.
    """
    own = _in_order(facts.pixels.mean, facts.pixels.order, pixels.order)
    if max(abs(a - b) for a, b in zip(own, pixels.mean, strict=True)) > _SAME_MEAN:
        what = "no mean (pixels from 0 to 1)" if not any(own) else f"the mean {list(own)} (as {pixels.order})"
        raise ValueError(
            f"it cannot be baked exactly: the weights were trained with {what}, and the wanted input subtracts "
            f"{list(pixels.mean)}. Convolutions pad with zeros, which then would be another colour, and every feature "
            "near a border would change; convert without --bake and take the config lines that are printed"
        )


def bake(
    tensors: Mapping[str, torch.Tensor], facts: BackboneFacts, pixels: Pixels = DETECTRON2_INPUT
) -> tuple[dict[str, torch.Tensor], BackboneFacts]:
    """Fold the difference between two inputs into the first convolution.

    Where strides sit is not a matter of weights: ``stride_in_1x1`` stays, and its config key has to be set as before.

    Args:
        tensors: a ResNet under Detectron2's or torchvision's names.
        facts: what it is; ``facts.pixels`` is the input it wants now.
        pixels: the input it shall want.

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


def bake_content(
    content: Mapping[str, Any], path: str | os.PathLike[str], pixels: Pixels = DETECTRON2_INPUT
) -> dict[str, Any]:
    """Bake the content of a file that the conversion wrote; ``path`` is for messages.

    Raises:
        CheckpointError: it is not such a file, or it cannot be exact.
    """
    facts, model = facts_in(content, path), content.get("model")
    if facts is None or not isinstance(model, Mapping) or _STEMS[0] not in model:
        raise CheckpointError(f"{path}: not a converted file with facts; convert it first")
    try:
        tensors, baked = bake({name: torch.as_tensor(t) for name, t in model.items()}, facts, pixels)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {**content, "model": tensors, "facts": baked.as_dict()}


def prove_baked(
    facts: BackboneFacts,
    tensors: Mapping[str, torch.Tensor],
    baked_facts: BackboneFacts,
    baked: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """Compare the source network under its own input with Detectron2's under the new one, on one random picture.

    Args:
        facts: of the weights as they were.
        tensors: those, under Detectron2's names.
        baked_facts: of the baked weights.
        baked: those, under Detectron2's names.

    Returns:
        Stage name -> largest relative difference, as in :func:`moco_d2.convert.prove.prove`.

    Raises:
        ProofError: the features differ, or Detectron2 is missing.
    """
    if not can_prove():
        raise ProofError("the proof was not made: detectron2 is not installed")
    picture = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).double()  # RGB
    names = rename_table(DETECTRON2, TORCHVISION, facts.depth)
    source = {names[name]: tensor for name, tensor in tensors.items()}
    with torch.no_grad():
        wanted = _source_features(facts, source, prepare(picture, facts.pixels))
        got = _detectron2_features(baked_facts, baked, prepare(picture, baked_facts.pixels))
    differences = {s: ((wanted[s] - got[s]).abs().max() / wanted[s].abs().max()).item() for s in STAGES}
    if wrong := {stage: d for stage, d in differences.items() if not d < TOLERANCE}:  # "not <": a NaN fails
        raise ProofError(f"the proof of the baked input failed: {wrong} (limit {TOLERANCE:.0e})")
    return differences


def prepare(picture: torch.Tensor, pixels: Pixels) -> torch.Tensor:
    """Turn pictures (N, 3, H, W), RGB from 0 to 255, into a network's input, as Detectron2 does."""
    if pixels.order == "BGR":
        picture = picture.flip(1)
    mean, std = (torch.tensor(v, dtype=picture.dtype).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
    return ((picture - mean) / std).float()


def _in_order(values: tuple[float, float, float], order: str, wanted: str) -> tuple[float, ...]:
    return values if order == wanted else values[::-1]

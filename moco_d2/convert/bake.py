"""Weights for another input: channel order and divisor move into the first convolution.

A network that was trained on RGB divided by a standard deviation computes the same from BGR divided by 1, once its
``conv1`` is reordered and divided instead. The mean cannot move: behind it lies the zero padding, which stands for the
mean colour, so both inputs must have the same mean.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from moco_d2.atomic import atomic_write
from moco_d2.convert.convert import Conversion, check_output, config_path, config_yaml, convert_checkpoint, save
from moco_d2.convert.load import CheckpointError, read_checkpoint
from moco_d2.convert.names import DETECTRON2, TORCHVISION
from moco_d2.convert.prove import prove, prove_parts
from moco_d2.convert.recognise import Choice
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


def convert_baked(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    proof: bool = True,
    choice: Choice | None = None,
    picture: torch.Tensor | None = None,
) -> tuple[Conversion, dict[str, float]]:
    """Convert a checkpoint as :func:`moco_d2.convert.convert.convert_checkpoint` does, baked for Detectron2's input.

    The conversion is proven first, under its own input, and then what was written.

    Raises:
        CheckpointError: the checkpoint cannot be read, converted or baked.
        ValueError: the output's name is unusable, or a proof failed.
    """
    output = Path(output)
    check_output(Path(source), output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as scratch:
        part = Path(scratch) / output.name
        conversion, _ = convert_checkpoint(source, part, proof, choice, picture)
        baked = bake_conversion(conversion, source)
        save(baked, part)
        differences: dict[str, float] = {}
        if proof:
            written = {name: torch.as_tensor(tensor) for name, tensor in read_checkpoint(part)["model"].items()}
            trunk = {name: tensor for name, tensor in written.items() if name in baked.tensors}
            differences = prove_baked(conversion, baked.facts, trunk, picture)
            differences |= prove_parts(baked.facts, baked.source_tensors, baked.parts, written, baked.norm)
        os.replace(part, output)
    with atomic_write(config_path(output)) as file:
        file.write(config_yaml(baked, output).encode())
    return baked, differences


def bake_conversion(conversion: Conversion, path: str | os.PathLike[str]) -> Conversion:
    """Return a conversion with the weights baked for Detectron2's input; ``path`` is for messages.

    Raises:
        CheckpointError: it cannot be exact.
    """
    try:
        tensors, facts = bake(conversion.tensors, conversion.facts)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    source_tensors, _ = bake(conversion.source_tensors, conversion.facts)
    pixels = conversion.facts.pixels
    notes = [
        f"baked: conv1 takes Detectron2's default input; it was {pixels.order}, mean {pixels.mean}, std {pixels.std}"
    ]
    if not facts.stride_in_1x1:
        notes.append("baked: MODEL.RESNETS.STRIDE_IN_1X1 False must still be set; strides are not a matter of weights")
    return replace(
        conversion, tensors=tensors, source_tensors=source_tensors, facts=facts, notes=(*conversion.notes, *notes)
    )


def prove_baked(
    conversion: Conversion,
    facts: BackboneFacts,
    baked: Mapping[str, torch.Tensor],
    picture: torch.Tensor | None = None,
) -> dict[str, float]:
    """Compare the source network under its own input with Detectron2's under the new one, on one picture.

    Args:
        conversion: with the weights as they were.
        facts: of the baked weights.
        baked: those, under Detectron2's names.
        picture: as in :func:`moco_d2.convert.prove.prove`.

    Returns:
        Stage name -> largest relative difference, as in :func:`moco_d2.convert.prove.prove`.

    Raises:
        ProofError: the features differ, or Detectron2 is missing.
    """
    return prove(conversion.facts, conversion.source_tensors, baked, conversion.norm, picture, facts)


def _in_order(values: tuple[float, float, float], order: str, wanted: str) -> tuple[float, ...]:
    return values if order == wanted else values[::-1]

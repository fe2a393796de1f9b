"""Backbones for other tools, out of a file of ours: a converted file, a pretraining checkpoint, a fine-tuned detector.

Two layouts are written; the conversion reads both. ``torchvision`` is the layout of ``backbone.pth``: a state dict with
the names of torchvision's network (timm has the same), without ``fc``. ``moco`` is the layout of the MoCo authors'
checkpoints, which their linear classification and many other scripts load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from moco_d2.convert.bake import bake
from moco_d2.convert.checks import shapes_of
from moco_d2.convert.choice import Choice, Question
from moco_d2.convert.conversion import AUTHOR, check_another, is_converted
from moco_d2.convert.convert import check_stated, read_backbone
from moco_d2.convert.find import as_tensor
from moco_d2.convert.keys import sort_keys
from moco_d2.convert.names import DETECTRON2, DETECTRON2_C4
from moco_d2.convert.recognise import Match, recognise
from moco_d2.facts import BASIC_DEPTHS, IMAGENET_RGB, ResNetFacts
from moco_d2.io.checkpoints import CheckpointError, facts_in, read_checkpoint
from moco_d2.io.files import check_named_file, named_file
from moco_d2.layers.resnet import ARCHITECTURES
from moco_d2.messages import unknown_name

LAYOUTS = ("torchvision", "moco")

_MOCO_PREFIX = "module.encoder_q."
_VARIANCE, _COUNTER = "running_var", "num_batches_tracked"


@dataclass(frozen=True)
class Restored:
    """A backbone under torchvision's names.

    Attributes:
        tensors: torchvision's names, in its order, without ``fc``.
        facts: what the weights are.
        notes: what the user of another tool has to know, one sentence each.
    """

    tensors: dict[str, torch.Tensor]
    facts: ResNetFacts
    notes: tuple[str, ...]


def take_back(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Restored:
    """Take the backbone out of a file of ours (``backbone.pth``, a converted file, a training or detector checkpoint).

    If the weights need Detectron2's input, ``conv1`` is refolded for torchvision's, provided that this is exact.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        CheckpointError: the file has no facts, no complete ResNet, or not that of the facts.
    """
    stated = facts_in(content, path)
    if stated is None:
        raise CheckpointError(
            f"{path}: it has no facts, so its input and its strides are unknown; give a file of moco_d2 (a "
            "backbone.pth, a converted file, a detector trained with moco-d2 train), or convert this one without "
            "--to first, and then give the file that was written"
        )
    shapes = shapes_of(stated, path)
    match = _recognise(content, stated, path)
    tensors, facts, notes = read_backbone(match, stated, path)
    check_stated(stated, facts, path)
    if stated.parts:
        notes.append(f"the pretrained {', '.join(stated.parts)} is no part of a ResNet and is left out")
    state, found = match.backbone.state, match.backbone
    if found.naming == DETECTRON2_C4 or (found.naming == DETECTRON2 and found.prefix):
        facts, about_detector = _after_fine_tuning(facts, state)
        notes += about_detector
    tensors, facts, more = _fit_input(tensors, facts)
    # Some tools look for the batch counters, which nothing computes with; frozen norms have none.
    for row in found.rows:
        if row.torchvision.endswith(_VARIANCE):
            counter = state.get(row.key.removesuffix(_VARIANCE) + _COUNTER, torch.tensor(0))
            tensors[row.torchvision.removesuffix(_VARIANCE) + _COUNTER] = as_tensor(counter)
    ordered = {name: tensors[name].contiguous() for name in shapes if name in tensors}  # GroupNorm has no statistics
    return Restored(ordered, facts, (*notes, *more, *_standing_notes(facts)))


def restore(source: str | os.PathLike[str], output: str | os.PathLike[str], layout: str) -> Restored:
    """Read a file of ours and write its backbone for other tools.

    Args:
        source: see :func:`take_back`.
        output: the file to write (``torch.save``).
        layout: ``torchvision`` or ``moco``.

    Raises:
        CheckpointError: the source cannot be used.
        ValueError: an unknown layout, or the output is the input or a file that no conversion wrote.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown_name("the layout", layout, LAYOUTS))
    check_another(source, output)
    check_named_file(output, is_converted)
    restored = take_back(read_checkpoint(source), source)
    content: dict[str, Any] = {
        "state_dict": restored.tensors, "facts": restored.facts.as_dict(), "__author__": AUTHOR,
    }  # fmt: skip
    if layout == "moco":
        content["state_dict"] = {_MOCO_PREFIX + name: tensor for name, tensor in restored.tensors.items()}
        content["arch"] = architecture(restored.facts) or f"resnet{restored.facts.depth}, other widths"
    with named_file(output, is_converted) as file:
        torch.save(content, file)
    return restored


def architecture(facts: ResNetFacts) -> str | None:
    """Return torchvision's name of the network, or None if torchvision has none of its widths."""
    for name, (depth, groups, width) in ARCHITECTURES.items():
        res2 = 64 if depth in BASIC_DEPTHS else 256
        if (facts.depth, facts.groups, facts.width_per_group) == (depth, groups, width) and (
            facts.stem_channels, facts.res2_channels) == (64, res2):  # fmt: skip
            return name
    return None


def _recognise(content: Mapping[str, Any], stated: ResNetFacts, path: str | os.PathLike[str]) -> Match:
    choice = Choice(norm="GN" if stated.norm == "GN" else "")
    try:
        match = recognise(content, path, choice, stated)
    except Question as question:
        raise CheckpointError(
            f"{path}: {question.found}; convert it without --to first, and then give the file that was written"
        ) from question
    with suppress(Question):  # about keys besides the backbone, which are left out in any case
        sort_keys(match, (), choice, path)
    return match


def _after_fine_tuning(facts: ResNetFacts, state: Mapping[str, Any]) -> tuple[ResNetFacts, list[str]]:
    """Return facts that no longer name the pretraining recipe, and notes on what of the detector is left out."""
    start = f"{facts.origin} ({facts.recipe})" if facts.recipe else facts.origin
    notes = []
    if any(name.startswith("roi_heads.res5.norm.") for name in state):
        notes.append("the norm that the C4 box head adds after conv5 is no part of a ResNet and is left out")
    if any(name.startswith("backbone.top.") for name in state):
        notes.append("this detector's conv5 is dilated by 2 (stride 1): a plain ResNet computes other features there")
    elif any(name.startswith("sem_seg_head.") for name in state) and "backbone.fpn_lateral2.weight" not in state:
        notes.append(
            "an FCN's conv5 may be dilated (see its config): a plain ResNet then computes other features there"
        )
    return replace(facts, origin=f"{start}, fine-tuned in a detector", recipe=""), notes


def _fit_input(
    tensors: dict[str, torch.Tensor], facts: ResNetFacts
) -> tuple[dict[str, torch.Tensor], ResNetFacts, list[str]]:
    """Refold ``conv1`` for torchvision's input if that is exact, or else say what the input is."""
    if facts.pixels == IMAGENET_RGB:
        return tensors, facts, []
    try:
        refolded, new = bake(tensors, facts, IMAGENET_RGB)
    except ValueError:
        return tensors, facts, [f"its input is {facts.pixels}; other tools feed {IMAGENET_RGB}"]
    return refolded, new, [f"conv1 was refolded for torchvision's input ({IMAGENET_RGB}); it was {facts.pixels}"]


def _standing_notes(facts: ResNetFacts) -> list[str]:
    notes = ["it has no classifier: fc.weight and fc.bias are missing (strict=False, or net.fc = torch.nn.Identity())"]
    if facts.stride_in_1x1:
        notes.append(
            "its bottlenecks stride in their 1x1 convolution (Caffe); torchvision's and timm's stride in the 3x3 and "
            "compute other features; moco_d2.layers.resnet.network_for(facts) builds the right network"
        )
    if architecture(facts) is None:
        notes.append("torchvision has no network of its widths; moco_d2.layers.resnet.network_for(facts) builds it")
    if facts.norm == "GN":
        notes.append(
            "its norms are GroupNorm with 32 groups: build torchvision's network with "
            "norm_layer=functools.partial(torch.nn.GroupNorm, 32)"
        )
    return notes

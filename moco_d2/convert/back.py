"""Backbones for other tools, out of a file of ours: a converted file, a pretraining checkpoint, a fine-tuned detector.

The conversion reads all layouts that are written. ``torchvision`` is the layout of a ResNet's ``backbone.pth``: a state
dict with the names of torchvision's network, without ``fc``. ``timm`` is the same for a ResNet, and for a ViT its
``backbone.pth``, with timm's names. ``moco`` is the layout of the MoCo authors' checkpoints (for a ViT, MoCo v3's),
which their linear classification and many other scripts load.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from moco_d2.convert.bake import bake
from moco_d2.convert.checks import check_facts, shapes_of
from moco_d2.convert.choice import Choice, Question
from moco_d2.convert.conversion import AUTHOR, check_another, is_converted
from moco_d2.convert.convert import check_stated, read_backbone
from moco_d2.convert.find import as_tensor
from moco_d2.convert.keys import sort_keys
from moco_d2.convert.names import DETECTRON2, DETECTRON2_C4
from moco_d2.convert.recognise import Match, recognise
from moco_d2.convert.vit import read_vit, sort_vit_keys
from moco_d2.convert.vit_find import recognise_vit
from moco_d2.convert.vit_names import IN_DETECTOR
from moco_d2.facts import BASIC_DEPTHS, IMAGENET_RGB, BackboneFacts, ResNetFacts, ViTFacts
from moco_d2.io.checkpoints import CheckpointError, facts_in, read_checkpoint
from moco_d2.io.files import check_named_file, named_file
from moco_d2.layers.resnet import ARCHITECTURES
from moco_d2.messages import unknown_name

LAYOUTS = ("torchvision", "timm", "moco")

_MOCO_PREFIX, _MOCO_V3_PREFIX = "module.encoder_q.", "module.base_encoder."
_MOCO_V3_NAMES = {(16, 384, 12, 12): "vit_small", (16, 768, 12, 12): "vit_base"}  # patch, features, blocks, heads
_RELATIVE = r"\.attn\.rel_pos_[hw]$"
_VARIANCE, _COUNTER = "running_var", "num_batches_tracked"


@dataclass(frozen=True)
class Restored:
    """A backbone under torchvision's names, or a ViT under timm's.

    Attributes:
        tensors: in that network's order, without its head.
        facts: what the weights are.
        notes: what the user of another tool has to know, one sentence each.
    """

    tensors: dict[str, torch.Tensor]
    facts: BackboneFacts
    notes: tuple[str, ...]


def take_back(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Restored:
    """Take the backbone out of a file of ours (``backbone.pth``, a converted file, a training or detector checkpoint).

    If the weights need Detectron2's input, ``conv1`` is refolded for torchvision's, provided that this is exact.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        CheckpointError: the file has no facts, no complete network, or not that of the facts.
    """
    stated = facts_in(content, path)
    if stated is None:
        raise CheckpointError(
            f"{path}: it has no facts, so its input and its strides are unknown; give a file of moco_d2 (a "
            "backbone.pth, a converted file, a detector trained with moco-d2 train), or convert this one without "
            "--to first, and then give the file that was written"
        )
    if isinstance(stated, ViTFacts):
        return _vit_back(content, stated, path)
    if not isinstance(stated, ResNetFacts):
        raise CheckpointError(f"{path}: no way back is known for facts of kind {stated.kind}")
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


def _vit_back(content: Mapping[str, Any], stated: ViTFacts, path: str | os.PathLike[str]) -> Restored:
    """Take a ViT out of a file of ours. Of a detector's, relative positions are left out, which other tools lack."""
    model = content.get("model", {})
    positions = [name for name in model if re.search(_RELATIVE, name)]
    held = {**content, "model": {k: v for k, v in model.items() if k not in positions}} if positions else content
    choice = Choice()
    try:
        match = recognise_vit(held, path, choice, stated)
    except Question as question:
        raise _unclear(question, path) from question
    with suppress(Question):  # about keys besides the backbone, which are left out in any case
        sort_vit_keys(match, choice, path)
    tensors, facts, notes = read_vit(match, stated, choice, path)
    check_facts(replace(stated, parts=()), facts, path)
    if match.vit.prefix == IN_DETECTOR and not all(name.startswith(IN_DETECTOR) for name in model):
        facts = replace(facts, origin=_fine_tuned(facts), recipe="")
        notes.append("a detector's ViT may attend in windows (see its config): a plain one computes other features")
    if positions:
        notes.append(
            f"its {len(positions)} tables of relative positions are left out: timm's ViT has none, so it computes "
            "other features"
        )
    if facts.pixels != IMAGENET_RGB:
        notes.append(f"its input is {facts.pixels}; other tools may feed {IMAGENET_RGB}")
    notes.append(f"it has no classifier (head), and {facts.heads} heads, which weights do not show")
    return Restored(tensors, facts, tuple(notes))


def restore(source: str | os.PathLike[str], output: str | os.PathLike[str], layout: str) -> Restored:
    """Read a file of ours and write its backbone for other tools.

    Args:
        source: see :func:`take_back`.
        output: the file to write (``torch.save``).
        layout: ``torchvision`` (ResNets only), ``timm`` or ``moco``.

    Raises:
        CheckpointError: the source cannot be used.
        ValueError: an unknown layout, or the output is the input or a file that no conversion wrote.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown_name("the layout", layout, LAYOUTS))
    check_another(source, output)
    check_named_file(output, is_converted)
    restored = take_back(read_checkpoint(source), source)
    facts = restored.facts
    if isinstance(facts, ViTFacts) and layout == "torchvision":
        raise CheckpointError(
            f"{source}: a ViT, and torchvision's has other names; use --to timm, or --to moco (MoCo v3's)"
        )
    content: dict[str, Any] = {
        "state_dict": restored.tensors, "facts": facts.as_dict(), "__author__": AUTHOR,
    }  # fmt: skip
    if layout == "moco":
        prefix = _MOCO_V3_PREFIX if isinstance(facts, ViTFacts) else _MOCO_PREFIX
        content["state_dict"] = {prefix + name: tensor for name, tensor in restored.tensors.items()}
        content["arch"] = architecture(facts) or f"{facts.network.lower().replace('-', '')}, other widths"
    with named_file(output, is_converted) as file:
        torch.save(content, file)
    return restored


def architecture(facts: BackboneFacts) -> str | None:
    """Return torchvision's name of a ResNet or MoCo v3's of a ViT, or None if there is none of its widths."""
    if isinstance(facts, ViTFacts):
        return _MOCO_V3_NAMES.get((facts.patch, facts.dim, facts.depth, facts.heads))
    if not isinstance(facts, ResNetFacts):
        return None
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
        raise _unclear(question, path) from question
    with suppress(Question):  # about keys besides the backbone, which are left out in any case
        sort_keys(match, (), choice, path)
    return match


def _unclear(question: Question, path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: {question.found}; convert it without --to first, and then give the file that was written"
    )


def _fine_tuned(facts: BackboneFacts) -> str:
    start = f"{facts.origin} ({facts.recipe})" if facts.recipe else facts.origin
    return f"{start}, fine-tuned in a detector"


def _after_fine_tuning(facts: ResNetFacts, state: Mapping[str, Any]) -> tuple[ResNetFacts, list[str]]:
    """Return facts that no longer name the pretraining recipe, and notes on what of the detector is left out."""
    notes = []
    if any(name.startswith("roi_heads.res5.norm.") for name in state):
        notes.append("the norm that the C4 box head adds after conv5 is no part of a ResNet and is left out")
    if any(name.startswith("backbone.top.") for name in state):
        notes.append("this detector's conv5 is dilated by 2 (stride 1): a plain ResNet computes other features there")
    elif any(name.startswith("sem_seg_head.") for name in state) and "backbone.fpn_lateral2.weight" not in state:
        notes.append(
            "an FCN's conv5 may be dilated (see its config): a plain ResNet then computes other features there"
        )
    return replace(facts, origin=_fine_tuned(facts), recipe=""), notes


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

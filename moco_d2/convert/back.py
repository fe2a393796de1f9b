"""Our backbones for other tools: out of a converted file, or out of a fine-tuned detector, under the names they know.

Two layouts are written, both of which the conversion reads again. ``torchvision`` is that of ``backbone.pth``: a state
dict with exactly the names of torchvision's network (timm's, too), ``fc`` apart. ``moco`` is that of the MoCo authors'
checkpoints, which their linear classification and many other scripts take.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from moco_d2.convert.bake import bake
from moco_d2.convert.checks import shapes_of
from moco_d2.convert.conversion import AUTHOR, check_another, is_converted
from moco_d2.convert.names import DETECTRON2, DETECTRON2_C4, TORCHVISION, Naming, rename_table
from moco_d2.convert.trunk import as_tensor, is_tensor
from moco_d2.facts import IMAGENET_RGB, BackboneFacts
from moco_d2.io.checkpoints import CheckpointError, facts_in, read_checkpoint, some
from moco_d2.io.files import check_named_file, named_file
from moco_d2.layers.resnet import ARCHITECTURES
from moco_d2.messages import unknown_name

LAYOUTS = ("torchvision", "moco")

_MOCO_PREFIX = "module.encoder_q."


@dataclass(frozen=True)
class _Home:
    """A place where our files keep a backbone.

    Attributes:
        place: the top-level key.
        prefix: what its names start with.
        naming: how they go on.
        what: what such a file is.
    """

    place: str
    prefix: str
    naming: Naming
    what: str


_HOMES = (
    _Home("model", "backbone.bottom_up.", DETECTRON2, "a detector"),  # FPN, dilated C5, RetinaNet
    _Home("model", "", DETECTRON2_C4, "a C4 detector"),
    _Home("model", "backbone.", DETECTRON2, "a detector"),  # FCN
    _Home("model", "", DETECTRON2, "a converted file"),
    _Home("model", "encoder_q.", TORCHVISION, "a pretraining checkpoint"),
    _Home("state_dict", "", TORCHVISION, "a backbone"),
    _Home("state_dict", _MOCO_PREFIX, TORCHVISION, "a MoCo checkpoint"),
)


@dataclass(frozen=True)
class Backbone:
    """A backbone taken back.

    Attributes:
        tensors: torchvision's names, in its order, without ``fc``.
        facts: what the weights are.
        notes: what the user of another tool has to know, one sentence each.
    """

    tensors: dict[str, torch.Tensor]
    facts: BackboneFacts
    notes: tuple[str, ...]


def take_back(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Backbone:
    """Take the backbone out of a file of ours (``backbone.pth``, a converted file, a training or detector checkpoint).

    Where the weights want Detectron2's input and it can be exact, ``conv1`` is refolded for torchvision's.

    Args:
        content: of the file.
        path: for messages.

    Raises:
        CheckpointError: no facts, no whole ResNet, or not that of the facts.
    """
    facts = facts_in(content, path)
    if facts is None:
        raise CheckpointError(
            f"{path}: it carries no facts, so how it was fed and where it strides is unknown; give a file of moco_d2, "
            "which carries them (a backbone.pth, a converted file, a detector trained with tools/train_net.py), or "
            "convert this one without --to first, and then what was written"
        )
    expected = shapes_of(facts, path)
    home, state = _home(content, facts, path)
    names = rename_table(home.naming, TORCHVISION, facts.depth)
    tensors = {new: as_tensor(state[home.prefix + old]) for old, new in names.items()}
    _check(tensors, expected, path)
    notes = [f"the pretrained {', '.join(facts.parts)} has no place in a ResNet and is left out"] if facts.parts else []
    facts = replace(facts, parts=())
    if home.what.endswith("detector"):
        facts, notes = _after_fine_tuning(facts, state)
    tensors, facts, more = _fit_input(tensors, facts)
    # Some tools look for the counters, which no computation reads; frozen norms have none.
    tensors |= {new: as_tensor(state.get(home.prefix + old, torch.tensor(0))) for old, new in _counters(names).items()}
    ordered = {name: tensors[name].contiguous() for name in expected}
    return Backbone(ordered, facts, (*notes, *more, *_standing_notes(facts)))


def restore(source: str | os.PathLike[str], output: str | os.PathLike[str], layout: str) -> Backbone:
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
    backbone = take_back(read_checkpoint(source), source)
    content: dict[str, Any] = {
        "state_dict": backbone.tensors, "facts": backbone.facts.as_dict(), "__author__": AUTHOR,
    }  # fmt: skip
    if layout == "moco":
        content["state_dict"] = {_MOCO_PREFIX + name: tensor for name, tensor in backbone.tensors.items()}
        content["arch"] = architecture(backbone.facts) or f"resnet{backbone.facts.depth}, other widths"
    with named_file(output, is_converted) as file:
        torch.save(content, file)
    return backbone


def architecture(facts: BackboneFacts) -> str | None:
    """Return torchvision's name of the network, or None where its widths are none of torchvision's."""
    for name, (depth, groups, width) in ARCHITECTURES.items():
        res2 = 64 if depth in (18, 34) else 256
        if (facts.depth, facts.groups, facts.width_per_group) == (depth, groups, width) and (
            facts.stem_channels, facts.res2_channels) == (64, res2):  # fmt: skip
            return name
    return None


def _home(
    content: Mapping[str, Any], facts: BackboneFacts, path: str | os.PathLike[str]
) -> tuple[_Home, Mapping[str, Any]]:
    """Return the place that holds the whole ResNet of the facts, and the mapping there."""
    nearest: tuple[int, _Home, list[str]] | None = None
    for home in _HOMES:
        state = content.get(home.place)
        if not isinstance(state, Mapping):
            continue
        keys = [home.prefix + name for name in home.naming.names(facts.depth)]
        missing = [key for key in keys if not is_tensor(state.get(key))]
        if not missing:
            return home, state
        if nearest is None or len(missing) < nearest[0]:
            nearest = len(missing), home, missing
    total = len(TORCHVISION.names(facts.depth))
    if nearest is None or nearest[0] == total:
        raise CheckpointError(f"{path}: holds no ResNet of ours; top-level keys: {some(list(content))}")
    count, home, missing = nearest
    conv5 = [name for name in missing if "res5." in name or "layer4." in name]
    why = "it has no conv5 (res5), so no whole ResNet can be made of it" if len(conv5) == count else "it is incomplete"
    raise CheckpointError(
        f"{path}: {home.what}, but {why}: {count} of the {total} tensors of a ResNet-{facts.depth} are missing: "
        f"{some(missing)}"
    )


def _check(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike[str]
) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{path}: its facts contradict its tensors: {name} is {tuple(tensor.shape)} instead of {shapes[name]}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity, so the run that wrote it had diverged")


def _after_fine_tuning(facts: BackboneFacts, state: Mapping[str, Any]) -> tuple[BackboneFacts, list[str]]:
    """Say that the weights are no longer those of their pretraining recipe, and what of them stays behind."""
    start = f"{facts.origin} ({facts.recipe})" if facts.recipe else facts.origin
    notes = []
    if any(name.startswith("roi_heads.res5.norm.") for name in state):
        notes.append("the norm that the C4 box head adds behind conv5 has no place in a ResNet and is left out")
    if any(name.startswith("backbone.top.") for name in state):
        notes.append(
            "this detector's conv5 is dilated by 2 (stride 1): the plain network computes other features there"
        )
    elif any(name.startswith("sem_seg_head.") for name in state) and "backbone.fpn_lateral2.weight" not in state:
        notes.append("an FCN's conv5 may be dilated (see its config): the plain network computes other features there")
    return replace(facts, origin=f"{start}, fine-tuned in a detector", recipe=""), notes


def _fit_input(
    tensors: dict[str, torch.Tensor], facts: BackboneFacts
) -> tuple[dict[str, torch.Tensor], BackboneFacts, list[str]]:
    """Refold ``conv1`` for torchvision's input where that is exact; else say what the input is."""
    if facts.pixels == IMAGENET_RGB:
        return tensors, facts, []
    try:
        refolded, new = bake(tensors, facts, IMAGENET_RGB)
    except ValueError:
        return tensors, facts, [f"its input is {facts.pixels}; other tools feed {IMAGENET_RGB}"]
    return refolded, new, [f"conv1 was refolded for torchvision's input ({IMAGENET_RGB}); it was {facts.pixels}"]


def _standing_notes(facts: BackboneFacts) -> list[str]:
    notes = ["it has no classifier: fc.weight and fc.bias are missing (strict=False, or net.fc = torch.nn.Identity())"]
    if facts.stride_in_1x1:
        notes.append(
            "its bottlenecks stride in their 1x1 convolution (Caffe); torchvision's and timm's stride in the 3x3 and "
            "compute other features; moco_d2.layers.resnet.network_for(facts) builds the right network"
        )
    if architecture(facts) is None:
        notes.append("its widths are none of torchvision's; moco_d2.layers.resnet.network_for(facts) builds it")
    return notes


def _counters(names: Mapping[str, str]) -> dict[str, str]:
    """Return the rename table of the norms' batch counters, which stand beside their variances."""
    variance, counter = "running_var", "num_batches_tracked"
    return {
        old.removesuffix(variance) + counter: new.removesuffix(variance) + counter
        for old, new in names.items()
        if old.endswith(variance)
    }

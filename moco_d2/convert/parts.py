"""Parts of a detector that some sources pretrain besides the ResNet: a feature pyramid (FPN), a box head.

A source's record lists the names of their layers (:class:`Part`). They are converted on request only, because
fine-tuning a detector with a pretrained FPN or box head is another protocol than fine-tuning a pretrained backbone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import FeaturePyramidNetwork

from moco_d2.convert.names import NORM_TENSORS, Row
from moco_d2.facts import ResNetFacts
from moco_d2.io.checkpoints import some
from moco_d2.messages import unknown_name

# The start of Detectron2's names in a part.
PART_PREFIXES = {"fpn": "backbone.fpn_", "box_head": "roi_heads.box_head."}
LEVELS = (2, 3, 4, 5)  # of a ResNet; level l has res2_channels * 2 ** (l - 2) channels and stride 2 ** l


@dataclass(frozen=True)
class Layer:
    """One layer of a part.

    Attributes:
        role: what Detectron2 calls it within the part: ``lateral2``, ``output2``, ``conv1``, ``fc1``, ...
        module: its key in the file, without wrappers.
        norm: the key of its normalisation; empty: it has none, and the layer has a bias.
    """

    role: str
    module: str
    norm: str = ""


@dataclass(frozen=True)
class Part:
    """One part of a detector, as one source spells it.

    Attributes:
        name: a key of ``PART_PREFIXES``.
        what: its name in messages.
        keys: a pattern of every key that belongs to it, without wrappers.
        layers: those that the source trains.
        note: for the report.
    """

    name: str
    what: str
    keys: str
    layers: tuple[Layer, ...]
    note: str = ""

    def rows(self) -> list[Row]:
        """Return the names of every tensor; torchvision's are those in :func:`rebuild`'s module."""
        convolutions = sum(layer.role.startswith("conv") for layer in self.layers)
        rows = []
        for layer in self.layers:
            kind, number = layer.role.rstrip("0123456789"), int(layer.role[-1])
            index = number - LEVELS[0]
            module, norm = {
                "lateral": (f"inner_blocks.{index}.0", f"inner_blocks.{index}.1"),
                "output": (f"layer_blocks.{index}.0", f"layer_blocks.{index}.1"),
                "conv": (f"{number - 1}.0", f"{number - 1}.1"),
                "fc": (f"{convolutions + 2 * number - 1}", ""),  # after a flattening, and each with a ReLU
            }[kind]
            target = PART_PREFIXES[self.name] + layer.role
            names = ("weight",) if layer.norm else ("weight", "bias")
            rows += [Row(f"{layer.module}.{n}", f"{module}.{n}", f"{target}.{n}") for n in names]
            if layer.norm:
                rows += [Row(f"{layer.norm}.{n}", f"{norm}.{n}", f"{target}.norm.{n}") for n in NORM_TENSORS]
        return rows

    @property
    def normed(self) -> bool:
        """Whether a normalisation follows its convolutions."""
        return any(layer.norm for layer in self.layers)


@dataclass(frozen=True)
class Component:
    """A part with its tensors, float32, under Detectron2's names, in the order of its rows."""

    part: Part
    tensors: dict[str, torch.Tensor]

    def as_torchvision(self) -> dict[str, torch.Tensor]:
        """Return the tensors under the names of :func:`rebuild`'s module."""
        return {row.torchvision: self.tensors[row.detectron2] for row in self.part.rows()}


def check_names(wanted: Sequence[str]) -> None:
    """Check the names of parts that a user gives.

    Raises:
        ValueError: one is unknown or repeated.
    """
    for name in wanted:
        if name not in PART_PREFIXES:
            raise ValueError(unknown_name("a part", name, PART_PREFIXES))
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"the parts are {', '.join(wanted)}; each may be named once")


def choose(parts: Sequence[Part], name: str, keys: Collection[str]) -> Part:
    """Return the part of this name, in the spelling that a file has.

    Raises:
        ValueError: the source has no such part, or the file's is incomplete or has unknown layers.
    """
    spellings = [part for part in parts if part.name == name]
    if not spellings:
        raise ValueError(f"its source pretrains {_listed(parts) or 'only the ResNet'}, no {name}")
    held = [key for key in keys if re.search(spellings[0].keys, key) and not key.endswith("num_batches_tracked")]
    if not held:
        raise ValueError(
            f"it holds no {name}: none of its keys looks like {spellings[0].layers[0].module}.weight; convert it "
            f"without {name}"
        )
    # Of two spellings, the one with more of the file's keys.
    known = {spelling: {row.key for row in spelling.rows()} for spelling in spellings}
    part = max(spellings, key=lambda spelling: len(known[spelling] & set(held)))
    missing = [row.key for row in part.rows() if row.key not in held]
    unknown = [key for key in held if key not in known[part]]
    if missing or unknown:
        raise ValueError(
            f"{part.what} is not the published one"
            + (f": {len(missing)} of its {len(part.rows())} tensors are missing: {some(missing)}" if missing else "")
            + (f": {len(unknown)} keys belong to no known layer of it: {some(unknown)}" if unknown else "")
        )
    return part


def check_component(component: Component, facts: ResNetFacts) -> None:
    """Check that a part fits its ResNet and itself.

    Raises:
        ValueError: a tensor has another shape than Detectron2's layer.
    """
    part, tensors = component.part, component.tensors
    try:
        with torch.device("meta"):  # shapes only
            expected = {name: tuple(t.shape) for name, t in rebuild(component, facts).state_dict().items()}
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{part.what} has impossible shapes ({error})") from error
    shapes = {row: tuple(tensors[row.detectron2].shape) for row in part.rows()}
    wrong = [
        f"{row.detectron2} is {shape} instead of {expected[row.torchvision]}"
        for row, shape in shapes.items()
        if shape != expected[row.torchvision]
    ]
    if wrong:
        raise ValueError(f"{part.what} does not fit: {len(wrong)} tensors have another shape: {some(wrong)}")


def rebuild(component: Component, facts: ResNetFacts) -> Any:
    """Return torchvision's module of a part, without the weights: a pyramid of all levels, or a box head."""
    norm: Any = nn.BatchNorm2d if component.part.normed else None
    sizes = _sizes(component)
    if component.part.name == "fpn":
        inputs = [facts.res2_channels * 2 ** (level - LEVELS[0]) for level in LEVELS]
        return FeaturePyramidNetwork(inputs, sizes["OUT_CHANNELS"], norm_layer=norm)
    shape = (sizes["CONV_DIM"], sizes["POOLER_RESOLUTION"], sizes["POOLER_RESOLUTION"])
    convolutions, linear = [sizes["CONV_DIM"]] * sizes["NUM_CONV"], [sizes["FC_DIM"]] * sizes["NUM_FC"]
    return FastRCNNConvFCHead(shape, convolutions, linear, norm_layer=norm)


def needs(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the config keys, with values, of a detector that can hold the parts in a file.

    Args:
        shapes: Detectron2's names -> shapes; names of no part are ignored.
    """
    keys: dict[str, Any] = {}
    laterals = [shape for name, shape in shapes.items() if re.fullmatch(r"backbone\.fpn_lateral\d\.weight", name)]
    if laterals:
        normed = any(re.match(r"backbone\.fpn_lateral\d\.norm\.", name) for name in shapes)
        keys |= {"MODEL.FPN.OUT_CHANNELS": laterals[0][0], "MODEL.FPN.NORM": "SyncBN" if normed else ""}
    head = PART_PREFIXES["box_head"]
    convolutions, linear = (
        [shape for name, shape in shapes.items() if re.fullmatch(rf"{re.escape(head)}{kind}\d\.weight", name)]
        for kind in ("conv", "fc")
    )
    if linear:
        keys |= {
            "MODEL.ROI_BOX_HEAD.NUM_CONV": len(convolutions),
            "MODEL.ROI_BOX_HEAD.NUM_FC": len(linear),
            "MODEL.ROI_BOX_HEAD.FC_DIM": linear[0][0],
            "MODEL.ROI_BOX_HEAD.NORM": "SyncBN" if f"{head}conv1.norm.weight" in shapes else "",
        }
    if linear and convolutions:
        channels = convolutions[0][0]
        keys |= {
            "MODEL.ROI_BOX_HEAD.CONV_DIM": channels,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": math.isqrt(linear[0][1] // channels),
        }
    return keys


def part_of(name: str) -> str:
    """Name the part of a detector that one of Detectron2's tensors belongs to: ``fpn``, ``box_head``, ``mask_head``."""
    known = (part for part, prefix in PART_PREFIXES.items() if name.startswith(prefix))
    return next(known, name.removeprefix("roi_heads.").partition(".")[0])


def _sizes(component: Component) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in component.tensors.items()}
    return {key.rpartition(".")[2]: value for key, value in needs(shapes).items()}


def _listed(parts: Sequence[Part]) -> str:
    return ", ".join(dict.fromkeys(part.name for part in parts))

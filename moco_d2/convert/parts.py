"""Parts of a detector that some sources pretrain beside the ResNet: a feature pyramid, a box head.

A source's record lists what its layers are called (:class:`Part`). They are converted on request only, because
fine-tuning a detector whose FPN or box head is pretrained is another protocol than fine-tuning a pretrained backbone.
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

from moco_d2.convert.names import NORM_TENSORS
from moco_d2.facts import BackboneFacts
from moco_d2.io.checkpoints import some
from moco_d2.messages import unknown_name

# What Detectron2's names in a part start with.
HOMES = {"fpn": "backbone.fpn_", "box_head": "roi_heads.box_head."}
LEVELS = (2, 3, 4, 5)  # of a ResNet; level l has res2_channels * 2 ** (l - 2) channels and stride 2 ** l


@dataclass(frozen=True)
class Layer:
    """One layer of a part.

    Attributes:
        role: what Detectron2 calls it within the part: ``lateral2``, ``output2``, ``conv1``, ``fc1``, ...
        module: what the file calls it, wrappers removed.
        norm: what the file calls its normalisation; empty: there is none, and the layer has a bias.
    """

    role: str
    module: str
    norm: str = ""


@dataclass(frozen=True)
class Part:
    """One part of a detector, as one source spells it.

    Attributes:
        name: a key of ``HOMES``.
        what: for people.
        keys: a pattern of every key that belongs to it, wrappers removed.
        layers: those that the source trains.
        note: what a user has to know.
    """

    name: str
    what: str
    keys: str
    layers: tuple[Layer, ...]
    note: str = ""

    def table(self) -> dict[str, str]:
        """Return key in the file -> Detectron2's name for every tensor."""
        names = {}
        for layer in self.layers:
            target = HOMES[self.name] + layer.role
            names[f"{layer.module}.weight"] = f"{target}.weight"
            if layer.norm:
                names |= {f"{layer.norm}.{tensor}": f"{target}.norm.{tensor}" for tensor in NORM_TENSORS}
            else:
                names[f"{layer.module}.bias"] = f"{target}.bias"
        return names

    @property
    def normed(self) -> bool:
        """Whether its convolutions have a normalisation behind them."""
        return any(layer.norm for layer in self.layers)


@dataclass(frozen=True)
class Carried:
    """A part with its tensors, float32, under Detectron2's names."""

    part: Part
    tensors: dict[str, torch.Tensor]


def check_names(wanted: Sequence[str]) -> None:
    """Check the names that a user gives.

    Raises:
        ValueError: one is unknown, or there twice.
    """
    for name in wanted:
        if name not in HOMES:
            raise ValueError(unknown_name("a part", name, HOMES))
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"the parts {', '.join(wanted)} name one twice")


def choose(parts: Sequence[Part], name: str, keys: Collection[str]) -> Part:
    """Return the part of a name whose spelling a file has.

    Raises:
        ValueError: the source has no such part, or the file has not the whole of it, or more than is known of it.
    """
    spellings = [part for part in parts if part.name == name]
    if not spellings:
        raise ValueError(f"its source pretrains {_listed(parts) or 'nothing beside the ResNet'}, but no {name}")
    held = [key for key in keys if re.search(spellings[0].keys, key) and not key.endswith("num_batches_tracked")]
    if not held:
        raise ValueError(
            f"it holds no {name}: none of its keys looks like {spellings[0].layers[0].module}.weight; convert it "
            f"without {name}"
        )
    # Of two spellings, the one that more of the file's keys show.
    part = max(spellings, key=lambda spelling: len(set(spelling.table()) & set(held)))
    missing = [key for key in part.table() if key not in held]
    unknown = [key for key in held if key not in part.table()]
    if missing or unknown:
        raise ValueError(
            f"{part.what} is not the published one"
            + (f": {len(missing)} of its {len(part.table())} tensors are missing: {some(missing)}" if missing else "")
            + (f": {len(unknown)} keys belong to no layer that is known: {some(unknown)}" if unknown else "")
        )
    return part


def check_part(carried: Carried, facts: BackboneFacts) -> None:
    """Check that a part fits its ResNet and itself.

    Raises:
        ValueError: a tensor has another shape than Detectron2's layer.
    """
    try:
        with torch.device("meta"):  # shapes only
            expected = {name: tuple(t.shape) for name, t in rebuild(carried, facts).state_dict().items()}
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{carried.part.what} has impossible shapes ({error})") from error
    own = as_torchvision(carried)
    wrong = [
        f"{name} is {tuple(carried.tensors[name].shape)} instead of {expected[other]}"
        for name, other in zip(carried.tensors, own, strict=True)
        if tuple(own[other].shape) != expected[other]
    ]
    if wrong:
        raise ValueError(f"{carried.part.what} does not fit: {len(wrong)} tensors have another shape: {some(wrong)}")


def rebuild(carried: Carried, facts: BackboneFacts) -> Any:
    """Return torchvision's module of a part, without the weights: a pyramid of all levels, or a box head."""
    norm: Any = nn.BatchNorm2d if carried.part.normed else None
    sizes = _sizes(carried)
    if carried.part.name == "fpn":
        inputs = [facts.res2_channels * 2 ** (level - LEVELS[0]) for level in LEVELS]
        return FeaturePyramidNetwork(inputs, sizes["OUT_CHANNELS"], norm_layer=norm)
    shape = (sizes["CONV_DIM"], sizes["POOLER_RESOLUTION"], sizes["POOLER_RESOLUTION"])
    convolutions, linear = [sizes["CONV_DIM"]] * sizes["NUM_CONV"], [sizes["FC_DIM"]] * sizes["NUM_FC"]
    return FastRCNNConvFCHead(shape, convolutions, linear, norm_layer=norm)


def as_torchvision(carried: Carried) -> dict[str, torch.Tensor]:
    """Return the tensors under the names of :func:`rebuild`'s module, in the same order."""
    convolutions = sum(layer.role.startswith("conv") for layer in carried.part.layers)
    modules = {}
    for layer in carried.part.layers:
        kind, number = layer.role.rstrip("0123456789"), int(layer.role[-1])
        modules[layer.role] = {
            "lateral": f"inner_blocks.{number - LEVELS[0]}.0",
            "output": f"layer_blocks.{number - LEVELS[0]}.0",
            "conv": f"{number - 1}.0",
            "fc": f"{convolutions + 2 * number - 1}",  # behind the convolutions a flattening, then with a ReLU each
        }[kind]
    tensors = {}
    for name, tensor in carried.tensors.items():
        role, _, rest = name.removeprefix(HOMES[carried.part.name]).partition(".")
        module = modules[role]
        tensors[f"{module[:-1]}1.{rest.removeprefix('norm.')}" if "norm." in rest else f"{module}.{rest}"] = tensor
    return tensors


def needs(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the Detectron2 keys, with values, of a detector that has a place for the parts in a file.

    Args:
        shapes: Detectron2's names -> shapes; names of no part are passed over.
    """
    keys: dict[str, Any] = {}
    laterals = [shape for name, shape in shapes.items() if re.fullmatch(r"backbone\.fpn_lateral\d\.weight", name)]
    if laterals:
        normed = any(re.match(r"backbone\.fpn_lateral\d\.norm\.", name) for name in shapes)
        keys |= {"MODEL.FPN.OUT_CHANNELS": laterals[0][0], "MODEL.FPN.NORM": "SyncBN" if normed else ""}
    head = HOMES["box_head"]
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
    known = (part for part, home in HOMES.items() if name.startswith(home))
    return next(known, name.removeprefix("roi_heads.").partition(".")[0])


def _sizes(carried: Carried) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in carried.tensors.items()}
    return {key.rpartition(".")[2]: value for key, value in needs(shapes).items()}


def _listed(parts: Sequence[Part]) -> str:
    return ", ".join(dict.fromkeys(part.name for part in parts))

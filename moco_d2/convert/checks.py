"""Checks that tensors are a sound ResNet that Detectron2 can build: kinds, stem, shapes and values."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from moco_d2.facts import BackboneFacts, ResNetFacts
from moco_d2.io.checkpoints import CheckpointError, some
from moco_d2.layers.resnet import network_for

_VARIANCES = ("_var", "_riv", "_variance", "var_ema|average")


def check_kinds(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors that are not plain arrays of floating-point numbers.

    Raises:
        CheckpointError: names ``path``, as in all checks here.
    """
    for what, remedy, wrong in (
        ("are quantised", "convert the float checkpoint that they were made from", lambda t: t.is_quantized),
        ("have no values (meta device)", "save the network after its weights are loaded", lambda t: t.is_meta),
        ("are sparse", "save them with to_dense()", lambda t: t.layout != torch.strided),
        ("are empty", "the file is one part of a sharded checkpoint (DeepSpeed ZeRO-3, FSDP); join its parts first, "
         "for example with DeepSpeed's zero_to_fp32.py", lambda t: t.numel() == 0),
        ("are not floating point", "the network is quantised, or the file damaged; convert the float checkpoint that "
         "it was made from", lambda t: not t.is_floating_point()),
    ):  # fmt: skip
        keys = [key for key, tensor in tensors.items() if wrong(tensor)]
        if keys:
            raise CheckpointError(f"{path}: {len(keys)} of {len(tensors)} tensors {what}: {some(keys)}; {remedy}")


def check_stem(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse a network for other images than RGB, or for small ones."""
    shape = tuple(tensors["conv1.weight"].shape)
    if len(shape) != 4 or shape[1] != 3:
        raise CheckpointError(
            f"{path}: conv1.weight has shape {shape}; only networks for 3-channel images can be converted"
        )
    if shape[2:] == (3, 3):
        raise CheckpointError(
            f"{path}: a CIFAR stem (conv1.weight has shape {shape}: a 3x3 convolution, no pooling), but Detectron2's "
            "ResNet begins with a 7x7 convolution and a pooling; pretrain with the imagenet stem"
        )


def shapes_of(facts: ResNetFacts, path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the network that facts describe, under torchvision's names, in its order."""
    try:
        with torch.device("meta"), _NoFilling():
            network = network_for(replace(facts, norm="BN"))  # has the tensors of group norm, and statistics
            return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its facts describe no ResNet that can be built ({error}): {facts}") from error


class _NoFilling(TorchFunctionMode):
    """Skips the initialisation of parameters, which takes longer than everything else on the meta device."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_):
            return arguments[0]
        return function(*arguments, **(named or {}))


def check_shapes(facts: ResNetFacts, tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Check that tensors are exactly those of the network that the facts describe."""
    group_norm = "bn1.running_mean" not in tensors
    unwanted = ("num_batches_tracked", *(("running_mean", "running_var") if group_norm else ()))
    shapes = {name: shape for name, shape in shapes_of(facts, path).items() if not name.endswith(unwanted)}
    if set(shapes) != set(tensors):  # impossible if the tensors were named by this depth
        raise CheckpointError(f"{path}: names differ from a {facts.network}'s: {some(set(shapes) ^ set(tensors))}")
    same_shapes(facts, shapes, tensors, path)


def same_shapes(
    facts: BackboneFacts,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
) -> None:
    """Check the tensors of a network for the shapes that its facts demand."""
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} of {len(shapes)} tensors have the wrong shape for a {facts.network}: {some(wrong)}"
        )


def check_facts(stated: BackboneFacts, facts: BackboneFacts, path: str | os.PathLike[str]) -> None:
    """Refuse a file whose stated facts are another network's than its tensors."""
    seen, said = facts.as_dict(), stated.as_dict()
    wrong = [f"{k} is {seen[k]} by the tensors, {said[k]} by the facts" for k in seen if seen[k] != said[k]]
    if wrong:
        raise CheckpointError(
            f"{path}: its facts contradict its tensors: {', '.join(wrong)}; one of them is from another run"
        )


def check_values(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors that cannot come from a sound run or download.

    A normalisation's weight, bias and mean may be all zero, as they are before the first step.
    """
    # One pass over the weights: a NaN shows in both ends of the range.
    ranges = {key: [end.item() for end in tensor.float().aminmax()] for key, tensor in tensors.items()}
    nonzero = [key for key in ranges if tensors[key].ndim == 4 or key.endswith(_VARIANCES)]
    for what, wrong in (
        ("hold NaN or infinity", [key for key, ends in ranges.items() if not all(map(math.isfinite, ends))]),
        ("are all zero", [key for key in nonzero if ranges[key] == [0, 0]]),
        ("hold negative variances", [key for key in ranges if key.endswith(_VARIANCES) and ranges[key][0] < 0]),
    ):
        if wrong:
            raise CheckpointError(
                f"{path}: {len(wrong)} of {len(tensors)} tensors {what}: {some(wrong)}; the run has diverged, or the "
                "file is damaged"
            )

"""Conversion of a checkpoint to a file that Detectron2 loads completely, or an error that says why not.

This module converts ResNets, and hands ViTs over to :mod:`moco_d2.convert.vit`.

Detectron2 skips tensors that do not match and trains on, so nothing is skipped here. Every key of the state dict is
mapped, dropped for a stated reason, or foreign to the wanted network. The mapped keys must be exactly the tensors of
the ResNet that the facts describe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from moco_d2.convert.bake import baked
from moco_d2.convert.checks import check_facts, check_kinds, check_shapes, check_stem, check_values
from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.conversion import Conversion, check_output, elsewhere, write, write_config
from moco_d2.convert.find import Backbone, as_tensor, is_tensor
from moco_d2.convert.fingerprints import input_scale
from moco_d2.convert.keys import Unmapped, sort_keys
from moco_d2.convert.names import TORCHVISION
from moco_d2.convert.parts import Component, Part, check_component, choose
from moco_d2.convert.recognise import Match, recognise
from moco_d2.convert.sources import DETECTOR_HEADS, INVISIBLE, SOURCES, unwrap
from moco_d2.convert.vit import convert_vit
from moco_d2.convert.vit_find import is_vit
from moco_d2.facts import ResNetFacts, ViTFacts
from moco_d2.io.checkpoints import CheckpointError, checkpoint_sha256, facts_in, read_checkpoint
from moco_d2.layers.resnet import facts_from_shapes

# To be raised if the same file would be converted differently: the catalogue then converts its files anew.
CONVERTER = 1

_EPSILON = 1e-5  # of every norm here


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    proof: bool = True,
    choice: Choice | None = None,
    picture: torch.Tensor | None = None,
    bake: bool = False,
) -> tuple[Conversion, dict[str, float]]:
    """Convert a checkpoint to Detectron2's names, prove it, and write it and its config.

    The output appears under its name only when it is complete and proven. A config for ``_BASE_``, which feeds it
    correctly, is written beside it with the suffix ``.yaml``.

    Args:
        source: the checkpoint.
        output: the file to write; ``.pth``, or ``.pkl`` with numpy arrays.
        proof: whether to compare the features of both networks (needs Detectron2).
        choice: what the user says that the file does not show.
        picture: what the features are compared on, besides noise (:func:`moco_d2.convert.prove.read_picture`).
        bake: whether to make the weights take Detectron2's default input (:mod:`moco_d2.convert.bake`).

    Returns:
        The conversion, and the largest relative difference per stage (empty without proof).

    Raises:
        CheckpointError: the checkpoint cannot be read, converted or baked.
        ValueError: the output's name is unusable, or the proof failed (:class:`moco_d2.convert.prove.ProofError`).
    """
    check_output(source, output)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(checkpoint_sha256, source)  # on another core: hashlib lets other threads run
        conversion = convert_state(read_checkpoint(source), source, choice)
    conversion = replace(conversion, source_sha256=digest.result())
    if bake:
        conversion = baked(conversion, source)
    differences = write(conversion, output, proof, picture)
    write_config(conversion, output)
    return conversion, differences


def convert_state(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], choice: Choice | None = None
) -> Conversion:
    """Convert an already read checkpoint (see :func:`convert_checkpoint`); ``path`` is for messages.

    Raises:
        CheckpointError: no known source, an incomplete network, unknown keys, or unusable tensors.
    """
    choice = choice or Choice()
    try:
        return _convert(checkpoint, path, choice)
    except Question as question:
        raise question.tried(lambda answer: _where(_convert(checkpoint, path, answer))) from None


def _where(conversion: Conversion) -> str:
    place, prefix = conversion.place, conversion.source.prefix
    return f"{place}.{prefix}" if place else prefix  # as Backbone.where


def _convert(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], choice: Choice) -> Conversion:
    """Convert with what the user says; the first question that comes up is raised."""
    stated = facts_in(checkpoint, path)
    if is_vit(checkpoint, path, choice, stated):
        return convert_vit(checkpoint, path, choice, stated if isinstance(stated, ViTFacts) else None)
    made = _convert_resnet(checkpoint, path, choice, stated if isinstance(stated, ResNetFacts) else None)
    if choice.heads:
        raise CheckpointError(f"{path}: it holds a ResNet, and --heads is for ViTs: leave it out")
    return made


def _convert_resnet(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], choice: Choice, stated: ResNetFacts | None
) -> Conversion:
    if stated and stated.norm == "GN":
        choice = replace(choice, norm="GN")
    match = recognise(checkpoint, path, choice, stated)
    backbone = match.backbone
    if stated and match.source.on_request:  # the recipe's name belongs to the network that the recipe transfers
        stated = replace(stated, origin=f"{stated.origin}, its network `{backbone.where}`", recipe="")
    parts = [_part(match, name, choice, path) for name in choice.parts]
    keys = sort_keys(match, parts, choice, path)
    declared, assumed = (stated, []) if stated else _declared(match, path)
    tensors, facts, notes = read_backbone(match, declared, path)
    if stated:
        check_stated(stated, facts, path)
    components = tuple(_component(part, match, facts, choice, path) for part in parts)
    offers = {name: _offer(match, name, facts, path) for name in set(keys.parts.values())}
    return Conversion(
        source=match.source,
        facts=replace(facts, parts=choice.parts),
        tensors={row.detectron2: tensors[row.torchvision] for row in backbone.rows},
        source_tensors=tensors,
        rows=(*backbone.rows, *(row for part in parts for row in backbone.rows_of(part))),
        dropped={key: why + offers.get(keys.parts.get(key, ""), "") for key, why in keys.dropped.items()},
        foreign=keys.foreign,
        place=backbone.place,
        elsewhere=elsewhere(checkpoint, backbone.state),
        also=match.also,
        notes=(
            *notes,
            *_contents(match, keys),
            *(part.note for part in parts if part.note),
            *assumed,
        ),
        parts=components,
    )


def read_backbone(
    match: Match, declared: ResNetFacts, path: str | os.PathLike[str]
) -> tuple[dict[str, torch.Tensor], ResNetFacts, list[str]]:
    """Take the recognised network out of its file and check it.

    Args:
        match: the network.
        declared: facts that shapes do not show: input, strides, origin.
        path: for messages.

    Returns:
        float32 tensors under torchvision's names, as their source computes with them; the facts; and notes on what was
        done to the tensors.

    Raises:
        CheckpointError: the tensors are unusable.
    """
    backbone = match.backbone
    tensors, notes = _tensors(backbone, path, declared)
    check_stem(tensors, path)
    facts = _facts(tensors, declared, path)
    check_shapes(facts, tensors, path)
    check_values({row.key or row.torchvision: tensors[row.torchvision] for row in backbone.rows}, path)
    return {name: t.to(torch.float32).contiguous() for name, t in tensors.items()}, facts, notes


def _part(match: Match, name: str, choice: Choice, path: str | os.PathLike[str]) -> Part:
    try:
        return choose(match.source.parts, name, match.backbone.keys)
    except ValueError as error:
        known = "; ".join(f"{s.name}: {', '.join(dict.fromkeys(p.name for p in s.parts))}" for s in SOURCES if s.parts)
        found = f"recognised as {match.source.name}; {error} (sources with parts: {known})"
        raise Question(path, found, choice, [_without_part(name, choice)]) from error


def _without_part(name: str, choice: Choice) -> Answer:
    left = tuple(other for other in choice.parts if other != name)
    return Answer(f"the backbone {f'and {left[0]} ' if left else ''}alone", (replace(choice, parts=left),))


def _offer(match: Match, name: str, facts: ResNetFacts, path: str | os.PathLike[str]) -> str:
    """Return the words that offer a part, if the file has all of it."""
    asked = Choice(parts=(name,))
    try:
        _component(_part(match, name, asked, path), match, facts, asked, path)
    except CheckpointError:
        return ""
    return f" (--with {name} keeps it)"


def _component(part: Part, match: Match, facts: ResNetFacts, choice: Choice, path: str | os.PathLike[str]) -> Component:
    """Take a part's tensors out of the file."""
    rows = match.backbone.rows_of(part)
    held = {row.key: as_tensor(match.backbone.state[row.key]) for row in rows}
    check_values(held, path)
    component = Component(part, {row.detectron2: held[row.key].to(torch.float32).contiguous() for row in rows})
    try:
        check_component(component, facts)
    except ValueError as error:
        raise Question(path, str(error), choice, [_without_part(part.name, choice)]) from error
    return component


def _contents(match: Match, keys: Unmapped) -> list[str]:
    """Return notes on what else the file holds that is useful or has consequences."""
    notes = [f"--source {match.average} converts the moving average, which the file holds too"] if match.average else []
    left = [key for key in (*keys.dropped, *keys.foreign) if key in match.backbone.state]
    if any(re.search(DETECTOR_HEADS, unwrap(key)) for key in left):
        notes.append(
            "the file holds a detector, of which the backbone alone was converted; a complete Detectron2 detector is "
            "loaded by MODEL.WEIGHTS without a conversion"
        )
    for key in left:
        value = match.backbone.state[key]
        if re.search(r"(^|[._])(mean|std)$", key) and is_tensor(value) and as_tensor(value).numel() == 3:
            shown = [round(number, 4) for number in as_tensor(value).flatten().tolist()]
            notes.append(f"`{key}` holds {shown}: the network prepares pixels itself; compare them with the input")
    return notes


def _tensors(
    backbone: Backbone, path: str | os.PathLike[str], declared: ResNetFacts
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors under torchvision's names as their source computes with them, and what was done to them."""
    tensors = backbone.tensors()
    check_kinds({row.key: tensors[row.torchvision] for row in backbone.rows if row.key}, path)
    notes = []
    if backbone.naming.height_first:
        tensors = _channels_first(tensors)
    if backbone.naming.statistics:
        groups = _join_split_norms(tensors)
        if groups:
            notes.append(
                f"split norms: the running statistics of {groups} groups were averaged, as their evaluation does"
            )
    elif backbone.group_norm:
        if declared.norm != "GN":
            notes.append("GroupNorm is your word: a BatchNorm that was saved without its statistics looks the same")
    else:
        tensors = _with_statistics(tensors, backbone.depth)
    bias = backbone.keys.get(f"{backbone.prefix}conv1.bias")
    if bias is not None and backbone.naming == TORCHVISION:
        tensors["bn1.running_mean"] = tensors["bn1.running_mean"] - as_tensor(backbone.state[bias])
        notes.append(
            "conv1.bias was subtracted from bn1's mean, which is the same computation; mmdetection leaves it out"
        )
    return tensors, notes


def _channels_first(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return torch's layout of kernels (height, width, in, out) and of vectors with axes of length 1."""
    return {
        name: t.permute(3, 2, 0, 1) if t.ndim == 4 and ("conv" in name or "downsample.0" in name) else t.reshape(-1)
        for name, t in tensors.items()
    }


def _with_statistics(tensors: Mapping[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """Give affine layers, into which the statistics were folded, the mean 0 and the variance 1."""
    plain = {"running_mean": 0.0, "running_var": 1 - _EPSILON}
    whole = {}
    for name in TORCHVISION.names(depth):
        norm, _, kind = name.rpartition(".")
        whole[name] = torch.full_like(tensors[f"{norm}.weight"], plain[kind]) if kind in plain else tensors[name]
    return whole


def _join_split_norms(tensors: dict[str, torch.Tensor]) -> int:
    """Average the statistics of lightly's split norms, in place; return the number of splits, 0 without any."""
    splits = 0
    for name, tensor in tensors.items():
        channels = len(tensors[name.rpartition(".")[0] + ".weight"]) if "running_" in name else 0
        if channels and tensor.ndim == 1 and len(tensor) > channels and len(tensor) % channels == 0:
            splits = len(tensor) // channels
            tensors[name] = tensor.view(splits, channels).mean(0)
    return splits


def _declared(match: Match, path: str | os.PathLike[str]) -> tuple[ResNetFacts, list[str]]:
    """Return the facts that weights do not show, by sidecar files or the source's record, and notes on assumptions."""
    source, keys, sidecars = match.source, match.backbone.keys, match.source.sidecars(path)
    variant = (words for pattern, words, _ in source.variants if any(re.search(pattern, key) for key in keys))
    stride = source.stride_in_1x1 if sidecars.stride_in_1x1 is None else sidecars.stride_in_1x1
    facts = ResNetFacts(
        pixels=sidecars.pixels or source.pixels, stride_in_1x1=stride, origin=next(variant, source.origin)
    )
    notes = [*source.notes, INVISIBLE, *sidecars.notes]
    if facts.pixels != source.pixels:
        notes.append(f"mean and std of the pixels are those of the {sidecars.file} in the folder of the weights")
    if scale := input_scale(match.backbone):
        notes.append(f"pixels: by conv1 and bn1, the inputs varied by about {scale:.2g}")
    return facts, notes


def _facts(tensors: Mapping[str, torch.Tensor], declared: ResNetFacts, path: str | os.PathLike[str]) -> ResNetFacts:
    """Read the facts off the shapes, and add those that are declared."""
    try:
        return facts_from_shapes(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            declared.pixels,
            origin=declared.origin,
            recipe=declared.recipe,
            stride_in_1x1=declared.stride_in_1x1,
        )
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its shapes are not a ResNet's ({error})") from error


def check_stated(stated: ResNetFacts, facts: ResNetFacts, path: str | os.PathLike[str]) -> None:
    """Refuse facts of another network."""
    # Parts are taken on request only, and earlier versions did not state the norm.
    check_facts(replace(stated, parts=(), norm=facts.norm), facts, path)

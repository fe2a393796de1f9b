"""Turning a checkpoint into a file that Detectron2 loads whole, or an error that says why not.

Detectron2 skips what does not match and trains on; so nothing is skipped here. Every key of the state dict is mapped,
dropped for a stated reason, or foreign to the wanted network, and the mapped ones must be exactly the tensors of the
ResNet that the facts describe.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moco_d2.convert.account import Account, account
from moco_d2.convert.bake import baked
from moco_d2.convert.checks import check_kinds, check_shapes, check_stem, check_values
from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.conversion import Conversion, check_output, write, write_config
from moco_d2.convert.hub import told_beside
from moco_d2.convert.names import DETECTRON2, TORCHVISION, rename_table
from moco_d2.convert.parts import Carried, Part, check_part, choose
from moco_d2.convert.recognise import Match, recognise
from moco_d2.convert.sources import DETECTOR_HEADS, SOURCES, UNSEEN
from moco_d2.convert.traits import input_scale
from moco_d2.convert.trunk import Trunk, as_tensor, is_tensor, unwrap
from moco_d2.facts import BackboneFacts
from moco_d2.io.checkpoints import CheckpointError, facts_in, read_checkpoint
from moco_d2.layers.resnet import facts_from_shapes

# Raised when the same file would be converted otherwise: the catalogue then makes what it keeps anew.
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

    The output appears under its name only when it is complete and proven. Beside it, with the suffix ``.yaml``, lies a
    config that feeds it rightly, for ``_BASE_``.

    Args:
        source: the checkpoint.
        output: the file to write; ``.pth``, or ``.pkl`` with numpy arrays.
        proof: whether to compare the features of both networks (needs Detectron2).
        choice: what the user says where the file does not.
        picture: what the features are compared on, beside noise (:func:`moco_d2.convert.prove.read_picture`).
        bake: whether to make the weights take Detectron2's default input (:mod:`moco_d2.convert.bake`).

    Returns:
        The conversion, and the largest relative difference per stage (empty without proof).

    Raises:
        CheckpointError: the checkpoint cannot be read, converted or baked.
        ValueError: the output's name is unusable, or the proof failed (:class:`moco_d2.convert.prove.ProofError`).
    """
    check_output(source, output)
    conversion = convert_state(read_checkpoint(source), source, choice)
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
    return f"{place}.{prefix}" if place else prefix  # as Trunk.where


def _convert(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], choice: Choice) -> Conversion:
    """Convert with what the user says; a question is asked as it comes."""
    stated = facts_in(checkpoint, path)
    if stated and stated.norm == "GN":
        choice = replace(choice, norm="GN")
    match = recognise(checkpoint, path, choice, stated)
    trunk = match.trunk
    parts = [_part(match, name, choice, path) for name in choice.parts]
    keys = account(match, parts, choice, path)
    tensors, notes = _tensors(trunk, path, stated)
    check_stem(tensors, path)
    told, unseen = (stated, []) if stated else _told(match, path)
    facts = _facts(tensors, told, path)
    if stated:
        _check_stated(stated, facts, path)
    check_shapes(facts, tensors, path)
    read, written = (naming.with_statistics(not trunk.group_norm) for naming in (TORCHVISION, DETECTRON2))
    to_detectron2 = rename_table(read, written, trunk.depth)
    key_of = {name: key for key, name in keys.mapped.items()}
    check_values({key_of.get(to_detectron2[name], name): tensor for name, tensor in tensors.items()}, path)
    tensors = {name: t.to(torch.float32).contiguous() for name, t in tensors.items()}
    offers = {name: _offer(match, name, facts, path) for name in set(keys.parts.values())}
    return Conversion(
        source=match.source,
        facts=replace(facts, parts=choice.parts),
        tensors={to_detectron2[name]: tensor for name, tensor in tensors.items()},
        source_tensors=tensors,
        mapped=keys.mapped,
        dropped={key: why + offers.get(keys.parts.get(key, ""), "") for key, why in keys.dropped.items()},
        foreign=keys.foreign,
        place=trunk.place,
        elsewhere=_elsewhere(checkpoint, trunk.state),
        norm="GN" if trunk.group_norm else "BN",
        also=match.also,
        notes=(*notes, *_beside(match, keys), *(part.note for part in parts if part.note), *unseen),
        parts=tuple(_carried(part, match, facts, choice, path) for part in parts),
    )


def _part(match: Match, name: str, choice: Choice, path: str | os.PathLike[str]) -> Part:
    try:
        return choose(match.source.parts, name, match.trunk.keys)
    except ValueError as error:
        known = "; ".join(f"{s.name}: {', '.join(dict.fromkeys(p.name for p in s.parts))}" for s in SOURCES if s.parts)
        found = f"recognised as {match.source.name}; {error} (sources with parts: {known})"
        raise Question(path, found, choice, [_without_part(name, choice)]) from error


def _without_part(name: str, choice: Choice) -> Answer:
    left = tuple(other for other in choice.parts if other != name)
    return Answer(f"the backbone {f'and {left[0]} ' if left else ''}alone", (replace(choice, parts=left),))


def _offer(match: Match, name: str, facts: BackboneFacts, path: str | os.PathLike[str]) -> str:
    """Return the words that offer a part, if the whole of it is there."""
    asked = Choice(parts=(name,))
    try:
        _carried(_part(match, name, asked, path), match, facts, asked, path)
    except CheckpointError:
        return ""
    return f" (--with {name} keeps it)"


def _carried(part: Part, match: Match, facts: BackboneFacts, choice: Choice, path: str | os.PathLike[str]) -> Carried:
    """Take a part's tensors out of the file, in the order of its table."""
    trunk = match.trunk
    held = {trunk.keys[key]: as_tensor(trunk.state[trunk.keys[key]]) for key in part.table()}
    check_values(held, path)
    tensors = [tensor.to(torch.float32).contiguous() for tensor in held.values()]
    carried = Carried(part, dict(zip(part.table().values(), tensors, strict=True)))
    try:
        check_part(carried, facts)
    except ValueError as error:
        raise Question(path, str(error), choice, [_without_part(part.name, choice)]) from error
    return carried


def _beside(match: Match, keys: Account) -> list[str]:
    """Return notes on what the file holds beside the backbone that is of use, or of consequence."""
    notes = [f"--source {match.average} converts the moving average, which the file holds too"] if match.average else []
    left = [key for key in (*keys.dropped, *keys.foreign) if key in match.trunk.state]
    if any(re.search(DETECTOR_HEADS, unwrap(key)) for key in left):
        notes.append(
            "the file holds a detector, of which the backbone alone was converted; the whole of a Detectron2 detector "
            "is loaded by MODEL.WEIGHTS without a conversion"
        )
    for key in left:
        value = match.trunk.state[key]
        if re.search(r"(^|[._])(mean|std)$", key) and is_tensor(value) and as_tensor(value).numel() == 3:
            shown = [round(number, 4) for number in as_tensor(value).flatten().tolist()]
            notes.append(f"`{key}` holds {shown}: the network prepares pixels itself; compare them with the input")
    return notes


def _tensors(
    trunk: Trunk, path: str | os.PathLike[str], stated: BackboneFacts | None
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the trunk's tensors under torchvision's names as its source computes with them, and what was done."""
    tensors = {name: as_tensor(value) for name, value in trunk.tensors().items()}
    key_of = {name: trunk.keys[key] for key, name in trunk.names().items()}
    check_kinds({key_of[name]: tensor for name, tensor in tensors.items()}, path)
    notes = []
    if trunk.naming.height_first:
        tensors = _channels_first(tensors)
    if trunk.naming.statistics:
        groups = _join_split_norms(tensors)
        if groups:
            notes.append(
                f"split norms: the running statistics of {groups} groups were averaged, as their evaluation does"
            )
    elif trunk.group_norm:
        if not (stated and stated.norm == "GN"):
            notes.append(
                "that the norms are GroupNorm is your word: a BatchNorm saved without statistics looks the same"
            )
    else:
        tensors = _with_statistics(tensors, trunk.depth)
    bias = trunk.keys.get(f"{trunk.prefix}conv1.bias")
    if bias is not None and trunk.naming == TORCHVISION:
        tensors["bn1.running_mean"] = tensors["bn1.running_mean"] - as_tensor(trunk.state[bias])
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


def _elsewhere(checkpoint: Mapping[str, Any], state: Mapping[Any, Any]) -> dict[str, int]:
    """Count the tensors of a file outside of the state dict, by top-level key."""
    seen = {id(state)}  # a small file may hold a list of a million times the same million

    def count(value: Any, depth: int) -> int:
        if isinstance(value, torch.Tensor | np.ndarray):
            return int(depth >= 0)
        if id(value) in seen or depth < 0:
            return 0
        seen.add(id(value))
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return sum(count(item, depth - 1) for item in inside)

    if checkpoint is state:
        return {}
    return {
        str(key): count(value, 3) for key, value in checkpoint.items() if isinstance(key, str) and value is not state
    }


def _told(match: Match, path: str | os.PathLike[str]) -> tuple[BackboneFacts, list[str]]:
    """Return what is known of a file that does not say it itself, and what nobody can see in it."""
    source, keys = match.source, match.trunk.keys
    fed, notes = told_beside(source, path)
    variant = (words for pattern, words, _ in source.variants if any(re.search(pattern, key) for key in keys))
    scale = input_scale(match.trunk)
    seen = [f"pixels: by conv1 and bn1, the inputs varied by about {scale:.2g}"] if scale else []
    return BackboneFacts(**fed, origin=next(variant, source.origin)), [*source.notes, UNSEEN, *notes, *seen]


def _facts(tensors: Mapping[str, torch.Tensor], told: BackboneFacts, path: str | os.PathLike[str]) -> BackboneFacts:
    """Read the facts off the shapes, beside what shapes cannot tell."""
    try:
        facts = facts_from_shapes(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            told.pixels,
            origin=told.origin,
            recipe=told.recipe,
            stride_in_1x1=told.stride_in_1x1,
        )
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its shapes are not a ResNet's ({error})") from error
    if facts.depth in (18, 34) and facts.res2_channels != 64:
        raise CheckpointError(
            f"{path}: a ResNet-{facts.depth} with {facts.res2_channels} channels in its first stage; Detectron2 builds "
            "depths 18 and 34 with 64 only"
        )
    return facts


def _check_stated(stated: BackboneFacts, facts: BackboneFacts, path: str | os.PathLike[str]) -> None:
    """Refuse facts of another network."""
    # Parts are taken on request only, and earlier versions did not state the norm.
    seen, said = facts.as_dict(), replace(stated, parts=(), norm=facts.norm).as_dict()
    wrong = [f"{k} is {seen[k]} by the tensors, {said[k]} by the facts" for k in seen if seen[k] != said[k]]
    if wrong:
        raise CheckpointError(
            f"{path}: its facts contradict its tensors: {', '.join(wrong)}; one of them is from another run"
        )

"""Conversion of a ViT checkpoint to the names of Detectron2's ViT under its simple feature pyramid.

As for ResNets, nothing is skipped: every key is mapped, dropped for a stated reason, or foreign to the wanted network,
and the mapped keys must be exactly the tensors of the ViT that the facts describe.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from moco_d2.convert.checks import check_facts, check_kinds, check_values, same_shapes
from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.conversion import Conversion, elsewhere
from moco_d2.convert.find import as_tensor
from moco_d2.convert.keys import Unmapped, dropped_by
from moco_d2.convert.sources import INSIDE_HEADS, INVISIBLE_IN_VITS
from moco_d2.convert.sources.vits import OTHER_HEADS
from moco_d2.convert.vit_find import Vit, VitMatch, recognise_vit
from moco_d2.convert.vit_names import BESIDE, BESIDE_KEY, detectron2_name, vit_shapes
from moco_d2.facts import ViTFacts
from moco_d2.io.checkpoints import CheckpointError, some
from moco_d2.layers.vit import facts_from_shapes

_HEAD_FEATURES = 64  # of a token per head, in nearly all published ViTs
_HEADS = rf"{INSIDE_HEADS}|^(fc_norm|head_drop|pre_logits|pooler)\b"


def convert_vit(checkpoint: Mapping[str, Any], path: Any, choice: Choice, stated: ViTFacts | None) -> Conversion:
    """Convert a checkpoint whose wanted network is a ViT.

    Args:
        checkpoint: the file's content.
        path: for messages.
        choice: what the user says.
        stated: the file's own facts.

    Raises:
        CheckpointError: as :func:`moco_d2.convert.convert.convert_state`.
    """
    for option, given in (("--with", choice.parts), ("--norm", choice.norm)):
        if given:
            raise CheckpointError(f"{path}: it holds a ViT, and {option} is for ResNets: leave it out")
    match = recognise_vit(checkpoint, path, choice, stated)
    if stated and match.source.on_request:
        stated = replace(stated, origin=f"{stated.origin}, its network `{match.vit.where}`", recipe="")
    keys = sort_vit_keys(match, choice, path)
    tensors, facts, notes = read_vit(match, stated, choice, path)
    if stated:
        check_facts(replace(stated, parts=()), facts, path)
    return Conversion(
        source=match.source,
        facts=facts,
        tensors={detectron2_name(name): t for name, t in tensors.items() if name not in BESIDE},
        beside={name: t for name, t in tensors.items() if name in BESIDE},
        source_tensors=tensors,
        rows=match.vit.rows,
        dropped=keys.dropped,
        foreign=keys.foreign,
        place=match.vit.place,
        elsewhere={
            key: count
            for key, count in elsewhere(checkpoint, match.vit.state).items()
            if key not in (match.vit.place.partition(".")[0], BESIDE_KEY)
        },
        also=match.also,
        notes=(*notes, *match.source.notes, INVISIBLE_IN_VITS),
    )


def read_vit(
    match: VitMatch, stated: ViTFacts | None, choice: Choice, path: Any
) -> tuple[dict[str, torch.Tensor], ViTFacts, list[str]]:
    """Take the recognised ViT out of its file and check it.

    Args:
        match: the network.
        stated: the file's own facts.
        choice: what the user says.
        path: for messages.

    Returns:
        float32 tensors under timm's names, in timm's order; the facts; and notes on what is assumed.

    Raises:
        CheckpointError: the tensors are unusable, or the number of heads is unknown.
    """
    vit = match.vit
    held = {row.key: as_tensor(vit.state[row.key]) for row in vit.rows}
    check_kinds(held, path)
    try:
        tensors = vit.tensors()
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"{path}: its queries, keys and values cannot be joined ({error})") from error
    _check_patches(tensors["patch_embed.proj.weight"], path)
    facts, notes = _facts(match, tensors, stated, choice, path)
    shapes = vit_shapes(facts)
    same_shapes(facts, {name: shapes[name] for name in tensors}, tensors, path)
    check_values(held, path)
    gone = [name for name in BESIDE if name not in tensors]
    if gone:
        notes.append(f"the file has no {', '.join(gone)}; Detectron2's ViT needs none of them, but other tools do")
    return {name: t.to(torch.float32).contiguous() for name, t in tensors.items()}, facts, notes


def _check_patches(projection: torch.Tensor, path: Any) -> None:
    shape = tuple(projection.shape)
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise CheckpointError(
            f"{path}: its patch projection has shape {shape}; only ViTs with square patches of 3-channel images can be "
            "converted"
        )


def _facts(
    match: VitMatch, tensors: Mapping[str, torch.Tensor], stated: ViTFacts | None, choice: Choice, path: Any
) -> tuple[ViTFacts, list[str]]:
    """Return the facts by the shapes, the file's facts, its sidecars and the record, and notes on assumptions."""
    source, sidecars = match.source, match.source.sidecars(path)
    pixels = stated.pixels if stated else sidecars.pixels or source.pixels
    notes = [] if stated else [*sidecars.notes]
    if not stated and sidecars.pixels:
        notes.append(f"mean and std of the pixels are those of the {sidecars.file} in the folder of the weights")
    declared = stated.heads if stated else sidecars.heads
    dim = len(tensors["patch_embed.proj.weight"])
    heads = choice.heads or declared or source.heads.get(dim) or _usual_heads(dim, path)
    if choice.heads:
        notes.append(f"{heads} heads: your word")
    elif not declared:
        why = f"which {source.name} has" if dim in source.heads else "as usual (assumed),"
        notes.append(f"{heads} heads, {why} for {dim} features; weights do not show it (--heads N says another number)")
    shapes = {"cls_token": (1, 1, dim)} | {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    words = (stated.origin, stated.recipe) if stated else (source.origin, "")
    try:
        facts = facts_from_shapes(shapes, heads, pixels, origin=words[0], recipe=words[1])
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: it is no plain ViT ({error})") from error
    return facts, notes


def _usual_heads(dim: int, path: Any) -> int:
    if dim in OTHER_HEADS:
        return OTHER_HEADS[dim]
    if dim % _HEAD_FEATURES:
        raise CheckpointError(
            f"{path}: weights do not show the number of heads, and tokens of {dim} features are of no usual size; give "
            "it with --heads N"
        )
    return dim // _HEAD_FEATURES


def sort_vit_keys(match: VitMatch, choice: Choice, path: Any) -> Unmapped:
    """Sort every key of the state dict that holds the ViT, except the keys that are converted.

    Args:
        match: the network.
        choice: what the user says.
        path: for messages.

    Raises:
        CheckpointError: a key shows another network or is unknown (:class:`Question`), or an expression of
            ``choice.drop`` matches a key of the network, or none.
    """
    source, vit = match.source, match.vit
    mapped = {row.key for row in vit.rows}
    own = {name.partition(".")[0] for spelled in vit.naming.names(1).values() for name in spelled}
    within = {key for name, key in vit.inside.items() if name.partition(".")[0] in own}
    asked = _asked_for(vit, mapped | within, choice, path)
    done, unknown = Unmapped(), list[str]()
    plain = {key: name for name, key in vit.keys.items()}
    for key in (key for key in map(str, vit.state) if key not in mapped):
        name = plain.get(key, key)
        inside = key in plain and name.startswith(vit.prefix)
        reason = asked.get(key) or next((why for pattern, why in source.dropped if re.search(pattern, name)), "")
        if reason:
            done.dropped[key] = reason
        elif key in within:
            raise CheckpointError(
                f"{path}: unknown keys inside the network: {some([key])}; so it is no plain ViT, and only ViTs as timm "
                "and Detectron2 build them can be converted"
            )
        elif source.rest:
            done.dropped[key] = source.rest
        elif inside and re.match(_HEADS, name[len(vit.prefix) :]):
            done.dropped[key] = "head"
        elif inside:
            unknown.append(key)
        else:
            done.foreign.append(key)
    if unknown:
        pattern = f"^({'|'.join(sorted({re.escape(_group(key, vit)) for key in unknown}))})"
        dropping = replace(choice, drop=(*choice.drop, pattern))
        raise Question(
            path,
            f"unknown keys besides the network, which was recognised as {source.name}: {some(unknown)}",
            choice,
            [Answer("leaves them out, and the report lists them", (dropping,))],
        )
    return done


def _group(key: str, vit: Vit) -> str:
    """Return the start of a key, as the file spells it: the prefix and the first module after it."""
    name = next(plain for plain, held in vit.keys.items() if held == key)[len(vit.prefix) :]
    return key.removesuffix(name) + re.split(r"(?<=[./])", name, maxsplit=1)[0] if key.endswith(name) else key


def _asked_for(vit: Vit, kept: set[str], choice: Choice, path: Any) -> dict[str, str]:
    """Return key -> reason for what the user drops."""
    asked: dict[str, str] = {}
    for pattern in choice.drop:
        found = [key for key in vit.state if isinstance(key, str) and re.search(pattern, key)]
        wrong = [key for key in found if key in kept]
        if wrong or not found:
            problem = (
                f"matches {some(wrong)}; the network's tensors are never dropped" if wrong else "matches no key there"
            )
            without = replace(choice, drop=tuple(other for other in choice.drop if other != pattern))
            raise Question(path, f"--drop {pattern} {problem}", choice, [Answer("the rest as before", (without,))])
        asked |= {key: dropped_by(pattern) for key in found if key not in asked}
    return asked

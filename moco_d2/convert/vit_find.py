"""Recognition of the wanted ViT in a checkpoint, and of its source, by the same rules as for ResNets.

A network counts as a ViT if it has a patch projection and a first block in a known spelling. Whether it is complete and
plain is decided after the choice, so that the refusal can say what it is instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.find import (
    as_tensor,
    clean_prefix,
    find_backbones,
    find_places,
    is_plain,
    joined,
    selected,
    unique_prefix,
    unwrapped,
)
from moco_d2.convert.names import Row
from moco_d2.convert.recognise import check_others, shows, to_try
from moco_d2.convert.sources import ANY, TARGET_NETWORKS, VIT_SOURCES, VIT_UNSUPPORTED, VitSource
from moco_d2.convert.vit_names import (
    BESIDE,
    BESIDE_KEY,
    IN_DETECTOR,
    LAST_NORM,
    VIT_NAMINGS,
    VitNaming,
    detectron2_name,
)
from moco_d2.facts import BackboneFacts, ViTFacts
from moco_d2.io.checkpoints import CheckpointError, some
from moco_d2.layers.vit import sincos_position


@dataclass(frozen=True)
class Vit:
    """A ViT in a checkpoint, perhaps incomplete.

    Attributes:
        place: dotted path of the mapping that holds it.
        state: that mapping.
        keys: key without wrappers -> key in the file.
        prefix: what its keys start with.
        naming: how they are spelled after the prefix.
        depth: number of blocks.
    """

    place: str
    state: Mapping[Any, Any]
    keys: dict[str, str]
    prefix: str
    naming: VitNaming
    depth: int

    @property
    def where(self) -> str:
        """Place and prefix."""
        return joined(self.place, self.prefix)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The names of the tensors that are there, in timm's order; three rows of one name are to be joined."""
        named = (
            Row(self.keys.get(self.prefix + own, ""), name, detectron2_name(name))
            for name, spelled in self.naming.names(self.depth).items()
            for own in spelled
        )
        return tuple(row for row in named if row.key)

    @cached_property
    def missing(self) -> dict[str, str]:
        """What is not there: key without wrappers -> timm's name."""
        return {
            self.prefix + own: name
            for name, spelled in self.naming.names(self.depth).items()
            for own in spelled
            if self.prefix + own not in self.keys
        }

    @property
    def inside(self) -> dict[str, str]:
        """The keys under the prefix, without it -> as the file spells them."""
        return {plain[len(self.prefix) :]: key for plain, key in self.keys.items() if plain.startswith(self.prefix)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return timm's name -> tensor; separate queries, keys and values are joined."""
        joint: dict[str, list[torch.Tensor]] = {}
        for row in self.rows:
            joint.setdefault(row.torchvision, []).append(as_tensor(self.state[row.key]))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in joint.items()}


@dataclass(frozen=True)
class VitMatch:
    """A ViT and the source that it was recognised as.

    Attributes:
        source: the record.
        vit: the network.
        also: names of other sources that fit as well.
    """

    source: VitSource
    vit: Vit
    also: tuple[str, ...] = ()


def find_vits(places: Mapping[str, Mapping[Any, Any]], states: Mapping[str, dict[str, str]]) -> Iterator[Vit]:
    """Yield every network that begins as a ViT, whatever its prefix and naming.

    Args:
        places: of :func:`moco_d2.convert.find.find_places`.
        states: place -> key without wrappers -> key in the file.
    """
    for place, keys in states.items():
        for naming in VIT_NAMINGS:
            stem = f"{naming.patch}weight"
            for plain in keys:
                prefix = plain.removesuffix(stem)
                if plain.endswith(stem) and prefix + naming.probe in keys and (not prefix or prefix[-1] in "./"):
                    yield Vit(place, places[place], keys, prefix, naming, _depth(keys, prefix, naming))


def _depth(keys: Mapping[str, str], prefix: str, naming: VitNaming) -> int:
    start, _, end = naming.block.partition("{b}")
    block = re.compile(re.escape(prefix + start) + r"(\d{1,4})" + re.escape(end))
    return 1 + max(int(found[1]) for key in keys if (found := block.match(key)))


def find_all(
    checkpoint: Mapping[Any, Any], path: Any, choice: Choice
) -> tuple[dict[str, Mapping[Any, Any]], dict[str, dict[str, str]]]:
    """Return the places of a file, and the keys of each without wrappers.

    The class token and the last norm of a converted file are beside ``model``; here they are in it.
    """
    places = find_places(checkpoint)
    if "facts" in checkpoint and "model" in places and set(places.get(BESIDE_KEY, "?")) <= set(BESIDE):
        beside = places.pop(BESIDE_KEY)
        places["model"] = {**places["model"], **{IN_DETECTOR + name: value for name, value in beside.items()}}
    return places, {place: unwrapped(state, path, choice) for place, state in places.items()}


def is_vit(checkpoint: Mapping[Any, Any], path: Any, choice: Choice, stated: BackboneFacts | None) -> bool:
    """Return whether the wanted network is a ViT: by the file's facts, the user's word, or else the keys.

    Raises:
        Question: the user's word is a ResNet, and the file holds a ViT.
    """
    if stated is not None:
        return isinstance(stated, ViTFacts)
    if choice.source in [source.key for source in VIT_SOURCES]:
        return True
    places, states = find_all(checkpoint, path, choice)
    vits = list(find_vits(places, states))
    resnets = (
        [net for group_norm in (False, True) for net in find_backbones(places, states, group_norm)] if vits else []
    )
    of_prefix = selected(choice.prefix, vits), selected(choice.prefix, resnets)
    chosen, others = of_prefix if any(of_prefix) else (vits, resnets)  # a mistyped prefix
    holds = bool(chosen) and not others
    if holds and choice.source:
        answer = Answer("what the file itself shows", (replace(choice, source=""),))
        raise Question(path, f"--source {choice.source} means a ResNet, and it holds a ViT", choice, [answer])
    return holds


def recognise_vit(checkpoint: Mapping[Any, Any], path: Any, choice: Choice, stated: ViTFacts | None = None) -> VitMatch:
    """Return the ViT to convert and its source.

    Args:
        checkpoint: the file's content.
        path: the file, for messages.
        choice: what the user says.
        stated: the file's own facts, which settle the input.

    Raises:
        CheckpointError: no complete plain ViT is of a known source, or several could be meant.
    """
    places, states = find_all(checkpoint, path, choice)
    every = list(find_vits(places, states))
    sources = to_try(VIT_SOURCES, checkpoint, path, choice)
    chosen = selected(choice.prefix, every)
    if not chosen:
        raise _none(every, sources, choice, path)
    fitting = _fitting(sources, checkpoint, chosen, choice)
    if not fitting:
        check_plain(chosen[0], path)
        check_complete(chosen[0], choice.prefix is None, path)
        raise _unknown_place(chosen, every, choice, path)
    vit = fitting[0][1]
    candidates = [source for source, fits in fitting if fits is vit]
    # A fixed position embedding says more than a classifier.
    shown = [source for source in candidates if source.position]
    candidates = shown or [source for source in candidates if source.has_signature] or candidates
    check_plain(vit, path)
    check_complete(vit, candidates[0].partial, path)
    if not choice.source:
        complete = [v for v in chosen if not v.missing and plain_enough(v)]
        check_others(candidates[0], vit, complete, choice, path)
    if stated is None:
        _check_input(candidates, vit, every, choice, path)
    source = candidates[0]
    return VitMatch(source, vit, tuple(s.name for s in candidates[1:] if s.name != source.name))


def _fitting(
    sources: Sequence[VitSource], checkpoint: Mapping[Any, Any], vits: Sequence[Vit], choice: Choice
) -> list[tuple[VitSource, Vit]]:
    """Return (source, network) in the order of precedence."""
    fitting = [
        (replace(source, prefix=vit.prefix) if source.prefix == ANY else source, vit)
        for source in sources
        for place in source.containers
        for vit in vits
        if vit.place == place and vit.naming in source.namings and shows(source, vit, checkpoint, choice)
        if choice.source or not source.position or has_position(vit, source.position)
    ]
    if fitting or choice.prefix is None:
        return fitting
    # No record has this prefix: the named one, or those that show no project, supply the rest.
    vit = vits[0]
    alike = [source for source in sources if vit.naming in source.namings and (choice.source or _plain(source))]
    return [(_at(source, vit, bool(choice.source)), vit) for source in alike]


def _plain(source: VitSource) -> bool:
    return source.key in ("dino-vit-backbone", "transformers-vit", "torchvision-vit")


def _at(source: VitSource, vit: Vit, named: bool) -> VitSource:
    """Return a record for a network at a place that no record has."""
    here = replace(source, prefix=vit.prefix, containers=(vit.place,), on_request=True)
    if named:
        return here
    return replace(
        here,
        name=f"ViT under `{vit.prefix}`" if vit.prefix else f"ViT in {vit.place}",
        origin=f"{vit.where}*, method unknown",
        arxiv="",
        encoder="",
        notes=(f"the input is assumed to be {source.pixels}",),
    )


def has_position(vit: Vit, whose: str) -> bool:
    """Return whether a ViT has the fixed sine-cosine position embedding of MoCo v3 or MAE.

    Both give the class token zeros. MoCo v3 (arXiv 2104.02057) codes the row first, MAE (arXiv 2111.06377) the column.
    """
    key = vit.keys.get(vit.prefix + vit.naming.pos_embed)
    held = as_tensor(vit.state[key]) if key else torch.empty(0)
    side = round(max(held.shape[1] - 1, 0) ** 0.5) if held.ndim == 3 else 0
    if not is_plain(held) or not side or side**2 + 1 != held.shape[1] or held.shape[2] % 4:
        return False
    wanted = sincos_position(side, held.shape[2])
    if whose == "mae":
        wanted = torch.cat(wanted.chunk(2, dim=2)[::-1], dim=2)
    return bool(torch.allclose(held.float(), wanted, atol=1e-3))


def plain_enough(vit: Vit) -> bool:
    """Return whether nothing inside a network shows that it is no plain ViT."""
    return _unlike(vit) is None


def _unlike(vit: Vit) -> str | None:
    for kind in VIT_UNSUPPORTED:
        shown = next((key for name, key in vit.inside.items() if re.search(kind.pattern, name)), None)
        if shown is not None:
            return f"{kind.found}, as `{shown}` shows; {kind.advice}"
    return None


def check_plain(vit: Vit, path: Any) -> None:
    """Refuse a network that only begins as a plain ViT.

    Raises:
        CheckpointError: it is of another kind, which the message names.
    """
    unlike = _unlike(vit)
    if unlike:
        raise CheckpointError(f"{path}: {unlike}")


def check_complete(vit: Vit, partial: bool, path: Any) -> None:
    """Refuse a ViT that lacks tensors; the last norm may be replaced by a classifier's (``fc_norm``).

    Args:
        vit: the network.
        partial: whether it may lack the class token and the last norm.
        path: for messages.

    Raises:
        CheckpointError: it is incomplete.
    """
    allowed = BESIDE if partial else LAST_NORM if "fc_norm.weight" in vit.inside else ()
    missing = [key for key, name in vit.missing.items() if name not in allowed]
    if missing:
        raise CheckpointError(
            f"{path}: an incomplete ViT of {vit.depth} blocks: {len(missing)} of its {len(missing) + len(vit.rows)} "
            f"tensors are missing: {some(missing)}; only a plain, complete ViT can be converted (with a class token, a "
            "position embedding and biases): save the whole network's state_dict()"
        )


def _check_input(candidates: Sequence[VitSource], vit: Vit, every: Sequence[Vit], choice: Choice, path: Any) -> None:
    """Ask for the input if neither the weights nor a sidecar file show it."""
    if len({s.pixels for s in candidates}) < 2 or candidates[0].sidecars(path).pixels:
        return
    prefix = unique_prefix(vit, every)
    answers = [
        Answer(f"{s.name}: {s.pixels}", (named := replace(choice, source=s.key), replace(named, prefix=prefix)))
        for s in candidates
    ]
    raise Question(path, "the weights do not show which input they need", choice, answers)


def _none(every: Sequence[Vit], sources: Sequence[VitSource], choice: Choice, path: Any) -> CheckpointError:
    """Say that no ViT is where the user or the file's facts say."""
    if choice.prefix is not None:
        found = f"no ViT under `{clean_prefix(choice.prefix)}.` (--prefix {choice.prefix})"
        if every:
            return _unknown_place(every, every, replace(choice, prefix=None), path, found, choice)
        return CheckpointError(f"{path}: {found}, and none elsewhere in the file")
    what = f"--source {choice.source} means a ViT" if choice.source else "its facts are a ViT's"
    declared = f" ({sources[0].declared})" if sources and sources[0].declared else ""
    return CheckpointError(
        f"{path}: {what}{declared}, but no network in it begins as one (a patch projection and blocks, as in timm, "
        "transformers or torchvision)"
    )


def _unknown_place(
    vits: Sequence[Vit],
    every: Sequence[Vit],
    choice: Choice,
    path: Any,
    found: str = "",
    before: Choice | None = None,
) -> CheckpointError:
    """Ask which ViT is meant, if none is where a known source has it."""
    answers = []
    for vit in vits:
        kind = " (by its name a moving average or a student)" if TARGET_NETWORKS.search(vit.where) else ""
        under = f"under `{vit.prefix}`" if vit.prefix else "without a prefix"
        placed = replace(choice, prefix=unique_prefix(vit, every))
        ways = (replace(choice, source=""), placed, replace(placed, source="")) if choice.source else (placed,)
        answers.append(Answer(f"a ViT of {vit.depth} blocks {under} in {vit.place or 'the top level'}{kind}", ways))
    if not found:
        named = f"it does not look like --source {choice.source}"
        found = named if choice.source else "its ViT is at a place that no known source uses"
    return Question(path, found, before or choice, answers)

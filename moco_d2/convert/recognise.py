"""Which network of a checkpoint is wanted, and whose it is, without guessing.

Of the complete ResNets in the file (:mod:`moco_d2.convert.trunk`), the first record of ``SOURCES`` that expects one at
its place decides. What stays open is the user's to say (:class:`Choice`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moco_d2.convert.hub import read_beside
from moco_d2.convert.parts import check_names
from moco_d2.convert.sources import ANY, COMPANIONS, LOOKALIKES, SOURCES, CheckpointSource
from moco_d2.convert.traits import TRAITS, caffe, input_scale
from moco_d2.convert.trunk import Trunk, equal, find_places, find_trunks, unwrap, unwrapped
from moco_d2.facts import CAFFE_BGR, BackboneFacts
from moco_d2.io.checkpoints import CheckpointError, some
from moco_d2.nearest import unknown_name

_NORMS = ("", "GN")


@dataclass(frozen=True)
class Choice:
    """What the user says where the file does not.

    Attributes:
        source: the key of a record of ``SOURCES``.
        prefix: what the keys of the wanted network start with; None: whatever the source says.
        norm: ``GN`` for a network with GroupNorm.
        parts: of a detector, ``fpn`` or ``box_head``, to convert too, where the source pretrains them.
    """

    source: str = ""
    prefix: str | None = None
    norm: str = ""
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the names."""
        keys = [source.key for source in SOURCES]
        if self.source and self.source not in keys:
            raise ValueError(unknown_name("the source", self.source, keys))
        if self.norm not in _NORMS:
            raise ValueError(f"norm is {self.norm!r}; it must be 'GN' or empty")
        check_names(self.parts)


@dataclass(frozen=True)
class Match:
    """A trunk and the source that it was recognised as; ``also`` are other sources that fit as well."""

    source: CheckpointSource
    trunk: Trunk
    also: tuple[str, ...] = ()


def recognise(checkpoint: Mapping[Any, Any], path: Any, choice: Choice, stated: BackboneFacts | None = None) -> Match:
    """Return the network to convert and its source.

    Args:
        checkpoint: the file's content.
        path: the file, for messages and for its name.
        choice: what the user says.
        stated: the file's own facts, which settle what a source's place leaves open.

    Raises:
        CheckpointError: there is no complete ResNet of a known source, or more than one that could be meant.
    """
    _check_twin(checkpoint, path)
    places = find_places(checkpoint)
    states = {place: unwrapped(state, path) for place, state in places.items()}
    trunks = list(find_trunks(places, states, choice.norm == "GN"))
    if choice.prefix is not None:
        wanted = _plain_prefix(choice.prefix)
        trunks = [trunk for trunk in trunks if trunk.prefix == wanted]
    fitting = _fitting(checkpoint, trunks, choice)
    if not fitting:
        raise _not_recognised(checkpoint, states, trunks, path, choice)
    trunk = fitting[0][1]
    candidates = [source for source, fits in fitting if fits is trunk]
    candidates = [source for source in candidates if source.marked] or candidates
    if stated:
        said = stated.pixels, stated.stride_in_1x1
        candidates = [source for source in candidates if (source.pixels, source.stride_in_1x1) == said] or candidates
    else:
        _check_input(candidates, trunk, choice, path)
    source = candidates[0]
    if choice.prefix is None and not choice.source:
        _check_others(source, trunk, trunks, path)
    return Match(source, trunk, tuple(s.name for s in candidates[1:] if s.name != source.name))


def _check_input(candidates: list[CheckpointSource], trunk: Trunk, choice: Choice, path: Any) -> None:
    """Refuse a file whose input is open, or another than that of its source."""
    if len({(s.pixels, s.stride_in_1x1) for s in candidates}) > 1:
        listed = "; ".join(f"--source {s.key} ({s.name}: {_feeding(s)})" for s in candidates)
        raise CheckpointError(f"{path}: the weights do not show which input they need; say it with one of {listed}")
    source = candidates[0]
    if not choice.source and source.pixels != CAFFE_BGR and caffe(trunk):
        raise CheckpointError(
            f"{path}: recognised as {source.name}, but its conv1 and bn1 were trained on inputs that were not divided "
            f"by a std (they varied by about {input_scale(trunk):.0f}); say --source caffe for BGR pixels in 0..255, "
            f"or --source {source.key} if the input was {_feeding(source)} all the same"
        )


def _feeding(source: CheckpointSource) -> str:
    return f"{source.pixels}, stride in the {'1x1' if source.stride_in_1x1 else '3x3'}"


def _plain_prefix(prefix: str) -> str:
    prefix = unwrap(prefix)
    return prefix if not prefix or prefix[-1] in "./" else f"{prefix}."


def _fitting(
    checkpoint: Mapping[Any, Any], trunks: list[Trunk], choice: Choice
) -> list[tuple[CheckpointSource, Trunk]]:
    """Return (source, trunk) in the order of precedence."""
    sources = [s for s in SOURCES if (s.key == choice.source if choice.source else not s.on_request)]
    fitting = [
        # A file of any prefix is marked by nothing that its likes have not.
        (replace(source, prefix=trunk.prefix, beside=()) if source.prefix == ANY else source, trunk)
        for source in sources
        for place in source.nest
        for trunk in trunks
        if trunk.place == place and _fits(source, trunk, checkpoint, choice)
    ]
    if fitting or choice.prefix is None:
        return fitting
    # A prefix that no record knows: the naming says the rest.
    alike = ((_like(sources, trunk, choice), trunk) for trunk in trunks)
    return [(source, trunk) for source, trunk in alike if source is not None][:1]


def _like(sources: list[CheckpointSource], trunk: Trunk, choice: Choice) -> CheckpointSource | None:
    """Return a record for a network at a place that none knows, after the plainest one of its naming."""
    alike = [source for source in sources if _same_naming(source, trunk)]
    plain = [source for source in alike if not source.marked and not source.prefix and "" in source.nest]
    like = next(iter(plain + alike), None)
    if like is None or choice.source:
        return like and replace(like, prefix=trunk.prefix)
    return replace(
        like,
        name=f"network under `{trunk.prefix}`",
        origin=f"{trunk.where}*, no method's mark",
        arxiv="",
        variants=(),
        prefix=trunk.prefix,
        notes=(f"the input is assumed to be that of {like.name}: {_feeding(like)}",),
    )


def _same_naming(source: CheckpointSource, trunk: Trunk) -> bool:
    return trunk.naming == source.naming.with_statistics(not trunk.group_norm)


def _fits(source: CheckpointSource, trunk: Trunk, checkpoint: Mapping[Any, Any], choice: Choice) -> bool:
    if not _same_naming(source, trunk):
        return False
    if source.prefix == ANY:
        if COMPANIONS.search(trunk.where):
            return False
    elif source.prefix != trunk.prefix:
        return False
    if choice.source:  # the user's word stands for the marks
        return True
    return (
        all(
            any(re.fullmatch(pattern, str(key)) for key in checkpoint if isinstance(key, str))
            for pattern in source.beside
        )
        and not (
            source.without and any(re.fullmatch(source.without, str(k)) and _filled(v) for k, v in checkpoint.items())
        )
        and all(any(re.search(mark, key) for key in trunk.keys) for mark in source.marks)
        and not (source.never and any(re.search(source.never, key) for key in trunk.keys))
        and (not source.trait or TRAITS[source.trait](trunk))
    )


def _filled(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _check_others(source: CheckpointSource, trunk: Trunk, trunks: list[Trunk], path: Any) -> None:
    """Refuse a file with another network that might be meant."""
    others = [
        other
        for other in trunks
        if other.where != trunk.where
        and not COMPANIONS.search(other.where)
        and not (source.knows and re.search(source.knows, other.where))
        and not equal(trunk, other)
    ]
    if others:
        listed = ", ".join(
            f"--prefix {t.prefix or chr(39) * 2} (in {t.place or 'the top level'})" for t in (trunk, *others)
        )
        raise CheckpointError(f"{path}: {len(others) + 1} different complete ResNets; say which is meant: {listed}")


_TWIN = re.compile(r"(resnet|resnext)(aa|blur)\d|(resnet|resnext)\d+(aa|blur)", re.IGNORECASE)


def _check_twin(checkpoint: Mapping[Any, Any], path: Any) -> None:
    """Refuse networks that only a name tells from torchvision's: the file's, or the architecture's."""
    arguments = checkpoint.get("args")
    arguments = getattr(arguments, "state", arguments)
    told = [Path(path).name, checkpoint.get("arch"), read_beside(path).get("architecture")]
    told += [arguments.get(name) for name in ("model", "arch")] if isinstance(arguments, Mapping) else []
    twin = next((name for name in told if isinstance(name, str) and _TWIN.search(name)), None)
    if twin:
        raise CheckpointError(
            f"{path}: an anti-aliased ResNet, as the name `{twin}` shows; its tensors fit Detectron2's ResNet, but its "
            "features differ by 10 to 50 %; use the plain one"
        )


def look_alike(keys: Any, path: Any) -> CheckpointError | None:
    """Return the refusal of a known other network, if one of the keys shows it."""
    keys = list(keys)
    for lookalike in LOOKALIKES:
        shown = next((key for key in keys if re.search(lookalike.pattern, unwrap(key))), None)
        if shown is not None:
            return CheckpointError(f"{path}: {lookalike.found}, as `{shown}` shows; {lookalike.advice}")
    return None


def _not_recognised(
    checkpoint: Mapping[Any, Any], states: Mapping[str, dict[str, str]], trunks: list[Trunk], path: Any, choice: Choice
) -> CheckpointError:
    """Say what the checkpoint is, if it is known; else what is missing of a network; else what was found."""
    refusal = look_alike((key for keys in states.values() for key in keys.values()), path)
    if refusal:
        return refusal
    if trunks:
        found = "; ".join(
            f"a complete ResNet-{t.depth} under `{t.prefix or 'no prefix'}` in {t.place or 'the top level'}"
            + (" (by its name a moving average or a student)" if COMPANIONS.search(t.where) else "")
            for t in trunks
        )
        if choice.source:
            name = next(source.name for source in SOURCES if source.key == choice.source)
            return CheckpointError(
                f"{path}: not what --source {choice.source} expects ({name}); {found}; leave the flag out, or "
                "use --prefix"
            )
        return CheckpointError(
            f"{path}: {found}; no known source keeps its network there, so say that it is meant: --prefix "
            f"{trunks[0].prefix or chr(39) * 2} (the input is then torchvision's, or that of a --source)"
        )
    if not choice.norm and _is_group_norm(states):
        return CheckpointError(
            f"{path}: a ResNet with GroupNorm (its norms have no running_mean); Detectron2's default is a frozen "
            "BatchNorm; convert it with --norm GN, for MODEL.RESNETS.NORM GN"
        )
    if choice.prefix is not None:
        return CheckpointError(f"{path}: no complete ResNet under --prefix {choice.prefix}; tensors: {_groups(states)}")
    incomplete = _incomplete(states, path)
    if incomplete:
        return incomplete
    top = some(key if isinstance(key, str) else type(key).__name__ for key in checkpoint) or "nothing"
    looked_for = "; ".join(dict.fromkeys(source.describe() for source in SOURCES))
    return CheckpointError(
        f"{path}: no ResNet that is known; top-level keys: {top}; tensors: {_groups(states) or 'none'}; "
        f"looked for {looked_for}"
    )


def _is_group_norm(states: Mapping[str, dict[str, str]]) -> bool:
    return any(find_trunks({place: {} for place in states}, states, group_norm=True))


def _incomplete(states: Mapping[str, dict[str, str]], path: Any) -> CheckpointError | None:
    """Name the source of which most is there, by the share of its tensors, and what is missing."""
    best: tuple[tuple[float, bool], CheckpointSource, int, list[str]] | None = None
    for source in SOURCES:
        for place in source.nest:
            keys = states.get(place)
            if not keys or source.prefix == ANY or source.on_request:
                continue
            wanted = {key.removeprefix(source.prefix) for key in keys if key.startswith(source.prefix)}
            depth, missing = source.naming.nearest(wanted)
            share = len(missing) / len(source.naming.names(depth)), source.marked
            if share[0] < 1 and (best is None or share < best[0]):
                best = share, source, depth, missing
    if best is None:
        return None
    _, source, depth, missing = best
    return CheckpointError(
        f"{path}: an incomplete {source.name}: {len(missing)} of the {len(source.naming.names(depth))} tensors of a "
        f"ResNet-{depth} are missing: {some(source.prefix + name for name in missing)}; found {_groups(states)}"
    )


def _groups(states: Mapping[str, dict[str, str]]) -> str:
    """Return `place: first two parts of the keys` with counts, the most frequent first."""
    counts: Counter[str] = Counter()
    for place, keys in states.items():
        for key in keys.values():
            parts = key.split(".")
            start = f"{'.'.join(parts[:2])}.*" if len(parts) > 2 else key
            counts[f"{place}: {start}" if place else start] += 1
    return some(f"{prefix} ({count})" for prefix, count in counts.most_common())

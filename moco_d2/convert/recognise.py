"""Which network of a checkpoint is wanted, and whose it is, without guessing.

Of the complete ResNets in the file (:mod:`moco_d2.convert.trunk`), the first record of ``SOURCES`` that expects one at
its place decides. What stays open is the user's to say (:class:`Choice`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.hub import read_beside
from moco_d2.convert.refusals import not_recognised
from moco_d2.convert.sources import ANY, COMPANIONS, SOURCES, CheckpointSource
from moco_d2.convert.traits import TRAITS, caffe, input_scale
from moco_d2.convert.trunk import Trunk, equal, find_places, find_trunks, said_prefix, selected, unwrapped
from moco_d2.facts import CAFFE_BGR, BackboneFacts
from moco_d2.io.checkpoints import CheckpointError


@dataclass(frozen=True)
class Match:
    """A trunk and the source that it was recognised as.

    Attributes:
        source: the record.
        trunk: the network.
        also: names of other sources that fit as well.
        average: key of the source that takes the moving average of this network, where the file has it.
    """

    source: CheckpointSource
    trunk: Trunk
    also: tuple[str, ...] = ()
    average: str = ""


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
    states = {place: unwrapped(state, path, choice) for place, state in places.items()}
    every = list(find_trunks(places, states, choice.norm == "GN"))
    trunks = selected(choice.prefix, every)
    fitting = _fitting(checkpoint, trunks, choice)
    if not fitting:
        raise not_recognised(checkpoint, places, states, choice, path)
    trunk = fitting[0][1]
    candidates = [source for source, fits in fitting if fits is trunk]
    candidates = [source for source in candidates if source.marked] or candidates
    if not choice.source:
        _check_others(candidates[0], trunk, trunks, choice, path)
    if stated:
        said = stated.pixels, stated.stride_in_1x1
        candidates = [source for source in candidates if (source.pixels, source.stride_in_1x1) == said] or candidates
    else:
        _check_input(candidates, trunk, every, choice, path)
    source = candidates[0]
    also = tuple(s.name for s in candidates[1:] if s.name != source.name)
    average = Choice(source=source.average)
    return Match(source, trunk, also, source.average if average.source and _fitting(checkpoint, every, average) else "")


def _check_input(
    candidates: Sequence[CheckpointSource], trunk: Trunk, trunks: Sequence[Trunk], choice: Choice, path: Any
) -> None:
    """Refuse a file whose input is open, or another than that of its source."""

    def answer(key: str, words: str) -> Answer:
        of_source = replace(choice, source=key)
        return Answer(words, (of_source, replace(of_source, prefix=said_prefix(trunk, trunks))))

    if len({(s.pixels, s.stride_in_1x1) for s in candidates}) > 1:
        names = {s.key: s.name for s in SOURCES}  # a candidate may be named after its prefix
        answers = [answer(s.key, f"{names[s.key]}: {_feeding(s)}") for s in candidates]
        raise Question(path, "the weights do not show which input they need", choice, answers)
    source = candidates[0]
    if not choice.source and source.pixels != CAFFE_BGR and caffe(trunk):
        raise Question(
            path,
            f"recognised as {source.name}, but its conv1 and bn1 were trained on inputs that were not divided by a std "
            f"(they varied by about {input_scale(trunk):.0f})",
            choice,
            [
                answer("caffe", "for BGR pixels in 0..255"),
                answer(source.key, f"if the input was {_feeding(source)} all the same"),
            ],
        )


def _feeding(source: CheckpointSource) -> str:
    return f"{source.pixels}, stride in the {'1x1' if source.stride_in_1x1 else '3x3'}"


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
    if fitting or choice.prefix is None or not trunks:
        return fitting
    # A prefix that no record knows: the naming says the rest.
    trunk = trunks[0]
    return [(source, trunk) for source in _like(sources, trunk, choice)]


def _like(sources: Sequence[CheckpointSource], trunk: Trunk, choice: Choice) -> list[CheckpointSource]:
    """Return records for a network at a place that none knows, after the plainest ones of its naming."""
    alike = [source for source in sources if _same_naming(source, trunk)]
    plain = [source for source in alike if not source.marked and not source.prefix and "" in source.nest]
    if choice.source:
        return [replace(source, prefix=trunk.prefix, beside=()) for source in alike]
    name = f"network under `{trunk.prefix}`" if trunk.prefix else f"network in {trunk.place}"
    return [
        replace(
            like,
            name=name,
            origin=f"{trunk.where}*, no method's mark",
            arxiv="",
            nest=(trunk.place,),
            beside=(),
            marks=(),
            trait="",
            variants=(),
            prefix=trunk.prefix,
            encoder="",
            notes=(f"the input is assumed to be that of {like.name}: {_feeding(like)}",),
        )
        for like in plain or alike
    ]


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


def _check_others(source: CheckpointSource, trunk: Trunk, trunks: Sequence[Trunk], choice: Choice, path: Any) -> None:
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
        answers = [
            Answer(f"in {t.place or 'the top level'}", (replace(choice, prefix=said_prefix(t, trunks)),))
            for t in (trunk, *others)
        ]
        raise Question(path, f"{len(others) + 1} different complete ResNets, of which one is wanted", choice, answers)


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

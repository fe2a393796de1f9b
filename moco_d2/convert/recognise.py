"""Recognition of the wanted network in a checkpoint, and of its source, without guessing.

Of the complete ResNets in the file (:mod:`moco_d2.convert.find`), the first record of ``SOURCES`` that expects one at
its place decides. If that leaves a question, the user is asked (:class:`Choice`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.find import (
    AnyNetwork,
    Backbone,
    Network,
    equal,
    find_backbones,
    find_places,
    selected,
    unique_prefix,
    unwrapped,
)
from moco_d2.convert.fingerprints import FINGERPRINTS, caffe, input_scale
from moco_d2.convert.refusals import not_recognised
from moco_d2.convert.sidecars import read_sidecar
from moco_d2.convert.sources import ANY, SOURCES, TARGET_NETWORKS, CheckpointSource, VitSource
from moco_d2.facts import CAFFE_BGR, ResNetFacts
from moco_d2.io.checkpoints import CheckpointError

AnySource = TypeVar("AnySource", bound=CheckpointSource)


@dataclass(frozen=True)
class Match:
    """A network and the source that it was recognised as.

    Attributes:
        source: the record.
        backbone: the network.
        also: names of other sources that fit as well.
        average: key of the source that takes the moving average of this network, if the file has it.
    """

    source: CheckpointSource
    backbone: Backbone
    also: tuple[str, ...] = ()
    average: str = ""


def recognise(checkpoint: Mapping[Any, Any], path: Any, choice: Choice, stated: ResNetFacts | None = None) -> Match:
    """Return the network to convert and its source.

    Args:
        checkpoint: the file's content.
        path: the file, for messages and for its name.
        choice: what the user says.
        stated: the file's own facts, which settle what a source's place leaves open.

    Raises:
        CheckpointError: no complete ResNet is of a known source, or several could be meant.
    """
    _check_twin(checkpoint, path)
    places = find_places(checkpoint)
    states = {place: unwrapped(state, path, choice) for place, state in places.items()}
    every = list(find_backbones(places, states, choice.norm == "GN"))
    backbones = selected(choice.prefix, every)
    sources = to_try(SOURCES, checkpoint, path, choice)
    fitting = _fitting(sources, checkpoint, backbones, choice)
    if not fitting:
        raise not_recognised(checkpoint, places, states, choice, sources, path)
    backbone = fitting[0][1]
    candidates = [source for source, fits in fitting if fits is backbone]
    candidates = [source for source in candidates if source.has_signature] or candidates
    if not choice.source:
        check_others(candidates[0], backbone, backbones, choice, path)
    if stated:
        settled = stated.pixels, stated.stride_in_1x1
        candidates = [s for s in candidates if (s.pixels, s.stride_in_1x1) == settled] or candidates
    else:
        _check_input(candidates, backbone, every, choice, path)
    source = candidates[0]
    also = tuple(s.name for s in candidates[1:] if s.name != source.name)
    average = [s for s in SOURCES if s.key == source.average]
    has_average = average and _fitting(average, checkpoint, every, Choice(source=source.average))
    return Match(source, backbone, also, source.average if has_average else "")


def to_try(records: Sequence[AnySource], checkpoint: Mapping[Any, Any], path: Any, choice: Choice) -> list[AnySource]:
    """Return the records to try: one alone, if the user or the file names it."""
    sources = [s for s in records if (s.key == choice.source if choice.source else not s.on_request)]
    sources = [_adapted(source, checkpoint, path, choice) for source in sources]
    return [source for source in sources if source.declared and choice.prefix is None] or sources


def _adapted(source: AnySource, checkpoint: Mapping[Any, Any], path: Any, choice: Choice) -> AnySource:
    """Return a record as the file declares it; a prefix of the user's makes up for a damaged declaration."""
    try:
        return source.adapt(source, checkpoint, path) if source.adapt else source
    except CheckpointError:
        if choice.prefix is None:
            raise
        return source


def _check_input(
    candidates: Sequence[CheckpointSource], backbone: Backbone, backbones: Sequence[Backbone], choice: Choice, path: Any
) -> None:
    """Refuse a file whose input is not known, or is not the input of its source."""

    def answer(key: str, words: str) -> Answer:
        of_source = replace(choice, source=key)
        return Answer(words, (of_source, replace(of_source, prefix=unique_prefix(backbone, backbones))))

    if len({(s.pixels, s.stride_in_1x1) for s in candidates}) > 1:
        names = {s.key: s.name for s in SOURCES}  # a candidate may be named after its prefix
        answers = [answer(s.key, f"{names[s.key]}: {_feeding(s)}") for s in candidates]
        raise Question(path, "the weights do not show which input they need", choice, answers)
    source = candidates[0]
    if not choice.source and source.pixels != CAFFE_BGR and caffe(backbone):
        raise Question(
            path,
            f"recognised as {source.name}, but its conv1 and bn1 were trained on inputs that were not divided by a std "
            f"(they varied by about {input_scale(backbone):.0f})",
            choice,
            [
                answer("caffe", "for BGR pixels in 0..255"),
                answer(source.key, f"if the input was {_feeding(source)} all the same"),
            ],
        )


def _feeding(source: CheckpointSource) -> str:
    return f"{source.pixels}, stride in the {'1x1' if source.stride_in_1x1 else '3x3'}"


def _fitting(
    sources: Sequence[CheckpointSource], checkpoint: Mapping[Any, Any], backbones: Sequence[Backbone], choice: Choice
) -> list[tuple[CheckpointSource, Backbone]]:
    """Return (source, network) in the order of precedence."""
    fitting = [
        # For a record of any prefix, top-level keys are no signature: many files have them.
        (replace(source, prefix=backbone.prefix, top_level=()) if source.prefix == ANY else source, backbone)
        for source in sources
        for place in source.containers
        for backbone in backbones
        if backbone.place == place and _fits(source, backbone, checkpoint, choice)
    ]
    if fitting or choice.prefix is None or not backbones:
        return fitting
    # No record has this prefix: records of the same naming supply the rest.
    return [(source, backbones[0]) for source in _alike(sources, backbones[0], choice)]


def _alike(sources: Sequence[CheckpointSource], backbone: Backbone, choice: Choice) -> list[CheckpointSource]:
    """Return records for a network at a place that no record has, made from the plainest records of its naming."""
    alike = [source for source in sources if _same_naming(source, backbone)]
    plain = [source for source in alike if not source.has_signature and not source.prefix and "" in source.containers]
    if choice.source:
        return [replace(source, prefix=backbone.prefix, top_level=(), on_request=True) for source in alike]
    name = f"network under `{backbone.prefix}`" if backbone.prefix else f"network in {backbone.place}"
    return [
        replace(
            like,
            name=name,
            origin=f"{backbone.where}*, method unknown",
            arxiv="",
            containers=(backbone.place,),
            top_level=(),
            signature=(),
            fingerprint="",
            variants=(),
            prefix=backbone.prefix,
            encoder="",
            on_request=True,
            notes=(f"the input is assumed to be that of {like.name}: {_feeding(like)}",),
        )
        for like in plain or alike
    ]


def _same_naming(source: CheckpointSource, backbone: Backbone) -> bool:
    return backbone.naming == source.naming.with_statistics(not backbone.group_norm)


def _fits(source: CheckpointSource, backbone: Backbone, checkpoint: Mapping[Any, Any], choice: Choice) -> bool:
    if not _same_naming(source, backbone) or not shows(source, backbone, checkpoint, choice):
        return False
    # The user's word replaces the signature.
    return bool(choice.source) or not source.fingerprint or FINGERPRINTS[source.fingerprint](backbone)


def shows(source: CheckpointSource, network: Network, checkpoint: Mapping[Any, Any], choice: Choice) -> bool:
    """Return whether a network's prefix, the keys beside it and those of the file are as a record expects."""
    if source.prefix == ANY:
        if TARGET_NETWORKS.search(network.where):
            return False
    elif source.prefix != network.prefix:
        return False
    if choice.source:
        return True
    top_level = [key for key in checkpoint if isinstance(key, str)]
    return (
        all(any(re.fullmatch(pattern, key) for key in top_level) for pattern in source.top_level)
        and not (source.without and any(re.fullmatch(source.without, k) and _filled(checkpoint[k]) for k in top_level))
        and all(any(re.search(pattern, key) for key in network.keys) for pattern in source.signature)
        and not (source.never and any(re.search(source.never, key) for key in network.keys))
    )


def _filled(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def check_others(
    source: CheckpointSource, backbone: AnyNetwork, backbones: Sequence[AnyNetwork], choice: Choice, path: Any
) -> None:
    """Refuse a file with another network that might be meant.

    Raises:
        Question: it has one.
    """
    others = [
        other
        for other in backbones
        if other.where != backbone.where
        and not TARGET_NETWORKS.search(other.where)
        and not (source.others and re.search(source.others, other.where))
        and not equal(backbone, other)
    ]
    if others:
        answers = [
            Answer(f"in {found.place or 'the top level'}", (replace(choice, prefix=unique_prefix(found, backbones)),))
            for found in (backbone, *others)
        ]
        raise Question(path, f"it holds {len(others) + 1} different complete {_family(source)}", choice, answers)


def _family(source: CheckpointSource) -> str:
    return "ViTs" if isinstance(source, VitSource) else "ResNets"


_TWIN = re.compile(r"(resnet|resnext)(aa|blur)\d|(resnet|resnext)\d+(aa|blur)", re.IGNORECASE)


def _check_twin(checkpoint: Mapping[Any, Any], path: Any) -> None:
    """Refuse anti-aliased networks, which only a name shows: the file's, or the architecture's."""
    arguments = checkpoint.get("args")
    arguments = getattr(arguments, "state", arguments)
    names = [Path(path).name, checkpoint.get("arch"), read_sidecar(path).get("architecture")]
    names += [arguments.get(name) for name in ("model", "arch")] if isinstance(arguments, Mapping) else []
    twin = next((name for name in names if isinstance(name, str) and _TWIN.search(name)), None)
    if twin:
        raise CheckpointError(
            f"{path}: an anti-aliased ResNet, as the name `{twin}` shows; its tensors fit Detectron2's ResNet, but its "
            "features differ by 10 to 50 %; convert weights of the plain ResNet"
        )

"""The answers to a checkpoint that no record recognises: what it is, what is missing, and what the user can say."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.names import NAMINGS, Naming
from moco_d2.convert.sources import COMPANIONS, INSIDE_HEADS, LOOKALIKES, SOURCES
from moco_d2.convert.trunk import Trunk, clean_prefix, find_trunks, is_tensor, said_prefix, selected, unwrap
from moco_d2.io.checkpoints import CheckpointError, some
from moco_d2.io.unpickle import Stub
from moco_d2.layers.resnet import DEPTHS

_INCOMPLETE = 0.5  # of a network's tensors: of which more is missing is another network
_CANDIDATES = 200  # places where an incomplete network may begin


def look_alike(keys: Iterable[str], path: Any) -> CheckpointError | None:
    """Return the refusal of a known other network, if one of the keys shows it."""
    plain = [(unwrap(key), key) for key in keys]
    for lookalike in LOOKALIKES:
        shown = next((key for name, key in plain if re.search(lookalike.pattern, name)), None)
        if shown is not None:
            return CheckpointError(f"{path}: {lookalike.found}, as `{shown}` shows; {lookalike.advice}")
    return None


def not_recognised(
    checkpoint: Mapping[Any, Any],
    places: Mapping[str, Mapping[Any, Any]],
    states: Mapping[str, dict[str, str]],
    choice: Choice,
    path: Any,
) -> CheckpointError:
    """Say which complete ResNets could be meant and how to say so; else what the file is, or what is missing.

    Args:
        checkpoint: the file's content.
        places: of :func:`moco_d2.convert.trunk.find_places`.
        states: place -> key without wrappers -> key in the file.
        choice: what the user says, with which no network was recognised.
        path: for messages.
    """
    trunks = [t for group_norm in (False, True) for t in find_trunks(places, states, group_norm)]
    if trunks:
        return _which(trunks, states, choice, path)
    refusal = look_alike((key for keys in states.values() for key in keys.values()), path)
    return refusal or _unread(places, path) or _incomplete(states, choice, path) or _nothing(checkpoint, states, path)


def _which(trunks: Sequence[Trunk], states: Mapping[str, dict[str, str]], choice: Choice, path: Any) -> CheckpointError:
    """Ask which of the complete networks is meant."""
    # CMC's halves and CLIP's ResNet have the names of a complete one.
    under = (key for t in trunks for plain, key in t.keys.items() if plain.startswith(t.prefix))
    refusal = look_alike(under, path)
    trunks = list({trunk.where: trunk for trunk in reversed(trunks)}.values())[::-1]  # one may have two namings
    if choice.prefix is not None:
        likeness = difflib.SequenceMatcher(b=clean_prefix(choice.prefix))
        trunks = sorted(trunks, key=lambda trunk: _ratio(likeness, said_prefix(trunk, trunks)), reverse=True)
    answers = []
    for trunk in trunks:
        as_said = replace(choice, norm="GN" if trunk.group_norm else "")
        placed = replace(as_said, prefix=said_prefix(trunk, trunks))
        file_decides, its_own = replace(as_said, source=""), replace(placed, source="")
        # A prefix that is wrong says nothing about the source.
        ways = (as_said, file_decides, placed) if choice.prefix is None else (as_said, placed, file_decides)
        answers.append(Answer(_described(trunk), (*ways, its_own), trunk.where))
    return Question(path, _why(trunks, states, choice), choice, answers, refusal)


def _ratio(likeness: difflib.SequenceMatcher[str], prefix: str) -> float:
    likeness.set_seq1(prefix)
    return likeness.ratio()


def _why(trunks: Sequence[Trunk], states: Mapping[str, dict[str, str]], choice: Choice) -> str:
    """Say why no network was taken, though there are complete ones."""
    chosen = selected(choice.prefix, trunks)
    if choice.prefix is not None and not chosen:
        return _no_prefix(states, choice)
    if not any(trunk.group_norm == (choice.norm == "GN") for trunk in chosen):
        if choice.norm:
            return "not a ResNet with GroupNorm: its norms have a running_mean, as BatchNorm's have"
        return (
            "its norms have no running_mean: a ResNet with GroupNorm, or one with BatchNorm whose statistics were not "
            "saved (state_dict() holds them, named_parameters() does not); if it is GroupNorm, which Detectron2 takes "
            "with MODEL.RESNETS.NORM GN"
        )
    if choice.source:
        name = next(source.name for source in SOURCES if source.key == choice.source)
        return f"not what --source {choice.source} expects ({name})"
    return "no known source keeps a network where this file has one, so say which is meant"


def _described(trunk: Trunk) -> str:
    where = f"under `{trunk.prefix}`" if trunk.prefix else "without a prefix"
    kind = " (by its name a moving average or a student)" if COMPANIONS.search(trunk.where) else ""
    return f"a complete ResNet-{trunk.depth} {where} in {trunk.place or 'the top level'}{kind}"


def _no_prefix(states: Mapping[str, dict[str, str]], choice: Choice) -> str:
    """Say what stands under a prefix that holds no complete network."""
    wanted = clean_prefix(choice.prefix or "")
    if not wanted:
        return "the keys without a prefix are no complete ResNet"
    under = [key for keys in states.values() for key in keys if re.match(f"{re.escape(wanted)}([./]|$)", key)]
    if not under:
        return f"no key starts with `{wanted}.` (--prefix {choice.prefix})"
    missing = _nearest(states, wanted)
    lacks = f": {missing.words}" if missing else ""
    return f"{len(under)} keys start with `{wanted}.`, but they are no complete ResNet{lacks}"


@dataclass(frozen=True)
class _Incomplete:
    """A ResNet of which tensors are missing."""

    place: str
    prefix: str
    naming: Naming
    depth: int
    missing: list[str]

    @property
    def share(self) -> float:
        """What part of the network is missing."""
        return len(self.missing) / len(self.naming.names(self.depth))

    @property
    def words(self) -> str:
        """How many and which."""
        return (
            f"{len(self.missing)} of the {len(self.naming.names(self.depth))} tensors of a ResNet-{self.depth} are "
            f"missing: {some(self.prefix + name for name in self.missing)}"
        )


def _nearest(states: Mapping[str, dict[str, str]], wanted: str | None = None) -> _Incomplete | None:
    """Return the network of which least is missing, or that under a prefix; None where more is missing than there."""
    found: list[_Incomplete] = []
    for place, keys in states.items():
        for naming in NAMINGS:
            for prefix in _beginnings(keys, naming):
                if wanted is None or prefix.rstrip("./") == wanted:
                    there = {name for depth in DEPTHS for name in naming.names(depth) if prefix + name in keys}
                    found.append(_Incomplete(place, prefix, naming, *naming.nearest(there)))
    return min((one for one in found if one.share < _INCOMPLETE), key=lambda one: one.share, default=None)


def _beginnings(keys: Mapping[str, str], naming: Naming) -> Iterable[str]:
    """Return what stands before the first convolutions of a network that may be incomplete."""
    names = naming.names(18)
    ends = (names[0], names[1 + len(naming.norm_tensors)])
    prefixes = (key.removesuffix(end) for key in keys for end in ends if key.endswith(end))
    return itertools.islice(dict.fromkeys(p for p in prefixes if not p or p[-1] in "./"), _CANDIDATES)


def _unread(places: Mapping[str, Mapping[Any, Any]], path: Any) -> CheckpointError | None:
    """Name the tensors of kinds that are not read: they are there, but would be called missing."""
    tensors = [(key, value) for place in places.values() for key, value in place.items() if isinstance(value, Stub)]
    kinds = {key: type(value).__name__.removeprefix("_rebuild_") for key, value in tensors if _is_rebuilt(value)}
    if not kinds:
        return None
    plain = "save them with to_dense()" if any("sparse" in kind for kind in kinds.values()) else "save plain tensors"
    return CheckpointError(
        f"{path}: {len(kinds)} tensors are of a kind that is not read ({some(dict.fromkeys(kinds.values()))}): "
        f"{some(kinds)}; {plain}"
    )


def _is_rebuilt(stub: Stub) -> bool:
    """Return whether a stub stands for a tensor: torch pickles each kind as the call of ``_rebuild_KIND``."""
    return type(stub).__name__.startswith("_rebuild_")


def _incomplete(states: Mapping[str, dict[str, str]], choice: Choice, path: Any) -> CheckpointError | None:
    """Name what is missing of the network of which most is there, and its source."""
    if choice.prefix is not None:
        return CheckpointError(
            f"{path}: {_no_prefix(states, choice)}; the file holds {_groups(states) or 'no tensors'}"
        )
    found = _nearest(states)
    if found is None:
        return None
    name = next(
        (
            s.name
            for s in SOURCES
            if not s.marked and (s.prefix, s.naming) == (found.prefix, found.naming) and found.place in s.nest
        ),
        f"ResNet under `{found.prefix}`",
    )
    return CheckpointError(
        f"{path}: an incomplete {name}: {found.words}; found {_groups(states)}; only a complete ResNet can be "
        "converted: save the whole network's state_dict()"
    )


def _nothing(checkpoint: Mapping[Any, Any], states: Mapping[str, dict[str, str]], path: Any) -> CheckpointError:
    """Say what a file holds in which nothing looks like a ResNet."""
    unnamed = {type(key).__name__ for key, value in checkpoint.items() if not isinstance(key, str) and is_tensor(value)}
    if unnamed:
        return CheckpointError(
            f"{path}: its tensors are named by {' and '.join(sorted(unnamed))}, not by text; save the network's "
            "state_dict(), whose keys are names such as layer1.0.conv1.weight"
        )
    top = some(key if isinstance(key, str) else type(key).__name__ for key in checkpoint) or "nothing"
    names = [unwrap(key) for keys in states.values() for key in keys]
    what = "no ResNet that is known"
    if not names and {"optimizer", "optimizer_states", "param_groups"} & set(map(str, checkpoint)):
        what = "no ResNet, only the state of an optimizer"
    elif names and all(re.search(rf"(^|\.){INSIDE_HEADS.removeprefix('^')}", name) for name in names):
        what = "no ResNet, only a head"
    return CheckpointError(
        f"{path}: {what}; top-level keys: {top}; tensors: {_groups(states) or 'none'}; save the state_dict() of the "
        "whole network: its keys are names such as conv1.weight and layer1.0.conv1.weight in one mapping, or those "
        "of a project in docs/checkpoints.md"
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

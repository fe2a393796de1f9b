"""Refusals of checkpoints that no record recognises: what the file is, what is missing, and what the user can say."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.find import Backbone, clean_prefix, find_backbones, is_tensor, selected, unique_prefix
from moco_d2.convert.names import TORCHVISION, Naming
from moco_d2.convert.sources import (
    INSIDE_HEADS,
    NAMINGS,
    SOURCES,
    TARGET_NETWORKS,
    UNSUPPORTED,
    CheckpointSource,
    unwrap,
)
from moco_d2.io.checkpoints import CheckpointError, some
from moco_d2.io.unpickle import Stub
from moco_d2.layers.resnet import DEPTHS

_INCOMPLETE = 0.5  # of a network's tensors: if more is missing, it is another network
_CANDIDATES = 200  # places where an incomplete network may begin


def unsupported(keys: Iterable[str], path: Any) -> CheckpointError | None:
    """Return the refusal of a known unsupported network, if one of the keys shows it."""
    plain = [(unwrap(key), key) for key in keys]
    for kind in UNSUPPORTED:
        shown = next((key for name, key in plain if re.search(kind.pattern, name)), None)
        if shown is not None:
            return CheckpointError(f"{path}: {kind.found}, as `{shown}` shows; {kind.advice}")
    return None


def not_recognised(
    checkpoint: Mapping[Any, Any],
    places: Mapping[str, Mapping[Any, Any]],
    states: Mapping[str, dict[str, str]],
    choice: Choice,
    sources: Sequence[CheckpointSource],
    path: Any,
) -> CheckpointError:
    """Return the question which complete ResNet is meant, or else say what the file is, or what is missing.

    Args:
        checkpoint: the file's content.
        places: of :func:`moco_d2.convert.find.find_places`.
        states: place -> key without wrappers -> key in the file.
        choice: what the user says, with which no network was recognised.
        sources: the records that were tried.
        path: for messages.
    """
    backbones = [b for group_norm in (False, True) for b in find_backbones(places, states, group_norm)]
    declared = next((source for source in sources if source.declared), None)
    if declared and not any(backbone.prefix == declared.prefix for backbone in backbones):
        return _not_as_declared(declared, states, path)
    if backbones:
        return _which(backbones, states, choice, path)
    refusal = unsupported((key for keys in states.values() for key in keys.values()), path)
    return refusal or _unread(places, path) or _incomplete(states, choice, path) or _nothing(checkpoint, states, path)


def _not_as_declared(source: CheckpointSource, states: Mapping[str, dict[str, str]], path: Any) -> CheckpointError:
    """Say that the network is not where the file itself says that it is."""
    under = [key for keys in states.values() for plain, key in keys.items() if plain.startswith(source.prefix)]
    return unsupported(under, path) or CheckpointError(
        f"{path}: {source.declared}, but {_no_prefix(states, source.prefix)}; convert the backbone.pth in the same "
        "folder, which pretraining wrote with it"
    )


def _which(
    backbones: Sequence[Backbone], states: Mapping[str, dict[str, str]], choice: Choice, path: Any
) -> CheckpointError:
    """Ask which of the complete networks is meant."""
    # CMC's halves and CLIP's ResNet have the names of a complete one.
    refusal = unsupported((key for b in backbones for plain, key in b.keys.items() if plain.startswith(b.prefix)), path)
    backbones = list({b.where: b for b in reversed(backbones)}.values())[::-1]  # one may have two namings
    if choice.prefix is not None:
        likeness = difflib.SequenceMatcher(b=clean_prefix(choice.prefix))
        backbones = sorted(backbones, key=lambda b: _ratio(likeness, unique_prefix(b, backbones)), reverse=True)
    answers = []
    for backbone in backbones:
        as_given = replace(choice, norm="GN" if backbone.group_norm else "")
        placed = replace(as_given, prefix=unique_prefix(backbone, backbones))
        file_decides, its_own = replace(as_given, source=""), replace(placed, source="")
        # A wrong prefix does not mean that the source is wrong too.
        ways = (as_given, file_decides, placed) if choice.prefix is None else (as_given, placed, file_decides)
        answers.append(Answer(_described(backbone), (*ways, its_own), backbone.where))
    return Question(path, _why(backbones, states, choice), choice, answers, refusal)


def _ratio(likeness: difflib.SequenceMatcher[str], prefix: str) -> float:
    likeness.set_seq1(prefix)
    return likeness.ratio()


def _why(backbones: Sequence[Backbone], states: Mapping[str, dict[str, str]], choice: Choice) -> str:
    """Say why no network was taken, though there are complete ones."""
    chosen = selected(choice.prefix, backbones)
    if choice.prefix is not None and not chosen:
        return _no_prefix(states, choice.prefix, f" (--prefix {choice.prefix})")
    if not any(backbone.group_norm == (choice.norm == "GN") for backbone in chosen):
        if choice.norm:
            return "it is not a ResNet with GroupNorm: its norms have a running_mean, as BatchNorm has"
        return (
            "its norms have no running_mean: it is a ResNet with GroupNorm, or one with BatchNorm whose statistics "
            "were not saved (state_dict() holds them, named_parameters() does not); if it has GroupNorm, which "
            "Detectron2 builds with MODEL.RESNETS.NORM GN"
        )
    if choice.source:
        name = next(source.name for source in SOURCES if source.key == choice.source)
        return f"it does not look like --source {choice.source} ({name})"
    return "it holds a ResNet at a place that no known source uses; say that it is the wanted one"


def _described(backbone: Backbone) -> str:
    where = f"under `{backbone.prefix}`" if backbone.prefix else "without a prefix"
    kind = " (by its name a moving average or a student)" if TARGET_NETWORKS.search(backbone.where) else ""
    return f"a complete ResNet-{backbone.depth} {where} in {backbone.place or 'the top level'}{kind}"


def _no_prefix(states: Mapping[str, dict[str, str]], prefix: str, given: str = "") -> str:
    """Say what is under a prefix that holds no complete network; ``given``: how the user named it."""
    wanted = clean_prefix(prefix)
    if not wanted:
        return "the keys without a prefix are not a complete ResNet"
    under = [key for keys in states.values() for key in keys if re.match(f"{re.escape(wanted)}([./]|$)", key)]
    if not under:
        return f"no key starts with `{wanted}.`{given}"
    missing = _nearest(states, wanted)
    lacks = f": {missing.words}" if missing else ""
    return f"{len(under)} keys start with `{wanted}.`, but they are not a complete ResNet{lacks}"


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
        """The missing part of the network, 0..1."""
        return len(self.missing) / len(self.naming.names(self.depth))

    @property
    def words(self) -> str:
        """How many tensors are missing, and which."""
        names = self.naming.names(self.depth)
        last = zip(names, TORCHVISION.with_statistics(self.naming.statistics).names(self.depth), strict=True)
        no_last = {own for own, name in last if name.startswith("layer4.")} == set(self.missing)
        return (
            f"{len(self.missing)} of the {len(names)} tensors of a ResNet-{self.depth} are missing"
            f"{', all of conv5 (layer4, res5)' if no_last else ''}: {some(self.prefix + n for n in self.missing)}"
        )


def _nearest(states: Mapping[str, dict[str, str]], wanted: str | None = None) -> _Incomplete | None:
    """Return the network of which least is missing, among all or under a prefix; None: more than half is missing."""
    found: list[_Incomplete] = []
    for place, keys in states.items():
        for naming in NAMINGS:
            for prefix in _beginnings(keys, naming):
                if wanted is None or prefix.rstrip("./") == wanted:
                    there = {name for depth in DEPTHS for name in naming.names(depth) if prefix + name in keys}
                    found.append(_Incomplete(place, prefix, naming, *naming.nearest(there)))
    return min((one for one in found if one.share < _INCOMPLETE), key=lambda one: one.share, default=None)


def _beginnings(keys: Mapping[str, str], naming: Naming) -> Iterable[str]:
    """Return what precedes the first convolutions of a network that may be incomplete."""
    names = naming.names(18)
    ends = (names[0], names[1 + len(naming.norm_tensors)])
    prefixes = (key.removesuffix(end) for key in keys for end in ends if key.endswith(end))
    return itertools.islice(dict.fromkeys(p for p in prefixes if not p or p[-1] in "./"), _CANDIDATES)


def _unread(places: Mapping[str, Mapping[Any, Any]], path: Any) -> CheckpointError | None:
    """Name the tensors of kinds that are not read; otherwise they would be called missing."""
    tensors = [(key, value) for place in places.values() for key, value in place.items() if isinstance(value, Stub)]
    kinds = {key: type(value).__name__.removeprefix("_rebuild_") for key, value in tensors if _is_rebuilt(value)}
    if not kinds:
        return None
    plain = "save them with to_dense()" if any("sparse" in kind for kind in kinds.values()) else "save plain tensors"
    return CheckpointError(
        f"{path}: {len(kinds)} tensors are of a kind that cannot be read ({some(dict.fromkeys(kinds.values()))}): "
        f"{some(kinds)}; {plain}"
    )


def _is_rebuilt(stub: Stub) -> bool:
    """Return whether a stub stands for a tensor: torch pickles each kind as the call of ``_rebuild_KIND``."""
    return type(stub).__name__.startswith("_rebuild_")


def _incomplete(states: Mapping[str, dict[str, str]], choice: Choice, path: Any) -> CheckpointError | None:
    """Name what is missing in the most complete network of the file, and its source."""
    if choice.prefix is not None:
        problem = _no_prefix(states, choice.prefix, f" (--prefix {choice.prefix})")
        return CheckpointError(f"{path}: {problem}; the file holds {_groups(states) or 'no tensors'}")
    found = _nearest(states)
    if found is None:
        return None
    plain = [s for s in SOURCES if not s.has_signature and found.place in s.containers]
    names = [s.name for s in plain if (s.prefix, s.naming) == (found.prefix, found.naming)]
    name = names[0] if names else f"ResNet under `{found.prefix}`"
    return CheckpointError(
        f"{path}: an incomplete {name}: {found.words}; found {_groups(states)}; only a complete ResNet can be "
        "converted: save the whole network's state_dict()"
    )


def _nothing(checkpoint: Mapping[Any, Any], states: Mapping[str, dict[str, str]], path: Any) -> CheckpointError:
    """Say what is in a file that holds nothing like a ResNet."""
    unnamed = {type(key).__name__ for key, value in checkpoint.items() if not isinstance(key, str) and is_tensor(value)}
    if unnamed:
        return CheckpointError(
            f"{path}: its tensors are named by {' and '.join(sorted(unnamed))}, not by text; save the network's "
            "state_dict(), whose keys are names such as layer1.0.conv1.weight"
        )
    top = some(key if isinstance(key, str) else type(key).__name__ for key in checkpoint) or "nothing"
    names = [unwrap(key) for keys in states.values() for key in keys]
    what = "it holds no known ResNet"
    if not names and {"optimizer", "optimizer_states", "param_groups"} & set(map(str, checkpoint)):
        what = "it holds no ResNet, only the state of an optimizer"
    elif names and all(re.search(rf"(^|\.){INSIDE_HEADS.removeprefix('^')}", name) for name in names):
        what = "it holds no ResNet, only a head"
    return CheckpointError(
        f"{path}: {what}; top-level keys: {top}; tensors: {_groups(states) or 'none'}; save the state_dict() of the "
        "whole network, one mapping with keys such as conv1.weight and layer1.0.conv1.weight, or the file of a project "
        "in docs/checkpoints.md"
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

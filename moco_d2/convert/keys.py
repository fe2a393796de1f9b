"""Sorting of a checkpoint's keys: each is mapped, dropped for a stated reason, or foreign to the wanted network.

No key is skipped. Only the user can drop an unknown key outside the backbone (``Choice.drop``). An unknown key inside
the backbone shows that the network is a different one, and the file is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.find import Backbone, as_tensor
from moco_d2.convert.names import TORCHVISION, Naming
from moco_d2.convert.parts import Part
from moco_d2.convert.recognise import Match
from moco_d2.convert.refusals import unsupported
from moco_d2.convert.sources import COUNTERS, INSIDE_HEADS, TARGET_NETWORKS
from moco_d2.io.checkpoints import CheckpointError, some

_GROUPS = 6  # of keys to drop that one expression names
# torchvision's and timm's modules between the convolutions; they have tensors only if the network is a different one.
_BETWEEN = re.compile(r"(relu|act|maxpool|pool)\d*")


@dataclass(frozen=True)
class Unmapped:
    """The keys that are not converted, as the file spells them.

    Attributes:
        dropped: key -> reason.
        foreign: keys of something other than the wanted network.
        parts: key -> name of the part that the source pretrains besides the ResNet, for some keys of ``dropped``.
    """

    dropped: dict[str, str] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)


def sort_keys(match: Match, parts: Sequence[Part], choice: Choice, path: Any) -> Unmapped:
    """Sort every key of the state dict that holds the wanted network, except the keys that are converted.

    Args:
        match: the network.
        parts: those to convert with it.
        choice: what the user says.
        path: for messages.

    Raises:
        CheckpointError: a key belongs to no ResNet or is unknown (:class:`Question`), or an expression of
            ``choice.drop`` matches a key of the backbone, or none.
    """
    source, backbone = match.source, match.backbone
    mapped = {row.key for row in (*backbone.rows, *(row for part in parts for row in backbone.rows_of(part)))}
    asked = _asked_for(backbone, mapped, choice, path)
    tensors = set(backbone.keys.values())
    done, unknown = Unmapped(), dict[str, str]()
    for key in map(str, (key for key in backbone.state if key not in tensors)):  # numbers and the like
        if key in asked or source.rest:
            done.dropped[key] = asked.get(key, source.rest)
        else:
            done.foreign.append(key)
    for plain, key in backbone.keys.items():
        if key in mapped:
            continue
        inside = plain.startswith(backbone.prefix)
        if plain == f"{backbone.prefix}conv1.bias" and backbone.naming == TORCHVISION:
            done.dropped[key] = "bias of conv1, subtracted from the mean of bn1 (the same computation)"
        elif key in asked:
            done.dropped[key] = asked[key]
        elif reason := _reason(match, parts, plain, key, done):
            done.dropped[key] = reason
        # TensorFlow's and JAX's networks have no prefix, and their moving average is among their keys.
        elif inside and not (source.prefix == "" and source.naming.height_first and TARGET_NETWORKS.search(plain)):
            unknown[plain] = key
        else:
            done.foreign.append(key)
    if unknown:
        raise _unknown(match, unknown, choice, path)
    return done


def dropped_by(pattern: str) -> str:
    """Return the reason of the keys that the user drops."""
    return f"as --drop {pattern} says"


def _reason(match: Match, parts: Sequence[Part], plain: str, key: str, done: Unmapped) -> str | None:
    """Return why a key is left out without being asked; note in ``done`` the part that it belongs to."""
    source, backbone = match.source, match.backbone
    inside, name = plain.startswith(backbone.prefix), plain.removeprefix(backbone.prefix)
    # Batch counters of another network (an encoder_k) are as foreign as the rest of it.
    patterns = (*([COUNTERS] if inside else []), *source.dropped)
    reason = next((why for pattern, why in patterns if re.search(pattern, plain)), None)
    if reason is not None:
        return reason
    for part in source.parts:
        if re.search(part.keys, plain):
            if part.name in [taken.name for taken in parts]:
                return COUNTERS[1]
            done.parts[key] = part.name
            return part.what
    if inside and _in_backbone(backbone, name):
        return None
    if source.rest or not inside:
        return source.rest or None
    if re.match(INSIDE_HEADS, name):
        return "head"
    return "a single number, no layer's weights" if as_tensor(backbone.state[key]).numel() == 1 else None


@functools.cache
def _interior(naming: Naming, depth: int) -> tuple[str, frozenset[str], frozenset[str], dict[str, int]]:
    """Return how a backbone's names are split, their first parts, the stem's words, and word -> highest number."""
    own = naming.names(depth)
    separators = "./|" if re.search(r"[./|]", own[0]) else "_"
    firsts = [re.split(f"[{separators}]", name, maxsplit=1)[0] for name in own]
    words: dict[str, int] = {}
    for word, number in map(_numbered, firsts):
        words[word] = max(number, words.get(word, 0))
    stem = frozenset(_numbered(first)[0] for first in firsts[:2]) - {""}
    return separators, frozenset(firsts), stem, words


def _in_backbone(backbone: Backbone, name: str) -> bool:
    """Return whether a key, its prefix removed, is in one of the backbone's own modules or between them.

    True for ``layer1.0.se.fc.weight`` and ``conv2.weight`` (of a stem with three convolutions), false for
    ``layer5.weight`` and ``my_head.weight``.
    """
    separators, firsts, stem, words = _interior(backbone.naming, backbone.depth)
    first = _first(name, separators)
    word, number = _numbered(first)
    own = first in firsts or word in stem or number <= words.get(word, -1)
    return own or _BETWEEN.fullmatch(first) is not None


def _first(name: str, separators: str) -> str:
    return re.split(f"[{separators}]", name, maxsplit=1)[0]


def _numbered(word: str) -> tuple[str, int]:
    bare = word.rstrip("0123456789")
    return bare, int(word[len(bare) :] or 0)


def _asked_for(backbone: Backbone, mapped: Collection[str], choice: Choice, path: Any) -> dict[str, str]:
    """Return key -> reason for what the user drops.

    Raises:
        Question: an expression matches a key that is never dropped, or none.
    """
    asked: dict[str, str] = {}
    kept = set(mapped)
    for plain, key in backbone.keys.items():
        name = plain.removeprefix(backbone.prefix)
        if plain.startswith(backbone.prefix) and not re.search(COUNTERS[0], name) and _in_backbone(backbone, name):
            kept.add(key)
    for pattern in choice.drop:
        found = [key for key in backbone.state if isinstance(key, str) and re.search(pattern, key)]
        wrong = [key for key in found if key in kept]
        if wrong or not found:
            problem = "matches no key of the state dict that holds the backbone"
            if wrong:
                also = " and of --with" if choice.parts else ""
                problem = f"matches {some(wrong)}; tensors of the backbone{also} are never dropped"
            without = replace(choice, drop=tuple(other for other in choice.drop if other != pattern))
            raise Question(path, f"--drop {pattern} {problem}", choice, [Answer("the rest as before", (without,))])
        asked |= {key: dropped_by(pattern) for key in found if key not in asked}
    return asked


def _unknown(match: Match, unknown: Mapping[str, str], choice: Choice, path: Any) -> CheckpointError:
    """Name the keys that belong neither to the backbone nor to anything known, and how to go on without them."""
    source, backbone = match.source, match.backbone
    within = [key for plain, key in unknown.items() if _in_backbone(backbone, plain.removeprefix(backbone.prefix))]
    if within:
        return unsupported(within, path) or CheckpointError(
            f"{path}: unknown keys inside the backbone: {some(within)}; so the network is not a plain "
            f"ResNet-{backbone.depth}, and only ResNets as torchvision and Detectron2 build them can be converted"
        )
    keys = list(unknown.values())
    pattern = _expression(backbone, keys)
    dropping = replace(choice, drop=(*choice.drop, pattern))
    answer = Answer("leaves them out, and the report lists them", (dropping,))
    found = f"unknown keys besides the backbone, which was recognised as {source.name}: {some(keys)}"
    return Question(path, found, choice, [answer])


def _expression(backbone: Backbone, keys: Sequence[str]) -> str:
    """Return an expression that matches these keys, by their first parts, and no key of the backbone."""
    separators, own, _, _ = _interior(backbone.naming, backbone.depth)
    stem = backbone.naming.names(backbone.depth)[0]
    prefix = backbone.rows[0].key.removesuffix(stem)  # as the file spells it, wrappers included
    prefix = prefix if all(key.startswith(prefix) for key in keys) else ""
    names = [key.removeprefix(prefix) for key in keys]
    firsts = dict.fromkeys(_first(name, separators) for name in names)
    start = f"^{re.escape(prefix)}"
    if len(firsts) > _GROUPS:
        return f"{start}(?!({'|'.join(map(re.escape, sorted(own)))})[{separators}])"
    ends = {name[len(_first(name, separators)) :][:1] for name in names}
    end = f"([{separators}]|$)" if len(ends) > 1 else re.escape(ends.pop()) or "$"
    words = "|".join(map(re.escape, firsts))
    if not words.isprintable():  # such characters cannot be typed
        words = re.sub(r"\\?[\x00-\x1f\x7f-\x9f]", lambda _: r"\W", words)
    return f"{start}{f'({words})' if len(firsts) > 1 else words}{end}"

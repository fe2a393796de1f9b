"""The account of a checkpoint's keys: each is mapped, dropped for a stated reason, or foreign to the wanted network.

Nothing else is skipped. A key that stands beside the backbone and that nobody knows is the user's to drop
(``Choice.drop``); one that stands inside it says that the network is another one, and is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.names import DETECTRON2, TORCHVISION, Naming, rename_table
from moco_d2.convert.parts import Part
from moco_d2.convert.recognise import Match
from moco_d2.convert.refusals import look_alike
from moco_d2.convert.sources import COMPANIONS, COUNTERS, INSIDE_HEADS
from moco_d2.convert.trunk import Trunk, as_tensor
from moco_d2.io.checkpoints import CheckpointError, some

_GROUPS = 6  # of keys to drop that one expression names
# torchvision's and timm's modules between the convolutions, which have no tensors unless the network is another one.
_BETWEEN = re.compile(r"(relu|act|maxpool|pool)\d*")


@dataclass(frozen=True)
class Account:
    """What becomes of each key, as the file spells it.

    Attributes:
        mapped: key -> Detectron2's name.
        dropped: key -> reason.
        foreign: keys of something else than the wanted network.
        parts: key -> name of the part that the source pretrains beside the ResNet, for those among ``dropped``.
    """

    mapped: dict[str, str]
    dropped: dict[str, str]
    foreign: list[str]
    parts: dict[str, str]


def account(match: Match, parts: Sequence[Part], choice: Choice, path: Any) -> Account:
    """Sort every key of the state dict that holds the wanted network.

    Args:
        match: the network.
        parts: those to convert beside it.
        choice: what the user says.
        path: for messages.

    Raises:
        CheckpointError: a key belongs to no ResNet, or is nobody's (:class:`Question`), or an expression of
            ``choice.drop`` reaches the backbone or nothing.
    """
    source, trunk = match.source, match.trunk
    table = rename_table(trunk.naming, DETECTRON2.with_statistics(trunk.naming.statistics), trunk.depth)
    carried = {key: name for part in parts for key, name in part.table().items()}
    asked = _asked_for(trunk, carried, choice, path)
    tensors = set(trunk.keys.values())
    other = [str(key) for key in trunk.state if key not in tensors]  # numbers and the like among the tensors
    done = Account({}, {key: asked[key] for key in other if key in asked}, [k for k in other if k not in asked], {})
    unknown: dict[str, str] = {}
    for plain, key in trunk.keys.items():
        inside = plain.startswith(trunk.prefix)
        name = plain.removeprefix(trunk.prefix)
        if inside and name in table:
            done.mapped[key] = table[name]
        elif plain in carried:
            done.mapped[key] = carried[plain]
        elif inside and name == "conv1.bias" and trunk.naming == TORCHVISION:
            done.dropped[key] = "bias of conv1, subtracted from the mean of bn1 (the same computation)"
        elif key in asked:
            done.dropped[key] = asked[key]
        elif reason := _reason(match, parts, plain, key, done):
            done.dropped[key] = reason
        elif inside and not (source.prefix == "" and source.naming.height_first and COMPANIONS.search(plain)):
            unknown[plain] = key  # a network of TensorFlow's or JAX's lies beside its moving average, without a prefix
        else:
            done.foreign.append(key)
    if unknown:
        raise _unknown(match, unknown, choice, path)
    order = {name: index for index, name in enumerate((*table.values(), *carried.values()))}
    return replace(done, mapped=dict(sorted(done.mapped.items(), key=lambda item: order[item[1]])))


def dropped_by(pattern: str) -> str:
    """Return the reason of the keys that the user drops."""
    return f"as --drop {pattern} says"


def _reason(match: Match, parts: Sequence[Part], plain: str, key: str, done: Account) -> str | None:
    """Return why a key is left out without being asked; note in ``done`` the part that it belongs to."""
    source, trunk = match.source, match.trunk
    inside, name = plain.startswith(trunk.prefix), plain.removeprefix(trunk.prefix)
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
    if not inside or _in_backbone(trunk, name):
        return None
    if re.match(INSIDE_HEADS, name):
        return "head"
    return "a single number, no layer's weights" if as_tensor(trunk.state[key]).numel() == 1 else None


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


def _in_backbone(trunk: Trunk, name: str) -> bool:
    """Return whether a key, its prefix removed, stands in one of the backbone's own modules or between them.

    ``layer1.0.se.fc.weight`` and ``conv2.weight`` (of a stem with three convolutions) do, ``layer5.weight`` and
    ``my_head.weight`` do not.
    """
    separators, firsts, stem, words = _interior(trunk.naming, trunk.depth)
    first = _first(name, separators)
    word, number = _numbered(first)
    own = first in firsts or word in stem or number <= words.get(word, -1)
    return own or _BETWEEN.fullmatch(first) is not None


def _first(name: str, separators: str) -> str:
    return re.split(f"[{separators}]", name, maxsplit=1)[0]


def _numbered(word: str) -> tuple[str, int]:
    bare = word.rstrip("0123456789")
    return bare, int(word[len(bare) :] or 0)


def _asked_for(trunk: Trunk, carried: Mapping[str, str], choice: Choice, path: Any) -> dict[str, str]:
    """Return key -> reason for what the user drops.

    Raises:
        Question: an expression finds a key that is never dropped, or none.
    """
    asked: dict[str, str] = {}
    own = set(trunk.naming.names(trunk.depth))
    kept = {key for plain, key in trunk.keys.items() if plain in carried}
    for plain, key in trunk.keys.items():
        name = plain.removeprefix(trunk.prefix)
        if plain.startswith(trunk.prefix) and not re.search(COUNTERS[0], name):
            kept |= {key} if name in own or _in_backbone(trunk, name) else set()
    for pattern in choice.drop:
        found = [key for key in trunk.state if isinstance(key, str) and re.search(pattern, key)]
        wrong = [key for key in found if key in kept]
        if wrong or not found:
            problem = "finds no key of the state dict that holds the backbone"
            if wrong:
                beside = " and of --with" if choice.parts else ""
                problem = f"finds {some(wrong)}; the tensors of the backbone{beside} are never dropped"
            without = replace(choice, drop=tuple(other for other in choice.drop if other != pattern))
            raise Question(path, f"--drop {pattern} {problem}", choice, [Answer("the rest as before", (without,))])
        asked |= {key: dropped_by(pattern) for key in found if key not in asked}
    return asked


def _unknown(match: Match, unknown: Mapping[str, str], choice: Choice, path: Any) -> CheckpointError:
    """Say what the keys are that belong neither to the backbone nor to anything known, and how to go on without."""
    source, trunk = match.source, match.trunk
    within = [key for plain, key in unknown.items() if _in_backbone(trunk, plain.removeprefix(trunk.prefix))]
    if within:
        return look_alike(within, path) or CheckpointError(
            f"{path}: unknown keys inside the backbone: {some(within)}; the network is another one than a "
            f"ResNet-{trunk.depth}, and only ResNets as torchvision and Detectron2 build them can be converted"
        )
    keys = list(unknown.values())
    pattern = _expression(trunk, keys)
    dropping = replace(choice, drop=(*choice.drop, pattern))
    answer = Answer("they are left out, and the account names them", (dropping,))
    found = f"unknown keys beside the backbone, which was recognised as {source.name}: {some(keys)}"
    return Question(path, found, choice, [answer])


def _expression(trunk: Trunk, keys: Sequence[str]) -> str:
    """Return an expression that finds these keys, by their first parts, and no key of the backbone."""
    separators, own, _, _ = _interior(trunk.naming, trunk.depth)
    stem = trunk.naming.names(trunk.depth)[0]
    prefix = trunk.keys[trunk.prefix + stem].removesuffix(stem)  # as the file spells it, wrappers included
    prefix = prefix if all(key.startswith(prefix) for key in keys) else ""
    names = [key.removeprefix(prefix) for key in keys]
    firsts = dict.fromkeys(_first(name, separators) for name in names)
    start = f"^{re.escape(prefix)}"
    if len(firsts) > _GROUPS:
        return f"{start}(?!({'|'.join(map(re.escape, sorted(own)))})[{separators}])"
    ends = {name[len(_first(name, separators)) :][:1] for name in names}
    end = f"([{separators}]|$)" if len(ends) > 1 else re.escape(ends.pop()) or "$"
    words = "|".join(map(re.escape, firsts))
    if not words.isprintable():  # Who types it has no key for them.
        words = re.sub(r"\\?[\x00-\x1f\x7f-\x9f]", lambda _: r"\W", words)
    return f"{start}{f'({words})' if len(firsts) > 1 else words}{end}"

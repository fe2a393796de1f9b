"""Every complete ResNet of a checkpoint, wherever it is nested and however its tensors are named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from moco_d2.convert.choice import Answer, Choice, Question
from moco_d2.convert.names import DETECTRON2, TORCHVISION, Naming, Row
from moco_d2.convert.parts import Part
from moco_d2.convert.sources import NAMINGS, SOURCES, WRAPPERS, unwrap
from moco_d2.layers.resnet import DEPTHS

_SEARCHED = 8  # levels of mappings and lists below the top; VISSL's network is four deep
_LISTED = 100  # entries of a list that are searched


class Network(Protocol):
    """A network in a checkpoint, of any family: :class:`Backbone`, or :class:`moco_d2.convert.vit_find.Vit`."""

    @property
    def place(self) -> str:
        """Dotted path of the mapping that holds it."""

    @property
    def keys(self) -> dict[str, str]:
        """Key without wrappers -> key in the file."""

    @property
    def prefix(self) -> str:
        """What its keys start with."""

    @property
    def where(self) -> str:
        """Place and prefix."""

    @property
    def depth(self) -> int:
        """Number of layers or blocks."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return its tensors under the names that its family computes with."""


AnyNetwork = TypeVar("AnyNetwork", bound=Network)


@dataclass(frozen=True)
class Backbone:
    """A complete ResNet in a checkpoint.

    Attributes:
        place: dotted path of the mapping that holds it.
        state: that mapping.
        keys: key without wrappers -> key in the file.
        prefix: what its keys start with.
        naming: how they are spelled after the prefix.
        depth: of the ResNet.
        group_norm: whether its norms are GroupNorm, as the user said.
    """

    place: str
    state: Mapping[Any, Any]
    keys: dict[str, str]
    prefix: str
    naming: Naming
    depth: int
    group_norm: bool

    @property
    def where(self) -> str:
        """Place and prefix."""
        return joined(self.place, self.prefix)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The names of all its tensors, in torchvision's order."""
        read = TORCHVISION.with_statistics(self.naming.statistics).names(self.depth)
        keys = {
            name: self.keys[self.prefix + own] for name, own in zip(read, self.naming.names(self.depth), strict=True)
        }
        torchvision, detectron2 = (
            naming.with_statistics(not self.group_norm).names(self.depth) for naming in (TORCHVISION, DETECTRON2)
        )
        return tuple(Row(keys.get(name, ""), name, new) for name, new in zip(torchvision, detectron2, strict=True))

    def rows_of(self, part: Part) -> list[Row]:
        """Return the names of a part's tensors, with the keys as this file spells them."""
        return [row._replace(key=self.keys[row.key]) for row in part.rows()]

    def tensors(self, modules: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
        """Return name under torchvision's naming -> tensor as the file has it, for names with one of these starts."""
        rows = [row for row in self.rows if row.key and row.torchvision.startswith(modules)]
        return {row.torchvision: as_tensor(self.state[row.key]) for row in rows}


def joined(place: str, prefix: str) -> str:
    """Return the place of a network and its prefix in one."""
    return f"{place}.{prefix}" if place else prefix


def find_places(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Return dotted path -> mapping for all mappings inside, also in lists, the outer ones first."""
    found: dict[str, Mapping[Any, Any]] = {"": checkpoint}
    seen = {id(checkpoint)}  # a file may hold a mapping in itself
    level: list[tuple[str, Any]] = [("", checkpoint)]
    for _ in range(_SEARCHED):
        below = []
        for place, container in level:
            for key, value in _entries(container):
                # An optimizer's keys are numbers.
                if isinstance(value, Mapping | list | tuple) and key != "optimizer" and id(value) not in seen:
                    seen.add(id(value))
                    below.append((f"{place}.{key}" if place else key, value))
        found.update((place, value) for place, value in below if isinstance(value, Mapping))
        level = below
    for source in SOURCES:
        found |= source.read(checkpoint) if source.read else {}
    return found


def _entries(container: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(container, Mapping):
        yield from ((key, value) for key, value in container.items() if isinstance(key, str))
    else:
        yield from ((str(index), value) for index, value in enumerate(container[:_LISTED]))


def unwrapped(state: Mapping[Any, Any], path: Any, choice: Choice) -> dict[str, str]:
    """Return key without wrappers -> key, for the entries that are tensors.

    Raises:
        Question: two keys of ``path`` differ only in wrappers, and ``choice`` drops neither.
    """
    keys: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not is_tensor(value):
            continue
        plain = unwrap(key)
        if plain not in keys or _dropped(keys[plain], choice):
            keys[plain] = key
        elif not _dropped(key, choice):
            raise _twice(keys[plain], key, path, choice)
    return keys


def _dropped(key: str, choice: Choice) -> bool:
    return any(re.search(pattern, key) for pattern in choice.drop)


def _twice(one: str, other: str, path: Any, choice: Choice) -> Question:
    """Ask which of two keys that name the same tensor is meant."""
    answers = []
    for kept, left in ((one, other), (other, one)):
        more = [part for part in left.split(".") if part in WRAPPERS and part not in kept.split(".")]
        fewer = [part for part in kept.split(".") if part in WRAPPERS and part not in left.split(".")]
        pattern = rf"(^|\.){more[0]}\." if more else rf"^(?!(.*\.)?{fewer[0]}\.)" if fewer else ""
        if pattern:
            dropping = replace(choice, drop=(*choice.drop, pattern))
            answers.append(Answer(f"takes `{kept}` of the two", (dropping,)))
    found = f"`{one}` and `{other}` name the same tensor, once with a wrapper and once without"
    return Question(path, found, choice, answers)


def find_backbones(
    places: Mapping[str, Mapping[Any, Any]], states: Mapping[str, dict[str, str]], group_norm: bool
) -> Iterator[Backbone]:
    """Yield every complete ResNet, whatever its prefix and naming.

    Args:
        places: of :func:`find_places`.
        states: place -> key without wrappers -> key in the file, of :func:`unwrapped`.
        group_norm: whether their norms are GroupNorm.
    """
    for place, keys in states.items():
        for naming in NAMINGS:
            naming = naming.with_statistics(not group_norm)
            stem, probe = naming.names(18)[0], naming.names(18)[1 + len(naming.norm_tensors)]
            for plain in keys:
                prefix = plain.removesuffix(stem)
                if not plain.endswith(stem) or prefix + probe not in keys or (prefix and prefix[-1] not in "./"):
                    continue
                depth = naming.depth_of({key[len(prefix) :] for key in keys if key.startswith(prefix)})
                if depth is not None and not (group_norm and _has_statistics(keys, prefix, naming)):
                    yield Backbone(place, places[place], keys, prefix, naming, depth, group_norm)


def _has_statistics(keys: Mapping[str, str], prefix: str, naming: Naming) -> bool:
    """Return whether the norms of a network, spelled without statistics, have some, and so are not GroupNorm."""
    spelled = next((full for full in NAMINGS if full.statistics and full.with_statistics(False) == naming), None)
    if spelled is None:
        return False
    return any(
        prefix + name in keys for depth in DEPTHS for name in spelled.names(depth) if name not in naming.names(depth)
    )


def clean_prefix(prefix: str) -> str:
    """Return a prefix as the user may have typed it, without quotes, wrappers, ``*`` and the separator at its end."""
    return unwrap(prefix.strip().strip("'\"`").removesuffix("*")).rstrip("./")


def selected(prefix: str | None, backbones: Sequence[AnyNetwork]) -> list[AnyNetwork]:
    """Return the networks that a prefix means: those at exactly this place and prefix, else those of this prefix."""
    if prefix is None:
        return list(backbones)
    wanted = clean_prefix(prefix)
    exact = [backbone for backbone in backbones if unwrap(backbone.where).rstrip("./") == wanted]
    return exact or [backbone for backbone in backbones if backbone.prefix.rstrip("./") == wanted]


def unique_prefix(backbone: Network, backbones: Sequence[Network]) -> str:
    """Return the prefix that means this network and no other; the place comes first if it is needed for that."""
    meant = [other.where for other in selected(backbone.prefix, backbones)]
    return backbone.prefix if set(meant) == {backbone.where} else backbone.where


def equal(one: Network, other: Network) -> bool:
    """Return whether two networks are copies of the same network."""
    if one.depth != other.depth:
        return False
    a, b = one.tensors(), other.tensors()
    pairs = [(a[name], b[name]) for name in a if name in b]
    return all(is_plain(x) and is_plain(y) and torch.equal(x, y) for x, y in pairs)


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor or an array of numbers."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")


def as_tensor(value: Any) -> torch.Tensor:
    """Return a tensor for a tensor or an array; an array is copied into this machine's byte order."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a dense array of floating-point numbers, with its values."""
    return tensor.layout == torch.strided and tensor.is_floating_point() and not tensor.is_meta

"""Finding every complete ResNet in a checkpoint, wherever it lies and however it is spelled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moco_d2.convert.names import NAMINGS, TORCHVISION, Naming, rename_table
from moco_d2.convert.sources import WRAPPERS
from moco_d2.convert.variables import byol_variables
from moco_d2.io.checkpoints import CheckpointError

_SEARCHED = 4  # levels of mappings below the top: VISSL's trunk lies so deep


@dataclass(frozen=True)
class Trunk:
    """A complete ResNet in a checkpoint.

    Attributes:
        place: dotted path of the mapping that holds it.
        state: that mapping.
        keys: key without wrappers -> key in the file.
        prefix: what its keys start with.
        naming: how they are spelled behind it.
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
        return f"{self.place}.{self.prefix}" if self.place else self.prefix

    def tensors(self) -> dict[str, Any]:
        """Return name under torchvision's naming -> value in the file."""
        table = rename_table(self.naming, TORCHVISION.with_statistics(self.naming.statistics), self.depth)
        return {target: self.state[self.keys[self.prefix + name]] for name, target in table.items()}


def find_places(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Return dotted path -> mapping for all mappings inside, the outer ones first."""
    found: dict[str, Mapping[Any, Any]] = {"": checkpoint}
    seen = {id(checkpoint)}  # a file may hold a mapping in itself
    level = [("", checkpoint)]
    for _ in range(_SEARCHED):
        below = []
        for place, mapping in level:
            for key, value in mapping.items():
                # An optimizer's keys are numbers.
                if isinstance(value, Mapping) and isinstance(key, str) and key != "optimizer" and id(value) not in seen:
                    seen.add(id(value))
                    below.append((f"{place}.{key}" if place else key, value))
        found.update(below)
        level = below
    return {**found, **byol_variables(checkpoint)}


def unwrapped(state: Mapping[Any, Any], path: Any) -> dict[str, str]:
    """Return key without wrappers -> key, for the entries that are tensors.

    Raises:
        CheckpointError: two keys of ``path`` differ in wrappers only.
    """
    keys: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not is_tensor(value):
            continue
        plain = unwrap(key)
        if plain in keys:
            raise CheckpointError(f"{path}: `{keys[plain]}` and `{key}` are the same tensor's name; keep one of them")
        keys[plain] = key
    return keys


def find_trunks(
    places: Mapping[str, Mapping[Any, Any]], states: Mapping[str, dict[str, str]], group_norm: bool
) -> Iterator[Trunk]:
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
                if depth is not None:
                    yield Trunk(place, places[place], keys, prefix, naming, depth, group_norm)


def equal(one: Trunk, other: Trunk) -> bool:
    """Return whether two trunks are the same network, copied."""
    if one.depth != other.depth:
        return False
    a, b = one.tensors(), other.tensors()
    return all(torch.equal(as_tensor(a[name]), as_tensor(b[name])) for name in a if name in b)


def unwrap(key: str) -> str:
    """Remove what wrappers (DataParallel, torch.compile, FSDP) insert into a key."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor or an array of numbers."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")


def as_tensor(value: Any) -> torch.Tensor:
    """Return a tensor for a tensor or an array, which is copied into this machine's order of bytes."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    return torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))

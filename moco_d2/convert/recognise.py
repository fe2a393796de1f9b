"""Finding the network in a checkpoint, and whose it is, without guessing.

First every complete ResNet in the file is found, wherever it lies and however it is spelled. Then the first record of
``SOURCES`` that expects one of them at its place decides. What stays open is the user's to say (:class:`Choice`).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_d2.convert.load import CheckpointError
from moco_d2.convert.names import NAMINGS, TORCHVISION, Naming
from moco_d2.convert.parts import check_names
from moco_d2.convert.sources import ANY, COMPANIONS, LOOKALIKES, SOURCES, WRAPPERS, CheckpointSource
from moco_d2.convert.variables import byol_variables
from moco_d2.facts import CAFFE_BGR, BackboneFacts

SHOWN = 6  # names listed in a message before "and N more"
_SEARCHED = 4  # levels of mappings below the top: VISSL's trunk lies so deep
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
            near = difflib.get_close_matches(self.source, keys, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"unknown source {self.source!r}{hint}; choose one of {', '.join(keys)}")
        if self.norm not in _NORMS:
            raise ValueError(f"norm is {self.norm!r}; it must be 'GN' or empty")
        check_names(self.parts)


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
        statistics = self.naming.statistics
        target = (TORCHVISION if statistics else TORCHVISION.without_statistics()).names(self.depth)
        names = self.naming.names(self.depth)
        return {t: self.state[self.keys[self.prefix + n]] for t, n in zip(target, names, strict=True)}


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
    _check_names(checkpoint, path)
    places = _places(checkpoint)
    states = {place: _unwrapped(state, path) for place, state in places.items()}
    trunks = list(_trunks(places, states, choice.norm))
    if choice.prefix is not None:
        wanted = _plain_prefix(choice.prefix)
        trunks = [trunk for trunk in trunks if trunk.prefix == wanted]
    fitting = list(_fitting(checkpoint, trunks, choice))
    if not fitting:
        raise _not_recognised(checkpoint, states, trunks, path, choice)
    trunk = fitting[0][1]
    candidates = [source for source, fits in fitting if fits is trunk]
    candidates = [source for source in candidates if source.marked] or candidates
    if stated:
        said = stated.pixels, stated.stride_in_1x1
        candidates = [source for source in candidates if (source.pixels, source.stride_in_1x1) == said] or candidates
    source = candidates[0]
    if not stated and len({(s.pixels, s.stride_in_1x1) for s in candidates}) > 1:
        listed = "; ".join(f"--source {s.key} ({s.name}: {_feeding(s)})" for s in candidates)
        raise CheckpointError(f"{path}: the weights do not show which input they need; say it with one of {listed}")
    if not (stated or choice.source) and source.pixels != CAFFE_BGR and _caffe(trunk):
        raise CheckpointError(
            f"{path}: recognised as {source.name}, but its conv1 and bn1 were trained on inputs that were not divided "
            f"by a std (they varied by about {input_scale(trunk):.0f}); say --source caffe for BGR pixels in 0..255, "
            f"or --source {source.key} if the input was {_feeding(source)} all the same"
        )
    if choice.prefix is None and not choice.source:
        _check_others(source, trunk, trunks, path)
    return Match(source, trunk, tuple(s.name for s in candidates[1:] if s.name != source.name))


def _feeding(source: CheckpointSource) -> str:
    mean, std = source.pixels.mean, source.pixels.std
    stride = "1x1" if source.stride_in_1x1 else "3x3"
    return f"{source.pixels.order}, mean {list(mean)}, std {list(std)}, stride in the {stride}"


def _plain_prefix(prefix: str) -> str:
    prefix = ".".join(part for part in prefix.split(".") if part not in WRAPPERS)
    return prefix if not prefix or prefix[-1] in "./" else f"{prefix}."


def _places(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
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


def _unwrapped(state: Mapping[Any, Any], path: Any) -> dict[str, str]:
    """Return key without wrappers -> key, for the entries that are tensors."""
    keys: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not is_tensor(value):
            continue
        plain = unwrap(key)
        if plain in keys:
            raise CheckpointError(f"{path}: `{keys[plain]}` and `{key}` are the same tensor's name; keep one of them")
        keys[plain] = key
    return keys


def unwrap(key: str) -> str:
    """Remove what wrappers (DataParallel, torch.compile, FSDP) insert into a key."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor or an array of numbers."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")


def as_tensor(value: Any) -> torch.Tensor:
    """Return a tensor for a tensor or an array."""
    return value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def _trunks(
    places: Mapping[str, Mapping[Any, Any]], states: Mapping[str, dict[str, str]], norm: str
) -> Iterator[Trunk]:
    """Yield every complete ResNet, whatever its place, prefix and naming."""
    for place, keys in states.items():
        for naming in NAMINGS:
            naming = naming.without_statistics() if norm == "GN" else naming
            stem, probe = naming.names(18)[0], naming.names(18)[1 + len(naming.norm_tensors)]
            for plain in keys:
                prefix = plain.removesuffix(stem)
                if not plain.endswith(stem) or prefix + probe not in keys or (prefix and prefix[-1] not in "./"):
                    continue
                depth = naming.depth_of({key[len(prefix) :] for key in keys if key.startswith(prefix)})
                if depth is not None:
                    yield Trunk(place, places[place], keys, prefix, naming, depth, norm == "GN")


def _fitting(
    checkpoint: Mapping[Any, Any], trunks: list[Trunk], choice: Choice
) -> Iterator[tuple[CheckpointSource, Trunk]]:
    """Yield (source, trunk) in the order of precedence."""
    sources = [s for s in SOURCES if (s.key == choice.source if choice.source else not s.on_request)]
    found = False
    for source in sources:
        for place in source.nest:
            for trunk in trunks:
                if trunk.place == place and _fits(source, trunk, checkpoint, choice):
                    found = True
                    # A file of any prefix is marked by nothing that its likes have not.
                    yield (replace(source, prefix=trunk.prefix, beside=()) if source.prefix == ANY else source), trunk
    if choice.prefix is not None and not found:  # a prefix that no record knows; the naming says the rest
        for trunk in trunks:
            like = next(
                (s for s in sources if _same_naming(s, trunk) and not s.marked and not s.prefix and "" in s.nest), None
            )
            like = like or next((s for s in sources if _same_naming(s, trunk)), None)
            if like is not None:
                note = f"the input is assumed to be that of {like.name}: {_feeding(like)}"
                name = f"network under `{trunk.prefix}`"
                origin = f"{trunk.where}*, no method's mark"
                if choice.source:
                    yield replace(like, prefix=trunk.prefix), trunk
                else:
                    yield (
                        replace(
                            like, name=name, origin=origin, arxiv="", variants=(), prefix=trunk.prefix, notes=(note,)
                        ),
                        trunk,
                    )
                return


def _same_naming(source: CheckpointSource, trunk: Trunk) -> bool:
    return trunk.naming == (source.naming.without_statistics() if trunk.group_norm else source.naming)


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
        and (not source.trait or _TRAITS[source.trait](trunk))
    )


def _filled(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _shortcut_first(trunk: Trunk) -> bool:
    order = {key: index for index, key in enumerate(trunk.keys)}
    prefix = f"{trunk.prefix}layer1.0."
    shortcut, conv = order.get(f"{prefix}downsample.0.weight"), order.get(f"{prefix}conv1.weight")
    return shortcut is not None and conv is not None and shortcut < conv


# A pixel of a picture resembles its neighbour by 0.95, and its own other colours by 0.9: natural pictures' statistics.
_NEIGHBOURS, _COLOURS = 0.95, 0.9
_UNDIVIDED = (
    15.0  # inputs that vary by more are not divided by a std; measured: 0.4 to 2 for divided ones, 67 for Caffe
)


def input_scale(trunk: Trunk) -> float:
    """Estimate the standard deviation of the pixels that a network was trained with, from its first two layers.

    A norm's running variance is the variance of its convolution's outputs, which follows from the kernel and from the
    statistics of natural pictures, but for the pixels' scale. 0 where it cannot be told.
    """
    tensors = trunk.tensors()
    kernel = as_tensor(tensors["conv1.weight"]).double()
    if trunk.naming.height_first:
        kernel = kernel.permute(3, 2, 0, 1)
    if "bn1.running_var" not in tensors or kernel.ndim != 4 or kernel.shape[1:] != (3, 7, 7):
        return 0.0
    variance = as_tensor(tensors["bn1.running_var"]).double().reshape(-1)  # (C,)
    if len(variance) != len(kernel) or not torch.isfinite(kernel).all():
        return 0.0
    offsets = torch.arange(7.0, dtype=torch.float64)
    line = _NEIGHBOURS ** (offsets[:, None] - offsets[None]).abs()
    colours = torch.full((3, 3), _COLOURS, dtype=torch.float64).fill_diagonal_(1)
    flat = kernel.reshape(len(kernel), -1)  # (C, 3 * 7 * 7)
    expected = ((flat @ torch.kron(colours, torch.kron(line, line))) * flat).sum(1)
    norms = flat.norm(dim=1)
    alive = (norms > 0.05 * norms.max()) & (expected > 0)
    ratio = (variance[alive] / expected[alive]).median().item() if alive.any() else 0.0
    return math.sqrt(ratio) if 0 < ratio < math.inf else 0.0


def _caffe(trunk: Trunk) -> bool:
    """Return whether the input was not divided by a std, or the statistics are folded away, as in Caffe's files."""
    return input_scale(trunk) > _UNDIVIDED or folded(trunk)


def folded(trunk: Trunk) -> bool:
    """Return whether bn1 has mean 0 and variance 1 though it is trained: an affine layer of Caffe's."""
    tensors = {name: as_tensor(value).reshape(-1) for name, value in trunk.tensors().items() if name.startswith("bn1.")}
    if "bn1.running_var" not in tensors:
        return False
    fresh = bool((tensors["bn1.weight"] == 1).all())
    # Detectron2 takes its epsilon off a variance of 1.
    unit = bool(((tensors["bn1.running_var"] - 1).abs() < 2e-5).all())
    bias = trunk.keys.get(f"{trunk.prefix}conv1.bias")
    # Folded here, or left to a bias in the convolution.
    return unit and not bool(tensors["bn1.running_mean"].any()) and (not fresh or bias is not None)


_TRAITS = {"caffe": _caffe, "shortcut first": _shortcut_first}


def _check_others(source: CheckpointSource, trunk: Trunk, trunks: list[Trunk], path: Any) -> None:
    """Refuse a file with another network that might be meant."""
    others = []
    for other in trunks:
        known = COMPANIONS.search(other.where) or (source.knows and re.search(source.knows, other.where))
        if known or other.where == trunk.where:
            continue
        if not _equal(trunk, other):
            others.append(other)
    if others:
        listed = ", ".join(
            f"--prefix {t.prefix or chr(39) * 2} (in {t.place or 'the top level'})" for t in (trunk, *others)
        )
        raise CheckpointError(f"{path}: {len(others) + 1} different complete ResNets; say which is meant: {listed}")


def _equal(one: Trunk, other: Trunk) -> bool:
    if one.depth != other.depth:
        return False
    a, b = one.tensors(), other.tensors()
    return all(torch.equal(as_tensor(a[name]), as_tensor(b[name])) for name in a if name in b)


_TWIN = re.compile(r"(resnet|resnext)(aa|blur)\d|(resnet|resnext)\d+(aa|blur)", re.IGNORECASE)


def _check_names(checkpoint: Mapping[Any, Any], path: Any) -> None:
    """Refuse networks that only a name tells from torchvision's: the file's, or the architecture's."""
    arguments = checkpoint.get("args")
    arguments = getattr(arguments, "state", arguments)
    told = [Path(path).name, checkpoint.get("arch"), beside(path).get("architecture")]
    told += [arguments.get(name) for name in ("model", "arch")] if isinstance(arguments, Mapping) else []
    twin = next((name for name in told if isinstance(name, str) and _TWIN.search(name)), None)
    if twin:
        raise CheckpointError(
            f"{path}: an anti-aliased ResNet, as the name `{twin}` shows; its tensors fit Detectron2's ResNet, but its "
            "features differ by 10 to 50 %; use the plain one"
        )


def beside(path: Any) -> dict[str, Any]:
    """Return the config.json beside a file of Hugging Face's hub, or nothing."""
    try:
        content = json.loads((Path(path).parent / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def some(names: Any) -> str:
    """Join the first few names for a message."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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
    return any(True for _ in _trunks({place: {} for place in states}, states, "GN"))


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
    shown = [f"{prefix} ({count})" for prefix, count in counts.most_common(SHOWN)]
    return ", ".join(shown) + (f" and {len(counts) - SHOWN} more groups" if len(counts) > SHOWN else "")

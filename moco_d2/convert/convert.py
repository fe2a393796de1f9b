"""Turning a checkpoint into a file that Detectron2 loads whole, or an error that says why not.

Detectron2 skips what does not match and trains on; so nothing is skipped here. Every key of the state dict is mapped,
dropped for a stated reason, or foreign to the wanted network, and the mapped ones must be exactly the tensors of the
ResNet that the facts describe.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_d2.convert.load import CheckpointError, facts_in, read_checkpoint
from moco_d2.convert.names import DETECTRON2, TORCHVISION, rename_table
from moco_d2.convert.prove import prove
from moco_d2.convert.sources import COUNTERS, LOOKALIKES, SOURCES, WRAPPERS, CheckpointSource
from moco_d2.facts import BackboneFacts
from moco_d2.layers.resnet import facts_from_shapes, network_for

OUTPUT_SUFFIXES = (".pth", ".pkl")
AUTHOR = "moco_d2"
_SHOWN = 6  # names listed in a message before "and N more"


@dataclass(frozen=True)
class Conversion:
    """The outcome of a conversion, before it is written.

    Attributes:
        source: the record that recognised the checkpoint.
        facts: what the weights are.
        tensors: Detectron2 name -> float32 tensor, the whole trunk.
        source_tensors: the same tensors under torchvision's names.
        mapped: key in the file -> Detectron2 name.
        dropped: key in the file -> reason it was left out.
        foreign: keys in the file that belong to something else than the wanted network.
    """

    source: CheckpointSource
    facts: BackboneFacts
    tensors: dict[str, torch.Tensor]
    source_tensors: dict[str, torch.Tensor]
    mapped: dict[str, str]
    dropped: dict[str, str]
    foreign: list[str]

    def foreign_groups(self) -> Counter[str]:
        """Return how many foreign keys there are under each first part of their names, wrappers aside."""
        return Counter(_unwrap(key).partition(".")[0] for key in self.foreign)


@dataclass(frozen=True)
class _Match:
    """A source tried on one place of a checkpoint."""

    source: CheckpointSource
    place: str
    state: Mapping[str, Any]  # as in the file
    keys: dict[str, str]  # key without wrappers -> key in the file

    def wanted(self) -> set[str]:
        """Return the names behind the source's prefix."""
        prefix = self.source.prefix
        return {key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)}


def convert_checkpoint(
    source: str | os.PathLike[str], output: str | os.PathLike[str], proof: bool = True
) -> tuple[Conversion, dict[str, float]]:
    """Convert a checkpoint to Detectron2's names, prove it, and write it.

    The output appears under its name only when it is complete and proven.

    Args:
        source: the checkpoint.
        output: the file to write; ``.pth``, or ``.pkl`` with numpy arrays.
        proof: whether to compare the features of both networks (needs Detectron2).

    Returns:
        The conversion, and the largest relative difference per stage (empty without proof).

    Raises:
        CheckpointError: the checkpoint cannot be read or converted.
        ValueError: the output's name is unusable, or the proof failed (:class:`moco_d2.convert.prove.ProofError`).
    """
    source, output = Path(source), Path(output)
    _check_output(source, output)
    conversion = convert_state(read_checkpoint(source), source)
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within a file system.
    part = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    differences: dict[str, float] = {}
    try:
        save(conversion, part)
        if proof:
            written = {name: _as_tensor(t) for name, t in read_checkpoint(part)["model"].items()}
            differences = prove(conversion.facts, conversion.source_tensors, written)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return conversion, differences


def convert_state(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> Conversion:
    """Convert an already read checkpoint (see :func:`convert_checkpoint`); ``path`` is for messages.

    Raises:
        CheckpointError: no known source, an incomplete network, unknown keys, or unusable tensors.
    """
    match, depth = _recognise(checkpoint, path)
    mapped, dropped, foreign = _account(match, depth, path)
    to_torchvision = rename_table(DETECTRON2, TORCHVISION, depth)
    tensors = {name: _as_tensor(match.state[key]) for key, name in mapped.items()}
    source_tensors = {to_torchvision[name]: tensor for name, tensor in tensors.items()}
    facts = _facts(match, source_tensors, facts_in(checkpoint, path), path)
    _check_shapes(facts, source_tensors, path)
    _check_values({key: tensors[name] for key, name in mapped.items()}, path)
    tensors = {name: t.to(torch.float32).contiguous() for name, t in tensors.items()}
    return Conversion(
        source=match.source,
        facts=facts,
        tensors=tensors,
        source_tensors={to_torchvision[name]: tensor for name, tensor in tensors.items()},
        mapped=mapped,
        dropped=dropped,
        foreign=foreign,
    )


def save(conversion: Conversion, output: str | os.PathLike[str]) -> None:
    """Write a conversion and flush it to the disk; the suffix decides the format.

    Raises:
        ValueError: an unknown suffix.
    """
    output = Path(output)
    _check_suffix(output)
    content: dict[str, Any] = {
        "model": conversion.tensors,
        "__author__": AUTHOR,
        # One file must fit backbone.res4 and roi_heads.res5 (C4) as well as backbone.bottom_up.res4 (FPN).
        "matching_heuristics": True,
        "facts": conversion.facts.as_dict(),
    }
    with open(output, "wb") as file:
        if output.suffix == ".pkl":
            content["model"] = {name: tensor.numpy() for name, tensor in conversion.tensors.items()}
            _ArrayPickler(file, protocol=5).dump(content)
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


class _ArrayPickler(pickle.Pickler):
    """Writes arrays by numpy's public constructor: its own pickles name modules that numpy 2 renamed."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def _check_output(source: Path, output: Path) -> None:
    _check_suffix(output)
    if output.is_dir():
        raise ValueError(f"{output}: a folder; name the file to write")
    if source.exists() and output.exists() and os.path.samefile(source, output):
        raise ValueError(f"{output}: the output is the input; choose another name")


def _check_suffix(output: Path) -> None:
    if output.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{output}: the output's suffix is {output.suffix!r}; it must be {' or '.join(OUTPUT_SUFFIXES)}"
        )


def _recognise(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[_Match, int]:
    """Return the first source whose network is complete, and its depth."""
    tried = []
    for source in SOURCES:
        for place in source.nest:
            state = _at(checkpoint, place)
            if state is None or any(key not in checkpoint for key in source.beside):
                continue
            match = _Match(source, place, state, _unwrapped(state, path))
            depth = source.naming.depth_of(match.wanted())
            if depth is not None:
                return match, depth
            tried.append(match)
    raise _not_recognised(checkpoint, tried, path)


def _at(checkpoint: Mapping[str, Any], place: str) -> Mapping[str, Any] | None:
    """Return the mapping at a dotted path of keys, or None."""
    here: Any = checkpoint
    for key in place.split(".") if place else ():
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if isinstance(here, Mapping) else None


def _unwrapped(state: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, str]:
    """Return key without wrappers -> key, for the entries that are tensors."""
    keys: dict[str, str] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not _is_tensor(value):
            continue
        plain = _unwrap(key)
        if plain in keys:
            raise CheckpointError(f"{path}: `{keys[plain]}` and `{key}` are the same tensor's name; keep one of them")
        keys[plain] = key
    return keys


def _unwrap(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiu")


def _as_tensor(value: Any) -> torch.Tensor:
    return value.detach() if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


def _not_recognised(
    checkpoint: Mapping[str, Any], tried: list[_Match], path: str | os.PathLike[str]
) -> CheckpointError:
    """Say what the checkpoint is, if it is known; else what is missing of a network; else what was found."""
    prefixes = _tensor_prefixes(checkpoint)
    keys = [key for place in _mappings(checkpoint) for key in place.values()]
    for lookalike in LOOKALIKES:
        shown = next((key for key in keys if re.search(lookalike.pattern, _unwrap(key))), None)
        if shown is not None:
            return CheckpointError(f"{path}: {lookalike.found}, as `{shown}` shows; {lookalike.advice}")
    looked_for = "; ".join(source.describe() for source in SOURCES)
    top = _some(map(str, checkpoint)) or "nothing"
    for match in tried:
        wanted = match.wanted()
        depth, missing = match.source.naming.nearest(wanted)
        total = len(match.source.naming.names(depth))
        if len(missing) < total:
            prefix = match.source.prefix
            return CheckpointError(
                f"{path}: an incomplete {match.source.name}: {len(missing)} of the {total} tensors of a ResNet-{depth} "
                f"are missing: {_some(prefix + name for name in missing)}; found {prefixes}"
            )
    return CheckpointError(
        f"{path}: no ResNet that is known; top-level keys: {top}; tensors: {prefixes or 'none'}; "
        f"looked for {looked_for}"
    )


def _mappings(checkpoint: Mapping[str, Any], place: str = "", depth: int = 4) -> list[dict[str, str]]:
    """Return, for every mapping inside, dotted place and key -> key of its tensors."""
    found = [{f"{place}{key}": str(key) for key, value in checkpoint.items() if _is_tensor(value)}]
    for key, value in checkpoint.items():
        if isinstance(value, Mapping) and depth and key != "optimizer":  # an optimizer's keys are numbers
            found += _mappings(value, f"{place}{key}: ", depth - 1)
    return [mapping for mapping in found if mapping]


def _tensor_prefixes(checkpoint: Mapping[str, Any]) -> str:
    """Return `place: first two parts of the keys` with counts, the most frequent first."""
    counts: Counter[str] = Counter()
    for mapping in _mappings(checkpoint):
        for placed, key in mapping.items():
            place = placed.removesuffix(key)
            parts = key.split(".")
            counts[f"{place}{'.'.join(parts[:2])}.*" if len(parts) > 2 else f"{place}{key}"] += 1
    shown = [f"{prefix} ({count})" for prefix, count in counts.most_common(_SHOWN)]
    return ", ".join(shown) + (f" and {len(counts) - _SHOWN} more groups" if len(counts) > _SHOWN else "")


def _account(
    match: _Match, depth: int, path: str | os.PathLike[str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Sort every key into mapped, dropped and foreign."""
    source = match.source
    table = rename_table(source.naming, DETECTRON2, depth)
    mapped, dropped, unknown = {}, {}, []
    tensors = set(match.keys.values())
    foreign = [str(key) for key in match.state if key not in tensors]  # numbers and the like among the tensors
    for plain, key in match.keys.items():
        inside = plain.startswith(source.prefix)
        # Batch counters of another network (an encoder_k) are as foreign as the rest of it.
        patterns = (COUNTERS, *source.dropped) if inside else source.dropped
        reason = next((why for pattern, why in patterns if re.search(pattern, plain)), None)
        if inside and plain.removeprefix(source.prefix) in table:
            mapped[key] = table[plain.removeprefix(source.prefix)]
        elif reason is not None:
            dropped[key] = reason
        elif inside:
            unknown.append(key)
        else:
            foreign.append(key)
    if unknown:
        raise CheckpointError(
            f"{path}: {len(unknown)} keys belong neither to a ResNet-{depth} nor to what is known of {source.name}: "
            f"{_some(unknown)}; the network is another one than its other names say, or the file holds more than one"
        )
    order = {name: index for index, name in enumerate(table.values())}
    return dict(sorted(mapped.items(), key=lambda item: order[item[1]])), dropped, foreign


def _facts(
    match: _Match,
    tensors: Mapping[str, torch.Tensor],
    stated: BackboneFacts | None,
    path: str | os.PathLike[str],
) -> BackboneFacts:
    """Read the facts off the shapes; what shapes cannot tell comes from the file's own facts or the source's record."""
    _check_stem(tensors, path)
    source = match.source
    variant = (words for pattern, words in source.variants if any(re.search(pattern, key) for key in match.keys))
    told = stated or BackboneFacts(
        pixels=source.pixels, stride_in_1x1=source.stride_in_1x1, origin=next(variant, source.origin)
    )
    try:
        facts = facts_from_shapes(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            told.pixels,
            origin=told.origin,
            protocol=told.protocol,
            stride_in_1x1=told.stride_in_1x1,
        )
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its shapes are not a ResNet's ({error})") from error
    if stated is not None and facts != stated:
        seen, said = facts.as_dict(), stated.as_dict()
        wrong = ", ".join(
            f"{k} is {seen[k]} by the tensors, {said[k]} by the facts" for k in seen if seen[k] != said[k]
        )
        raise CheckpointError(f"{path}: its facts contradict its tensors: {wrong}; one of them is from another run")
    if facts.depth in (18, 34) and facts.res2_channels != 64:
        raise CheckpointError(
            f"{path}: a ResNet-{facts.depth} with {facts.res2_channels} channels in its first stage; Detectron2 builds "
            "depths 18 and 34 with 64 only"
        )
    return facts


def _check_stem(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    shape = tuple(tensors["conv1.weight"].shape)
    if len(shape) != 4 or shape[1] != 3:
        raise CheckpointError(
            f"{path}: conv1.weight has shape {shape}; only networks for 3-channel images can be converted"
        )
    if shape[2:] == (3, 3):
        raise CheckpointError(
            f"{path}: a CIFAR stem (conv1.weight has shape {shape}, a 3x3 convolution without pooling); Detectron2's "
            "ResNet has a 7x7 convolution and a pooling there; pretrain with the imagenet stem"
        )


def _check_shapes(facts: BackboneFacts, tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Compare with the network that the facts describe; its tensors, no more and no less, are expected."""
    try:
        with torch.device("meta"):  # shapes only
            expected = network_for(facts).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: no ResNet has these widths ({error}): {facts}") from error
    shapes = {name: tuple(t.shape) for name, t in expected.items() if not name.endswith("num_batches_tracked")}
    if set(shapes) != set(tensors):  # the names come from the same depth's table
        raise CheckpointError(
            f"{path}: names differ from a ResNet-{facts.depth}'s: {_some(set(shapes) ^ set(tensors))}"
        )
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors have the wrong shape for a ResNet-{facts.depth}: {_some(wrong)}"
        )


def _check_values(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors that cannot come from a sound run or download.

    A normalisation's weight, bias and mean may be all zero: they are, before the first step.
    """
    for what, wrong in (
        ("are not floating point", [k for k, t in tensors.items() if not t.is_floating_point()]),
        ("hold NaN or infinity", [k for k, t in tensors.items() if not torch.isfinite(t).all()]),
        ("are all zero", [k for k, t in tensors.items() if (t.ndim == 4 or k.endswith("_var")) and not t.any()]),
        ("hold negative variances", [k for k, t in tensors.items() if k.endswith("_var") and (t < 0).any()]),
    ):
        if wrong:
            raise CheckpointError(
                f"{path}: {len(wrong)} tensors {what}: {_some(wrong)}; the run diverged, or the file is damaged"
            )


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""Turning a checkpoint into a file that Detectron2 loads whole, or an error that says why not.

Detectron2 skips what does not match and trains on; so nothing is skipped here. Every key of the state dict is mapped,
dropped for a stated reason, or foreign to the wanted network, and the mapped ones must be exactly the tensors of the
ResNet that the facts describe.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.overrides import TorchFunctionMode

from moco_d2.atomic import atomic_write
from moco_d2.convert.load import CheckpointError, facts_in, read_checkpoint
from moco_d2.convert.names import DETECTRON2, TORCHVISION, Naming, rename_table
from moco_d2.convert.parts import Carried, Part, check_shapes, choose, needs
from moco_d2.convert.prove import prove, prove_parts
from moco_d2.convert.recognise import (
    Choice,
    Match,
    Trunk,
    as_tensor,
    beside,
    input_scale,
    look_alike,
    recognise,
    some,
    unwrap,
)
from moco_d2.convert.sources import COMPANIONS, COUNTERS, SOURCES, UNSEEN, CheckpointSource
from moco_d2.facts import BackboneFacts, Pixels
from moco_d2.layers.resnet import facts_from_shapes, network_for

OUTPUT_SUFFIXES = (".pth", ".pkl")
AUTHOR = "moco_d2"
_VARIANCES = ("_var", "_riv", "_variance", "var_ema|average")
_EPSILON = 1e-5  # of every norm here


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
        place: dotted path of the state dict in the file.
        elsewhere: first parts of the names of what the file holds beside that state dict, with counts of tensors.
        norm: ``BN``, or ``GN`` for GroupNorm.
        also: other sources whose files look the same.
        notes: what the weights do not show, and what was assumed or done about it.
        parts: what of a detector was converted beside the trunk.
    """

    source: CheckpointSource
    facts: BackboneFacts
    tensors: dict[str, torch.Tensor]
    source_tensors: dict[str, torch.Tensor]
    mapped: dict[str, str]
    dropped: dict[str, str]
    foreign: list[str]
    place: str = ""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    norm: str = "BN"
    also: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[Carried, ...] = ()

    def config(self) -> dict[str, Any]:
        """Return the Detectron2 keys, with values, under which the weights mean what they meant at their source."""
        norm = {"MODEL.RESNETS.NORM": self.norm} if self.norm != "BN" else {}
        wanted = needs({name: tuple(tensor.shape) for name, tensor in self.content().items()})
        # No norm is Detectron2's default, and not what detectors are fine-tuned with: left to the protocol.
        return self.facts.config() | norm | {key: value for key, value in wanted.items() if value != ""}

    def content(self) -> dict[str, torch.Tensor]:
        """Return everything that is written: the trunk and the parts."""
        return {**self.tensors, **{name: tensor for part in self.parts for name, tensor in part.tensors.items()}}

    @property
    def arxiv(self) -> str:
        """Number of the paper, or of several."""
        told = (number for _, origin, number in self.source.variants if origin == self.facts.origin)
        return next(told, self.source.arxiv)

    def foreign_groups(self) -> Counter[str]:
        """Return how many foreign keys there are under each first part of their names, wrappers aside."""
        return Counter(unwrap(key).partition(".")[0] for key in self.foreign)


def convert_checkpoint(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    proof: bool = True,
    choice: Choice | None = None,
    picture: torch.Tensor | None = None,
) -> tuple[Conversion, dict[str, float]]:
    """Convert a checkpoint to Detectron2's names, prove it, and write it and its config.

    The output appears under its name only when it is complete and proven. Beside it, with the suffix ``.yaml``, lies a
    config that feeds it rightly, for ``_BASE_``.

    Args:
        source: the checkpoint.
        output: the file to write; ``.pth``, or ``.pkl`` with numpy arrays.
        proof: whether to compare the features of both networks (needs Detectron2).
        choice: what the user says where the file does not.
        picture: what the features are compared on, beside noise (:func:`moco_d2.convert.prove.read_picture`).

    Returns:
        The conversion, and the largest relative difference per stage (empty without proof).

    Raises:
        CheckpointError: the checkpoint cannot be read or converted.
        ValueError: the output's name is unusable, or the proof failed (:class:`moco_d2.convert.prove.ProofError`).
    """
    source, output = Path(source), Path(output)
    check_output(source, output)
    conversion = convert_state(read_checkpoint(source), source, choice)
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within a file system.
    part = output.with_name(f".{output.stem}.{os.getpid()}{output.suffix}")
    differences: dict[str, float] = {}
    try:
        save(conversion, part)
        if proof:
            written = {name: as_tensor(t) for name, t in read_checkpoint(part)["model"].items()}
            trunk = {name: tensor for name, tensor in written.items() if name in conversion.tensors}
            differences = prove(conversion.facts, conversion.source_tensors, trunk, conversion.norm, picture)
            differences |= prove_parts(
                conversion.facts, conversion.source_tensors, conversion.parts, written, conversion.norm
            )
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    with atomic_write(config_path(output)) as file:
        file.write(config_yaml(conversion, output).encode())
    return conversion, differences


def config_path(output: str | os.PathLike[str]) -> Path:
    """Return where the config of a converted file is."""
    return Path(output).with_suffix(".yaml")


def config_yaml(conversion: Conversion, output: str | os.PathLike[str]) -> str:
    """Return a config for ``_BASE_``: the weights and what they need."""
    tree: dict[str, Any] = {"MODEL": {"WEIGHTS": str(Path(output).absolute())}}
    for key, value in conversion.config().items():
        here = tree
        *parts, last = key.split(".")
        for name in parts:
            here = here.setdefault(name, {})
        here[last] = value
    lines: str = yaml.safe_dump({**tree, "VERSION": 2}, sort_keys=False, default_flow_style=None)
    return f"# What {Path(output).name} needs: {conversion.facts.origin}.\n{lines}"


def convert_state(
    checkpoint: Mapping[str, Any], path: str | os.PathLike[str], choice: Choice | None = None
) -> Conversion:
    """Convert an already read checkpoint (see :func:`convert_checkpoint`); ``path`` is for messages.

    Raises:
        CheckpointError: no known source, an incomplete network, unknown keys, or unusable tensors.
    """
    stated, choice = facts_in(checkpoint, path), choice or Choice()
    match = recognise(checkpoint, path, choice, stated)
    trunk = match.trunk
    parts = [_part(match, name, path) for name in choice.parts]
    mapped, dropped, foreign = _account(match, parts, path)
    tensors, notes = _tensors(match, path)
    statistics = "bn1.running_mean" in tensors
    to_detectron2 = rename_table(*_pair(statistics), trunk.depth)
    key_of = {name: key for key, name in mapped.items()}
    facts = _facts(match, tensors, stated, path)
    _check_shapes(facts, tensors, path)
    _check_values({key_of.get(to_detectron2[name], name): tensor for name, tensor in tensors.items()}, path)
    tensors = {name: t.to(torch.float32).contiguous() for name, t in tensors.items()}
    carried = tuple(_carried(part, trunk, facts, path) for part in parts)
    facts = replace(facts, parts=choice.parts)
    notes += [part.note for part in parts if part.note]
    if not stated:
        notes += [*match.source.notes, UNSEEN]
        scale = input_scale(trunk)
        notes += [f"pixels: by conv1 and bn1, the inputs varied by about {scale:.2g}"] if scale else []
    return Conversion(
        source=match.source,
        facts=facts,
        tensors={to_detectron2[name]: tensor for name, tensor in tensors.items()},
        source_tensors=tensors,
        mapped=mapped,
        dropped=dropped,
        foreign=foreign,
        place=trunk.place,
        elsewhere=_elsewhere(checkpoint, trunk.state),
        norm="GN" if trunk.group_norm else "BN",
        also=match.also,
        notes=tuple(notes),
        parts=carried,
    )


def _part(match: Match, name: str, path: str | os.PathLike[str]) -> Part:
    try:
        return choose(match.source.parts, name, match.trunk.keys)
    except ValueError as error:
        known = "; ".join(f"{s.name}: {', '.join(dict.fromkeys(p.name for p in s.parts))}" for s in SOURCES if s.parts)
        raise CheckpointError(
            f"{path}: recognised as {match.source.name}; {error} (sources with parts: {known})"
        ) from error


def _carried(part: Part, trunk: Trunk, facts: BackboneFacts, path: str | os.PathLike[str]) -> Carried:
    """Take a part's tensors out of the file, in the order of its table."""
    held = {trunk.keys[key]: as_tensor(trunk.state[trunk.keys[key]]) for key in part.table()}
    _check_values(held, path)
    tensors = [tensor.to(torch.float32).contiguous() for tensor in held.values()]
    carried = Carried(part, dict(zip(part.table().values(), tensors, strict=True)))
    try:
        check_shapes(carried, facts)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return carried


def _pair(statistics: bool) -> tuple[Naming, Naming]:
    if statistics:
        return TORCHVISION, DETECTRON2
    return TORCHVISION.without_statistics(), DETECTRON2.without_statistics()


def save(conversion: Conversion, output: str | os.PathLike[str]) -> None:
    """Write a conversion and flush it to the disk; the suffix decides the format.

    Raises:
        ValueError: an unknown suffix.
    """
    output = Path(output)
    _check_suffix(output)
    content: dict[str, Any] = {
        "model": conversion.content(),
        "__author__": AUTHOR,
        # One file must fit backbone.res4 and roi_heads.res5 (C4) as well as backbone.bottom_up.res4 (FPN).
        "matching_heuristics": True,
        "facts": conversion.facts.as_dict(),
    }
    with open(output, "wb") as file:
        if output.suffix == ".pkl":
            content["model"] = {name: tensor.numpy() for name, tensor in content["model"].items()}
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


def check_output(source: Path, output: Path) -> None:
    """Refuse an output of an unknown suffix, a folder, or the input itself."""
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


def _account(
    match: Match, parts: Sequence[Part], path: str | os.PathLike[str]
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Sort every key into mapped, dropped and foreign."""
    source, trunk = match.source, match.trunk
    target = DETECTRON2 if trunk.naming.statistics else DETECTRON2.without_statistics()
    table = rename_table(trunk.naming, target, trunk.depth)
    beside = {key: name for part in parts for key, name in part.table().items()}
    taken = [part.name for part in parts]
    left = [(p.keys, COUNTERS[1] if p.name in taken else f"{p.what} (--with {p.name} keeps it)") for p in source.parts]
    mapped, dropped, unknown = {}, {}, []
    tensors = set(trunk.keys.values())
    foreign = [str(key) for key in trunk.state if key not in tensors]  # numbers and the like among the tensors
    for plain, key in trunk.keys.items():
        inside = plain.startswith(trunk.prefix)
        name = plain.removeprefix(trunk.prefix)
        # Batch counters of another network (an encoder_k) are as foreign as the rest of it.
        patterns = (*([COUNTERS] if inside else []), *source.dropped, *left)
        reason = next((why for pattern, why in patterns if re.search(pattern, plain)), None)
        if inside and name in table:
            mapped[key] = table[name]
        elif plain in beside:
            mapped[key] = beside[plain]
        elif inside and name == "conv1.bias" and trunk.naming == TORCHVISION:
            dropped[key] = "bias of conv1, subtracted from the mean of bn1 (the same computation)"
        elif reason is not None:
            dropped[key] = reason
        elif inside and not _of_companion(source, plain):
            unknown.append(key)
        else:
            foreign.append(key)
    if unknown:
        raise look_alike(unknown, path) or CheckpointError(
            f"{path}: {len(unknown)} keys belong neither to a ResNet-{trunk.depth} nor to what is known of "
            f"{source.name}: {some(unknown)}; the network is another one than its other names say, or the file holds "
            "more than one"
        )
    order = {name: index for index, name in enumerate((*table.values(), *beside.values()))}
    return dict(sorted(mapped.items(), key=lambda item: order[item[1]])), dropped, foreign


def _of_companion(source: CheckpointSource, plain: str) -> bool:
    # Only where there is no prefix to tell: a network of TensorFlow's or JAX's lies beside its moving average.
    return source.prefix == "" and source.naming.height_first and COMPANIONS.search(plain) is not None


def _tensors(match: Match, path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the trunk's tensors under torchvision's names as its source computes with them, and what was done."""
    trunk = match.trunk
    tensors = {name: as_tensor(value) for name, value in trunk.tensors().items()}
    notes = []
    for name, tensor in tensors.items():
        if tensor.is_quantized:
            raise CheckpointError(
                f"{path}: a quantised network ({name}); convert the float checkpoint it was made from"
            )
    if trunk.naming.height_first:
        tensors = {
            n: t.permute(3, 2, 0, 1)
            if t.ndim == 4 and ".weight" in n and "bn" not in n and "downsample.1" not in n
            else t.reshape(-1)
            for n, t in tensors.items()
        }
    if trunk.naming.statistics:
        groups = _join_split_norms(tensors)
        if groups:
            notes.append(
                f"split norms: the running statistics of {groups} groups were averaged, as their evaluation does"
            )
    elif not trunk.group_norm:  # statistics folded into an affine layer
        whole = TORCHVISION.names(trunk.depth)
        ones = {
            n: tensors[n.replace("running_mean", "weight").replace("running_var", "weight")]
            for n in whole
            if "running" in n
        }
        fill = {n: torch.full_like(w, 1 - _EPSILON if n.endswith("var") else 0.0) for n, w in ones.items()}
        tensors = {name: tensors[name] if name in tensors else fill[name] for name in whole}
    bias = trunk.keys.get(f"{trunk.prefix}conv1.bias")
    if bias is not None and trunk.naming == TORCHVISION and match.trunk.naming.statistics:
        tensors["bn1.running_mean"] = tensors["bn1.running_mean"] - as_tensor(trunk.state[bias])
        notes.append(
            "conv1.bias was subtracted from bn1's mean, which is the same computation; mmdetection leaves it out"
        )
    return tensors, notes


def _join_split_norms(tensors: dict[str, torch.Tensor]) -> int:
    """Average the statistics of lightly's split norms, in place; return the number of splits, 0 without any."""
    splits = 0
    for name, tensor in tensors.items():
        channels = len(tensors[name.rpartition(".")[0] + ".weight"]) if "running_" in name else 0
        if channels and tensor.ndim == 1 and len(tensor) > channels and len(tensor) % channels == 0:
            splits = len(tensor) // channels
            tensors[name] = tensor.view(splits, channels).mean(0)
    return splits


def _elsewhere(checkpoint: Mapping[str, Any], state: Mapping[Any, Any]) -> dict[str, int]:
    """Count the tensors of a file outside of the state dict, by top-level key."""

    def count(value: Any, depth: int) -> int:
        if value is state or depth < 0:
            return 0
        if isinstance(value, torch.Tensor | np.ndarray):
            return 1
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return sum(count(item, depth - 1) for item in inside)

    if checkpoint is state:
        return {}
    return {
        str(key): count(value, 3) for key, value in checkpoint.items() if isinstance(key, str) and value is not state
    }


def _facts(
    match: Match,
    tensors: Mapping[str, torch.Tensor],
    stated: BackboneFacts | None,
    path: str | os.PathLike[str],
) -> BackboneFacts:
    """Read the facts off the shapes; what shapes cannot tell comes from the file's own facts or the source's record."""
    _check_stem(tensors, path)
    source, keys = match.source, match.trunk.keys
    variant = (words for pattern, words, _ in source.variants if any(re.search(pattern, key) for key in keys))
    told = stated or BackboneFacts(**_told_beside(source, path), origin=next(variant, source.origin))
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
    if stated is not None and facts != (stated := replace(stated, parts=())):  # parts are taken on request only
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


def _told_beside(source: CheckpointSource, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return pixels and stride by the config.json of Hugging Face's hub, where there is one, else by the record."""
    config = beside(path)
    told = {"pixels": source.pixels, "stride_in_1x1": source.stride_in_1x1}
    if source.key.startswith("transformers") and config:
        told["stride_in_1x1"] = bool(config.get("downsample_in_bottleneck"))
        if config.get("hidden_act", "relu") != "relu":
            raise CheckpointError(f"{path}: its activation is {config['hidden_act']}; Detectron2's ResNet has ReLU")
        if config.get("downsample_in_first_stage"):
            raise CheckpointError(f"{path}: strides in the first stage (its config.json); Detectron2's ResNet cannot")
    trained = config.get("pretrained_cfg")
    if isinstance(trained, dict) and "mean" in trained and "std" in trained:
        mean, std = ([255 * float(v) for v in trained[name]] for name in ("mean", "std"))
        told["pixels"] = Pixels("RGB", tuple(round(v, 3) for v in mean), tuple(round(v, 3) for v in std))  # type: ignore[arg-type]
    return told


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
        with torch.device("meta"), _NoFilling():  # shapes only
            expected = network_for(facts).state_dict()
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: no ResNet has these widths ({error}): {facts}") from error
    shapes = {name: tuple(t.shape) for name, t in expected.items() if not name.endswith("num_batches_tracked")}
    if not set(tensors) & {"bn1.running_mean"}:  # GroupNorm
        shapes = {name: shape for name, shape in shapes.items() if "running_" not in name}
    if set(shapes) != set(tensors):  # the names come from the same depth's table
        raise CheckpointError(f"{path}: names differ from a ResNet-{facts.depth}'s: {some(set(shapes) ^ set(tensors))}")
    wrong = [
        f"{name} is {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors have the wrong shape for a ResNet-{facts.depth}: {some(wrong)}"
        )


class _NoFilling(TorchFunctionMode):
    """Skips the initialisation of parameters, which on the meta device takes longer than all else."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.fill_, torch.Tensor.zero_):
            return arguments[0]
        return function(*arguments, **(named or {}))


def _check_values(tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Refuse tensors that cannot come from a sound run or download.

    A normalisation's weight, bias and mean may be all zero: they are, before the first step.
    """
    # One pass over the weights: a NaN shows in both ends of the range.
    ranges = {k: [end.item() for end in t.float().aminmax()] for k, t in tensors.items() if t.is_floating_point()}
    nonzero = [key for key in ranges if tensors[key].ndim == 4 or key.endswith(_VARIANCES)]
    for what, wrong in (
        ("are not floating point", [key for key in tensors if key not in ranges]),
        ("hold NaN or infinity", [key for key, ends in ranges.items() if not all(map(math.isfinite, ends))]),
        ("are all zero", [key for key in nonzero if ranges[key] == [0, 0]]),
        ("hold negative variances", [key for key in ranges if key.endswith(_VARIANCES) and ranges[key][0] < 0]),
    ):
        if wrong:
            raise CheckpointError(
                f"{path}: {len(wrong)} tensors {what}: {some(wrong)}; the run diverged, or the file is damaged"
            )

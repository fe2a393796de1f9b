"""Outcome of a conversion, and the files that it is written to: weights and a config."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from moco_d2.convert.find import as_tensor
from moco_d2.convert.names import Row
from moco_d2.convert.parts import Component, needs
from moco_d2.convert.prove import ProofError, prove, prove_parts
from moco_d2.convert.prove_vit import check_provable, prove_vit
from moco_d2.convert.sources import CheckpointSource
from moco_d2.convert.vit_names import BESIDE_KEY
from moco_d2.facts import BackboneFacts, Pixels, ResNetFacts, ViTFacts
from moco_d2.io.checkpoints import CheckpointError, read_checkpoint, some
from moco_d2.io.files import check_named_file, make_folder, move, named_file, one_line

OUTPUT_SUFFIXES = (".pth", ".pkl")
AUTHOR = "moco_d2"  # of every converted file; no checkpoint of a training says so


@dataclass(frozen=True)
class Conversion:
    """The outcome of a conversion, before it is written.

    Attributes:
        source: the record that recognised the checkpoint.
        facts: what the weights are.
        tensors: Detectron2's name -> float32 tensor, for the backbone.
        source_tensors: the same tensors under torchvision's names, or a ViT's under timm's, those of ``beside`` too.
        rows: the names of every tensor that is written; the tensors were moved by them.
        dropped: key in the file -> reason it was left out.
        foreign: keys in the file that belong to something other than the wanted network.
        place: dotted path of the state dict in the file.
        elsewhere: what the file holds outside that state dict: top-level key -> count of tensors.
        also: other sources whose files look the same.
        notes: what the weights do not show, and what was assumed or done about it.
        parts: what of a detector was converted with the backbone.
        source_pixels: the input of ``source_tensors``, if ``tensors`` were baked for another.
        beside: timm's name -> float32 tensor of a ViT, for which Detectron2's has no place: the class token and the
            last norm. They are written outside the model, for the way back.
        source_sha256: of the checkpoint, so that reports know what the written file was made of; empty if unknown.
    """

    source: CheckpointSource
    facts: BackboneFacts
    tensors: dict[str, torch.Tensor]
    source_tensors: dict[str, torch.Tensor]
    rows: tuple[Row, ...]
    dropped: dict[str, str]
    foreign: list[str]
    place: str = ""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[Component, ...] = ()
    source_pixels: Pixels | None = None
    beside: dict[str, torch.Tensor] = field(default_factory=dict)
    source_sha256: str = ""

    @property
    def mapped(self) -> dict[str, str]:
        """Key in the file -> Detectron2's name."""
        return {row.key: row.detectron2 for row in self.rows if row.key}

    def config(self) -> dict[str, Any]:
        """Return the config keys, with values, under which Detectron2 computes what the source computes."""
        wanted = needs({name: tuple(tensor.shape) for name, tensor in self.content().items()})
        # A norm "" is left to the protocol: it is Detectron2's default, and detectors are fine-tuned with another.
        return self.facts.config() | {key: value for key, value in wanted.items() if value != ""}

    def content(self) -> dict[str, torch.Tensor]:
        """Return every tensor that is written: the backbone's and the parts'."""
        return {**self.tensors, **{name: tensor for part in self.parts for name, tensor in part.tensors.items()}}

    @property
    def arxiv(self) -> str:
        """Number of the paper, or of several; empty if unknown."""
        numbers = {origin: number for _, origin, number in self.source.variants}
        # A file in this source's layout may state another origin.
        return {self.source.origin: self.source.arxiv, **numbers}.get(self.facts.origin, "")


def elsewhere(checkpoint: Mapping[str, Any], state: Mapping[Any, Any]) -> dict[str, int]:
    """Count the tensors of a file outside the state dict, by top-level key."""
    seen = {id(state)}  # a small file may hold a list that repeats the same large list a million times

    def count(value: Any, depth: int) -> int:
        if isinstance(value, torch.Tensor | np.ndarray):
            return int(depth >= 0)
        if id(value) in seen or depth < 0:
            return 0
        seen.add(id(value))
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return sum(count(item, depth - 1) for item in inside)

    if checkpoint is state:
        return {}
    return {
        str(key): count(value, 3) for key, value in checkpoint.items() if isinstance(key, str) and value is not state
    }


def check_output(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse an output that is the input, has an unknown suffix, or would overwrite what the converter did not write.

    Raises:
        ValueError: it is one of these, or is not writable.
    """
    output = Path(output)
    _check_suffix(output)
    check_another(source, output)
    check_named_file(output, is_converted)
    check_named_file(config_path(output), is_config_of(output))


def _check_suffix(output: Path) -> None:
    if output.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(
            f"{output}: the output's suffix is {output.suffix!r}; it must be {' or '.join(OUTPUT_SUFFIXES)}"
        )


def check_another(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse an output that is the input.

    Raises:
        ValueError: it is.
    """
    if os.path.exists(source) and os.path.exists(output) and os.path.samefile(source, output):
        raise ValueError(f"{output}: the output is the input; choose another name")


def is_converted(path: Path) -> bool:
    """Return whether a file is one that a conversion wrote, forward or back."""
    try:
        content = read_checkpoint(path)
    except CheckpointError:
        return False
    return content.get("__author__") == AUTHOR


def write(
    conversion: Conversion,
    output: str | os.PathLike[str],
    proof: bool = True,
    picture: torch.Tensor | None = None,
) -> dict[str, float]:
    """Write a conversion; the file appears under its name only when it is complete and proven.

    Args:
        conversion: what to write.
        output: the file; ``.pth``, or ``.pkl`` with numpy arrays.
        proof: whether to compare the features of both networks (needs Detectron2).
        picture: as in :func:`moco_d2.convert.prove.prove`.

    Returns:
        The largest relative difference per stage (empty without proof).

    Raises:
        ProofError: the features differ.
    """
    if proof and isinstance(conversion.facts, ViTFacts):
        check_provable()
    output = Path(os.path.realpath(output))
    make_folder(output.parent, "the folder")
    # In the same folder, because a rename is atomic only within a file system.
    with one_line(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as scratch:
        part = Path(scratch) / output.name
        save(conversion, part)
        differences = _prove_written(conversion, part, picture) if proof else {}
        move(part, output, is_converted)
    return differences


def _prove_written(conversion: Conversion, path: Path, picture: torch.Tensor | None) -> dict[str, float]:
    written = {name: as_tensor(tensor) for name, tensor in read_checkpoint(path)["model"].items()}
    backbone = {name: tensor for name, tensor in written.items() if name in conversion.tensors}
    facts, pixels = conversion.facts, conversion.source_pixels
    if isinstance(facts, ViTFacts):
        return prove_vit(facts, conversion.source_tensors, written, picture)
    if not isinstance(facts, ResNetFacts):
        raise ProofError(f"no proof is known for facts of kind {facts.kind}")
    read = (facts, conversion.source_tensors)
    differences = prove(*read, backbone, picture, pixels)
    return differences | prove_parts(*read, conversion.parts, written, pixels)


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
        "source_sha256": conversion.source_sha256,
    }
    if conversion.beside:
        content[BESIDE_KEY] = conversion.beside
    with open(output, "wb") as file:
        if output.suffix == ".pkl":
            for key in {"model", BESIDE_KEY} & set(content):
                content[key] = {name: tensor.numpy() for name, tensor in content[key].items()}
            _ArrayPickler(file, protocol=5).dump(content)
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


class _ArrayPickler(pickle.Pickler):
    """Writes arrays by numpy's public constructor, because numpy's own pickles name modules that numpy 2 renamed."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented


def config_path(output: str | os.PathLike[str]) -> Path:
    """Return the path of a converted file's config."""
    return Path(output).with_suffix(".yaml")


def is_config_of(output: str | os.PathLike[str]) -> Callable[[Path], bool]:
    """Return a function that tests whether a file is the unedited config of a converted file."""
    starts = tuple(f"# What {Path(output).stem}{suffix} needs: ".encode() for suffix in OUTPUT_SUFFIXES)

    def test(path: Path) -> bool:
        head, _, rest = path.read_bytes().partition(b"\n")
        stamp, _, body = rest.partition(b"\n")
        return head.startswith(starts) and stamp == _stamp(body)

    return test


def _stamp(body: bytes) -> bytes:
    """Return the comment that shows that a config is unedited."""
    digest = hashlib.sha256(body).hexdigest()[:16]
    return f"# Once edited, this file is not overwritten (SHA-256 of what follows: {digest}).".encode()


def write_config(conversion: Conversion, output: str | os.PathLike[str]) -> None:
    """Write, beside a converted file, a config for ``_BASE_``: the weights and the keys that they need.

    Raises:
        ValueError: there is a file of the user's, or an edited config.
    """
    tree: dict[str, Any] = {"MODEL": {"WEIGHTS": str(Path(output).absolute())}}
    for key, value in conversion.config().items():
        here = tree
        *parts, last = key.split(".")
        for name in parts:
            here = here.setdefault(name, {})
        here[last] = value
    body: bytes = yaml.safe_dump({**tree, "VERSION": 2}, sort_keys=False, default_flow_style=None).encode()
    # The origin is any text, also that of a stranger's file: on one line, it cannot leave the comment.
    head = f"# What {Path(output).name} needs: {some([conversion.facts.origin])}.\n".encode()
    with named_file(config_path(output), is_config_of(output)) as file:
        file.write(head + _stamp(body) + b"\n" + body)

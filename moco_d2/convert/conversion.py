"""The outcome of a conversion, and the files that it becomes: weights and a config."""

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

from moco_d2.convert.parts import Carried, needs
from moco_d2.convert.prove import prove, prove_parts
from moco_d2.convert.sources import CheckpointSource
from moco_d2.convert.trunk import as_tensor
from moco_d2.facts import BackboneFacts, Pixels
from moco_d2.io.checkpoints import CheckpointError, read_checkpoint
from moco_d2.io.files import check_named_file, make_folder, move, named_file, one_line

OUTPUT_SUFFIXES = (".pth", ".pkl")
AUTHOR = "moco_d2"  # of every converted file; no checkpoint of a training says so


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
        source_pixels: the input of ``source_tensors``, where ``tensors`` were baked for another.
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
    source_pixels: Pixels | None = None

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


def check_output(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse an output that is the input, has an unknown suffix, or would overwrite what the converter did not write.

    Raises:
        ValueError: it is one of these, or cannot be written.
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
    """Write a conversion; the file appears under its name only when it is complete and what it holds is proven.

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
    trunk = {name: tensor for name, tensor in written.items() if name in conversion.tensors}
    read = conversion.facts, conversion.source_tensors
    norm, pixels = conversion.norm, conversion.source_pixels
    differences = prove(*read, trunk, norm, picture, pixels)
    return differences | prove_parts(*read, conversion.parts, written, norm, pixels)


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


def config_path(output: str | os.PathLike[str]) -> Path:
    """Return where the config of a converted file is."""
    return Path(output).with_suffix(".yaml")


def is_config_of(output: str | os.PathLike[str]) -> Callable[[Path], bool]:
    """Return a test whether a file is the config that was written beside a converted file, and not edited since."""
    starts = tuple(f"# What {Path(output).stem}{suffix} needs: ".encode() for suffix in OUTPUT_SUFFIXES)

    def test(path: Path) -> bool:
        head, _, rest = path.read_bytes().partition(b"\n")
        stamp, _, body = rest.partition(b"\n")
        return head.startswith(starts) and stamp == _stamp(body)

    return test


def _stamp(body: bytes) -> bytes:
    """Return the comment by which a config is known to be as it was written."""
    digest = hashlib.sha256(body).hexdigest()[:16]
    return f"# Once edited, this file is not overwritten (SHA-256 of what follows: {digest}).".encode()


def write_config(conversion: Conversion, output: str | os.PathLike[str]) -> None:
    """Write, beside a converted file, a config for ``_BASE_``: the weights and what they need.

    Raises:
        ValueError: the file there is the user's, or was edited.
    """
    tree: dict[str, Any] = {"MODEL": {"WEIGHTS": str(Path(output).absolute())}}
    for key, value in conversion.config().items():
        here = tree
        *parts, last = key.split(".")
        for name in parts:
            here = here.setdefault(name, {})
        here[last] = value
    body: bytes = yaml.safe_dump({**tree, "VERSION": 2}, sort_keys=False, default_flow_style=None).encode()
    head = f"# What {Path(output).name} needs: {conversion.facts.origin}.\n".encode()
    with named_file(config_path(output), is_config_of(output)) as file:
        file.write(head + _stamp(body) + b"\n" + body)

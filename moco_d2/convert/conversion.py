"""The outcome of a conversion, and the files that it becomes: weights and a config."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping
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
from moco_d2.io.checkpoints import read_checkpoint
from moco_d2.io.files import atomic_write

OUTPUT_SUFFIXES = (".pth", ".pkl")
AUTHOR = "moco_d2"


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
    """Refuse an output of an unknown suffix, a folder, or the input itself.

    Raises:
        ValueError: it is one of these.
    """
    output = Path(output)
    _check_suffix(output)
    if output.is_dir():
        raise ValueError(f"{output}: a folder; name the file to write")
    check_another(source, output)


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
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within a file system.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".") as scratch:
        part = Path(scratch) / output.name
        save(conversion, part)
        differences = _prove_written(conversion, part, picture) if proof else {}
        os.replace(part, output)
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


def write_config(conversion: Conversion, output: str | os.PathLike[str]) -> None:
    """Write, beside a converted file, a config for ``_BASE_``: the weights and what they need."""
    tree: dict[str, Any] = {"MODEL": {"WEIGHTS": str(Path(output).absolute())}}
    for key, value in conversion.config().items():
        here = tree
        *parts, last = key.split(".")
        for name in parts:
            here = here.setdefault(name, {})
        here[last] = value
    lines: str = yaml.safe_dump({**tree, "VERSION": 2}, sort_keys=False, default_flow_style=None)
    with atomic_write(config_path(output)) as file:
        file.write(f"# What {Path(output).name} needs: {conversion.facts.origin}.\n{lines}".encode())

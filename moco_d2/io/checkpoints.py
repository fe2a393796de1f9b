"""Reader of checkpoints of any project, format and name, which runs no code from them.

Nothing else in the project opens a file of weights. Pickles are read by :mod:`moco_d2.io.unpickle`. Tensors are views
of the mapped file, so tensors that are not used are never read from the disk.
"""

from __future__ import annotations

import io
import json
import logging
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from moco_d2.facts import BackboneFacts
from moco_d2.io import forms
from moco_d2.io.errors import CheckpointError as CheckpointError  # users of this module need these names
from moco_d2.io.errors import some as some
from moco_d2.io.sharded import INDEX, find_index, join, parts_of, refuse_part
from moco_d2.io.unpickle import HostileError, Stub, Unpickler, allowed_names, read_legacy, section
from moco_d2.io.version import FileVersion

logger = logging.getLogger(__name__)

_INFLATION = 20  # times; weights are noise, and compress by a tenth only
_HEAD_BYTES = 512  # enough for every signature below
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6: its magic number


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file.

    Attributes:
        path: as it was given.
        content: the top-level mapping. Tensors are views of the mapped file: copy a tensor before changing it.
        stubbed: names of classes and functions that became stubs.
        version: of the file, or of the index and its parts.
    """

    path: Path
    content: dict[str, Any]
    stubbed: tuple[str, ...]
    version: FileVersion


@dataclass(frozen=True)
class MethodBackbone:
    """Where a pretraining checkpoint of this project keeps the backbone.

    Attributes:
        method: the method's name.
        prefix: what the backbone's keys in ``model`` start with; None: the backbone is no sub-module of the method.
    """

    method: str
    prefix: str | None


# The last file, because a command checks its weights, loads them and asks for their checksum.
_last: Checkpoint | None = None


def _mapped(path: Path) -> Any:
    return torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)


def _load_zip(path: Path) -> tuple[Any, set[str]]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: a truncated torch file (its end is missing); {forms.DOWNLOAD_AGAIN}")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    members = {entry.filename.rpartition("/")[2] for entry in entries}
    if any(entry.flag_bits & 1 for entry in entries):
        raise CheckpointError(f"{path}: an encrypted zip archive; decrypt it first")
    if entries and all(entry.filename.endswith(".npy") for entry in entries):
        return _load_arrays(path, sum(entry.file_size for entry in entries))
    if problem := forms.of_zip(path, members):
        raise CheckpointError(f"{path}: {problem}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: a compressed torch file, which torch.save does not write; save it again where it was made"
        )
    return _load_archive(path)


def _load_archive(path: Path) -> tuple[Any, set[str]]:
    """Read a zip archive of ``torch.save`` (since 1.6): a pickle, and each storage in a file of its own."""
    whole, stubbed = _mapped(path), set[str]()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        root = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl").removesuffix(
            "data.pkl"
        )
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"

        def storage(key: str, dtype: torch.dtype, count: int) -> Any:
            entry = archive.getinfo(f"{root}data/{key}")
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            size = count * dtype.itemsize
            if size > entry.file_size:
                raise pickle.UnpicklingError(f"data/{key} has {entry.file_size} bytes of {size}")
            part = section(whole, entry.header_offset + 30 + name + extra, size)
            if order.decode() != sys.byteorder and dtype.itemsize > 1:
                part.byteswap(dtype)
            return part

        data = archive.read(f"{root}data.pkl")
        return Unpickler(io.BytesIO(data), allowed_names(len(data)), stubbed, storage).load(), stubbed


def _load_arrays(path: Path, size: int) -> tuple[Any, set[str]]:
    """Read numpy's archive of arrays; a name may hold slashes, as TensorFlow's variables do."""
    if size > _INFLATION * path.stat().st_size:
        raise CheckpointError(
            f"{path}: its arrays decompress to {size} bytes, more than weights can; the file is damaged, or hostile"
        )
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}, set()


def _load_legacy(path: Path) -> tuple[Any, set[str]]:
    stubbed = set[str]()
    with _bytes_of(path) as stream:
        return read_legacy(stream, _mapped(path), stubbed), stubbed


def _bytes_of(path: Path) -> mmap.mmap:
    # Mapped, so that a read beyond the end asks for no more memory than the file has.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load_pickle(path: Path) -> tuple[Any, set[str]]:
    stubbed = set[str]()
    with _bytes_of(path) as stream:
        return Unpickler(stream, allowed_names(path.stat().st_size), stubbed).load(), stubbed


def _load_safetensors(path: Path) -> tuple[Any, set[str]]:
    with safetensors.safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        facts = (file.metadata() or {}).get("facts", "")
    try:
        facts = json.loads(facts)
    except (ValueError, RecursionError):  # any text, in files of others
        facts = None
    return content | ({"facts": facts} if isinstance(facts, dict) else {}), set()


def _reader(path: Path) -> Callable[[Path], tuple[Any, set[str]]]:
    """Choose the reader by the first bytes: a ``.pkl`` is often a torch file, and a ``.pth`` may be a pickle."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return _load_zip
    if head.startswith(_TORCH_LEGACY):
        return _load_legacy
    fits = int.from_bytes(head[:8], "little") + 8 <= path.stat().st_size
    if head[8:9] == b"{" and fits:  # before pickles: a header of 128 bytes begins as they do
        return _load_safetensors
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return _load_pickle
    if head[8:9] == b"{":
        raise CheckpointError(f"{path}: a truncated safetensors file; {forms.DOWNLOAD_AGAIN}")
    if path.suffix == ".pkl" and head[:1] in (b"(", b"}", b"c"):  # Python 2's text form
        return _load_pickle
    raise CheckpointError(f"{path}: {forms.of_head(path, head)}")


def _load(path: Path) -> tuple[Any, set[str]]:
    """Read one file of any format.

    Raises:
        CheckpointError: it is damaged or hostile, or not a checkpoint.
    """
    try:
        return _reader(path)(path)
    except HostileError as error:
        raise CheckpointError(
            f"{path}: refused: opening it would run {error}, which no checkpoint needs; do not open it with torch.load"
        ) from None
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(
            f"{path}: cannot be opened ({error.strerror}); ask its owner for read permission"
        ) from error
    except MemoryError as error:
        raise CheckpointError(
            f"{path}: needs more memory than this machine has; the file is damaged, or hostile"
        ) from error
    except Exception as error:  # a damaged or hostile stream can make the unpicklers raise anything
        reason = " ".join(str(error).split())[:200] or "the data ends early"
        raise CheckpointError(
            f"{path}: damaged or truncated ({type(error).__name__}: {reason}); {forms.DOWNLOAD_AGAIN}"
        ) from error


def _load_mapping(path: Path, stubbed: set[str]) -> dict[str, Any]:
    """Read one file that holds a mapping; add the names of its stubs to ``stubbed``."""
    content, names = _load(path)
    stubbed |= names
    if problem := forms.of_content(path, content, names):
        raise CheckpointError(f"{path}: {problem}")
    return dict(content)


def _find(path: Path) -> tuple[Path, dict[Path, set[str]]]:
    """Return the file to read, and its parts if it is an index of several.

    Raises:
        CheckpointError: there is no such file, or it is a folder, or only a part of a checkpoint.
    """
    file = (find_index(path) or path) if path.is_dir() else path
    if file.is_dir():
        raise CheckpointError(f"{path}: {forms.of_folder(path)}")
    if not file.is_file():
        raise CheckpointError(f"{path}: {forms.of_missing(path)}")
    if file.name.endswith(INDEX):
        return file, parts_of(file)
    refuse_part(file)
    if problem := forms.of_name(file):
        raise CheckpointError(f"{path}: {problem}")
    return file, {}


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a ``.pth``, ``.pth.tar``, ``.pt``, ``.bin``, ``.safetensors``, ``.pkl`` or ``.npz`` file without its code.

    The format is recognised by the content. A checkpoint in several parts is given by its index (``*.index.json``) or
    its folder. Tensors are on the CPU and mapped from the file, so they need memory only when they are used. Objects of
    classes that are not on the allow-list become :class:`Stub`. The last file is kept, and not read again while it is
    unchanged.

    Raises:
        CheckpointError: there is no such file, it is damaged or hostile, or it holds no mapping.
    """
    global _last
    path = Path(path)
    try:
        file, parts = _find(path)
        version = FileVersion.now((file, *parts))
        if _last is None or _last.path != path or _last.version != version or not _last.version.settled:
            _last = None  # its memory first
            _last = _read(path, file, parts, version)
    except OSError as error:  # a folder that may not be listed, a file that vanishes
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    # Copies, because loaders take entries out of these mappings.
    content = {
        key: dict(value) if isinstance(value, dict) and not isinstance(value, Stub) else value
        for key, value in _last.content.items()
    }
    return replace(_last, content=content)


def checkpoint_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a checkpoint's file, or of its index and parts, one after the other.

    Raises:
        CheckpointError: there is no such file, or it changes while it is read.
    """
    file, parts = _find(Path(path))
    return FileVersion.now((file, *parts)).sha256()


def forget_checkpoint() -> None:
    """Free the memory of the last file."""
    global _last
    _last = None


def _read(path: Path, file: Path, parts: Mapping[Path, set[str]], version: FileVersion) -> Checkpoint:
    stubbed = set[str]()
    read = partial(_load_mapping, stubbed=stubbed)
    content = join(file, parts, read) if parts else read(file)
    version.check()
    return Checkpoint(path, content, tuple(sorted(stubbed)), version)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a file (see :func:`open_checkpoint`); a warning names what became a :class:`Stub`.

    Args:
        path: the file.

    Returns:
        The top-level mapping of the file.

    Raises:
        CheckpointError: as :func:`open_checkpoint` does.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.stubbed:
        logger.warning("%s: skipped objects that need code from outside: %s", path, some(checkpoint.stubbed))
    return checkpoint.content


def read_facts(path: str | os.PathLike[str]) -> BackboneFacts | None:
    """Return the facts in a file of weights, or None if it has none.

    Raises:
        CheckpointError: the file cannot be read (see :func:`read_checkpoint`), or its facts are not valid.
    """
    return facts_in(read_checkpoint(path), path)


def facts_in(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> BackboneFacts | None:
    """Return the facts in an already read checkpoint (see :func:`read_facts`); ``path`` is for the message."""
    facts = checkpoint.get("facts")
    if facts is None:
        return None
    try:
        return BackboneFacts.from_dict(facts)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: its `facts` are not valid ({type(error).__name__}: {error}); a newer version may have written it"
        ) from error


def backbone_in(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> MethodBackbone | None:
    """Return where a pretraining checkpoint says that its backbone is, or None if it does not say it.

    Only files with ``model`` and ``facts`` are asked; elsewhere, ``backbone`` may be anything.

    Raises:
        CheckpointError: the entry is damaged; the message names ``path``.
    """
    entry = checkpoint.get("backbone")
    if entry is None or checkpoint.get("facts") is None or "model" not in checkpoint:
        return None
    method, prefix = (entry.get(name, 0) if isinstance(entry, Mapping) else 0 for name in ("method", "prefix"))
    if not isinstance(method, str) or not isinstance(prefix, str | None):
        raise CheckpointError(
            f"{path}: its entry `backbone` is damaged; it must be a mapping of `method` (a name) and `prefix` (a text, "
            "or None); convert the backbone.pth in the same folder"
        )
    return MethodBackbone(method, prefix)

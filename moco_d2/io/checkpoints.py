"""Reading anyone's checkpoint, whatever its format and its name, without running code from it.

Pickles are read by :mod:`moco_d2.io.unpickle`. Tensors are views of the mapped file: what nobody looks at is never
read.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from moco_d2.facts import BackboneFacts
from moco_d2.io.unpickle import HostileError, Stub, Unpickler, allowed_names, read_legacy, section

logger = logging.getLogger(__name__)

_INFLATION = 20  # weights are noise, and compress by a tenth
_HEAD_BYTES = 512  # enough for every signature below
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6: its magic number
_DOWNLOAD_AGAIN = "download it again and compare its size or checksum"


class CheckpointError(ValueError):
    """A file cannot be used; the message is one line: the path, what was found, what to do."""


def some(names: Iterable[str], shown: int = 6) -> str:
    """Join the first few names for a message."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _mapped(path: Path) -> Any:
    return torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)


def _load_zip(path: Path) -> tuple[Any, set[str]]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: a truncated torch file (its end is missing); {_DOWNLOAD_AGAIN}")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    members = {entry.filename.rpartition("/")[2] for entry in entries}
    if any(entry.flag_bits & 1 for entry in entries):
        raise CheckpointError(f"{path}: an encrypted zip archive; decrypt it first")
    if entries and all(entry.filename.endswith(".npy") for entry in entries):
        return _load_arrays(path, sum(entry.file_size for entry in entries))
    if "constants.pkl" in members:  # reading one would run its program
        raise CheckpointError(
            f"{path}: a TorchScript program, not a checkpoint; save the module's state_dict() instead"
        )
    if "data.pkl" not in members:
        raise CheckpointError(f"{path}: a zip archive, not a checkpoint ({some(sorted(members))}); unpack it first")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: a compressed torch file, which torch.save does not write; unpack and save it again"
        )
    return _load_archive(path)


def _load_archive(path: Path) -> tuple[Any, set[str]]:
    """Read what ``torch.save`` writes since 1.6: a pickle, and each storage in a file of its own."""
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
        raise CheckpointError(f"{path}: its arrays inflate to {size} bytes, which weights do not")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}, set()


def _load_legacy(path: Path) -> tuple[Any, set[str]]:
    stubbed = set[str]()
    with _bytes_of(path) as stream:
        return read_legacy(stream, _mapped(path), stubbed), stubbed


def _bytes_of(path: Path) -> mmap.mmap:
    # Mapped: a read beyond the end then asks for no more memory than the file has.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load_pickle(path: Path) -> tuple[Any, set[str]]:
    stubbed = set[str]()
    with _bytes_of(path) as stream:
        return Unpickler(stream, allowed_names(path.stat().st_size), stubbed).load(), stubbed


def _load_safetensors(path: Path) -> tuple[Any, set[str]]:
    return safetensors.torch.load_file(path), set()


def _reader(path: Path) -> Callable[[Path], tuple[Any, set[str]]]:
    """Choose the reader by the first bytes: names lie (``.pkl`` is often a torch file, ``.pth`` sometimes a pickle)."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    size = path.stat().st_size
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path}: the file is empty; {_DOWNLOAD_AGAIN}")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: a web page, not a checkpoint; {_DOWNLOAD_AGAIN}, from the direct link to the file"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer of {size} bytes, not the file itself; run `git lfs pull`")
    if head.startswith(b"PK\x03\x04"):
        return _load_zip
    if head.startswith(_TORCH_LEGACY):
        return _load_legacy
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return _load_pickle
    if head[8:9] == b"{":
        if int.from_bytes(head[:8], "little") + 8 > size:
            raise CheckpointError(f"{path}: a truncated safetensors file; {_DOWNLOAD_AGAIN}")
        return _load_safetensors
    if path.suffix == ".pkl" and head[:1] in (b"(", b"}", b"c"):  # Python 2's text form
        return _load_pickle
    for signature, name in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"Rar!", "rar"),
    ):
        if head.startswith(signature):
            raise CheckpointError(f"{path}: a {name} archive, not a checkpoint; unpack it first")
    if head.startswith(
        (b"Salted__", b"age-encryption.org", b"-----BEGIN PGP", b"-----BEGIN AGE", b"LUKS", b"\x85\x02")
    ):
        raise CheckpointError(f"{path}: an encrypted file; decrypt it first")
    if head.startswith(b"\x89HDF"):
        raise CheckpointError(f"{path}: an HDF5 file (Keras); save its weights as an .npz of TensorFlow's variables")
    raise CheckpointError(
        f"{path}: not a checkpoint (it starts with {head[:12]!r}); expected a file of torch.save, safetensors or pickle"
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.pth``, ``.pth.tar``, ``.pt``, ``.safetensors`` or ``.pkl`` file without running code from it.

    The format is told from the content. Tensors come to the CPU, mapped from the file: they cost memory only when
    read. Objects of classes that are not on the allow-list become :class:`Stub`, and a
    warning names them.

    Args:
        path: the file.

    Returns:
        The top-level mapping of the file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds something else than a mapping.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"{path}: a folder, not a file; name the checkpoint in it ({some(sorted(os.listdir(path)))})"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path (the current folder is {Path.cwd()})")
    reader = _reader(path)
    try:
        content, stubbed = reader(path)
    except HostileError as error:
        raise CheckpointError(
            f"{path}: refused: reading it would run {error}, which no checkpoint needs; do not open it with torch.load"
        ) from None
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path}: asks for more memory than there is; it is damaged, or hostile") from error
    except Exception as error:  # a damaged or hostile stream can make the unpicklers raise anything
        reason = " ".join(str(error).split())[:200] or "the data ends early"
        raise CheckpointError(
            f"{path}: damaged or truncated ({type(error).__name__}: {reason}); {_DOWNLOAD_AGAIN}"
        ) from error
    if stubbed:
        logger.warning("%s: not read, because it would need code from the file: %s", path, some(sorted(stubbed)))
    if isinstance(content, Stub):
        name = f"{type(content).__module__}.{type(content).__qualname__}"
        raise CheckpointError(f"{path}: a pickled {name} object; load it where it was made and save its state_dict()")
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a mapping of names to tensors; save a state_dict()"
        )
    return dict(content)


def read_facts(path: str | os.PathLike[str]) -> BackboneFacts | None:
    """Return the facts that a weight file carries, or None where it carries none.

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
            f"{path}: its `facts` are not valid ({type(error).__name__}: {error}); it was written by another version"
        ) from error

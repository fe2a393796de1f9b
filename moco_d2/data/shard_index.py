"""Indexes of tar shards: which members are images, where they are, and which image files are left out.

An image is a member ``KEY.EXTENSION``: as in WebDataset, the key ends at the first dot of the base name, and only an
image's extension follows it (``a.jpg``, not ``a.mask.png``). Of a key's images the first counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moco_d2.data.listing import EXTENSIONS, fingerprint, is_hidden
from moco_d2.io.files import atomic_write
from moco_d2.io.paths import cache_folder

logger = logging.getLogger(__name__)

# Identifies the rule by which members are images. A cached index begins with it, and is ignored under another rule.
RULE = fingerprint(repr((2, EXTENSIONS)).encode())

# First bytes of archives whose members cannot be read on their own.
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z", b"Rar!": "rar",
}  # fmt: skip


@dataclass(frozen=True)
class Index:
    """A shard's images, the number of image files left out, and the shard's damage.

    Attributes:
        table: (N, 2), offset and size of each image.
        lost: image files whose key has no image by the rule (``x.1.jpg``, ``x.2.jpg``).
        further: image files whose key has one already (``a.mask.png`` or ``a.png`` beside ``a.jpg``).
        problem: the error at which reading stopped; empty if the shard was read to its end.
    """

    table: npt.NDArray[np.int64]
    lost: int
    further: int
    problem: str = ""


def members(path: str | os.PathLike[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the images in a shard, without their bytes.

    Raises:
        OSError: at the place where the shard is cut short or damaged.
    """
    taken = None
    for member in _image_files(path):
        key, extension = _split(member.name)
        if extension in EXTENSIONS and key != taken:
            taken = key
            yield member.name, member.offset_data, member.size


def read_index(path: str | os.PathLike[str]) -> Index:
    """Read a shard, as far as it can be read."""
    rows: list[tuple[int, int]] = []
    left_out, others = {True: 0, False: 0}, 0  # True: the key has an image
    last, taken, problem = None, None, ""
    try:
        for member in _image_files(path):
            key, extension = _split(member.name)
            if key != last:
                left_out[last == taken] += others
                last, others = key, 0
            if extension in EXTENSIONS and key != taken:
                taken = key
                rows.append((member.offset_data, member.size))
            else:
                others += 1
    except FileNotFoundError:
        raise
    except OSError as error:
        problem = f"{error}; its first {len(rows)} images are used"
    left_out[last == taken] += others
    return Index(np.array(rows, np.int64).reshape(-1, 2), left_out[False], left_out[True], problem)


def cached_index(path: Path, kept: Path | None = None) -> Index:
    """Return a shard's index, from the cache if it was read before.

    It is cached in ``kept``, else in the cache folder under path, size and time of the shard. A damaged shard's
    is not cached.
    """
    if kept is None:
        status = path.stat()
        state = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        name = hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()[:24]
        kept = cache_folder() / "indexes" / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        (rule, _), (lost, further), *_ = rows = np.asarray(np.load(kept), np.int64)
        if rule == -RULE:
            return Index(rows[2:], int(lost), int(further))
    index = read_index(path)
    if index.problem:
        logger.warning("%s", index.problem)
        return index
    head = [(-RULE, 0), (index.lost, index.further)]
    try:
        with atomic_write(kept) as file:
            np.save(file, np.concatenate([np.array(head, np.int64), index.table]))
    except OSError as error:
        logger.warning("cannot write the index of %s to %s: %s", path, kept.parent, error)
    return index


def image_names(path: Path) -> list[str]:
    """Return the names of a shard's images, as far as it can be read."""
    found = []
    with contextlib.suppress(OSError):  # of a damaged shard, the names before the damage
        for name, _, _ in members(path):
            found.append(name)
    return found


def log_left_out(what: str, lost: int, further: int) -> None:
    """Log the numbers of image files that are left out of shards (see :class:`Index`)."""
    if lost:
        logger.warning(
            "%s: %d image file(s) are left out because their names have more than one dot: by WebDataset's rule "
            "x.1.jpg and x.2.jpg are fields of one sample x, which has no picture x.jpg. Unpack the tar and name the "
            "folder, or pack that with moco-d2 shards, which gives names with one dot", what, lost,
        )  # fmt: skip
    if further:
        logger.info(
            "%s: %d image file(s) are left out because their sample has a picture already (a.mask.png or a.png beside "
            "a.jpg)",
            what, further,
        )  # fmt: skip


def _split(name: str) -> tuple[tuple[str, str], str]:
    """Return a member's key, with its folder, and the rest of its name in lower case."""
    folder, _, base = name.rpartition("/")
    key, dot, extension = base.partition(".")
    return (folder, key), (dot + extension).lower()


def _image_files(path: str | os.PathLike[str]) -> Iterator[tarfile.TarInfo]:
    """Yield a shard's files that are not hidden and end in an image's extension.

    Raises:
        OSError: at the place where the shard is cut short or damaged; at once if it is compressed.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.read(8)
            form = next((form for start, form in _COMPRESSED.items() if beginning.startswith(start)), "")
            if form:
                raise OSError(
                    f"{os.fspath(path)}: a {form} file, not a plain tar, from which single pictures cannot be read: "
                    "unpack it, and name the folder or the plain tar inside"
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    hidden = any(map(is_hidden, member.name.split("/")))
                    if member.isreg() and member.name.lower().endswith(EXTENSIONS) and not hidden:
                        yield member
                # tarfile takes a header that it cannot read for the end of the archive.
                file.seek(tar.offset)
                while rest := file.read(1 << 20):
                    if rest.strip(b"\0"):
                        raise OSError(f"{os.fspath(path)}: damaged or cut short after byte {tar.offset}")
    except tarfile.TarError as error:
        raise OSError(f"{os.fspath(path)}: {error}") from error

"""Listings of folders of images, cached so that a set of millions starts in seconds the second time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moco_d2.io.files import atomic_write
from moco_d2.io.paths import cache_folder

logger = logging.getLogger(__name__)

# The formats that every Pillow reads; Chrome and Windows save JPEGs as .jfif. Other files are counted and logged.
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".jpe", ".jif", ".jfi",
    ".apng", ".dib", ".jp2", ".j2k", ".jpf", ".jpx", ".pbm", ".pnm",
)  # fmt: skip
# Files and folders that systems put beside pictures, often copies or thumbnails under a picture's name; lower case.
_SYSTEM_NAMES = frozenset({
    "__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini",
})  # fmt: skip

# Listings of fewer images are not cached: a walk takes no time.
CACHED_FROM = 1000
# Seconds. A folder that changed so recently may change again without getting another time stamp: on the coarsest file
# systems (FAT) stamps have steps of two seconds.
_TICK = 2.0

# A folder's entry in the cache: [inode, mtime, ctime, images, subfolders, {kind: number of other files}].
Record = list[Any]
_FORMAT = 2  # of cached listings; it changes with the rule of what is an image


def is_hidden(name: str) -> bool:
    """Tell whether a file or folder is hidden or a system's own, and so is not searched for pictures.

    Examples are ``.ipynb_checkpoints``, macOS's ``._a.jpg`` and ``__MACOSX``, and those of a NAS or Windows. A folder
    that a user names is searched whatever its name is.
    """
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM_NAMES


def kind_of(name: str) -> str:
    """Return the kind under which a file that is not an image is counted: its extension, or that it has none."""
    return os.path.splitext(name)[1].lower() or "without extension"


def counted(kinds: Mapping[str, int], most: int = 6) -> str:
    """Return numbers of files in words, the largest first: ``10 .heic, 3 .txt, 2 hidden``."""
    order = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    words = [f"{kinds[kind]} {kind}" for kind in order[:most]]
    rest = sum(kinds[kind] for kind in order[most:])
    return ", ".join([*words, f"{rest} of other kinds"] if rest else words)


class Listing:
    """The images below a folder, sorted; a folder's own images come before those of its subfolders.

    Hidden files and folders (:func:`is_hidden`) are left out. Links are followed, except to a folder above themselves.
    Every folder's entries are cached under its inode, mtime and ctime, and read from the disk again if one of the three
    differs: adding, removing or renaming an entry changes them, and no program can set the ctime back.

    Attributes:
        files: paths of the images.
        others: number of files that were left out, by kind; hidden files and folders are one kind.
        unreadable: (folder, error) of those that could not be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.files: list[str] = []
        self.others: Counter[str] = Counter()
        self.unreadable: list[tuple[str, str]] = []
        self._cache = cache_folder() / "listings" / f"{_digest(os.path.realpath(folder))}.json"
        self._known, self._records = _load(self._cache), dict[str, Record]()
        self._read = 0
        self._walk(os.fspath(folder), "", ())
        if self._read and len(self.files) >= CACHED_FROM:
            self._save()

    def _walk(self, folder: str, relative: str, above: tuple[tuple[int, int], ...]) -> None:
        """Add a folder and its subfolders; ``above`` holds (device, inode) of its parents."""
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in above:
                return
            stamp = [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
            record = self._known.get(relative)
            if record is None or record[:3] != stamp:
                record = self._scan(folder, stamp)
        except OSError as error:
            logger.warning("cannot read the folder %s: %s", folder, error)
            self.unreadable.append((folder, str(error)))
            return
        self._records[relative] = record
        prefix = os.path.join(folder, "")
        self.files += [prefix + name for name in record[3]]
        self.others.update(record[5])
        for name in record[4]:
            self._walk(prefix + name, os.path.join(relative, name), (*above, (status.st_dev, status.st_ino)))

    def _scan(self, folder: str, stamp: list[int]) -> Record:
        self._read += 1
        images, folders, others = [], [], Counter[str]()
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    others["hidden"] += 1
                elif _is_dir(entry):
                    folders.append(entry.name)
                elif entry.name.lower().endswith(EXTENSIONS):
                    images.append(entry.name)
                else:
                    others[kind_of(entry.name)] += 1
        settled = time.time() - max(stamp[1:]) / 1e9 > _TICK
        return [*(stamp if settled else [0, 0, 0]), sorted(images), sorted(folders), others]

    def _save(self) -> None:
        try:
            with atomic_write(self._cache) as file:
                content = {"format": _FORMAT, "extensions": EXTENSIONS, "folders": self._records}
                file.write(json.dumps(content).encode())
        except OSError as error:
            logger.warning("cannot write the listing to %s (%s); set MOCO_D2_CACHE to another folder",
                           self._cache.parent, error)  # fmt: skip


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link whose target is not accessible: reading it will give the error
        return False


def _load(path: Path) -> dict[str, Record]:
    try:
        content = json.loads(path.read_bytes())
        if (content.get("format"), content["extensions"]) == (_FORMAT, list(EXTENSIONS)):
            return dict(content["folders"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s); it is written again", path, error)
    return {}


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogateescape")).hexdigest()[:24]


def fingerprint(names: bytes) -> int:
    """Return a hash of 48 bits that identifies a set of images."""
    return int.from_bytes(hashlib.sha256(names).digest()[:6], "big")


class Paths:
    """Strings in one buffer, which worker processes share without copying.

    Attributes:
        fingerprint: of the paths in their order, without the folder that all are in: a set may be moved.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        low, high = (min(encoded), max(encoded)) if encoded else (b"", b"")
        same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        common = len(low[:same].rpartition(b"/")[0])
        self.fingerprint = fingerprint(b"\0".join(path[common:] for path in encoded))
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._buffer = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._buffer[start : self._ends[index]].tobytes())

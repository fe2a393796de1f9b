"""Version of a file that was read, to notice changes and not to read an unchanged file again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from moco_d2.io.errors import CheckpointError

_BLOCK = 1 << 20
_SETTLED = 1.0  # seconds; a file can change twice within one tick of the file system's clock


@dataclass(frozen=True)
class FileVersion:
    """The state of files at one moment; if :attr:`settled`, equal versions have equal content.

    Attributes:
        paths: the files, usually one.
        states: of each file: device, inode, size, times of the last change of content and of attributes.
        settled: whether the last change is so long ago that a later one would show in the times.
    """

    paths: tuple[Path, ...]
    states: tuple[tuple[int, ...], ...]
    settled: bool = field(compare=False)

    @classmethod
    def now(cls, paths: Iterable[Path]) -> FileVersion:
        """Return the current version.

        Raises:
            OSError: one of the files is gone.
        """
        paths = tuple(paths)
        states = [os.stat(path) for path in paths]
        newest = max(state.st_mtime for state in states)
        return cls(
            paths,
            tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in states),
            abs(time.time() - newest) > _SETTLED,
        )

    def check(self) -> None:
        """Check that the files are unchanged.

        Raises:
            CheckpointError: they are not.
        """
        try:
            same = FileVersion.now(self.paths) == self
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self.paths[0]}: changed while it was in use; start again once nothing writes to it"
            )

    def sha256(self) -> str:
        """Return the SHA-256 of the files, one after the other, in hexadecimal.

        Raises:
            CheckpointError: they change while they are read.
        """
        self.check()
        digest = _sha256(self) if self.settled else _sha256.__wrapped__(self)
        self.check()
        return digest


@lru_cache(maxsize=8)
def _sha256(version: FileVersion) -> str:
    digest = hashlib.sha256()
    for path in version.paths:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()

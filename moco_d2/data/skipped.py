"""Log of unreadable images: one line each in ``skipped.jsonl``, and an error when there are too many."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moco_d2.io.pictures import PictureError

logger = logging.getLogger(__name__)

FILE = "skipped.jsonl"
# The fraction is of at least so many images, because it means little for the first few.
BENEFIT = 1000


class Skip(NamedTuple):
    """An image that could not be read: path, error, epoch (-1: before training)."""

    path: str
    error: str
    epoch: int


class SkipLog:
    """The unreadable images that this process met: each is logged once and counted every time.

    Attributes:
        paths: those met so far by this process, and by any process of the run before it was resumed.
        seen: images in this process's batches.
        replaced: how many of them replace an unreadable one.
    """

    def __init__(self, folder: str | os.PathLike[str] = "", limit: float = 1.0, rank: int = 0) -> None:
        """Log to ``folder`` (empty: nowhere) as process ``rank``; stop above the fraction ``limit``."""
        self.file = Path(folder) / FILE if folder else None
        self.limit, self.rank = limit, rank
        self.seen = self.replaced = 0
        self.paths = set(self._logged())

    def record(self, skips: Iterable[Skip], iteration: int = -1) -> None:
        """Log the images that are new; ``iteration`` is the step of their batch."""
        lines = []
        for skip in skips:
            if skip.path not in self.paths:
                self.paths.add(skip.path)
                logger.warning("cannot read %s (%s)", skip.path, skip.error)
                lines.append(json.dumps({**skip._asdict(), "iteration": iteration, "rank": self.rank}))
        if lines and self.file:
            try:
                self._append("".join(f"{line}\n" for line in lines).encode())
            except OSError as error:
                logger.warning("cannot write %s: %s", self.file, error)

    def count(self, seen: int, replaced: int) -> None:
        """Count a batch.

        Raises:
            PictureError: too many of the images could not be read.
        """
        self.seen, self.replaced = self.seen + seen, self.replaced + replaced
        if self.replaced > self.limit * max(self.seen, BENEFIT):
            raise PictureError(
                f"{self.replaced} of the {self.seen} images that process {self.rank} saw could not be read, more than "
                f"DATA.MAX_SKIPPED {self.limit:g} allows; {self._account()}, or raise DATA.MAX_SKIPPED, then --resume"
            )

    def stop(self) -> None:
        """Raise the PictureError for an unreadable image without a replacement."""
        raise PictureError(
            f"process {self.rank} could not read an image, nor any of those near it that could replace it; "
            f"{self._account()}, then --resume"
        )

    def _account(self) -> str:
        return f"{self.file or 'the log'} has {len(self.paths)} paths with their errors: repair or remove these files"

    def _logged(self) -> Iterable[str]:
        if self.file is None or not self.file.exists():
            return
        with self.file.open("rb") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a killed process
                    yield json.loads(line)["path"]

    def _append(self, text: bytes) -> None:
        """Append by one write, because all processes of a run share the file."""
        assert self.file is not None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab+") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks; on most, one write is atomic
                fcntl.lockf(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)

"""The cache of streamed shards: a folder of bounded size that the processes of a machine share."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import filelock

from moco_d2.io.download import download_file, size_of
from moco_d2.io.files import atomic_write, move, removable, remove

logger = logging.getLogger(__name__)

_FETCHERS = 4  # shards that a process fetches at a time
_STALE = 3600.0  # seconds after which nobody is fetching a part any more
_ASK_AGAIN = 300.0  # seconds until a shard that could not be fetched is tried again


@dataclass(frozen=True)
class Shard:
    """One shard: path or address, size in bytes (0: unknown), number of images."""

    location: str
    bytes: int
    samples: int


def base_name(location: str) -> str:
    """Return a shard's file name, of an address without what follows its path."""
    # urllib's parser would take two thirds of the time in which a stream of 100 000 shards is opened.
    path = location.partition("#")[0].partition("?")[0] if is_url(location) else location
    return path.rpartition("/")[2]


def answer(error: OSError) -> str:
    """Return an error as a sentence, with the server's status if it gave one."""
    status = getattr(error, "status", None)
    return f"the server answers {status}: {error}" if status else str(error)


def is_url(location: str) -> bool:
    """Tell whether a location is fetched over the network."""
    return location.startswith(("http://", "https://"))


class ShardCache:
    """A folder of bounded size for streamed shards, shared by the processes of a machine.

    The shard that was asked for longest ago makes room. A process dies with no harm: what is whole has its name, and
    the rest is continued. Beside ``NAME.tar`` lie its index ``NAME.npy``, while it is fetched ``NAME.BYTES.part``, and
    if that failed ``NAME.lost``.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        """Keep shards in ``folder``, ``limit`` bytes of them at most."""
        self.folder, self.limit = folder, limit
        self._begun = time.time()

    def path(self, shard: Shard) -> Path:
        """Return where a shard is or will be; another size is another shard."""
        mark = hashlib.sha256(f"{shard.location} {shard.bytes}".encode()).hexdigest()[:16]
        return self.folder / f"{mark}-{base_name(shard.location).removesuffix('.tar')}.tar"

    def note(self, location: str) -> Path:
        """Return where it is written down what was found in a shard that no manifest knows."""
        return self.folder / f"{hashlib.sha256(location.encode()).hexdigest()[:16]}.json"

    def get(self, shard: Shard) -> Path:
        """Return a shard's file, fetched if it is not there; other processes that want it wait.

        Raises:
            OSError: it cannot be fetched or kept; for five minutes nobody tries again.
        """
        path = self.path(shard)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            # A bounded number of lock files, never removed: two processes could hold a removed one at the same time.
            with filelock.FileLock(self.folder / f".lock-{path.name[:2]}"):
                if not path.exists():
                    self._fetch(shard, path)
        return path

    def touch(self, shard: Shard) -> None:
        """Mark a shard as wanted now, if it is there."""
        with contextlib.suppress(OSError):
            os.utime(self.path(shard))

    def _fetch(self, shard: Shard, path: Path) -> None:
        lost = path.with_suffix(".lost")
        self._raise_if_lost(lost)
        part = path.with_suffix(f".{shard.bytes}.part")
        self._make_room(part)
        try:
            download_file(shard.location, part, shard.location, checked=bool(shard.bytes), attempts=6)
        except FileNotFoundError:  # somebody emptied the folder
            raise
        except OSError as error:
            reason = f"cannot fetch {shard.location}: {answer(error)}"
            with contextlib.suppress(OSError):
                os.utime(part, (0, 0))  # nobody is fetching it: it may go, and takes the room that it has
                with atomic_write(lost) as file:
                    file.write(f"{time.time()} {reason}".encode())
            raise OSError(reason) from error
        if shard.bytes and size_of(part) != shard.bytes:
            logger.warning("%s has %d bytes, %d were expected: cut short, or replaced since it was looked into",
                           shard.location, size_of(part), shard.bytes)  # fmt: skip
            remove(self.note(shard.location))
        with self._lock():
            for old in (lost, index_of(path)):
                remove(old)
            move(part, path)

    def _raise_if_lost(self, mark: Path) -> None:
        """Raise what another process of this run met a moment ago: its minute of attempts is not spent again."""
        try:
            then, _, reason = mark.read_text().partition(" ")
            recent = float(then) > max(self._begun, time.time() - _ASK_AGAIN)
        except (OSError, ValueError):
            return
        if recent:
            raise OSError(reason)

    def _make_room(self, part: Path) -> None:
        """Reserve the room of a shard that is about to be fetched: what is being fetched counts as if it were whole."""
        with self._lock():
            part.touch()
            files = []
            # Only what was fetched into it makes room: the folder may hold the user's own shards.
            for entry in filter(removable, (*self.folder.glob("*.part"), *self.folder.glob("*.tar"))):
                with contextlib.suppress(FileNotFoundError):  # a transfer may begin anew
                    status = entry.stat()
                    fetching = entry.suffix == ".part" and time.time() - status.st_mtime < _STALE
                    size = max(status.st_size, int(entry.stem.rpartition(".")[2]) if fetching else 0)
                    files.append((fetching, status.st_mtime, size, entry))
            used = sum(size for _, _, size, _ in files)
            for fetching, _, size, entry in sorted(files):
                if used <= self.limit or fetching:
                    return
                used -= size
                remove(index_of(entry))
                remove(entry)

    def _lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / ".lock")


def start_fetching(cache: ShardCache) -> queue.SimpleQueue[Shard]:
    """Start the threads of a process that fetch what is put into the queue."""
    wanted: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for _ in range(_FETCHERS):  # daemons: a stuck transfer does not keep a finished run from ending
        threading.Thread(target=_fetch_all, args=(cache, wanted), daemon=True).start()
    return wanted


def _fetch_all(cache: ShardCache, wanted: queue.SimpleQueue[Shard]) -> None:
    while True:
        shard = wanted.get()
        try:
            cache.get(shard)
        except OSError as error:  # whoever reads it will meet the error again and count it
            logger.warning("%s", error)


def index_of(path: Path) -> Path:
    """Return where the index of a shard in the cache is, which goes when the shard goes."""
    return path.with_suffix(".npy")

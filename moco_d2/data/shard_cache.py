"""Cache of remote shards: a folder of bounded size that the processes of a machine share."""

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
_STALE = 3600.0  # seconds without a change after which a partial download counts as abandoned
_RETRY_AFTER = 300.0  # seconds until a shard that could not be fetched is tried again


@dataclass(frozen=True)
class Shard:
    """One shard: path or address, size in bytes (0: unknown), number of images."""

    location: str
    bytes: int
    samples: int


def base_name(location: str) -> str:
    """Return a shard's file name; of an address without query and fragment."""
    # urllib's parser would take two thirds of the time in which 100 000 remote shards are opened.
    path = location.partition("#")[0].partition("?")[0] if is_url(location) else location
    return path.rpartition("/")[2]


def explain(error: OSError) -> str:
    """Return an error in words, with the server's status if there is one."""
    status = getattr(error, "status", None)
    return f"the server answers {status}: {error}" if status else str(error)


def is_url(location: str) -> bool:
    """Tell whether a location is fetched over the network."""
    return location.startswith(("http://", "https://"))


class ShardCache:
    """A folder of bounded size for remote shards, shared by the processes of a machine.

    The least recently used shard is evicted. A killed process does no harm: a complete shard has its final name, and a
    partial download is resumed. Beside ``NAME.tar`` are its index ``NAME.npy``, while it is fetched
    ``NAME.BYTES.part``, and if that failed ``NAME.lost``.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        """Keep at most ``limit`` bytes of shards in ``folder``."""
        self.folder, self.limit = folder, limit
        self._begun = time.time()

    def path(self, shard: Shard) -> Path:
        """Return the path that a shard has or will have; another size means another shard."""
        digest = hashlib.sha256(f"{shard.location} {shard.bytes}".encode()).hexdigest()[:16]
        return self.folder / f"{digest}-{base_name(shard.location).removesuffix('.tar')}.tar"

    def sidecar(self, location: str) -> Path:
        """Return the path of the file with size and number of images of a shard that is in no manifest."""
        return self.folder / f"{hashlib.sha256(location.encode()).hexdigest()[:16]}.json"

    def get(self, shard: Shard) -> Path:
        """Return a shard's file; if it is not in the cache, fetch it while other processes that want it wait.

        Raises:
            OSError: it cannot be fetched or stored; for five minutes no process of the machine tries again.
        """
        path = self.path(shard)
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            # A bounded number of lock files that are never removed: two processes could both hold a removed one.
            with filelock.FileLock(self.folder / f".lock-{path.name[:2]}"):
                if not path.exists():
                    self._fetch(shard, path)
        return path

    def touch(self, shard: Shard) -> None:
        """Mark a shard as just used, if it is in the cache."""
        with contextlib.suppress(OSError):
            os.utime(self.path(shard))

    def _fetch(self, shard: Shard, path: Path) -> None:
        lost = path.with_suffix(".lost")
        self._raise_if_lost(lost)
        part = path.with_suffix(f".{shard.bytes}.part")
        self._make_room(part)
        try:
            download_file(shard.location, part, shard.location, checked=bool(shard.bytes), attempts=6)
        except FileNotFoundError:  # the folder was emptied meanwhile
            raise
        except OSError as error:
            reason = f"cannot fetch {shard.location}: {explain(error)}"
            with contextlib.suppress(OSError):
                os.utime(part, (0, 0))  # abandoned: it may be evicted, and counts with its present size
                with atomic_write(lost) as file:
                    file.write(f"{time.time()} {reason}".encode())
            raise OSError(reason) from error
        if shard.bytes and size_of(part) != shard.bytes:
            logger.warning("%s has %d bytes, %d were expected: cut short, or replaced since it was first read",
                           shard.location, size_of(part), shard.bytes)  # fmt: skip
            remove(self.sidecar(shard.location))
        with self._lock():
            for old in (lost, index_path(path)):
                remove(old)
            move(part, path)

    def _raise_if_lost(self, lost: Path) -> None:
        """Raise the error that another process of this run got in the last minutes, instead of trying again."""
        try:
            then, _, reason = lost.read_text().partition(" ")
            recent = float(then) > max(self._begun, time.time() - _RETRY_AFTER)
        except (OSError, ValueError):
            return
        if recent:
            raise OSError(reason)

    def _make_room(self, part: Path) -> None:
        """Evict shards until one that is about to be fetched fits; partial downloads count with their full size."""
        with self._lock():
            part.touch()
            files = []
            # Only fetched files are evicted: the folder may hold the user's own shards.
            for entry in filter(removable, (*self.folder.glob("*.part"), *self.folder.glob("*.tar"))):
                with contextlib.suppress(FileNotFoundError):  # a download may start again
                    status = entry.stat()
                    fetching = entry.suffix == ".part" and time.time() - status.st_mtime < _STALE
                    size = max(status.st_size, int(entry.stem.rpartition(".")[2]) if fetching else 0)
                    files.append((fetching, status.st_mtime, size, entry))
            used = sum(size for _, _, size, _ in files)
            for fetching, _, size, entry in sorted(files):
                if used <= self.limit or fetching:
                    return
                used -= size
                remove(index_path(entry))
                remove(entry)

    def _lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.folder / ".lock")


def start_fetching(cache: ShardCache) -> queue.SimpleQueue[Shard]:
    """Start a process's threads that fetch the shards in the returned queue."""
    wanted: queue.SimpleQueue[Shard] = queue.SimpleQueue()
    for _ in range(_FETCHERS):  # daemons, so that a stuck download does not keep a finished run from ending
        threading.Thread(target=_fetch_all, args=(cache, wanted), daemon=True).start()
    return wanted


def _fetch_all(cache: ShardCache, wanted: queue.SimpleQueue[Shard]) -> None:
    while True:
        shard = wanted.get()
        try:
            cache.get(shard)
        except OSError as error:  # reading the shard will give the error again, and count it
            logger.warning("%s", error)


def index_path(path: Path) -> Path:
    """Return the path of the index of a shard in the cache; both are evicted together."""
    return path.with_suffix(".npy")

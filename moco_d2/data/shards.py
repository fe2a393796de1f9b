"""Tar shards in WebDataset's format, on a disk or streamed over http(s), read by number.

A shard's images are its members ``KEY.EXTENSION``: as in WebDataset, the key ends at the first dot of the base name,
and an image has nothing but an image's extension behind it (``a.jpg``, not ``a.mask.png``); a key's first one counts.
``shards.json`` beside the shards tells their sizes and numbers of images; shards without it are read once.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import json
import logging
import os
import queue
import re
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import filelock
import numpy as np
import numpy.typing as npt

from moco_d2.data.listing import EXTENSIONS, cache_folder, fingerprint
from moco_d2.data.shard_cache import Shard, ShardCache, answer, base_name, index_of, is_url, start_fetching
from moco_d2.io.download import TransferError, size_of, transfer
from moco_d2.io.files import atomic_write, move, remove

logger = logging.getLogger(__name__)

MANIFEST = "shards.json"
FORMAT = "moco_d2 shards 1"
# Beside shards that are still being made; it says of what.
PLAN = ".making.json"

_OPEN = 64  # shards a process keeps open
_KNOWN = 4096  # shards whose members a process remembers: 16 bytes an image
_SAY_EVERY = 10.0


def is_shards(name: str) -> bool:
    """Tell whether a name in DATASETS.TRAIN means shards: an address, a tar, a pattern of tars, a folder of ours."""
    return bool(
        (re.match(r"\w+:", name) and not os.path.exists(name))
        or name.endswith(".tar")
        or os.path.basename(name) == MANIFEST
        or os.path.isfile(os.path.join(name, MANIFEST))
    )


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: ``{000..123}`` keeps its zeros, ``{a,b}`` lists.

    Raises:
        ValueError: a range that runs backwards.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is None and int(first) > int(last):
        raise ValueError(f"DATASETS.TRAIN names {pattern!r}: {match[0]} runs backwards")
    parts = choices.split(",") if choices else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    rests = expand(pattern[match.end() :])
    return [pattern[: match.start()] + part + rest for part in parts for rest in rests]


def members(path: str | os.PathLike[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the images in a shard, without their bytes.

    Raises:
        OSError: at the place where the shard is cut short or damaged.
    """
    last_key = None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, dot, extension = base.partition(".")
                if member.isreg() and key and (dot + extension).lower() in EXTENSIONS and (folder, key) != last_key:
                    last_key = folder, key
                    yield member.name, member.offset_data, member.size
            # tarfile takes a header that it cannot read for the end.
            file.seek(tar.offset)
            while rest := file.read(1 << 20):
                if rest.strip(b"\0"):
                    raise OSError(f"{os.fspath(path)}: damaged or cut short behind byte {tar.offset}")
    except tarfile.TarError as error:
        raise OSError(f"{os.fspath(path)}: {error}") from error


class ShardSource:
    """The images of a list of shards.

    Attributes:
        spans: number of images in each shard.
        stream_sizes: bytes of each shard that comes over the network (0: unknown).
        fingerprint: of the shards' file names, sizes and numbers of images.
    """

    def __init__(self, shards: Sequence[Shard], cache: ShardCache, unreadable: Sequence[tuple[str, str]] = ()) -> None:
        self.shards, self.cache, self.unreadable = list(shards), cache, list(unreadable)
        self.spans = np.array([shard.samples for shard in shards], np.int64)
        self.stream_sizes = [shard.bytes for shard in shards if is_url(shard.location)]
        rows = [f"{base_name(shard.location)} {shard.bytes} {shard.samples}" for shard in shards]
        self.fingerprint = fingerprint("\n".join(rows).encode(errors="surrogateescape"))
        self._ends = np.cumsum(self.spans)
        self._forget()

    def _forget(self) -> None:
        self._wanted: queue.SimpleQueue[Shard] | None = None
        self._open = functools.lru_cache(_OPEN)(_Open)
        self._look = functools.lru_cache(_KNOWN)(_look)
        self._names = functools.lru_cache(2)(_names)

    def __getstate__(self) -> dict[str, object]:
        """Leave out open files and threads, which do not travel to another process."""
        return {name: value for name, value in vars(self).items() if name in _TRAVELS}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _where(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.spans[shard])

    def name(self, index: int) -> str:
        """Return the shard and the member in it, or its number where the shard cannot be asked."""
        number, position = self._where(index)
        shard = self.shards[number]
        try:
            return f"{shard.location}/{self._names(self._file(number))[position]}"
        except (OSError, IndexError):
            return f"{shard.location}[{position}]"

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            OSError: the shard cannot be had, or does not hold the image whole.
        """
        number, position = self._where(index)
        try:
            return self._read(number, position)
        except FileNotFoundError:  # it made room for others in between, or vanished
            return self._read(number, position)

    def _read(self, number: int, position: int) -> bytes:
        path, streamed = self._file(number), is_url(self.shards[number].location)
        table, _ = self._look(path, index_of(path) if streamed else None)
        if position >= len(table):
            raise OSError(f"{path} is cut short: it has {len(table)} images and this is number {position}")
        offset, size = table[position].tolist()
        if streamed:  # not kept open: when it makes room, its bytes would stay on the disk
            with open(path, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        else:
            data = os.pread(self._open(path).descriptor, size, offset)
        if len(data) < size:
            raise OSError(f"{path} is cut short: {len(data)} of {size} bytes")
        return data

    def _file(self, number: int) -> Path:
        shard = self.shards[number]
        return self.cache.get(shard) if is_url(shard.location) else Path(shard.location)

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Fetch streamed shards in the background: those of the window that begins, then those of the next."""
        if not self.stream_sizes:
            return
        wanted = [shard for number in (*now, *ahead) if is_url((shard := self.shards[number]).location)]
        for shard in wanted:
            self.cache.touch(shard)
        if self._wanted is None:
            self._wanted = start_fetching(self.cache)
        for shard in wanted:
            self._wanted.put(shard)


_TRAVELS = ("shards", "cache", "spans", "stream_sizes", "unreadable", "fingerprint", "_ends")


class _Open:
    """An open file that closes with its last reference.

    Read with pread, not mmap: pages of a file that shrinks under an mmap kill the process.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _look(path: Path, kept: Path | None = None) -> tuple[npt.NDArray[np.int64], str]:
    """Return (offset, size) of a shard's images, and what is wrong with it.

    The index is kept in ``kept``, else in the cache folder under path, size and time of the shard.
    """
    if kept is None:
        status = path.stat()
        mark = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
        name = hashlib.sha256(mark.encode(errors="surrogateescape")).hexdigest()[:24]
        kept = cache_folder() / "indexes" / f"{name}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.asarray(np.load(kept), np.int64), ""
    rows, problem = [], ""
    try:
        for _, offset, size in members(path):
            rows.append((offset, size))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        problem = f"{error}; its first {len(rows)} images are used"
        logger.warning("%s", problem)
    table = np.array(rows, np.int64).reshape(-1, 2)
    if not problem:
        try:
            with atomic_write(kept) as file:
                np.save(file, table)
        except OSError as error:
            logger.warning("the index of %s cannot be kept in %s: %s", path, kept.parent, error)
    return table, problem


def _names(path: Path) -> list[str]:
    names = []
    with contextlib.suppress(OSError):  # those before the place where it is cut short will do
        for name, _, _ in members(path):
            names.append(name)
    return names


def open_shards(name: str, cache: ShardCache) -> ShardSource:
    """Open the shards that a name in DATASETS.TRAIN means.

    Args:
        name: path or http(s) address, with braces, or for paths with ``*`` and ``?``; or a folder or address with a
            ``shards.json``.
        cache: where streamed shards are kept.

    Raises:
        ValueError: another protocol, nothing there, or no images; the message says what was looked for.
    """
    if re.match(r"\w+:", name) and not is_url(name):
        raise ValueError(f"DATASETS.TRAIN names {name!r}; shards are paths or http(s) addresses, with braces for many")
    if is_url(name):
        try:
            cache.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"streamed shards cannot be kept ({error}): set DATA.CACHE_FOLDER") from error
    if os.path.isdir(name) or name.endswith("/") or os.path.basename(name) == MANIFEST:
        folder = name.removesuffix(MANIFEST).rstrip("/") or "."
        known: dict[str, Shard | None] = {**_manifest(folder, cache, needed=True)}
        if not known:
            raise ValueError(f"DATASETS.TRAIN names {name!r}, but there is no {folder}/{MANIFEST}")
    else:
        locations = [path for part in expand(name) for path in ([part] if is_url(name) else _glob(part))]
        if not locations:
            raise ValueError(f"DATASETS.TRAIN names {name!r}, and no file is like it{neighbours(name)}")
        # An address with a query, as presigned ones have, is of one file only.
        folders = dict.fromkeys(os.path.dirname(path) for path in locations if not (is_url(path) and "?" in path))
        manifests = {folder: _manifest(folder, cache) for folder in folders}
        known = {path: manifests.get(os.path.dirname(path), {}).get(path) for path in locations}
    shards, unreadable = _describe(known, cache)
    if not sum(shard.samples for shard in shards):
        raise ValueError(
            f"no images in the {len(shards)} shard(s) of {name}: members are KEY.EXTENSION with one of "
            f"{' '.join(EXTENSIONS)} and no other dot in the base name"
        )
    return ShardSource(shards, cache, unreadable)


def _glob(pattern: str) -> list[str]:
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    if not os.path.isfile(pattern):
        raise ValueError(f"DATASETS.TRAIN names the shard {pattern!r}, which is not there{neighbours(pattern)}")
    return [pattern]


def neighbours(path: str) -> str:
    """Return the end of a message on a path that is not there: the nearest ones that are."""
    folder, base = os.path.split(path.rstrip("/"))
    try:
        near = difflib.get_close_matches(base, os.listdir(folder or "."), n=3)
    except (FileNotFoundError, NotADirectoryError):
        return f"; there is no folder {folder}{neighbours(folder)}"
    except OSError:
        return ""
    return f"; nearest: {', '.join(os.path.join(folder, name) for name in near)}" if near else ""


def _describe(known: Mapping[str, Shard | None], cache: ShardCache) -> tuple[list[Shard], list[tuple[str, str]]]:
    """Return the shards at the locations, and (location, error) of damaged ones.

    Those of which no manifest tells are read once, with progress.
    """
    found, damaged, said = [], [], time.monotonic()
    for location, shard in known.items():
        problem = ""
        if shard is None and is_url(location):
            shard, problem = _look_into(location, cache)
        elif shard is None:
            table, problem = _look(Path(location))
            shard = Shard(location, size_of(Path(location)), len(table))
        elif not is_url(location) and (there := size_of(Path(location))) != shard.bytes:
            logger.warning("%s has %d bytes, its %s says %d: it is cut short or was replaced; what it lacks counts as "
                           "unreadable", location, there, MANIFEST, shard.bytes)  # fmt: skip
        found.append(shard)
        if problem:
            damaged.append((location, problem))
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            logger.info("looked into %d of %d shards; %s beside them saves this", len(found), len(known), MANIFEST)
    return found, damaged


def _look_into(location: str, cache: ShardCache) -> tuple[Shard, str]:
    """Fetch a shard to see its size, number of images and damage, and write them down: it may have to make room."""
    note = cache.note(location)
    with filelock.FileLock(cache.folder / ".lock-look"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(note.read_bytes())
            return Shard(location, int(found["bytes"]), int(found["samples"])), str(found["problem"])
        try:
            fetched = cache.get(Shard(location, 0, 0))
        except OSError as error:
            raise ValueError(f"DATASETS.TRAIN names a shard that cannot be had: {error}") from error
        size = size_of(fetched)
        path = cache.path(Shard(location, size, 0))
        remove(index_of(path))
        move(fetched, path)
        table, problem = _look(path, index_of(path))
        shard = Shard(location, size, len(table))
        with atomic_write(note) as file:
            file.write(json.dumps({**asdict(shard), "problem": problem}).encode())
    return shard, problem


def _manifest(folder: str, cache: ShardCache, needed: bool = False) -> dict[str, Shard]:
    """Return ``{location: shard}`` of the ``shards.json`` in a folder or at an address; empty if there is none."""
    if not is_url(folder):
        path = Path(folder) / MANIFEST
        refuse_half_made(path.parent)
        return _read_manifest(path, folder) if path.is_file() else {}
    path = cache.folder / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}-{MANIFEST}"
    with filelock.FileLock(cache.folder / ".lock-manifest"):
        remove(path)  # always asked anew: it is small, and tells which shards are meant
        try:
            transfer(f"{folder}/{MANIFEST}", path, MANIFEST, checked=False)
        except TransferError as error:
            # Some stores answer 403 for what is not there; where it means the shards too, they say so.
            if error.status in (404, 410) or (error.status == 403 and not needed):
                return {}
            raise ValueError(f"{folder}/{MANIFEST} cannot be fetched: {answer(error)}") from error
        return _read_manifest(path, folder)


def refuse_half_made(folder: Path) -> None:
    """Raise ValueError for a folder in which shards are still being made."""
    if (folder / PLAN).exists():
        raise ValueError(f"the set in {folder} is half made: run tools/make_shards.py again as it was begun")


def _read_manifest(path: Path, folder: str) -> dict[str, Shard]:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        shards = [Shard(f"{folder}/{s['name']}", int(s["bytes"]), int(s["samples"])) for s in content["shards"]]
        return {shard.location: shard for shard in shards}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}/{MANIFEST} is damaged: {error}") from error


def write_manifest(folder: Path, shards: Sequence[Shard], origin: str) -> None:
    """Write the ``shards.json`` of a finished set; locations are names in the folder."""
    rows = [{"name": s["location"], "bytes": s["bytes"], "samples": s["samples"]} for s in map(asdict, shards)]
    content = {"format": FORMAT, "origin": origin, "samples": sum(s.samples for s in shards), "shards": rows}
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(content, indent=1).encode())

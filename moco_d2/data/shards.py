"""Tar shards in WebDataset's format, on a disk or streamed over http(s), read by number.

:mod:`moco_d2.data.shard_index` says which members are images. ``shards.json`` beside the shards tells their sizes and
numbers of images; shards without it are read once.
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
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import numpy as np

from moco_d2.data.listing import EXTENSIONS, fingerprint
from moco_d2.data.mistaken import mistaken
from moco_d2.data.shard_cache import Shard, ShardCache, answer, base_name, index_of, is_url, start_fetching
from moco_d2.data.shard_index import RULE, Index, look, names, say_left_out
from moco_d2.io.download import DownloadError, download_file, size_of
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
        or name.lower().endswith(".tar")
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
        self._look = functools.lru_cache(_KNOWN)(look)
        self._names = functools.lru_cache(2)(names)

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
        table = self._look(path, index_of(path) if streamed else None).table
        if position >= len(table):
            raise OSError(
                f"{path} is cut short, or its {MANIFEST} was written for another rule of what is an image: it has "
                f"{len(table)} images and this is number {position}"
            )
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


def open_shards(name: str, cache: ShardCache) -> ShardSource:
    """Open the shards that a name in DATASETS.TRAIN means.

    Args:
        name: path or http(s) address, with braces, or for paths with ``*`` and ``?``; or a folder or address with a
            ``shards.json``.
        cache: where streamed shards are kept.

    Raises:
        ValueError: another protocol, nothing there, something else than tars, or no images; the message says what was
            looked for.
    """
    if os.path.basename(name) != MANIFEST and (what := mistaken(name)):
        raise ValueError(f"DATASETS.TRAIN names {name!r}, {what}")
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
    seen = _describe(name, known, cache)
    shards, problems = [one.shard for one in seen], [(one.shard.location, one.problem) for one in seen if one.problem]
    if not sum(shard.samples for shard in shards):
        raise ValueError(
            f"no images in the {len(shards)} shard(s) of {name}: members are KEY.EXTENSION with one of "
            f"{' '.join(EXTENSIONS)}, no other dot in the base name, and in no hidden folder"
            + "".join(f"; {problem}" for _, problem in problems[:1])
        )
    return ShardSource(shards, cache, problems)


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


@dataclass(frozen=True)
class _Seen:
    """A shard that was looked into: it, what was left out (see :class:`Index`), and what is wrong with it."""

    shard: Shard
    lost: int = 0
    further: int = 0
    problem: str = ""

    @classmethod
    def by(cls, location: str, size: int, index: Index) -> _Seen:
        return cls(Shard(location, size, len(index.table)), index.lost, index.further, index.problem)


def _describe(name: str, known: Mapping[str, Shard | None], cache: ShardCache) -> list[_Seen]:
    """Return the shards at the locations. Those of which no manifest tells are read once, with progress."""
    found, said = [], time.monotonic()
    for location, shard in known.items():
        if shard is None and is_url(location):
            seen = _look_into(location, cache)
        elif shard is None:
            seen = _Seen.by(location, size_of(Path(location)), look(Path(location)))
        else:
            seen = _Seen(shard)
            if not is_url(location) and (there := size_of(Path(location))) != shard.bytes:
                logger.warning("%s has %d bytes, its %s says %d: it is cut short or was replaced; what it lacks counts "
                               "as unreadable", location, there, MANIFEST, shard.bytes)  # fmt: skip
        found.append(seen)
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            logger.info("looked into %d of %d shards; %s beside them saves this", len(found), len(known), MANIFEST)
    say_left_out(name, sum(seen.lost for seen in found), sum(seen.further for seen in found))
    return found


def _look_into(location: str, cache: ShardCache) -> _Seen:
    """Fetch a shard to see its size, number of images and damage, and write them down: it may have to make room."""
    note = cache.note(location)
    with filelock.FileLock(cache.folder / ".lock-look"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(note.read_bytes())
            if found.pop("rule") == RULE:
                return _Seen(Shard(**found.pop("shard")), **found)
        try:
            fetched = cache.get(Shard(location, 0, 0))
        except OSError as error:
            raise ValueError(f"DATASETS.TRAIN names a shard that cannot be had: {error}") from error
        size = size_of(fetched)
        path = cache.path(Shard(location, size, 0))
        remove(index_of(path))
        move(fetched, path)
        seen = _Seen.by(location, size, look(path, index_of(path)))
        with atomic_write(note) as file:
            file.write(json.dumps({**asdict(seen), "rule": RULE}).encode())
    return seen


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
            download_file(f"{folder}/{MANIFEST}", path, MANIFEST, checked=False)
        except DownloadError as error:
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

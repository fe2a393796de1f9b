"""Tar shards in WebDataset's format, on a disk or remote (http or https), whose images are read by number.

:mod:`moco_d2.data.shard_index` says which members are images. ``shards.json`` beside the shards has their sizes and
numbers of images; without it every shard is read once.
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
from moco_d2.data.shard_cache import Shard, ShardCache, base_name, explain, index_path, is_url, start_fetching
from moco_d2.data.shard_index import RULE, Index, cached_index, image_names, log_left_out
from moco_d2.io.download import DownloadError, download_file, size_of
from moco_d2.io.files import atomic_write, move, remove

logger = logging.getLogger(__name__)

MANIFEST = "shards.json"
FORMAT = "moco_d2 shards 1"
# Beside shards of an unfinished set; it identifies the files that the set is made of.
UNFINISHED = ".making.json"

_OPEN = 64  # shards that a process keeps open
_INDEXES = 4096  # shards whose index a process keeps: 16 bytes an image
_LOG_EVERY = 10.0  # seconds


def is_shards(name: str) -> bool:
    """Tell whether a name in DATASETS.TRAIN means shards: an address, a tar, a pattern, a folder with a manifest."""
    return bool(
        (re.match(r"\w+:", name) and not os.path.exists(name))
        or name.lower().endswith(".tar")
        or os.path.basename(name) == MANIFEST
        or os.path.isfile(os.path.join(name, MANIFEST))
    )


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: ``{000..123}`` keeps its zeros, ``{a,b}`` lists.

    Raises:
        ValueError: a range whose first number is larger than its last.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is None and int(first) > int(last):
        raise ValueError(f"DATASETS.TRAIN names {pattern!r}: {match[0]} counts down; write the smaller number first")
    parts = choices.split(",") if choices else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    rests = expand(pattern[match.end() :])
    return [pattern[: match.start()] + part + rest for part in parts for rest in rests]


class ShardSource:
    """The images of a list of shards.

    Attributes:
        lengths: number of images in each shard.
        remote_sizes: bytes of each remote shard (0: unknown).
        unreadable: (location, error) of damaged shards.
        fingerprint: of the shards' file names, sizes and numbers of images.
    """

    def __init__(self, shards: Sequence[Shard], cache: ShardCache, unreadable: Sequence[tuple[str, str]] = ()) -> None:
        self.shards, self.cache, self.unreadable = list(shards), cache, list(unreadable)
        self.lengths = np.array([shard.samples for shard in shards], np.int64)
        self.remote_sizes = [shard.bytes for shard in shards if is_url(shard.location)]
        rows = [f"{base_name(shard.location)} {shard.bytes} {shard.samples}" for shard in shards]
        self.fingerprint = fingerprint("\n".join(rows).encode(errors="surrogateescape"))
        self._ends = np.cumsum(self.lengths)
        self._wanted: queue.SimpleQueue[Shard] | None = None
        self._open = functools.lru_cache(_OPEN)(_OpenFile)
        self._index = functools.lru_cache(_INDEXES)(cached_index)
        self._names = functools.lru_cache(2)(image_names)

    def __reduce__(self) -> tuple[type[ShardSource], tuple[object, ...]]:
        """Pickle without open files and threads."""
        return ShardSource, (self.shards, self.cache, self.unreadable)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _where(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.lengths[shard])

    def name(self, index: int) -> str:
        """Return the shard and the member in it, or the member's number if the shard cannot be read."""
        number, position = self._where(index)
        shard = self.shards[number]
        try:
            return f"{shard.location}/{self._names(self._file(number))[position]}"
        except (OSError, IndexError):
            return f"{shard.location}[{position}]"

    def read(self, index: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            OSError: the shard cannot be fetched or read, or the image in it is cut short.
        """
        number, position = self._where(index)
        try:
            return self._read(number, position)
        except FileNotFoundError:  # evicted from the cache in between, or removed
            return self._read(number, position)

    def _read(self, number: int, position: int) -> bytes:
        path, remote = self._file(number), is_url(self.shards[number].location)
        table = self._index(path, index_path(path) if remote else None).table
        if position >= len(table):
            raise OSError(
                f"{path} has {len(table)} images, fewer than its {MANIFEST} says (number {position} is wanted): it is "
                f"cut short, or the {MANIFEST} was written by another version of this program"
            )
        offset, size = table[position].tolist()
        if remote:  # not kept open: the bytes of an evicted shard would stay on the disk
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
        """Fetch remote shards in the background: those of the window that begins, then those of the next."""
        if not self.remote_sizes:
            return
        wanted = [shard for number in (*now, *ahead) if is_url((shard := self.shards[number]).location)]
        for shard in wanted:
            self.cache.touch(shard)
        if self._wanted is None:
            self._wanted = start_fetching(self.cache)
        for shard in wanted:
            self._wanted.put(shard)


class _OpenFile:
    """An open file that is closed with its last reference.

    It is read with pread, not mmap: if a mapped file shrinks, reading it kills the process.
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
        cache: for remote shards.

    Raises:
        ValueError: another protocol, no such shards, something else than tars, or no images; the message says what was
            searched for.
    """
    if os.path.basename(name) != MANIFEST and (what := mistaken(name)):
        raise ValueError(f"DATASETS.TRAIN names {name!r}, which is {what}")
    if re.match(r"\w+:", name) and not is_url(name):
        raise ValueError(
            f"DATASETS.TRAIN names {name!r}; shards must be paths or http(s) addresses, with braces for many"
        )
    if is_url(name):
        try:
            cache.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"remote shards cannot be cached ({error}): set DATA.CACHE_FOLDER") from error
    if os.path.isdir(name) or name.endswith("/") or os.path.basename(name) == MANIFEST:
        folder = name.removesuffix(MANIFEST).rstrip("/") or "."
        known: dict[str, Shard | None] = {**_manifest(folder, cache, needed=True)}
        if not known:
            raise ValueError(f"DATASETS.TRAIN names {name!r}, but {folder}/{MANIFEST} does not exist")
    else:
        locations = [path for part in expand(name) for path in ([part] if is_url(name) else _glob(part))]
        if not locations:
            raise ValueError(f"DATASETS.TRAIN names {name!r}, which matches no file{nearest_paths(name)}")
        # An address with a query, such as a presigned one, is that of one file only: no manifest is asked for.
        folders = dict.fromkeys(os.path.dirname(path) for path in locations if not (is_url(path) and "?" in path))
        manifests = {folder: _manifest(folder, cache) for folder in folders}
        known = {path: manifests.get(os.path.dirname(path), {}).get(path) for path in locations}
    found = _inspect_all(name, known, cache)
    shards, problems = [one.shard for one in found], [(one.shard.location, one.problem) for one in found if one.problem]
    if not sum(shard.samples for shard in shards):
        raise ValueError(
            f"no images in the {len(shards)} shard(s) of {name}: an image is a member KEY.EXTENSION with one of "
            f"{' '.join(EXTENSIONS)}, with no other dot in its base name, and not in a hidden folder"
            + "".join(f"; {problem}" for _, problem in problems[:1])
        )
    return ShardSource(shards, cache, problems)


def _glob(pattern: str) -> list[str]:
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    if not os.path.isfile(pattern):
        raise ValueError(f"DATASETS.TRAIN names the shard {pattern!r}, which does not exist{nearest_paths(pattern)}")
    return [pattern]


def nearest_paths(path: str) -> str:
    """Return the end of a message on a path that does not exist: the most similar ones that do."""
    folder, base = os.path.split(path.rstrip("/"))
    try:
        near = difflib.get_close_matches(base, os.listdir(folder or "."), n=3)
    except (FileNotFoundError, NotADirectoryError):
        return f"; there is no folder {folder}{nearest_paths(folder)}"
    except OSError:
        return ""
    return f"; nearest: {', '.join(os.path.join(folder, name) for name in near)}" if near else ""


@dataclass(frozen=True)
class _Inspected:
    """A shard, with the numbers of image files left out and the problem of its :class:`Index`."""

    shard: Shard
    lost: int = 0
    further: int = 0
    problem: str = ""

    @classmethod
    def of(cls, location: str, size: int, index: Index) -> _Inspected:
        return cls(Shard(location, size, len(index.table)), index.lost, index.further, index.problem)


def _inspect_all(name: str, known: Mapping[str, Shard | None], cache: ShardCache) -> list[_Inspected]:
    """Return the shards at the locations. Those without a manifest are read once, with progress in the log."""
    found, logged = [], time.monotonic()
    for location, shard in known.items():
        if shard is None and is_url(location):
            inspected = _inspect_remote(location, cache)
        elif shard is None:
            inspected = _Inspected.of(location, size_of(Path(location)), cached_index(Path(location)))
        else:
            inspected = _Inspected(shard)
            if not is_url(location) and (size := size_of(Path(location))) != shard.bytes:
                logger.warning("%s has %d bytes, its %s says %d: it is cut short or was replaced; images that it lacks "
                               "count as unreadable", location, size, MANIFEST, shard.bytes)  # fmt: skip
        found.append(inspected)
        if time.monotonic() - logged > _LOG_EVERY:
            logged = time.monotonic()
            logger.info(
                "read %d of %d shards; with a %s beside them this is not needed", len(found), len(known), MANIFEST
            )
    log_left_out(name, sum(one.lost for one in found), sum(one.further for one in found))
    return found


def _inspect_remote(location: str, cache: ShardCache) -> _Inspected:
    """Fetch a shard to find its size, number of images and damage, and keep them in a sidecar: it may be evicted."""
    note = cache.sidecar(location)
    with filelock.FileLock(cache.folder / ".lock-look"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(note.read_bytes())
            if found.pop("rule") == RULE:
                return _Inspected(Shard(**found.pop("shard")), **found)
        try:
            fetched = cache.get(Shard(location, 0, 0))
        except OSError as error:
            raise ValueError(f"DATASETS.TRAIN names a shard that cannot be fetched: {error}") from error
        size = size_of(fetched)
        path = cache.path(Shard(location, size, 0))
        remove(index_path(path))
        move(fetched, path)
        inspected = _Inspected.of(location, size, cached_index(path, index_path(path)))
        with atomic_write(note) as file:
            file.write(json.dumps({**asdict(inspected), "rule": RULE}).encode())
    return inspected


def _manifest(folder: str, cache: ShardCache, needed: bool = False) -> dict[str, Shard]:
    """Return ``{location: shard}`` of the ``shards.json`` in a folder or at an address; empty if there is none."""
    if not is_url(folder):
        path = Path(folder) / MANIFEST
        refuse_unfinished(path.parent)
        return _read_manifest(path, folder) if path.is_file() else {}
    path = cache.folder / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}-{MANIFEST}"
    with filelock.FileLock(cache.folder / ".lock-manifest"):
        remove(path)  # fetched at every start: it is small, and lists the shards
        try:
            download_file(f"{folder}/{MANIFEST}", path, MANIFEST, checked=False)
        except DownloadError as error:
            # Some stores answer 403 for a missing file; if the shards are forbidden too, reading them gives that error.
            if error.status in (404, 410) or (error.status == 403 and not needed):
                return {}
            raise ValueError(f"{folder}/{MANIFEST} cannot be fetched: {explain(error)}") from error
        return _read_manifest(path, folder)


def refuse_unfinished(folder: Path) -> None:
    """Raise ValueError for a folder in which not all shards are made yet."""
    if (folder / UNFINISHED).exists():
        raise ValueError(f"the set in {folder} is unfinished: run moco-d2 shards again with the same arguments")


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

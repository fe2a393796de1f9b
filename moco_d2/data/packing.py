"""Writing of tar shards from files: resumable, and the same files always give the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco_d2.data.shard_cache import Shard
from moco_d2.data.shard_index import log_left_out, members, read_index
from moco_d2.data.shards import MANIFEST, UNFINISHED, refuse_unfinished, write_manifest
from moco_d2.data.sources import FileSource
from moco_d2.io import files as disk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packed:
    """A finished shard, the number of its files that could not be read, and whether it existed already."""

    shard: Shard
    unreadable: int
    kept: bool


def pack(files: Sequence[str], root: str | os.PathLike[str], out: Path, size: int, seed: int) -> Iterator[Packed]:
    """Write files into ``out/000000.tar``, ... and at the end ``shards.json``; yield each shard when it is complete.

    After an interruption it continues with the next shard. Files are shuffled, because folders are often sorted by
    class and training shuffles within a few shards only. A member is named by the file's path below ``root``, whose
    dots, other than the extension's, become underscores (in WebDataset a key ends at its first dot).

    Args:
        files: image files.
        root: folder that members' names are relative to.
        out: folder to write into.
        size: images in a shard.
        seed: of the shuffle; if negative, files are not shuffled.

    Raises:
        ValueError: ``out`` holds other files.
    """
    digest = hashlib.sha256("\0".join([os.path.realpath(root), str(size), str(seed), *files]).encode(errors="replace"))
    origin = digest.hexdigest()
    _claim(out, origin)
    order = np.arange(len(files)) if seed < 0 else np.random.default_rng(seed).permutation(len(files))
    source, names = FileSource(files), _names([os.path.relpath(file, root) for file in files])
    shards = []
    for number, start in enumerate(range(0, len(files), size)):
        chosen = order[start : start + size].tolist()
        path = out / f"{number:06d}.tar"
        kept = path.exists()
        if not kept:
            _write(path, [(names[i], i) for i in chosen], source)
        samples = sum(1 for _ in members(path))
        shards.append(Shard(path.name, path.stat().st_size, samples))
        yield Packed(shards[-1], len(chosen) - samples, kept)
    write_manifest(out, shards, origin)
    disk.remove(out / UNFINISHED)
    disk.remove_leftovers(out)


def _claim(out: Path, origin: str) -> None:
    """Check that the folder is empty or holds this set, and mark it as unfinished."""
    disk.make_folder(out, "OUT")
    for name in (MANIFEST, UNFINISHED):
        if (out / name).exists():
            if origin_of(out / name) != origin:
                raise ValueError(
                    f"{out} holds shards of other files, or of another --shard-size or --seed; name another folder"
                )
            return
    if there := sorted(path.name for path in out.iterdir()):
        raise ValueError(f"{out} holds {there[0]} and is not an unfinished set of shards; name another folder")
    with disk.one_line(out, "OUT"), disk.atomic_write(out / UNFINISHED) as file:
        file.write(json.dumps({"origin": origin}).encode())


def _names(paths: Sequence[str]) -> list[str]:
    """Return each file's name in the shards; keys are unique and have no dots."""
    used: set[str] = set()
    names = []
    for number, path in enumerate(paths):
        stem, extension = os.path.splitext(path)
        key = stem.replace(".", "_")
        while key in used:
            key = f"{key}_{number}"
        used.add(key)
        names.append(key + extension)
    return names


def _write(path: Path, entries: Sequence[tuple[str, int]], source: FileSource) -> None:
    with disk.atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, number in entries:
            try:
                data = source.read(number)
            except OSError as error:
                logger.warning("cannot read %s (%s); it is left out", source.name(number), error)
                continue
            member = tarfile.TarInfo(name)  # the same owner, mode and time for all
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def origin_of(path: Path) -> str:
    """Return the hash of the files that a set was made of, from its manifest or ``UNFINISHED`` file; empty if none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_bytes())["origin"])
    return ""


def index(out: Path) -> int:
    """Write ``shards.json`` for a folder of shards that another program made; return the number of images.

    The origin of a set that :func:`pack` made is kept, so that :func:`pack` still recognises it.

    Raises:
        ValueError: no shards, an unfinished set, or a ``shards.json`` of another program.
        OSError: a shard is damaged.
    """
    refuse_unfinished(out)
    paths = sorted(out.glob("*.tar"))
    if not paths:
        raise ValueError(f"there is no *.tar in {out}")
    indexes = {path: read_index(path) for path in paths}
    if problems := [index.problem for index in indexes.values() if index.problem]:
        raise OSError("; ".join(problems))
    log_left_out(str(out), *(sum(getattr(index, kind) for index in indexes.values()) for kind in ("lost", "further")))
    shards = [Shard(path.name, path.stat().st_size, len(index.table)) for path, index in indexes.items()]
    disk.check_named_file(out / MANIFEST, disk.has_keys("format", "origin", "shards"))
    write_manifest(out, shards, origin_of(out / MANIFEST) or "indexed")
    return sum(shard.samples for shard in shards)

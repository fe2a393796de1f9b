"""Catalogue of published weights: downloaded by name, checked and converted once, and kept in a cache.

``MODEL.WEIGHTS moco-d2://NAME`` calls :func:`fetch`. The list is ``catalog.yaml`` in this folder. The variable
``MOCO_D2_CATALOG`` names another list of the same form, whose entries come first (a mirror's addresses, a group's
weights).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from moco_d2.convert.choice import Choice
from moco_d2.convert.conversion import is_converted, write
from moco_d2.convert.convert import CONVERTER, convert_state
from moco_d2.convert.prove import can_prove
from moco_d2.io import paths
from moco_d2.io.checkpoints import read_checkpoint
from moco_d2.io.download import DownloadError, download_file, megabytes, size_of
from moco_d2.io.files import atomic_write, check_named_file, has_keys, move, remove
from moco_d2.io.locks import lock, unlock
from moco_d2.io.paths import expand_variable

logger = logging.getLogger(__name__)

PREFIX = "moco-d2://"
CATALOG = Path(__file__).with_suffix(".yaml")

_BLOCK = 1 << 20
_WAIT = 0.2  # seconds between two looks at a lock
_BY_HAND = "download the file elsewhere, and run moco-d2 convert FILE OUTPUT"


class CatalogError(ValueError):
    """Published weights cannot be used. The message says which, why, and what to do."""


@dataclass(frozen=True)
class Entry:
    """One published file; the fields are explained at the top of ``catalog.yaml``."""

    name: str
    url: str
    title: str
    recipe: str
    source: str = ""
    checksum: str = ""
    published: str = ""
    stated_in: str = ""

    @property
    def address(self) -> str:
        """Return where the file is downloaded from: ``url``, or the ``file://`` address of a file of this package."""
        inside, here, path = self.url.partition("package:")
        return (Path(__file__).parents[1] / path).as_uri() if here and not inside else self.url

    def __post_init__(self) -> None:
        if self.checksum and not re.fullmatch(r"(md5|sha256):[0-9a-f]{6,64}", self.checksum):
            raise CatalogError(f"{self.name}: checksum is {self.checksum!r}; it must look like md5:a04e12f8")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise CatalogError(f"{self.name!r}: the name may have letters, digits, '_', '-' and '.' only")


def list_entries() -> dict[str, Entry]:
    """Return all entries by name.

    Raises:
        CatalogError: a list cannot be read.
    """
    own = expand_variable("MOCO_D2_CATALOG", "")
    entries: dict[str, Entry] = {}
    for path in (*([Path(own)] if own else []), CATALOG):
        entries = {**_read(path), **entries}
    return entries


def get_entry(name: str) -> Entry:
    """Return an entry by name, with or without ``moco-d2://``.

    Raises:
        CatalogError: there is no such entry; the message lists similar names.
    """
    entries, bare = list_entries(), name.removeprefix(PREFIX).strip("/")
    if bare not in entries:
        near = difflib.get_close_matches(bare, entries, n=3, cutoff=0.4) or list(entries)[:3]
        raise CatalogError(
            f"no published weights {bare!r}; similar names: {', '.join(near)} (moco-d2 convert --list shows all)"
        )
    return entries[bare]


def cache_folder() -> Path:
    """Return where fetched weights are kept: ``MOCO_D2_CACHE``, or a folder in Detectron2's download cache."""
    return paths.cache_folder("FVCORE_CACHE", "~/.torch/iopath_cache")


def fetch(name: str) -> Path:
    """Return published weights as a file that Detectron2 loads; download and convert them unless they are in the cache.

    Any number of processes may call this at the same time: one downloads and the others wait. ``NAME.json`` beside the
    file records what was downloaded, from where and when, and how it was converted. If the list or the converter has
    changed since, the file is made again. The published file itself is not kept.

    Raises:
        CatalogError: an unknown name, or the file cannot be downloaded, has another checksum, or cannot be converted.
    """
    entry, folder = get_entry(name), cache_folder()
    converted = folder / f"{entry.name}.pth"
    if not _differences(entry, converted):
        return converted
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{entry.name}.lock", entry):
            if differences := _differences(entry, converted):  # else another process has just made it
                _make(entry, converted, differences)
    except OSError as error:  # of the disk: an error of the network is a CatalogError
        raise CatalogError(
            f"{entry.name} cannot be written to {folder} ({error}); set MOCO_D2_CACHE to another folder"
        ) from error
    return converted


def _made_from(entry: Entry) -> dict[str, Any]:
    """Return what the converted file depends on."""
    of_entry = {key: getattr(entry, key) for key in ("url", "checksum", "source", "title", "recipe")}
    return {**of_entry, "converter": CONVERTER}


def _differences(entry: Entry, converted: Path) -> list[str]:
    """Return in words how the file in the cache differs from what would be made now; empty: it does not."""
    if not converted.is_file():
        return ["it is not in the cache"]
    try:
        record = dict(json.loads(converted.with_suffix(".json").read_bytes()))
    except (OSError, TypeError, ValueError, RecursionError):
        return [f"{converted.with_suffix('.json').name}, which records how it was made, cannot be read"]
    return [
        f"{key} was {record.get(key, 'not recorded')!r} and is now {now!r}"
        for key, now in _made_from(entry).items()
        if record.get(key) != now
    ]


def _make(entry: Entry, converted: Path, differences: list[str]) -> None:
    """Download and convert an entry's file, and record what it was made from."""
    kept = converted.is_file()
    _refuse_foreign(converted)
    if kept:
        logger.info("%s is made again: %s", entry.name, "; ".join(differences))
    raw = converted.with_suffix(".download")
    try:
        record = download(entry, raw)
        _convert(entry, raw, converted)
    except CatalogError as error:
        if not kept:
            raise
        raise CatalogError(
            f"{error}. The cache has an older file, which would be made differently now ({'; '.join(differences)}); to "
            f"use it anyway, give its path: MODEL.WEIGHTS {converted}"
        ) from error
    with atomic_write(converted.with_suffix(".json")) as file:
        file.write(json.dumps({**_made_from(entry), **record}, indent=1).encode())
    remove(raw)


def _refuse_foreign(converted: Path) -> None:
    """Check, before a download, that no file of the user's in the cache has our names."""
    try:
        check_named_file(converted, is_converted)
        if not converted.is_file():  # next to weights of ours the record is ours too, even if it is damaged
            check_named_file(converted.with_suffix(".json"), has_keys("url", "sha256", "fetched"))
    except ValueError as error:
        raise CatalogError(f"{error}; set MOCO_D2_CACHE to another folder for published weights") from error


def download(entry: Entry, target: Path) -> dict[str, Any]:
    """Download an entry's file; an interrupted download (``.part`` beside it) is continued.

    Args:
        entry: of the catalogue.
        target: the file to write; it appears when it is complete and its checksum is right.

    Returns:
        Address, size, SHA-256 and time of the download.

    Raises:
        CatalogError: it cannot be downloaded, or is not the published file.
    """
    part = target.with_name(target.name + ".part")
    logger.info("downloading %s from %s", entry.name, entry.url)
    try:
        download_file(entry.address, part, entry.name, bool(entry.checksum), impatient=True)
    except DownloadError as error:
        if error.status:
            raise CatalogError(
                f"{entry.name}: {entry.url} answers {error.status} ({error}); it may have moved: {_BY_HAND}"
            ) from error
        done = size_of(part)
        kept = f"; {megabytes(done)} MB are kept, and the next attempt continues from there" if done else ""
        raise CatalogError(
            f"{entry.name}: {entry.url} cannot be downloaded ({error}){kept}. Without a network, {_BY_HAND}"
        ) from error
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"url": entry.url, "bytes": size_of(part), "sha256": _verify(entry, part), "fetched": now}
    move(part, target)
    return record


def listing() -> str:
    """Return all entries as text: name, what it is, published result, checksum, whether it is in the cache, address."""
    entries, folder = list_entries().values(), cache_folder()
    rows = [("name", "weights", "published", "checksum", "cached")]
    for e in entries:
        file = folder / f"{e.name}.pth"
        cached = "no" if not file.is_file() else "outdated" if _differences(e, file) else "yes"
        rows.append((e.name, e.title, e.published or "-", e.checksum or "none published", cached))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    addresses = [line for e in entries for line in (f"{e.name}", f"    {e.url}", f"    stated in: {e.stated_in}")]
    return "\n".join([
        *lines, "", "published: ImageNet linear classification, top-1, unless the entry says otherwise", "",
        "Addresses, of the internet as published; none was opened when this list was made:", *addresses, "",
        f"Use: MODEL.WEIGHTS {PREFIX}NAME (cached in {folder})",
    ])  # fmt: skip


def _read(path: Path) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CatalogError(f"{path}: not a list of weights ({' '.join(str(error).split())})") from error
    known = {field.name for field in fields(Entry)} - {"name"}
    if not isinstance(content, Mapping):
        raise CatalogError(f"{path}: not a list of weights; it must have the form of {CATALOG}")
    for name, values in content.items():
        unknown = sorted(set(values) - known) if isinstance(values, Mapping) else [str(values)]
        missing = sorted({"url", "title", "recipe"} - set(values)) if not unknown else []
        if unknown or missing:
            raise CatalogError(f"{path}: {name}: unknown {unknown}, missing {missing}; known keys are {sorted(known)}")
    return {str(name): Entry(str(name), **{k: str(v) for k, v in values.items()}) for name, values in content.items()}


@contextmanager
def _locked(path: Path, entry: Entry) -> Iterator[None]:
    """Hold the lock of an entry; the system frees it if the process dies."""
    if lock(path) is None:
        logger.info("%s is being downloaded by another process: waiting for it", entry.name)
        while lock(path) is None:
            time.sleep(_WAIT)
    try:
        yield
    finally:
        unlock(path)


def _verify(entry: Entry, path: Path) -> str:
    """Compare a file with the published checksum and return its SHA-256; a wrong file is removed."""
    digests = {kind: hashlib.new(kind, usedforsecurity=False) for kind in ("md5", "sha256")}
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            for digest in digests.values():
                digest.update(block)
    kind, _, wanted = entry.checksum.partition(":")
    if wanted and not digests[kind].hexdigest().startswith(wanted):
        size, got = size_of(path), digests[kind].hexdigest()
        remove(path)
        raise CatalogError(
            f"{entry.name}: the file from {entry.url} ({size} bytes) has {kind} {got[: len(wanted)]}, but {wanted} was "
            f"published; the download was damaged, or the file was replaced. It was removed; try again, or {_BY_HAND}"
        )
    if not wanted:
        logger.info("%s: no checksum was published; SHA-256 %s", entry.name, digests["sha256"].hexdigest())
    return digests["sha256"].hexdigest()


def _convert(entry: Entry, raw: Path, converted: Path) -> None:
    """Convert the published file, and add the facts that only the catalogue has: title and recipe."""
    try:
        conversion = convert_state(read_checkpoint(raw), raw, Choice(source=entry.source))
        facts = replace(conversion.facts, origin=f"{entry.title}, from {entry.url}", recipe=entry.recipe)
        write(replace(conversion, facts=facts), converted, can_prove())
    except ValueError as error:  # the file, the proof, or the catalogue's `source`
        remove(raw)
        raise CatalogError(
            f"{entry.name}: {entry.url} was downloaded but cannot be converted: {error}. It was removed; to look at "
            f"it, {_BY_HAND}"
        ) from error

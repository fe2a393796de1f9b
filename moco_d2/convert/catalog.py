"""Published weights by name: fetched once, checked, converted once, kept.

``MODEL.WEIGHTS moco-d2://NAME`` ends here (:func:`fetch`). The list is ``catalog.yaml`` beside this file; the variable
``MOCO_D2_CATALOG`` names another of the same form, whose entries come first (a mirror's addresses, a group's weights).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock
import yaml

from moco_d2.convert.choice import Choice
from moco_d2.convert.conversion import is_converted, write
from moco_d2.convert.convert import CONVERTER, convert_state
from moco_d2.convert.prove import can_prove
from moco_d2.io.checkpoints import read_checkpoint
from moco_d2.io.download import DownloadError, download_file, megabytes, size_of
from moco_d2.io.files import atomic_write, check_named_file, has_keys, move, remove
from moco_d2.io.paths import expand_variable

logger = logging.getLogger(__name__)

PREFIX = "moco-d2://"
CATALOG = Path(__file__).with_suffix(".yaml")

_BLOCK = 1 << 20
_BY_HAND = "fetch the file elsewhere, and run tools/convert_checkpoint.py FILE OUTPUT"


class CatalogError(ValueError):
    """Published weights cannot be had; the message says which, why, and what to do."""


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

    def __post_init__(self) -> None:
        if self.checksum and not re.fullmatch(r"(md5|sha256):[0-9a-f]{6,64}", self.checksum):
            raise CatalogError(f"{self.name}: checksum is {self.checksum!r}; it must be like md5:a04e12f8")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise CatalogError(f"{self.name!r}: the name must be letters, digits, '_', '-' and '.'")


def list_entries() -> dict[str, Entry]:
    """Return all entries by name.

    Raises:
        CatalogError: a list that cannot be read.
    """
    own = expand_variable("MOCO_D2_CATALOG", "")
    entries: dict[str, Entry] = {}
    for path in (*([Path(own)] if own else []), CATALOG):
        entries = {**_read(path), **entries}
    return entries


def get_entry(name: str) -> Entry:
    """Return an entry by name, ``moco-d2://`` before it or not.

    Raises:
        CatalogError: there is none; the message lists the nearest.
    """
    entries, bare = list_entries(), name.removeprefix(PREFIX).strip("/")
    if bare not in entries:
        near = difflib.get_close_matches(bare, entries, n=3, cutoff=0.4) or list(entries)[:3]
        raise CatalogError(
            f"no published weights {bare!r}; nearest: {', '.join(near)} (tools/convert_checkpoint.py --list shows all)"
        )
    return entries[bare]


def cache_folder() -> Path:
    """Return where fetched weights are kept: ``MOCO_D2_CACHE``, or a folder in Detectron2's download cache."""
    own = expand_variable("MOCO_D2_CACHE", "")
    return Path(own or os.path.join(expand_variable("FVCORE_CACHE", "~/.torch/iopath_cache"), "moco_d2"))


def fetch(name: str) -> Path:
    """Return published weights as a file that Detectron2 loads; fetch, check and convert them where they are not kept.

    Any number of processes may ask at the same time: one fetches and the others wait. Beside the file, ``NAME.json``
    says what was fetched, from where and when, and how it was converted; if the list or the converter says otherwise by
    now, the file is made anew. The file as published is not kept.

    Raises:
        CatalogError: an unknown name, or it cannot be fetched, has another checksum, or cannot be converted.
    """
    entry, folder = get_entry(name), cache_folder()
    converted = folder / f"{entry.name}.pth"
    if not _differences(entry, converted):
        return converted
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder / f".{entry.name}.lock", entry):
            if differences := _differences(entry, converted):  # else another process has made it meanwhile
                _make(entry, converted, differences)
    except OSError as error:  # the disk: the network's errors are CatalogErrors by now
        raise CatalogError(
            f"{entry.name} cannot be kept in {folder} ({error}); MOCO_D2_CACHE names another folder"
        ) from error
    return converted


def _made_from(entry: Entry) -> dict[str, Any]:
    """Return what the converted file depends on."""
    told = {key: getattr(entry, key) for key in ("url", "checksum", "source", "title", "recipe")}
    return {**told, "converter": CONVERTER}


def _differences(entry: Entry, converted: Path) -> list[str]:
    """Return in words why the kept file is not what the list and the converter say now; empty if it is."""
    if not converted.is_file():
        return ["it is not kept here"]
    try:
        record = dict(json.loads(converted.with_suffix(".json").read_bytes()))
    except (OSError, TypeError, ValueError, RecursionError):
        return [f"{converted.with_suffix('.json').name}, which says how it was made, cannot be read"]
    return [
        f"{key} was {record.get(key, 'not noted')!r} and is {now!r}"
        for key, now in _made_from(entry).items()
        if record.get(key) != now
    ]


def _make(entry: Entry, converted: Path, differences: list[str]) -> None:
    """Fetch and convert an entry's file, and note what it was made from."""
    kept = converted.is_file()
    _refuse_foreign(converted)
    if kept:
        logger.info("%s is made anew: %s", entry.name, "; ".join(differences))
    raw = converted.with_suffix(".download")
    try:
        record = download(entry, raw)
        _convert(entry, raw, converted)
    except CatalogError as error:
        if not kept:
            raise
        raise CatalogError(
            f"{error}. {converted} is kept, and would be made otherwise now ({'; '.join(differences)}); to use it all "
            f"the same, pass its path: MODEL.WEIGHTS {converted}"
        ) from error
    with atomic_write(converted.with_suffix(".json")) as file:
        file.write(json.dumps({**_made_from(entry), **record}, indent=1).encode())
    remove(raw)


def _refuse_foreign(converted: Path) -> None:
    """Refuse, before anything is fetched, a cache in which files of the user's have our names."""
    try:
        check_named_file(converted, is_converted)
        if not converted.is_file():  # beside weights of ours the note is ours, too, even if it is damaged
            check_named_file(converted.with_suffix(".json"), has_keys("url", "sha256", "fetched"))
    except ValueError as error:
        raise CatalogError(f"{error}; MOCO_D2_CACHE names another folder for published weights") from error


def download(entry: Entry, target: Path) -> dict[str, Any]:
    """Fetch an entry's file; what a broken transfer left beside it (``.part``) is continued, not repeated.

    Args:
        entry: of the catalogue.
        target: the file to write; it appears when it is whole and its checksum is right.

    Returns:
        What was fetched: address, size, SHA-256, time.

    Raises:
        CatalogError: it cannot be fetched, or is another file than was published.
    """
    part = target.with_name(target.name + ".part")
    logger.info("fetching %s from %s", entry.name, entry.url)
    try:
        download_file(entry.url, part, entry.name, bool(entry.checksum), impatient=True)
    except DownloadError as error:
        if error.status:
            raise CatalogError(
                f"{entry.name}: {entry.url} answers {error.status} ({error}); it may have moved: {_BY_HAND}"
            ) from error
        there = size_of(part)
        kept = f"; {megabytes(there)} MB are kept, and the next attempt goes on from there" if there else ""
        raise CatalogError(
            f"{entry.name}: {entry.url} cannot be fetched ({error}){kept}. Without a network, {_BY_HAND}"
        ) from error
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"url": entry.url, "bytes": size_of(part), "sha256": _verify(entry, part), "fetched": now}
    move(part, target)
    return record


def listing() -> str:
    """Return all entries as text: name, what it is, published result, checksum, whether it is kept here, address."""
    entries, folder = list_entries().values(), cache_folder()
    rows = [("name", "weights", "published", "checksum", "kept")]
    for e in entries:
        file = folder / f"{e.name}.pth"
        kept = "no" if not file.is_file() else "outdated" if _differences(e, file) else "yes"
        rows.append((e.name, e.title, e.published or "-", e.checksum or "none published", kept))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    addresses = [line for e in entries for line in (f"{e.name}", f"    {e.url}", f"    stated in: {e.stated_in}")]
    return "\n".join([
        *lines, "", "published: ImageNet linear classification, top-1, unless it says otherwise", "",
        "Addresses, as published; none was opened when the list was made:", *addresses, "",
        f"Use: MODEL.WEIGHTS {PREFIX}NAME (kept in {folder})",
    ])  # fmt: skip


def _read(path: Path) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CatalogError(f"{path}: not a list of weights ({' '.join(str(error).split())})") from error
    known = {field.name for field in fields(Entry)} - {"name"}
    if not isinstance(content, Mapping):
        raise CatalogError(f"{path}: not a list of weights; it must be like {CATALOG}")
    for name, values in content.items():
        unknown = sorted(set(values) - known) if isinstance(values, Mapping) else [str(values)]
        missing = sorted({"url", "title", "recipe"} - set(values)) if not unknown else []
        if unknown or missing:
            raise CatalogError(f"{path}: {name}: unknown {unknown}, missing {missing}; known are {sorted(known)}")
    return {str(name): Entry(str(name), **{k: str(v) for k, v in values.items()}) for name, values in content.items()}


@contextmanager
def _only_one(path: Path, entry: Entry) -> Iterator[None]:
    """Hold the lock of an entry; the system frees it when a process dies."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("%s is being fetched by another process: waiting for it", entry.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _verify(entry: Entry, path: Path) -> str:
    """Compare with the published checksum and return the SHA-256; a wrong file is removed."""
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
            f"{entry.name}: what {entry.url} sent ({size} bytes) has {kind} {got[: len(wanted)]}, published is "
            f"{wanted}; the transfer was damaged, or the file was replaced. It was removed; try again, or {_BY_HAND}"
        )
    if not wanted:
        logger.info("%s: no checksum was published; SHA-256 %s", entry.name, digests["sha256"].hexdigest())
    return digests["sha256"].hexdigest()


def _convert(entry: Entry, raw: Path, converted: Path) -> None:
    """Convert the published file, with the facts that only the catalogue knows: which weights, by which recipe."""
    try:
        conversion = convert_state(read_checkpoint(raw), raw, Choice(source=entry.source))
        facts = replace(conversion.facts, origin=f"{entry.title}, from {entry.url}", protocol=entry.recipe)
        write(replace(conversion, facts=facts), converted, can_prove())
    except ValueError as error:  # the file, the proof, or the catalogue's `source`
        remove(raw)
        raise CatalogError(
            f"{entry.name}: {entry.url} was fetched but cannot be converted: {error}. It was removed; to look at it, "
            f"{_BY_HAND}"
        ) from error

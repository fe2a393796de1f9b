"""Downloads over http(s) that continue after an interruption."""

from __future__ import annotations

import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from moco_d2.io.files import remove

logger = logging.getLogger(__name__)

_BLOCK = 1 << 20
_TIMEOUT = 30  # seconds without a byte
_PROGRESS_EVERY = 5.0  # seconds between lines of progress
_BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class DownloadError(OSError):
    """A file cannot be downloaded; the message is the reason. ``status``: the server's code, if it refused."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def download_file(url: str, part: Path, name: str, checked: bool, attempts: int = 3, impatient: bool = False) -> None:
    """Download a file into ``part``, continuing what is there, and compare its length with the server's.

    Args:
        url: http(s) address.
        part: the file to write; after an error it holds what has arrived.
        name: of the file in the log.
        checked: whether the caller compares a checksum or length. Otherwise ``part`` is continued only if the server's
            version of it is known.
        attempts: number of successive attempts without progress after which the download fails.
        impatient: fail at once if the very first attempt brings nothing.

    Raises:
        DownloadError: the server refused, or there were too many attempts without progress.
    """
    stalled = 0
    while True:
        before = size_of(part)
        try:
            _attempt(url, part, name, checked)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise DownloadError(error.reason, error.code) from error
            problem: Exception = error
        except _BROKEN as error:
            problem = error
        stalled = 0 if size_of(part) > before else stalled + 1
        if stalled == attempts or (stalled and impatient and not before):
            raise DownloadError(str(getattr(problem, "reason", None) or problem)) from problem
        logger.warning("%s: the download was interrupted at %s MB (%s)", name, megabytes(size_of(part)), problem)
        time.sleep(2**stalled - 1)
    remove(_version_file(part))


def _attempt(url: str, part: Path, name: str, checked: bool) -> None:
    """Download the missing rest of a file over one connection."""
    version = _version_file(part)
    if not (checked or version.exists()):  # it could be a part of another version, and nobody would notice
        remove(part)
    start = size_of(part)
    headers = {"User-Agent": "moco_d2", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if version.exists():  # the server sends the whole file if it has another version
            headers["If-Range"] = version.read_text()
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416 or not start:
                raise
            if error.headers.get("Content-Range", "") == f"bytes */{start}":  # complete, but not renamed yet
                return
        remove(part)
        return _attempt(url, part, name, checked)
    with response:
        held = re.match(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
        resumed = response.status == 206 and held is not None and int(held[1]) == start
        total = int(held[2]) if resumed and held else int(response.headers.get("Content-Length") or 0)
        marks = (response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
        if mark := next((mark for mark in marks if mark and not mark.startswith("W/")), ""):  # If-Range: no weak tags
            version.write_text(mark)
        with open(part, "ab" if resumed else "wb") as file:
            _copy(name, response, file, total)
    if size_of(part) < total:
        raise ConnectionError(f"the connection ended after {size_of(part)} of {total} bytes")


def _copy(name: str, response: Any, file: Any, total: int) -> None:
    begun = reported = time.monotonic()
    first = file.tell()
    while block := response.read(_BLOCK):
        file.write(block)
        if (now := time.monotonic()) - reported > _PROGRESS_EVERY:
            reported, done = now, file.tell()
            share = f" of {megabytes(total)} MB ({100 * done // total} %)" if total else " MB"
            rate = (done - first) / (now - begun) / 1e6
            logger.info("%s: %s%s, %.1f MB/s", name, megabytes(done), share, rate)


def _version_file(part: Path) -> Path:
    """Return the file with the server's version (ETag or date) of a partial file."""
    return part.with_name(part.name + ".version")


def size_of(path: Path) -> int:
    """Return a file's size in bytes; 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0


def megabytes(size: int) -> str:
    """Return a number of bytes in MB, as text."""
    return f"{size / 1e6:.0f}"

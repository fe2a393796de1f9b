"""Destinations of everything that the project writes: files are complete or absent, and no file of the user is lost.

There are four kinds of destinations:

* A file in a folder of ours, such as a run's or a cache: :func:`atomic_write`, after :func:`claim`.
* A file that the user names on the command line: :func:`named_file`. It replaces only a file that such a command wrote.
* A folder that is created as a whole: :func:`replaced_folder`, :func:`fresh_folder`. It replaces only a folder of ours.
* A file that is removed or replaced by another one: :func:`remove`, :func:`move`. Only names of ours.

A folder's :data:`MARKER` lists the entries that are ours. Nothing else in the project removes or overwrites files: a
test reads the source for it.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moco_d2.io.locks import LOCK, holder, lock

MARKER = ".moco_d2.json"

_SUFFIX = ".partial"
# Bytes of a name. File systems allow 255, and a temporary file has a longer name than the final file.
_LONGEST_NAME = 200
# The only names of files that are removed, or replaced by a file with another name.
_REMOVABLE = re.compile(
    r"""
      model_\d{7,}\.pth                              # a run's periodic checkpoints
    | \..+\.\w+\.partial                             # temporary files of killed processes
    | \.making\.json                                 # the plan of a set of shards that is now complete
    | [0-9a-f]{16}(-.+)?\.(tar|npy|json|lost)        # cached shards and their sidecars
    | .+\.download                                   # published weights before their conversion
    | (.+\.download|[0-9a-f]{16}(-.+)?)\.part        # partial downloads
    | (.+\.part|[0-9a-f]{16}-.+\.json)\.version      # the server's version of a partial download
    """,
    re.VERBOSE,
)

# Names.


def name_problem(name: str) -> str | None:
    """Return why a text from the user cannot be the name of a file or folder, or None if it can."""
    if not name or name.startswith("."):
        return "begins with a dot" if name else "is empty"
    if "/" in name or "\\" in name:
        return "is a path, not a name"
    if not name.isprintable():
        return "holds characters that cannot be printed"
    if len(name.encode()) > _LONGEST_NAME:
        return f"is longer than {_LONGEST_NAME} bytes"
    return None


def file_name(name: str) -> str:
    """Return a name as a file or folder name: unchanged if possible, else shortened and with a hash."""
    if name_problem(name) is None:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-60:].strip('._')}-{digest}".lstrip("-")


# Files.


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces ``path`` if the block succeeds, and is deleted otherwise.

    The data reach the disk before the name does, so that a crash at any moment leaves the old file or the new one. A
    process that is killed while it writes leaves the temporary file (see :func:`remove_leftovers`). If ``path`` is a
    link, the link is replaced and its target is unchanged.

    Args:
        path: a file of ours; its folder is created if missing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp creates private files
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextmanager
def named_file(path: str | os.PathLike[str], ours: Callable[[Path], bool]) -> Iterator[IO[bytes]]:
    """Open a file that the user names on the command line, as :func:`atomic_write` does.

    Args:
        path: as the user wrote it. If it is a link, its target is written.
        ours: returns whether an existing file was written by such a command and may be replaced.

    Raises:
        ValueError: see :func:`check_named_file`; or the file cannot be written.
    """
    target = check_named_file(path, ours)
    with one_line(path), atomic_write(target) as file:
        yield file


def check_named_file(path: str | os.PathLike[str], ours: Callable[[Path], bool]) -> Path:
    """Return the target of :func:`named_file`; call it before long work to check that the file may be written.

    Raises:
        ValueError: it is a folder, a device, or a file that no command of ours wrote; or its folder is not writable.
    """
    target = Path(os.path.realpath(path))
    with one_line(path):
        if target.is_dir():
            raise ValueError(f"{path}: is a folder; name a file")
    if os.path.lexists(target) and not (target.is_file() and ours(target)):
        raise ValueError(
            f"{path}: this file exists, and this command did not write it; move it away, or choose another name"
        )
    check_folder(target.parent, f"{path}: the folder")
    return target


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """Return a test for JSON files whose object has these keys; results on disk are recognised by it."""

    def test(path: Path) -> bool:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= {*keys}

    return test


def remove(path: Path) -> None:
    """Remove a file of ours, if it exists.

    Raises:
        ValueError: its name is not one of those that may be removed.
    """
    if not removable(path):
        raise ValueError(f"{path} is not removed: only the names in moco_d2/io/files.py may be")
    path.unlink(missing_ok=True)


def removable(path: Path) -> bool:
    """Return whether a file's name is one of those that may be removed."""
    return _REMOVABLE.fullmatch(path.name) is not None


def move(source: Path, target: Path, ours: Callable[[Path], bool] = removable) -> None:
    """Rename a file that this process has just written.

    Args:
        source: the file.
        target: its new name, on the same disk.
        ours: returns whether an existing file of this name may be replaced.

    Raises:
        ValueError: an existing file may not be replaced.
    """
    if os.path.lexists(target) and not ours(target):
        raise ValueError(f"{target}: this file exists, and this command did not write it; choose another name")
    os.replace(source, target)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of killed processes from a folder, to which no other process may be writing."""
    for path in filter(removable, Path(folder).glob(f".*{_SUFFIX}")):
        remove(path)


# Folders.


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Check that a folder could be created and written to, without creating it.

    Args:
        path: the folder.
        what: the key or option that names it, as in ``OUTPUT_DIR``.

    Raises:
        ValueError: it could not.
    """
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(f"{what} is {os.fspath(path)!r}; it must be the path of a folder")
    place = Path(os.path.abspath(path))
    while not os.path.lexists(place):
        place = place.parent
    # By trial: permissions are no proof, because root has them all, even on read-only or full disks and in /proc.
    with one_line(path, what), tempfile.TemporaryFile(dir=place):
        pass


def make_folder(path: str | os.PathLike[str], what: str) -> Path:
    """Create a folder if it does not exist, and return it.

    Raises:
        ValueError: it cannot be created, or not be written to.
    """
    check_folder(path, what)
    with one_line(path, what):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextmanager
def one_line(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Turn the system's error about a path of the user into a one-line ValueError with a remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        where = f"{what} {path}" if what else f"{path}"
        remedy = "free some space or give permission, or choose another path"
        raise ValueError(f"{where}: cannot be written to ({reason}); {remedy}") from error


def claim(folder: str | os.PathLike[str], patterns: Sequence[str], what: str, trusted: bool = False) -> None:
    """Create a folder if needed, and record in its marker that entries matching these patterns are ours to overwrite.

    Args:
        folder: may contain other entries, which are left alone.
        patterns: shell patterns; :func:`exactly` makes one of a name.
        what: the key or option that names the folder.
        trusted: whether present entries are known to be ours, for another reason than the marker.

    Raises:
        ValueError: a matching entry exists that the marker does not list; or the folder cannot be written to.
    """
    folder = make_folder(folder, what)
    if new := check_claim(folder, patterns, what, trusted):
        with one_line(folder, what):
            _write_marker(folder, [*_marked(folder), *new])


def check_claim(folder: str | os.PathLike[str], patterns: Sequence[str], what: str, trusted: bool = False) -> list[str]:
    """Check, without writing, that :func:`claim` would not refuse a folder, which may be missing.

    Returns:
        The patterns that the marker does not list yet.

    Raises:
        ValueError: a matching entry exists that the marker does not list.
    """
    # List the names before the marker is read: another process of ours writes the marker first.
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    marked = _marked(Path(folder))
    new = [pattern for pattern in patterns if pattern not in marked]
    taken = [name for name in names if _matches(name, new)]
    if taken and not trusted:
        raise ValueError(
            f"{what} {folder} contains {taken[0]}, which this command did not write and would overwrite: move it away, "
            "or choose another folder"
        )
    return new


def exactly(name: str) -> str:
    """Return the pattern that matches this name only, for :func:`claim`."""
    return glob.escape(name)


@contextmanager
def replaced_folder(folder: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """Yield an empty folder that replaces ``folder`` if the block succeeds, and is deleted otherwise.

    Raises:
        ValueError: ``folder`` contains entries that are not ours, or cannot be written to.
    """
    folder = Path(folder)
    check_replaceable(folder, what)
    make_folder(folder.parent, what)
    with one_line(folder, what), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as own:
        new, old = Path(own, "new"), Path(own, "old")
        new.mkdir()
        yield new
        _write_marker(new, [exactly(name) for name in os.listdir(new)], _files_below(new))
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def write_text(folder: Path, name: str, text: str) -> None:
    """Write a text file into a new folder of :func:`replaced_folder`.

    Raises:
        ValueError: the name, a relative path, leads out of the folder.
    """
    path = folder / name
    if ".." in Path(name).parts or os.path.isabs(name):
        raise ValueError(f"{name} leads out of the folder {folder}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fresh_folder(folder: str | os.PathLike[str], patterns: Sequence[str], what: str) -> int:
    """Create a folder, or empty one that this command created before, and lock it against other processes.

    Args:
        folder: the folder.
        patterns: of the entries that will be ours.
        what: the key or option that names it.

    Returns:
        The lock's descriptor, as :func:`lock` does.

    Raises:
        ValueError: it contains entries that are not ours, another command writes there, or it cannot be written to.
    """
    folder = Path(folder)
    check_replaceable(folder, what)
    for marker in sorted(folder.rglob(MARKER)):  # folders below may contain files of the user, too
        _refuse_foreign(marker.parent, what)
    make_folder(folder, what)
    with one_line(folder, what):
        held = lock(folder / LOCK)
        if held is None:
            raise ValueError(
                f"another command writes to {what} {folder} ({holder(folder / LOCK)}): choose another folder"
            )
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        _write_marker(folder, patterns)
    return held


def empty_folder(folder: str | os.PathLike[str], what: str) -> Path:
    """Return a folder after checking that it is empty or absent, and could be written to.

    Raises:
        ValueError: it is not empty, is a file, or could not be written to.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{what} {folder} is a file; choose a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{what} {folder} is not empty; choose a new folder")
    check_folder(folder, what)
    return folder


def check_replaceable(folder: Path, what: str) -> None:
    """Check that a folder may be replaced: it is absent, or contains only entries of ours.

    Raises:
        ValueError: it contains other entries, or is not a folder.
    """
    if not os.path.lexists(folder):
        check_folder(folder, what)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{what} {folder} is a {'link' if folder.is_symlink() else 'file'}; choose a new folder")
    _refuse_foreign(folder, what)


def _refuse_foreign(folder: Path, what: str) -> None:
    known = [*_marked(folder), MARKER, LOCK]
    foreign = [name for name in sorted(os.listdir(folder)) if not _matches(name, known) and not _is_leftover(name)]
    if not foreign and (files := _marked(folder, "files")):
        foreign = sorted({*_files_below(folder)} - {*files, MARKER, LOCK})
    if foreign:
        raise ValueError(
            f"{what} {folder} contains {foreign[0]}, which this command did not write: move it away, or choose another "
            "folder"
        )


def _is_leftover(name: str) -> bool:
    return name.startswith(".") and name.endswith(_SUFFIX)


def _files_below(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder, without temporary files of killed processes."""
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names if not _is_leftover(name))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _marked(folder: Path, kind: str = "ours") -> list[str]:
    """Return the patterns of a folder's entries that are ours, or its ``files`` of ours, if the marker lists them."""
    try:
        return [str(pattern) for pattern in json.loads((folder / MARKER).read_bytes())[kind]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write_marker(folder: Path, patterns: Iterable[str], files: Sequence[str] = ()) -> None:
    text = "Entries of this folder that moco_d2 wrote, and may overwrite or remove; it leaves all others alone."
    content = {"about": text, "ours": sorted(patterns), **({"files": list(files)} if files else {})}
    with atomic_write(folder / MARKER) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk; otherwise a power cut may bring the old file back."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot do this for folders
        pass
    finally:
        os.close(handle)

"""Every place that the project writes to: a file is complete or not there, and nothing of the user's is lost.

There are four kinds of destinations:

* A file in a folder of ours, such as a run's or a cache's: :func:`atomic_write`, after :func:`claim`.
* A file that the user's command names: :func:`named_file`. It replaces only what such a command wrote.
* A folder that is made as a whole: :func:`replaced_folder`, :func:`fresh_folder`. It replaces only a folder of ours.
* A file that is removed or takes another's place: :func:`remove`, :func:`move`. Names of ours only.

A folder's :data:`MARKER` lists what of its content is ours. Nothing else in the project removes or overwrites: a test
reads the source for it.
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
# Bytes of a name: file systems take 255, and a temporary file's name is longer than that of the file it becomes.
_LONGEST_NAME = 200
# The only files that are removed, or replaced by another file that was written under another name.
_REMOVABLE = re.compile(
    r"""
      model_\d{7,}\.pth                              # a run's periodic checkpoints
    | \..+\.\w+\.partial                             # what a killed process left of a file
    | \.making\.json                                 # the plan of a set of shards that is now complete
    | [0-9a-f]{16}(-.+)?\.(tar|npy|json|lost)        # shards in their cache, and what is known of them
    | .+\.download                                   # published weights before their conversion
    | (.+\.download|[0-9a-f]{16}(-.+)?)\.part        # what a broken transfer left
    | (.+\.part|[0-9a-f]{16}-.+\.json)\.version      # the server's mark of the version that it is of
    """,
    re.VERBOSE,
)

# Names.


def name_problem(name: str) -> str | None:
    """Return why a text from the user cannot be the name of a file or folder, or None."""
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
    """Return the name of the file or folder for something that bears a name: the same where that is possible."""
    if name_problem(name) is None:
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)[-60:].strip('._')}-{digest}".lstrip("-")


# Files.


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a temporary file beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    The data reach the disk before the name does, so that a crash at any moment leaves the old file or the new one. A
    process killed while it writes leaves the temporary file; :func:`remove_leftovers` is for those. A link of this name
    is replaced, and the file that it leads to stays as it is.

    Args:
        path: a file of ours; its folder is made if missing.
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
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; ours have a normal file's rights.
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


@contextmanager
def named_file(path: str | os.PathLike[str], ours: Callable[[Path], bool]) -> Iterator[IO[bytes]]:
    """Open, as :func:`atomic_write` does, a file that the user's command names.

    Args:
        path: as the user wrote it. Through a link the file that it leads to is written.
        ours: whether an existing file is one that such a command wrote, and may be replaced.

    Raises:
        ValueError: see :func:`check_named_file`; or it cannot be written.
    """
    target = check_named_file(path, ours)
    with one_line(path), atomic_write(target) as file:
        yield file


def check_named_file(path: str | os.PathLike[str], ours: Callable[[Path], bool]) -> Path:
    """Return the file that a name leads to, having checked before long work that it may be written.

    Raises:
        ValueError: it is a folder or a device, a file that no command of ours wrote, or where nothing can be written.
    """
    target = Path(os.path.realpath(path))
    with one_line(path):
        if target.is_dir():
            raise ValueError(f"{path}: a folder; name the file to write")
    if os.path.lexists(target) and not (target.is_file() and ours(target)):
        raise ValueError(
            f"{path}: a file that this command did not write has this name, and is kept; move it away, or choose "
            "another name"
        )
    check_folder(target.parent, f"{path}: the folder")
    return target


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """Return a test whether a file is a JSON object with these keys, which is how results on disk are recognised."""

    def test(path: Path) -> bool:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= {*keys}

    return test


def remove(path: Path) -> None:
    """Remove a file of ours, if it is there.

    Raises:
        ValueError: its name is none of those that may be removed.
    """
    _refuse_other_names(path)
    path.unlink(missing_ok=True)


def removable(path: Path) -> bool:
    """Return whether a file's name is one of those that may be removed."""
    return _REMOVABLE.fullmatch(path.name) is not None


def move(source: Path, target: Path, ours: Callable[[Path], bool] = removable) -> None:
    """Give a file that we have just written another name.

    Args:
        source: the file.
        target: its new name, on the same disk.
        ours: whether a file that has this name already may be replaced.

    Raises:
        ValueError: it may not.
    """
    if os.path.lexists(target) and not ours(target):
        raise ValueError(f"{target}: a file that was not written by this command, and is kept; choose another name")
    os.replace(source, target)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed processes left in a folder. Nobody may be writing there."""
    for path in filter(removable, Path(folder).glob(f".*{_SUFFIX}")):
        remove(path)


def _refuse_other_names(path: Path) -> None:
    if not removable(path):
        raise ValueError(f"{path} is not removed: its name is none of the names that may be (moco_d2/io/files.py)")


# Folders.


def check_folder(path: str | os.PathLike[str], what: str) -> None:
    """Refuse a folder that could not be made, or not be written to; nothing is made.

    Args:
        path: the folder.
        what: how the user named it, as in ``OUTPUT_DIR``.

    Raises:
        ValueError: it could not.
    """
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(f"{what} is {os.fspath(path)!r}; it must name a folder")
    place = Path(os.path.abspath(path))
    while not os.path.lexists(place):
        place = place.parent
    # The system's permissions alone do not tell: root has them all, on read-only and full disks and in /proc, too.
    with one_line(path, what), tempfile.TemporaryFile(dir=place):
        pass


def make_folder(path: str | os.PathLike[str], what: str) -> Path:
    """Make a folder if it is not there, and return it.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    check_folder(path, what)
    with one_line(path, what):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextmanager
def one_line(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Turn the system's error about a place that the user named into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        where = f"{what} {path}" if what else f"{path}"
        raise ValueError(f"{where}: cannot be written to ({reason}); make room there or name another") from error


def claim(folder: str | os.PathLike[str], patterns: Sequence[str], what: str, trusted: bool = False) -> None:
    """Make a folder, and note that the entries that match these patterns are ours to overwrite.

    Args:
        folder: may hold other things, which are left alone.
        patterns: as the shell has them; :func:`exactly` makes one of a name.
        what: how the user named the folder.
        trusted: whether present entries are known to be ours, for another reason than the note.

    Raises:
        ValueError: an entry that matches is there already, and is not noted; or nothing can be written.
    """
    folder = make_folder(folder, what)
    if new := check_claim(folder, patterns, what, trusted):
        with one_line(folder, what):
            _note(folder, [*_noted(folder), *new])


def check_claim(folder: str | os.PathLike[str], patterns: Sequence[str], what: str, trusted: bool = False) -> list[str]:
    """Refuse what :func:`claim` would refuse in a folder, which may be missing; nothing is written.

    Returns:
        The patterns that are not noted yet.

    Raises:
        ValueError: an entry that matches is there already, and is not noted.
    """
    # The names before the notes, which another process of ours makes before it writes.
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    noted = _noted(Path(folder))
    new = [pattern for pattern in patterns if pattern not in noted]
    taken = [name for name in names if _matches(name, new)]
    if taken and not trusted:
        raise ValueError(
            f"{what} {folder} holds {taken[0]}, which was not written by this command and would be overwritten: move "
            "it away, or name another folder"
        )
    return new


def exactly(name: str) -> str:
    """Return the pattern for :func:`claim` that matches this name only."""
    return glob.escape(name)


@contextmanager
def replaced_folder(folder: str | os.PathLike[str], what: str) -> Iterator[Path]:
    """Yield an empty folder that takes the place of another one when the block ends well, and vanishes otherwise.

    Raises:
        ValueError: the other one holds something that is not ours, or nothing can be written.
    """
    folder = Path(folder)
    check_replaceable(folder, what)
    make_folder(folder.parent, what)
    with one_line(folder, what), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as own:
        new, old = Path(own, "new"), Path(own, "old")
        new.mkdir()
        yield new
        _note(new, [exactly(name) for name in os.listdir(new)], _files_below(new))
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def write_text(folder: Path, name: str, text: str) -> None:
    """Write a file into a new folder of :func:`replaced_folder`.

    Raises:
        ValueError: the name, which may have folders in it, leads out of the folder.
    """
    path = folder / name
    if ".." in Path(name).parts or os.path.isabs(name):
        raise ValueError(f"{name} leads out of the folder that it belongs into")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fresh_folder(folder: str | os.PathLike[str], patterns: Sequence[str], what: str) -> int:
    """Make a folder, or empty one that was made here before, and lock it against others of this command.

    Args:
        folder: the folder.
        patterns: of the entries that will be ours.
        what: how the user named it.

    Returns:
        The lock's descriptor, as :func:`lock` does.

    Raises:
        ValueError: it holds something that is not ours, another command is at it, or nothing can be written.
    """
    folder = Path(folder)
    check_replaceable(folder, what)
    for marker in sorted(folder.rglob(MARKER)):  # What the user put into a folder within is the user's, too.
        _refuse_foreign(marker.parent, what)
    make_folder(folder, what)
    with one_line(folder, what):
        held = lock(folder / LOCK)
        if held is None:
            raise ValueError(
                f"another command writes to {what} {folder} ({holder(folder / LOCK)}): name another folder"
            )
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
        _note(folder, patterns)
    return held


def empty_folder(folder: str | os.PathLike[str], what: str) -> Path:
    """Return a folder, having checked that it is empty or not there yet, and could be written to.

    Raises:
        ValueError: it is not, or could not.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{what} {folder} is a file; choose a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{what} {folder} is not empty; choose a new folder")
    check_folder(folder, what)
    return folder


def check_replaceable(folder: Path, what: str) -> None:
    """Refuse to replace a folder that holds anything which is not ours.

    Raises:
        ValueError: it does, or is no folder.
    """
    if not os.path.lexists(folder):
        check_folder(folder, what)
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{what} {folder} is a {'link' if folder.is_symlink() else 'file'}; name a new folder")
    _refuse_foreign(folder, what)


def _refuse_foreign(folder: Path, what: str) -> None:
    known = [*_noted(folder), MARKER, LOCK]
    foreign = [name for name in sorted(os.listdir(folder)) if not _matches(name, known) and not _is_leftover(name)]
    if not foreign and (files := _noted(folder, "files")):
        foreign = sorted({*_files_below(folder)} - {*files, MARKER, LOCK})
    if foreign:
        raise ValueError(
            f"{what} {folder} holds {foreign[0]}, which this command did not put there: move it away, or name another "
            "folder"
        )


def _is_leftover(name: str) -> bool:
    return name.startswith(".") and name.endswith(_SUFFIX)


def _files_below(folder: Path) -> list[str]:
    """Return the paths of all files in a folder and its folders, leftovers of killed processes aside."""
    found = (Path(place, name) for place, _, names in os.walk(folder) for name in names if not _is_leftover(name))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _noted(folder: Path, kind: str = "ours") -> list[str]:
    """Return the patterns of what is ours in a folder; or all files that we put there, if they are noted."""
    try:
        return [str(pattern) for pattern in json.loads((folder / MARKER).read_bytes())[kind]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _note(folder: Path, patterns: Iterable[str], files: Sequence[str] = ()) -> None:
    text = "What moco_d2 wrote into this folder, and may overwrite or remove; everything else is left alone."
    content = {"about": text, "ours": sorted(patterns), **({"files": list(files)} if files else {})}
    with atomic_write(folder / MARKER) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _flush_folder(folder: Path) -> None:
    """Bring the new name itself to the disk: after a power cut a file may otherwise have its old one."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # Some network file systems cannot do this for folders.
        pass
    finally:
        os.close(handle)

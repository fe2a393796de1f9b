"""Exit codes: a user's mistake ends a command with one line and code 2, a fault of ours with a traceback and code 1.

:func:`ending` classifies an exception. Every command of the project ends by it, and so does each of several processes,
which reports to its launcher (:mod:`moco_d2.running.launch`). docs/reliability.md explains the codes.

The module imports the standard library only, so that it works in an installation whose torch or Detectron2 is broken.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

FAULT = 1
MISTAKE = 2
DISK_FULL = os.EX_IOERR
INTERRUPTED = 130  # as in shells: 128 plus the number of SIGINT
PIPE_CLOSED = 141  # 128 plus the number of SIGPIPE

# Errors of the system about a path that the user chose.
_OF_PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTEMPTY, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV, errno.ENXIO,
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Library files that look up a name from a config, and raise KeyError if it is not registered.
_LOOK_UP = (os.path.join("fvcore", "common", "registry.py"), os.path.join("detectron2", "data", "catalog.py"))
_PACKAGE = Path(__file__).parent
_OURS = (_PACKAGE, _PACKAGE.parent / "tools", _PACKAGE.parent / "benchmarks")
# The text of an exception from a loader's worker; torch keeps its class if that takes a single string.
_IN_WORKER = re.compile(r"\ACaught (\w+) in .*?\nOriginal Traceback .*\n(?:[\w.]+\.)?\1: (.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Ending:
    """How a command ends.

    Attributes:
        code: the exit code.
        line: the message, a line for each problem; empty for a fault of ours, which keeps its traceback.
        place: file and line where our code called the library that raised the error; empty if our code raised it and
            chose the words.
    """

    code: int
    line: str
    place: str = ""


def ending(error: BaseException) -> Ending:
    """Return how a command ends after an exception.

    An exception may decide it by ``exit_code`` (and by ``line``, if that is not its message). Otherwise ``ValueError``
    and its subclasses, errors of the system about a path, and names that are not registered are the user's mistakes. An
    exception from a loader's worker is classified as the exception in the worker.
    """
    if (code := getattr(error, "exit_code", None)) is not None:
        return Ending(code, getattr(error, "line", "") or str(error))
    kind, text, files = _original(error)
    if issubclass(kind, OSError):
        return _of_system(error, text, _place(files))
    if issubclass(kind, ValueError | FloatingPointError):
        return Ending(MISTAKE, text, _place(files))
    if issubclass(kind, KeyError) and files and files[-1][0].endswith(_LOOK_UP):
        return Ending(MISTAKE, text.strip("'\""))
    if isinstance(error, ImportError) and error.name == "detectron2" and error.path is None:
        return Ending(MISTAKE, text)
    return Ending(FAULT, "")


def _original(error: BaseException) -> tuple[type[BaseException], str, list[tuple[str, int]]]:
    """Return an exception's class, its message, and the files and lines of its traceback, innermost last.

    For an exception from a loader's worker they are those in the worker.
    """
    kind, text = type(error), str(error)
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    if found := _IN_WORKER.match(str(error.args[0]) if error.args else ""):
        name, text = found[1], found[2].rstrip("\n")
        passed = re.findall(r'^  File "(.+)", line (\d+)', found[0], re.MULTILINE)
        frames += [(file, int(line)) for file, line in passed]
        # Exceptions that take more arguments (JSONDecodeError, UnicodeDecodeError) arrive as RuntimeError.
        kind = next((child for child in _below(ValueError) if child.__name__ == name), kind)
    return kind, text or kind.__name__, frames


def _below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _of_system(error: BaseException, text: str, place: str) -> Ending:
    """Classify an OSError. One without a number has a text of ours, or of a library that reads files."""
    stated = re.fullmatch(r"\[Errno (\d+)\] ([^:]+)(?:: '(.*)')?", text)
    number = getattr(error, "errno", None) or (int(stated[1]) if stated else None)
    line = f"{stated[3]}: {stated[2]}" if stated and stated[3] else text
    if number in _NO_ROOM:
        return Ending(DISK_FULL, line)
    if number is None or number in _OF_PATHS:
        return Ending(MISTAKE, line, place if number is None else "")
    return Ending(FAULT, "")


def _place(files: list[tuple[str, int]]) -> str:
    ours = [(file, line) for file, line in files if any(Path(file).is_relative_to(folder) for folder in _OURS)]
    if not ours or files[-1] == ours[-1]:
        return ""
    file, line = ours[-1]
    return f"{Path(file).relative_to(_PACKAGE.parent)}:{line}"


def conclude(error: BaseException) -> Ending:
    """Return :func:`ending`; if the message is a library's, the line also names the place in our code.

    The traceback is written into the run's log, if there is one by now.
    """
    end, log = ending(error), record(error)
    if not end.place:
        return end
    where = f"raised below {end.place}" + (f"; the traceback is in {log}" if log else "")
    return Ending(end.code, f"{end.line} ({where})", end.place)


def record(error: BaseException) -> str:
    """Write an exception's traceback into the run's log, not to the screen; return the log's path, if there is one."""
    for handler in logging.getLogger("moco_d2").handlers:
        path = getattr(getattr(handler, "stream", None), "name", None)
        if isinstance(path, str) and not path.startswith("<"):  # <stdout>, <stderr>
            trace = (type(error), error, error.__traceback__)
            handler.handle(logging.LogRecord("moco_d2", logging.ERROR, __file__, 0, "the run has ended", None, trace))
            return path
    return ""


def leave(error: BaseException) -> NoReturn:
    """End the process as :func:`ending` says."""
    if isinstance(error, KeyboardInterrupt):
        _fail("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError) and _nobody_reads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise flushing at exit fails
        sys.exit(PIPE_CLOSED)
    end = conclude(error)
    if not end.line:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(end.code)
    _fail(end.line, end.code)


def attempt(work: Callable[[], int | None]) -> int:
    """Do a command's work and return the exit code; print a user's mistake, and re-raise a fault of ours."""
    try:
        return work() or 0
    except Exception as error:
        end = conclude(error)
        if not end.line:
            raise
        sys.stderr.write(f"error: {end.line}\n")
        return end.code


def guard(work: Callable[[], int | None]) -> NoReturn:
    """Do a command's work, which may return an exit code, and end the process as :func:`ending` says."""
    try:
        code = work() or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        leave(error)
    sys.exit(code)


def _nobody_reads() -> bool:
    """Tell whether standard output is a pipe whose reader has ended, as with ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file
        return False


def _fail(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {line}\n")
    sys.exit(code)

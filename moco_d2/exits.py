"""How a command ends: a user's mistake in one line and exit code 2, a fault of ours in its traceback and exit code 1.

:func:`ending` sorts an exception. Every command of the project ends by it, and so does a process of several, which
tells its launcher (:mod:`moco_d2.running.launch`). The codes are explained in docs/reliability.md.

The module imports the standard library only, and not the rest of the package either: an installation in which torch or
Detectron2 is broken can still say so.
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
INTERRUPTED = 130  # as shells say it: 128 and the number of SIGINT
PIPE_CLOSED = 141  # 128 and the number of SIGPIPE

# What the system says of a path that cannot be what the user wants it to be.
_OF_PATHS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTEMPTY, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENODEV, errno.ENXIO,
)  # fmt: skip
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Where libraries look up a name that a config gave, and raise KeyError where there is none.
_LOOK_UP = (os.path.join("fvcore", "common", "registry.py"), os.path.join("detectron2", "data", "catalog.py"))
_PACKAGE = Path(__file__).parent
_OURS = (_PACKAGE, _PACKAGE.parent / "tools", _PACKAGE.parent / "benchmarks")
# What torch makes of an exception in a loader's worker: its class (if that takes one string) with this text.
_IN_WORKER = re.compile(r"\ACaught (\w+) in .*?\nOriginal Traceback .*\n(?:[\w.]+\.)?\1: (.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class Ending:
    """How a command ends.

    Attributes:
        code: the exit code.
        line: what is said of the error (one line for each problem); empty for a fault of ours, which keeps its
            traceback.
        place: file and line where our code called a library that raised the error; empty where our code raised it
            itself, and so chose the words.
    """

    code: int
    line: str
    place: str = ""


def ending(error: BaseException) -> Ending:
    """Return how a command ends that an exception has left.

    An exception may say it itself, by ``exit_code`` (and ``line``, where that is not its message). Otherwise
    ``ValueError`` and its subclasses, errors of the system that are about a path, and names that are not registered are
    the user's mistakes. An exception that comes from a loader's worker is sorted as what it was there.
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
    """Return an exception's class, its message, and the files and lines it passed, the innermost last.

    For an exception of a loader's worker these are the ones in the worker.
    """
    kind, text = type(error), str(error)
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    if found := _IN_WORKER.match(str(error.args[0]) if error.args else ""):
        name, text = found[1], found[2].rstrip("\n")
        passed = re.findall(r'^  File "(.+)", line (\d+)', found[0], re.MULTILINE)
        frames += [(file, int(line)) for file, line in passed]
        # Those that take more than one string come as RuntimeError: JSONDecodeError, UnicodeDecodeError.
        kind = next((child for child in _below(ValueError) if child.__name__ == name), kind)
    return kind, text or kind.__name__, frames


def _below(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def _of_system(error: BaseException, text: str, place: str) -> Ending:
    """Sort an OSError. Those without a number were raised with a text, by us or by a library that reads files."""
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
    """Return :func:`ending` with a line that also says where to look when the words of the error are not ours.

    The traceback goes into the run's log in any case, if there is a log by now.
    """
    end, log = ending(error), record(error)
    if not end.place:
        return end
    where = f"raised below {end.place}" + (f"; the traceback is in {log}" if log else "")
    return Ending(end.code, f"{end.line} ({where})", end.place)


def record(error: BaseException) -> str:
    """Write an exception's traceback into the run's log, not on the screen; return the log's path, if there is one."""
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        sys.exit(PIPE_CLOSED)
    end = conclude(error)
    if not end.line:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(end.code)
    _fail(end.line, end.code)


def attempt(work: Callable[[], int | None]) -> int:
    """Do a command's work and return the exit code; a user's mistake is said in its line, a fault of ours goes on."""
    try:
        return work() or 0
    except Exception as error:
        end = conclude(error)
        if not end.line:
            raise
        sys.stderr.write(f"error: {end.line}\n")
        return end.code


def guard(work: Callable[[], int | None]) -> NoReturn:
    """Do a command's work, which may return an exit code, and end as :func:`ending` says."""
    try:
        code = work() or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        leave(error)
    sys.exit(code)


def _nobody_reads() -> bool:
    """Tell whether standard output is a pipe that was closed at its other end, as by ``| head``."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # no file at all
        return False


def _fail(line: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {line}\n")
    sys.exit(code)

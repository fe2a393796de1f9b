"""Locks of files: a process holds one until it ends, and the system frees it however the process ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger(__name__)

# Name of a folder's lock, which the command that writes into the folder holds.
LOCK = ".moco_d2.lock"

# Errors of flock on file systems without locks.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)

_locks: dict[str, int] = {}  # descriptors of the locks that this process holds, by path


def lock(path: Path) -> int | None:
    """Lock a file against other processes until this one ends or :func:`unlock` is called.

    Processes forked from this one do not keep the lock; a child that gets the descriptor (``pass_fds``) does. On a file
    system without locks there is a warning instead of a lock.

    Returns:
        The file's descriptor; None if another process, or this one, holds the lock.

    Raises:
        OSError: the file cannot be created.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise
        logger.warning("%s cannot be locked (%s): make sure that no other command writes there", path, error.strerror)
    _locks[os.path.realpath(path)] = file
    with contextlib.suppress(OSError):  # the holder's name is for messages only
        os.ftruncate(file, 0)
        os.pwrite(file, f"{socket.gethostname()}, process {os.getpid()}".encode(), 0)
    return file


def holds(path: Path) -> bool:
    """Return whether this process holds a lock."""
    return os.path.realpath(path) in _locks


def is_held(path: Path) -> bool:
    """Return whether another process holds a lock; nothing is created or written."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:  # shared, so that several processes may ask at the same time
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return not holds(path) and error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False


def holder(path: Path) -> str:
    """Return the name of the process that holds a lock."""
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace") or "another process"
    return "another process"


def unlock(path: Path) -> None:
    """Release a lock; a child that has the descriptor keeps it."""
    file = _locks.pop(os.path.realpath(path), None)
    if file is not None:
        os.close(file)


def _forget_locks() -> None:
    """In a forked child: drop the locks, or a loader's worker that outlives a killed run would block the next one."""
    for file in _locks.values():
        os.close(file)
    _locks.clear()


os.register_at_fork(after_in_child=_forget_locks)

"""One log line, in every process, for a picture that ends a run, instead of a traceback that hides it."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from moco_d2.io.pictures import PictureError

# Errors of gloo and NCCL in a process whose peer has ended.
_LEFT_ALONE = re.compile(r"(closed|reset) by peer|remote process exited")


@contextlib.contextmanager
def pictures_in_one_line() -> Iterator[None]:
    """Shorten what Detectron2's training loop logs about an exception that a picture caused."""
    loop = logging.getLogger("detectron2.engine.train_loop")
    loop.addFilter(_shorten)
    try:
        yield
    finally:
        loop.removeFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, PictureError):
        record.msg, record.args, record.exc_info = "training ends: %s", (str(error),), None
    elif isinstance(error, RuntimeError) and _LEFT_ALONE.search(str(error)):
        record.msg, record.args, record.exc_info = "training ends, because another process has ended", (), None
    return True

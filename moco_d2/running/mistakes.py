"""A picture that ends a run is one line in the log, in every process, not a traceback that hides the line."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from moco_d2.io.pictures import PictureError

# What gloo and NCCL say in the processes that go on when another one ends.
_LEFT_ALONE = re.compile(r"(closed|reset) by peer|remote process exited")


@contextlib.contextmanager
def pictures_in_one_line() -> Iterator[None]:
    """Shorten what Detectron2's training loop logs of an exception where a picture is to blame."""
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

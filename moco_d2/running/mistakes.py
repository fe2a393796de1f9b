"""A picture that ends a run is one line in the log, not a traceback that hides the line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from moco_d2.io.pictures import PictureError


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
    if record.exc_info and isinstance(record.exc_info[1], PictureError):
        record.msg, record.args, record.exc_info = "training ends: %s", (str(record.exc_info[1]),), None
    return True

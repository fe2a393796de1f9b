"""A fixture for commands that run in the tests' process: their logs and signal handlers end with the test."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from detectron2.utils.logger import setup_logger


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("", "moco_d2", "detectron2", "fvcore", "d2")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    handled = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handled.items():
        signal.signal(number, handler)
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    setup_logger.cache_clear()  # it would not add its handlers again

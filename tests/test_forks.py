"""What the fixture ``forks_can_train`` does for tests that fork."""

from __future__ import annotations

import gc
import multiprocessing
import os
import weakref


class Session:
    """An object that is in a circle, so that only the garbage collector ends it."""

    def __init__(self) -> None:
        self.circle = self


def collect(ended: list[int]) -> None:
    gc.collect()
    os._exit(len(ended))


def test_a_fork_leaves_the_garbage_of_its_parent_to_it() -> None:
    ended: list[int] = []
    gc.disable()
    try:
        session = Session()
        weakref.finalize(session, ended.append, 1)
        del session
        process = multiprocessing.get_context("fork").Process(target=collect, args=(ended,))
        process.start()
        process.join()
    finally:
        gc.enable()
    assert process.exitcode == 0 and not ended

"""Names that NumPy 2 removed, for packages that still use them: lvis (0.5.3) and cityscapesscripts (2.3.0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np


@contextmanager
def old_numpy_names() -> Iterator[None]:
    """Restore the removed names until the block ends."""
    with ExitStack() as stack:
        for name, value in (("float", float), ("in1d", _in1d)):
            if name not in vars(np):
                stack.enter_context(mock.patch.object(np, name, value, create=True))
        yield


def _in1d(values: Any, among: Any) -> Any:
    return np.isin(values, among).ravel()

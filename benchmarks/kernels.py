"""Operations of a MoCo step and the memory that they move, counted without arithmetic: ``python -m benchmarks kernels``."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.step import Ours, made_up_views


class Traffic(TorchDispatchMode):
    """Counts operations that compute, and the bytes of the tensors that they read and write.

    An operation that fills, normalises or copies reads each input and writes each output once. Views cost nothing and
    do not count, nor does what an operation needs besides, such as a convolution's workspace.

    Attributes:
        operations: number of operations.
        bytes: read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.operations += 1
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return result

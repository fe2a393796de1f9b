"""Count of operations and of the memory that they move, on tensors with or without values."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts the operations that compute, and the bytes that they read and write.

    An operation reads its inputs once, batch norm twice (for the statistics, and to normalise), and writes its results
    once. Views and allocations are no operations. What an operation needs inside, such as a convolution's workspace, is
    not counted, nor is what caches save.

    Attributes:
        operations: their number.
        bytes: read and written.
    """

    def __init__(self, device: str = "") -> None:
        """Start at zero; ``device``: count only what has tensors of this kind of device, and only these."""
        super().__init__()
        self.device = device
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given, made = self._bytes(args), self._bytes(result)  # tensors in kwargs are results, as in out=...
        computes = func.namespace == "aten" and not func.is_view and "empty" not in name and name != "_unsafe_view"
        if computes and (given or made or not self.device):
            self.operations += 1
            self.bytes += (2 if "batch_norm" in name else 1) * given + made
        return result

    def _bytes(self, tree: Any) -> int:
        """Return the bytes of tensors; of an expanded one, which is read once, those that are stored."""
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        counted = [x for x in tensors if not self.device or x.device.type == self.device]
        return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in counted)

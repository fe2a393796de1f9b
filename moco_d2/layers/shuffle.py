"""Shuffling BN (MoCo, section 3.3): groups of images with batch statistics of their own, and keys in shuffled order.

Letters: N images per process, R processes, C feature dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moco_d2.layers.batch_norm import use_group_batch_norm
from moco_d2.layers.distributed import all_gather, exchange, shared_permutation, to_device, world_size

logger = logging.getLogger(__name__)

PAPER_GROUPS = 8  # The paper trains on 8 GPUs, and each has its own batch statistics.


def shuffle(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's share of all processes' images in random order, and the order that puts them back.

    Args:
        x: (N, 3, H, W), this process's images.

    Returns:
        (N, 3, H, W), and (R * N,) int64 on the CPU, the same in all processes: :func:`exchange` with it, or indexing
        all processes' features, undoes the shuffling. Under autocast, images of several processes come in the
        type that an encoder's first layer would convert them to, which halves what is sent.
    """
    order = shared_permutation(world_size() * len(x))
    device = x.device.type
    if world_size() > 1 and x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    return exchange(x, order), order.argsort()


def encode_shuffled(
    encode: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    collect: Callable[[torch.Tensor], torch.Tensor] = all_gather,
) -> torch.Tensor:
    """Return all processes' features (R * N, C) in batch order, encoded in shuffled order.

    Shuffled across processes and BN groups, the key of an image is normalised together with other images than its
    query.

    Args:
        encode: maps (N, 3, H, W) to (N, C).
        x: (N, 3, H, W), this process's images.
        collect: how the features are gathered: ``all_gather``, or ``gather`` if they have a gradient.
    """
    shuffled, back = shuffle(x)
    features = collect(encode(shuffled))  # (R * N, C)
    return features[to_device(back, features.device)]


class BNGroups:
    """An encoder's groups of images with batch statistics of their own, and what a method says of them.

    Attributes:
        per_process: number of groups in a process.
        total: number of groups in all processes; without plain batch norm, 1.
    """

    def __init__(self, encoder: nn.Module, bn_groups: int, shuffle: bool) -> None:
        """Give the encoder's batch norms their groups, in place.

        Args:
            encoder: the network.
            bn_groups: groups per process. 0 chooses the number that makes 8 in total, like the paper's 8 GPUs, but at
                least one per process.
            shuffle: whether keys are shuffled; a warning follows if that has no effect.

        Raises:
            ValueError: more than one group for an encoder without plain batch norm.
        """
        if any(type(module) is nn.BatchNorm2d for module in encoder.modules()):
            self.per_process = bn_groups or max(1, PAPER_GROUPS // world_size())
            self.total = self.per_process * world_size()
            # A positive bn_groups is meant for one process, as in the authors' CIFAR demo.
            self._expected = bn_groups or PAPER_GROUPS
            reason = "a single BN group: set SSL.ARGS.bn_groups to 2 or more"
        else:
            if bn_groups > 1:
                raise ValueError(
                    f"SSL.ARGS.bn_groups is {bn_groups}; it must be 0 with SSL.ENCODER.ARGS.norm SyncBN or GN, which "
                    "have no groups"
                )
            self.per_process = self.total = self._expected = 1
            reason = "SSL.ENCODER.ARGS.norm SyncBN or GN: set SSL.ARGS.shuffle False"
        if shuffle and self.total == 1:
            logger.warning("shuffling BN has no effect with %s", reason)
        if self.per_process > 1:
            use_group_batch_norm(encoder, self.per_process)

    def check_batch(self, size: int) -> None:
        """Raise ValueError if ``size`` images per process cannot be split into the groups."""
        if size % self.per_process:
            raise ValueError(
                f"{size} images per process cannot be split into {self.per_process} BN groups; make the batch per "
                f"process a multiple of {self.per_process}, or change SSL.ARGS.bn_groups"
            )

    def settings(self) -> dict[str, Any]:
        """Return the total number of groups (``SSLMethod.settings``)."""
        return {"number of BN groups in all processes": self.total}

    def departures(self) -> list[str]:
        """Return the total number of groups if it is neither the paper's nor the argument's."""
        if self.total in (PAPER_GROUPS, self._expected):
            return []
        return [f"{self.total} BN groups in {world_size()} process(es) instead of {self._expected}"]

    def advice(self, batch: int) -> list[str]:
        """Warn if each group has a single image of a batch of all processes."""
        if batch // self.total != 1:
            return []
        return [
            f"each of the {self.total} BN groups has a single image, which gives no batch statistics: "
            "raise SOLVER.IMS_PER_BATCH, or use fewer groups (SSL.ARGS.bn_groups)"
        ]

"""Exponential moving average of a network (key, target or teacher network), and the schedule of its momentum."""

from __future__ import annotations

import math

import torch
from torch import nn


@torch.no_grad()
def ema_update_(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Move the target's parameters towards the online network's: theta_k <- m theta_k + (1 - m) theta_q.

    Only parameters are averaged: the target keeps its own BN running statistics, as in the authors' code.

    Args:
        target: the key (target, teacher) network; it is changed in place.
        online: the query (online, student) network, of the same architecture.
        momentum: m in [0, 1], the share of the old value.
    """
    kept: list[torch.Tensor] = list(target.parameters())
    new: list[torch.Tensor] = list(online.parameters())
    torch._foreach_lerp_(kept, new, 1 - momentum)  # theta_k + (1 - m) (theta_q - theta_k): one pass over memory


def cosine_momentum(start: float, progress: float) -> float:
    """Return m = 1 - (1 - start) (1 + cos(pi progress)) / 2, which rises from ``start`` to 1 (BYOL, section 3.2).

    Args:
        start: m at the beginning of training, in [0, 1].
        progress: fraction of training that is done, in [0, 1].
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def initial_share(start: float, steps: int) -> float:
    """Return the share of its initial weights that a target still has after a run of ``steps`` steps.

    It is the product of :func:`cosine_momentum` over the steps; less than a thousandth counts as 0.
    """
    left = 1.0
    for step in range(steps):
        left *= cosine_momentum(start, step / steps)
        if left < 0.001:  # a run can have millions of steps
            return 0.0
    return left

"""Batch norm over virtual groups: what several processes with per-process BN compute, in one process."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that splits a training batch into G groups and normalises each by its own statistics.

    Sample i belongs to group i % G, because then the split is a change of shape, without a copy; :func:`interleave`
    turns contiguous groups (what process r holds in data-parallel training) into that order. The running statistics
    take the mean of the groups', as in the authors' single-GPU CIFAR demo. Parameters and buffers have BatchNorm2d's
    names and shapes, so checkpoints do not change.
    """

    def __init__(self, num_features: int, groups: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W); in training N must be a multiple of the number of groups."""
        if not self.training or self.groups == 1:
            return super().forward(x)
        n, c, h, w = x.shape
        g = self.groups
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        mean, var = self.running_mean.repeat(g), self.running_var.repeat(g)
        weight, bias = self.weight.repeat(g), self.bias.repeat(g)
        momentum = 0.1 if self.momentum is None else self.momentum
        y = F.batch_norm(x.reshape(n // g, g * c, h, w), mean, var, weight, bias, True, momentum, self.eps)
        with torch.no_grad():
            self.running_mean.copy_(mean.view(g, c).mean(0))
            self.running_var.copy_(var.view(g, c).mean(0))
            self.num_batches_tracked.add_(1)
        return y.view(n, c, h, w)


def use_group_batch_norm(network: nn.Module, groups: int) -> nn.Module:
    """Replace every BatchNorm2d inside ``network`` by a :class:`GroupBatchNorm2d` with the same state; returns it."""
    for name, child in network.named_children():
        if type(child) is nn.BatchNorm2d:
            grouped = GroupBatchNorm2d(child.num_features, groups, child.eps, child.momentum)
            grouped.load_state_dict(child.state_dict())
            setattr(network, name, grouped)
        else:
            use_group_batch_norm(child, groups)
    return network


def interleave(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Reorder a batch of G contiguous groups (N, ...) so that sample i of the result is in group i % G."""
    return x.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1) if groups > 1 else x


def deinterleave(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Undo :func:`interleave`."""
    return x.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1) if groups > 1 else x

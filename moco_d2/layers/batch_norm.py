"""Batch norms with the statistics of a part of a process's batch, or of all processes' batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from moco_d2.layers.distributed import gather, world_size


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that splits a training batch into G contiguous groups and normalises each by its own statistics.

    In one process it computes what G processes with a batch norm each compute. The running statistics are updated with
    the mean over the groups, as in the authors' single-GPU CIFAR demo. Parameters and buffers have BatchNorm2d's names
    and shapes, so checkpoints do not change.

    The groups are normalised one after the other. Folding them into channels would need a single call, but copies every
    feature map in channels_last order and is no faster in the default order.
    """

    def __init__(self, num_features: int, groups: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W).

        Raises:
            ValueError: in training, N is not a multiple of the number of groups.
        """
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"a batch of {len(x)} cannot be split into {self.groups} BN groups of the same size")
        assert self.running_mean is not None and self.running_var is not None
        momentum = _next_momentum(self)
        means, variances = self.running_mean.repeat(self.groups, 1), self.running_var.repeat(self.groups, 1)  # (G, C)
        y = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, momentum, self.eps)
            for part, mean, var in zip(x.chunk(self.groups), means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
        return torch.cat(y)


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


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all processes' batches, whose sizes may differ.

    It computes what torch's SyncBatchNorm computes: every value counts alike, and ``running_var`` is unbiased. On GPUs
    it calls torch's kernels; torch's module refuses CPU tensors, for which this one has its own implementation.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, ...); in training every process must call this."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        momentum = _next_momentum(self)
        if x.is_cuda:
            y: torch.Tensor = TorchSyncBatchNorm.apply(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, momentum, dist.group.WORLD,
                world_size(),
            )  # fmt: skip
            return y
        weight = torch.ones_like(self.running_mean) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        maps = x if x.ndim == 4 else x.flatten(2)[..., None] if x.ndim > 2 else x[..., None, None]  # (N, C, H, W)
        joint = joint_batch_norm(maps, weight, bias, self.eps, x.numel() // x.shape[1])
        unbiased = joint.variance * joint.total / (joint.total - 1).clamp(min=1)
        with torch.no_grad():
            self.running_mean.lerp_(joint.mean, momentum)
            self.running_var.lerp_(unbiased, momentum)
        return joint.y.view_as(x)


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """BatchNorm1d with the statistics of all processes' batches: for heads, (N, C)."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' batches: for feature maps, (N, C, H, W)."""


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
}


def use_sync_batch_norm(network: nn.Module) -> nn.Module:
    """Let each BatchNorm1d and BatchNorm2d inside ``network`` take all processes' statistics, in place; returns it."""
    for module in network.modules():
        # The synchronised class has the same state.
        module.__class__ = _SYNCHRONISED.get(type(module), type(module))
    return network


def _next_momentum(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """Count a batch and return its weight in the running statistics."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    # Without a momentum, batch norm keeps the mean of all batches.
    return 1 / int(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


class Joint(NamedTuple):
    """A batch that was normalised by the statistics of all processes.

    Attributes:
        y: (N, C, H, W), the normalised batch.
        mean: (C,) of all processes, without gradient.
        variance: (C,) of all processes, without Bessel's correction and without gradient.
        total: sum of the processes' counts, without gradient.
    """

    y: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    total: torch.Tensor


def joint_batch_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, count: int) -> Joint:
    """Normalise a batch by the statistics of all processes' batches; every process must call this.

    Each process squares the deviations from its own mean, in float32 or wider; the means and variances are combined
    afterwards. E[x^2] - E[x]^2, in the input's own type, would lose every digit if the mean is large: in bfloat16 it
    can be hundreds, or negative, for a variance of 1.

    Args:
        x: (N, C, H, W); N may be 0.
        weight: (C,) gamma.
        bias: (C,) beta.
        eps: added to the variance.
        count: weight of this process's statistics, such as its number of images; 0 if it has none.
    """
    channels = x.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    values = max(1, x.numel() // channels)
    own_mean = wide.sum((0, 2, 3)) / values  # not mean(), which is NaN for an empty batch
    centred = wide - own_mean.view(1, -1, 1, 1)
    own_variance = centred.square().sum((0, 2, 3)) / values

    row = torch.cat([own_mean, own_variance, own_mean.new_full((1,), count)])
    means, variances, counts = gather(row[None]).split([channels, channels, 1], dim=1)  # R processes: (R, C), (R, 1)
    total = counts.detach().sum()
    shares = counts.detach() / total.clamp(min=1)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)

    scale = weight * torch.rsqrt(variance + eps)
    shift = bias + (own_mean - mean) * scale
    y = (centred * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)
    return Joint(y, mean.detach(), variance.detach(), total)

"""Batch norms with the statistics of a part of a process's batch, or of all processes' batches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm

from moco_d2.layers.distributed import gather, world_size


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that splits a training batch into G contiguous groups and normalises each by its own statistics.

    In one process it computes what G processes with a batch norm each compute. The running statistics are updated with
    the mean over the groups, as in the authors' single-GPU CIFAR demo. Parameters and buffers have BatchNorm2d's names
    and shapes, so checkpoints do not change.
    """

    def __init__(self, num_features: int, groups: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W).

        Raises:
            ValueError: in training, N is not a multiple of the number of groups, or a group has one value per channel.
        """
        if not self.training or self.groups == 1:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"a batch of {len(x)} cannot be split into {self.groups} BN groups of the same size")
        if x.numel() // x.shape[1] <= self.groups:
            raise ValueError(
                f"each of the {self.groups} BN groups of {tuple(x.shape)} has at most one value per channel, which has "
                "no variance: use a larger batch or fewer groups"
            )
        assert self.running_mean is not None and self.running_var is not None
        momentum = _next_momentum(self)
        y: torch.Tensor
        y, statistics = _NormaliseGroups.apply(x, self.weight, self.bias, self.groups, self.eps)
        with torch.no_grad():
            for running, batch in zip((self.running_mean, self.running_var), statistics.mean(1), strict=True):
                running.lerp_(batch, momentum)
        return y


class _NormaliseGroups(torch.autograd.Function):
    """Batch norm of G contiguous groups of a batch (N, C, H, W).

    It returns the normalised batch, and each group's mean and unbiased variance (2, G, C), which have no gradient. Two
    forms compute the same. Without a compiler, torch's kernels normalise a group at a time into its part of one tensor:
    a formula in torch's operations would move about twice as much memory, because each operation reads and writes whole
    feature maps, in half precision as float32. torch.compile fuses such a formula, and its graph is that of plain batch
    norm, where groups would multiply it; left to derive the gradient, it would read the feature maps more often.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        form = _in_one_reduction if torch.compiler.is_compiling() else _group_by_group
        y, mean, inverse_std, statistics = form(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.mark_non_differentiable(statistics)
        ctx.eps = eps
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        form = _gradient_in_one_reduction if torch.compiler.is_compiling() else _gradient_group_by_group
        x, weight, mean, inverse_std = ctx.saved_tensors
        return (*form(grad, x, weight, mean, inverse_std, ctx.eps), None, None)


def _group_by_group(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, ...]:
    order = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    x = x.contiguous(memory_format=order)  # on the CPU, native_batch_norm.out is wrong for any other order
    y = torch.empty_like(x)
    rows = weight.new_zeros(4, groups, len(weight))
    for part, out, mean, inverse_std, *statistics in zip(
        x.chunk(groups), y.chunk(groups), *(row.unbind() for row in rows), strict=True
    ):
        # With a momentum of 1, the running statistics are the batch's.
        torch.ops.aten.native_batch_norm.out(
            part, weight, bias, *statistics, True, 1.0, eps, out=out, save_mean=mean, save_invstd=inverse_std
        )
    return y, rows[0], rows[1], rows[2:]


def _gradient_group_by_group(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, inverse_std: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    parts = [
        torch.ops.aten.native_batch_norm_backward(g, part, weight, None, None, m, i, True, eps, [True] * 3)
        for g, part, m, i in zip(grad.chunk(len(mean)), x.chunk(len(mean)), mean, inverse_std, strict=True)
    ]
    of_x, of_weight, of_bias = zip(*parts, strict=True)
    of_affine = torch.stack(of_weight + of_bias).view(2, *mean.shape).sum(1)
    return torch.cat(of_x), of_affine[0], of_affine[1]


_IN_GROUP = (1, 3, 4)  # of (G, n, C, H, W), the axes that a group's statistics are taken over


def _in_one_reduction(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float
) -> tuple[torch.Tensor, ...]:
    parts = x.unflatten(0, (groups, -1)).to(torch.promote_types(x.dtype, torch.float32))  # (G, n, C, H, W)
    variance, mean = torch.var_mean(parts, _IN_GROUP, correction=0, keepdim=True)  # (G, 1, C, 1, 1)
    inverse_std = torch.rsqrt(variance + eps)
    normalised = ((parts - mean) * inverse_std).flatten(0, 1)
    y = normalised * weight[:, None, None] + bias[:, None, None]  # no view: a ReLU may write into it
    values = x.numel() // (groups * len(weight))  # per channel and group
    statistics = torch.stack([mean, variance * (values / (values - 1))])
    rows = (groups, len(weight))
    # With torch 2.11's compiler, a result that .to() returned unchanged has no gradient.
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y, mean.view(rows), inverse_std.view(rows), statistics.view(2, *rows)


def _gradient_in_one_reduction(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mean: torch.Tensor, inverse_std: torch.Tensor, _: float
) -> tuple[torch.Tensor, ...]:
    groups, channels = mean.shape
    mean, inverse_std = (row.view(groups, 1, channels, 1, 1) for row in (mean, inverse_std))
    grads, parts = (maps.unflatten(0, (groups, -1)).to(mean.dtype) for maps in (grad, x))
    normalised = (parts - mean) * inverse_std
    of_bias = grads.sum(_IN_GROUP, keepdim=True)
    of_weight = (grads * normalised).sum(_IN_GROUP, keepdim=True)
    values = x.numel() // (groups * channels)
    of_parts = (grads - (of_bias + normalised * of_weight) / values) * (inverse_std * weight[:, None, None])
    return of_parts.to(x.dtype).flatten(0, 1), of_weight.sum(0).flatten(), of_bias.sum(0).flatten()


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

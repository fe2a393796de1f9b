"""Detectron2's naiveSyncBN, computed so that it is right in every floating type."""

from __future__ import annotations

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_gather
from torch import nn


class StableSyncBatchNorm(NaiveSyncBatchNorm):
    """Batch norm with the statistics of all processes: Detectron2's definition, by another road.

    Detectron2 takes the variance as E[x^2] - E[x]^2, in the input's own type (but for float16). Where a mean is large
    the difference loses every digit: in bfloat16 it gives hundreds, or less than nothing, where the variance is 1. Here
    each process takes the squares of what is left after its own mean, in float32 at least, and the processes' means
    and variances are put together afterwards.

    As in Detectron2, processes count alike (``naiveSyncBN``) or by their number of images (``naiveSyncBN_N``), and
    ``running_var`` takes the variance without Bessel's correction. A process without images counts as nothing in both.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W); in training every process must call this, whatever its N, 0 included."""
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(x)
        images, channels = x.shape[:2]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        values = max(1, x.numel() // channels)
        own_mean = wide.sum((0, 2, 3)) / values  # a sum, as the mean of nothing is NaN
        centred = wide - own_mean.view(1, -1, 1, 1)
        own_variance = centred.square().sum((0, 2, 3)) / values

        weight = own_mean.new_full((1,), images if self._stats_mode == "N" else min(1, images))
        rows = torch.stack(differentiable_all_gather(torch.cat([own_mean, own_variance, weight])))  # (R, 2 C + 1)
        means, variances, weights = rows.split([channels, channels, 1], dim=1)
        total = weights.detach().sum()
        shares = weights.detach() / total.clamp(min=1)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)

        momentum = total.clamp(max=1) * self.momentum  # where no process has an image, nothing is learnt
        self.running_mean += momentum * (mean.detach() - self.running_mean)
        self.running_var += momentum * (variance.detach() - self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias + (own_mean - mean) * scale
        return (centred * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


def stabilise_sync_norms(model: nn.Module) -> None:
    """Let every naiveSyncBN of a model compute as :class:`StableSyncBatchNorm`, in place.

    Only the class changes: parameters, buffers, hooks and whoever else holds the module are left alone.
    """
    for module in model.modules():
        if type(module) is NaiveSyncBatchNorm:
            module.__class__ = StableSyncBatchNorm

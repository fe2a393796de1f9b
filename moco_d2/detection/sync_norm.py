"""Detectron2's naiveSyncBN with statistics that are right in every floating-point type."""

from __future__ import annotations

import torch
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm
from torch import nn

from moco_d2.layers.batch_norm import joint_batch_norm


class StableSyncBatchNorm(NaiveSyncBatchNorm):
    """Batch norm with the statistics of all processes: Detectron2's definition, computed another way.

    Detectron2 takes the variance as E[x^2] - E[x]^2, which loses its digits where a mean is large; see
    :func:`~moco_d2.layers.batch_norm.joint_batch_norm`.

    As in Detectron2, either all processes count alike (``naiveSyncBN``) or each by its number of images
    (``naiveSyncBN_N``), and ``running_var`` has no Bessel's correction. A process without images does not count.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, H, W); in training every process must call this, even if its N is 0."""
        if comm.get_world_size() == 1 or not self.training:
            return super().forward(x)
        count = len(x) if self._stats_mode == "N" else min(1, len(x))
        joint = joint_batch_norm(x, self.weight, self.bias, self.eps, count)
        momentum = joint.total.clamp(max=1) * self.momentum  # 0 if no process has an image
        self.running_mean += momentum * (joint.mean - self.running_mean)
        self.running_var += momentum * (joint.variance - self.running_var)
        return joint.y


def stabilise_sync_norms(model: nn.Module) -> None:
    """Make every naiveSyncBN of a model a :class:`StableSyncBatchNorm`, in place.

    Only the class changes, so parameters, buffers, hooks and other references to the module stay valid.
    """
    for module in model.modules():
        if type(module) is NaiveSyncBatchNorm:
            module.__class__ = StableSyncBatchNorm

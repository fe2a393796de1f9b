"""End-to-end contrast: MoCo's first rival (He et al., arXiv 1911.05722, section 3.2 and Figure 2a).

Letters: N images per process, R processes, C feature dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.distributed import gather, own_part
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import mlp_head, replace_head, without_head
from moco_d2.layers.losses import contrast_rank, in_batch_nce
from moco_d2.layers.shuffle import BNGroups, encode_shuffled
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, ShuffledMethod, check_ranges, feature_spread, register


@register
class EndToEnd(ShuffledMethod):
    """Contrast within the batch: one encoder for queries and keys, and gradients through both.

    The dictionary is the batch, so the number of negatives is ``SOLVER.IMS_PER_BATCH`` - 1.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 128,
        temperature: float = 0.07,
        mlp: bool = False,
        shuffle: bool = True,
        bn_groups: int = 0,
    ) -> None:
        """Build the encoder.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            temperature: tau > 0 (Eq. 1).
            mlp: use MoCo v2's two-layer head instead of v1's single layer.
            shuffle: shuffling BN for the keys (section 3.3).
            bn_groups: number of groups per process that have batch statistics of their own, as in MoCo.

        Raises:
            ValueError: a value is out of range, or there are BN groups for an encoder without plain batch norm.
        """
        super().__init__()
        check_ranges([
            (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 128)"),
            (temperature > 0, f"temperature is {temperature}; it must be positive (the paper's is 0.07)"),
            (bn_groups >= 0, f"bn_groups is {bn_groups}; it must be positive, or 0 for the paper's 8 in total"),
        ])  # fmt: skip
        self.temperature, self.shuffle = temperature, shuffle
        self.encoder = encoder(num_classes=dim)
        replace_head(self.encoder, mlp_head if mlp else lambda head: head)
        self.groups = BNGroups(self.encoder, bn_groups, shuffle)
        self.dim = dim

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image: the first is the query, the second its key."""
        x_q, x_k = views.images
        if self.training:
            self.check_batch(len(x_q))
        encode = functools.partial(unit_features, self.encoder)
        q = encode(x_q)  # (N, C)
        keys = encode_shuffled(encode, x_k, gather) if self.shuffle else gather(encode(x_k))  # (R * N, C)
        if self.recording:
            self._record(q.detach(), keys.detach())
        return {"loss_contrast": in_batch_nce(q, keys, self.temperature)}

    def backbone(self) -> nn.Module:
        """Return the encoder without its head."""
        return without_head(self.encoder)

    def _record(self, q: torch.Tensor, keys: torch.Tensor) -> None:
        own = own_part(keys)
        self.recorded = {
            "contrast_acc1": (contrast_rank(q, own, keys) <= 1).float().mean(),  # the key itself counts as one
            "positive_similarity": (q * own).sum(dim=1).mean(),
            "batch_similarity": (q.mean(dim=0) * keys.mean(dim=0)).sum(),  # mean over all pairs
            "feature_std": q.std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the accuracy within the batch, the similarities, and the spread of the features."""
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f"),
            Diagnostic("contrast_acc1", "contrast accuracy", "acc@1"),
            Diagnostic("positive_similarity", "cosine similarity", "-positive key"),
            Diagnostic("batch_similarity", "cosine similarity", "-batch"),
            feature_spread(self.dim),
        )

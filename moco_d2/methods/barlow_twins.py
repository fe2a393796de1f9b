"""Barlow Twins (Zbontar et al., arXiv 2103.03230).

Letters: N images per process, R processes, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.distributed import gather
from moco_d2.layers.heads import mlp, replace_head, without_head
from moco_d2.layers.losses import squared_correlations
from moco_d2.layers.spread import feature_std
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register, renamed


@register
class BarlowTwins(SSLMethod):
    """The correlation matrix of two views' features, over the batch, should be the identity.

    Each feature should be the same in both views, and different features should not be correlated.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 8192,
        hidden_dim: int = 8192,
        layers: int = 3,
        redundancy: float = 0.0051,
    ) -> None:
        """Build the encoder and the norm of its features.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            hidden_dim: width of the projector's hidden layers.
            layers: of the projector, 2 or more; the paper has 3.
            redundancy: lambda > 0, weight of the correlations of different features; 0.005 in the paper, 0.0051 in the
                authors' code.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges(
            [
                (dim >= 2, f"dim is {dim}; it must be at least 2 (the paper's is 8192)"),
                (hidden_dim >= 1, f"hidden_dim is {hidden_dim}; it must be at least 1 (the paper's is 8192)"),
                (layers >= 2, f"layers is {layers}; it must be at least 2 (the paper's are 3)"),
                (redundancy > 0, f"redundancy is {redundancy}; it must be positive (the authors' is 0.0051)"),
            ]
        )
        self.dim, self.redundancy = dim, redundancy
        self.encoder = encoder(num_classes=dim)
        sizes = [*[hidden_dim] * (layers - 1), dim]
        replace_head(self.encoder, lambda head: mlp([head.in_features, *sizes], bias=False, last_bias=False))
        self.bn = nn.BatchNorm1d(dim, affine=False)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute both parts of the loss of two views (N, 3, H, W) of each image: Eq. 1 and Algorithm 1."""
        x1, x2 = views.images
        z1, z2 = self.encoder(x1), self.encoder(x2)  # (N, C); a pass for each view: batch statistics are a view's own
        if self.recording:
            self.recorded = {"feature_std": feature_std(z1)}
        with torch.autocast(z1.device.type, enabled=False):
            wide = torch.promote_types(z1.dtype, torch.float32)
            same, different = correlation_losses(self.bn(z1.to(wide)), self.bn(z2.to(wide)))
        return {"loss_invariance": same, "loss_redundancy": self.redundancy * different}

    def backbone(self) -> nn.Module:
        """Return the encoder without its projector."""
        return without_head(self.encoder)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, and the spread of the features, which a collapse brings to 0."""
        return (Diagnostic("total_loss", "loss", "loss", ".2f"), feature_spread(self.dim))

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' training checkpoints: backbone and projector are one network here."""
        return renamed(state, {"backbone.": "encoder.", "projector.": "encoder.fc."})


def correlation_losses(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sum_i (1 - c_ii)^2 and sum_{i != j} c_ij^2, with c = a^T b / (R N) over all processes (Eq. 1 and 2).

    Args:
        a: (N, C) features of one view, each of mean 0 and variance 1 over the batches of all processes.
        b: (N, C) of the other view.
    """
    a, b = gather(a), gather(b)  # (R N, C)
    diagonal = (a * b).mean(dim=0)  # c_ii
    everything = squared_correlations(a, b) / len(a) ** 2
    return (1 - diagonal).square().sum(), everything - diagonal.square().sum()

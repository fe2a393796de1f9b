"""VICReg (Bardes et al., arXiv 2105.04906).

Letters: N images per process, R processes, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import gather
from moco_d2.layers.heads import mlp, replace_head, without_head
from moco_d2.layers.losses import squared_correlations
from moco_d2.layers.spread import feature_std
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register, renamed


@register
class VICReg(SSLMethod):
    """Invariance, variance, covariance: three terms on the features of two views, none of which compares images.

    Both views of an image should be equal, every feature should have a standard deviation of at least 1 over the batch,
    and different features should not vary together.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 8192,
        hidden_dim: int = 8192,
        layers: int = 3,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        """Build the encoder with its expander.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            hidden_dim: width of the expander's hidden layers.
            layers: of the expander, 2 or more; the paper has 3.
            invariance: lambda >= 0, weight of the distance of two views.
            variance: mu >= 0, weight of the features' missing standard deviation.
            covariance: nu >= 0, weight of the covariances.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges(
            [
                (dim >= 2, f"dim is {dim}; it must be at least 2 (the paper's is 8192)"),
                (hidden_dim >= 1, f"hidden_dim is {hidden_dim}; it must be at least 1 (the paper's is 8192)"),
                (layers >= 2, f"layers is {layers}; it must be at least 2 (the paper's are 3)"),
                (invariance >= 0, f"invariance is {invariance}; it must be 0 or more (the paper's is 25)"),
                (variance >= 0, f"variance is {variance}; it must be 0 or more (the paper's is 25)"),
                (covariance >= 0, f"covariance is {covariance}; it must be 0 or more (the paper's is 1)"),
            ]
        )
        self.dim = dim
        self.invariance, self.variance, self.covariance = invariance, variance, covariance
        self.encoder = encoder(num_classes=dim)
        sizes = [*[hidden_dim] * (layers - 1), dim]
        replace_head(self.encoder, lambda head: mlp([head.in_features, *sizes], last_bias=False))

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the three terms of two views (N, 3, H, W) of each image: Eq. 6 and Algorithm 1."""
        z1, z2 = (self.encoder(x) for x in views.images)  # (N, C); a pass for each: batch statistics are a view's own
        if self.recording:
            self.recorded = {"feature_std": feature_std(z1)}
        with torch.autocast(z1.device.type, enabled=False):
            wide = torch.promote_types(z1.dtype, torch.float32)  # variances overflow in float16
            z1, z2 = z1.to(wide), z2.to(wide)
            distance = F.mse_loss(z1, z2)
            z1, z2 = gather(z1), gather(z2)  # (R N, C)
            missing = (missing_std(z1) + missing_std(z2)) / 2
            joint = covariances(z1) + covariances(z2)
        return {
            "loss_invariance": self.invariance * distance,
            "loss_variance": self.variance * missing,
            "loss_covariance": self.covariance * joint,
        }

    def backbone(self) -> nn.Module:
        """Return the encoder without its expander."""
        return without_head(self.encoder)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, and the spread of the features, which a collapse brings to 0."""
        return (Diagnostic("total_loss", "loss", "loss", ".3f"), feature_spread(self.dim))

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' training checkpoints: backbone and expander are one network here."""
        return renamed(state, {"backbone.": "encoder.", "projector.": "encoder.fc."})


def missing_std(z: torch.Tensor) -> torch.Tensor:
    """Return the mean over features of max(0, 1 - std), the variance term of one view (Eq. 1 and 2).

    Args:
        z: (N, C) features.
    """
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def covariances(z: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squared covariances of different features, divided by C (Eq. 3 and 4).

    Args:
        z: (N, C) features.
    """
    centred = z - z.mean(dim=0)
    everything = squared_correlations(centred, centred) / (len(z) - 1) ** 2
    return (everything - z.var(dim=0).square().sum()) / z.shape[1]

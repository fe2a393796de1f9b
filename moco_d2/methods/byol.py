"""BYOL, bootstrap your own latent (Grill et al., arXiv 2006.07733).

Letters: N images per process, C feature dimension, m decay of the target (the paper's tau).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.ema import cosine_momentum, ema_update_
from moco_d2.layers.heads import mlp, replace_head, without_head
from moco_d2.layers.losses import cosine
from moco_d2.layers.spread import feature_std
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register, slow_target


@register
class BYOL(SSLMethod):
    """The online network predicts, from one view, what the target network makes of the other view.

    The target is a moving average of the online network; there are no negatives. What keeps all features from becoming
    one point is the predictor, which only the online network has, together with the target that gets no gradient.
    """

    def __init__(
        self, encoder: Callable[..., nn.Module], dim: int = 256, hidden_dim: int = 4096, momentum: float = 0.99
    ) -> None:
        """Build online network, predictor and target.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a projection and of a prediction.
            hidden_dim: width of the hidden layer in projector and predictor.
            momentum: m in [0, 1] at the beginning, decay of the target; it rises to 1 along a cosine (section 3.2).

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges(
            [
                (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 256)"),
                (hidden_dim >= 1, f"hidden_dim is {hidden_dim}; it must be at least 1 (the paper's is 4096)"),
                (0 <= momentum <= 1, f"momentum is {momentum}; it must be in [0, 1] (the paper's is 0.99 or 0.996)"),
            ]
        )
        self.dim, self.start, self.momentum = dim, momentum, momentum

        def network() -> nn.Module:
            built: nn.Module = encoder(num_classes=dim)
            replace_head(built, lambda head: mlp([head.in_features, hidden_dim, dim], last_bias=False))
            return built

        self.online = network()
        self.predictor = mlp([dim, hidden_dim, dim], last_bias=False)
        self.target = network().requires_grad_(False)  # with random weights of its own, as in the authors' code

    def before_step(self, progress: float, epoch: float) -> None:
        """Set the decay of the target that follows this step."""
        self.momentum = cosine_momentum(self.start, progress)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image: Eq. 2 and its counterpart, summed."""
        x1, x2 = views.images
        z1, z2 = self.online(x1), self.online(x2)  # (N, C); a pass for each view: batch statistics are a view's own
        p1, p2 = self.predictor(z1), self.predictor(z2)
        t1, t2 = self._targets(x1, x2)
        if self.recording:
            self.recorded = {"feature_std": feature_std(z1)}
        return {"loss_prediction": prediction_loss(p1, t2) + prediction_loss(p2, t1)}

    @torch.no_grad()
    def _targets(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.target(x1), self.target(x2)

    def after_step(self) -> None:
        """Move the target (Eq. 3)."""
        ema_update_(self.target, self.online, self.momentum)

    def backbone(self) -> nn.Module:
        """Return the online network without its projector: BYOL transfers f_theta."""
        return without_head(self.online)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, and the spread of the projections, which a collapse brings to 0."""
        return (Diagnostic("total_loss", "loss", "loss", ".4f", 4.0, "unrelated features"), feature_spread(self.dim))

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about a run too short for the target."""
        return slow_target(self.start, steps)


def prediction_loss(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the mean squared distance of normalised predictions and targets, 2 - 2 cos(p, z), in [0, 4] (Eq. 2).

    Args:
        p: (N, C) predictions.
        z: (N, C) targets.
    """
    return 2 - 2 * cosine(p, z)

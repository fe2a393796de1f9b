"""SimSiam (Chen and He, arXiv 2011.10566).

Letters: N images per process, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from moco_d2.layers.heads import head_name, mlp, replace_head, without_head
from moco_d2.layers.losses import cosine
from moco_d2.layers.spread import feature_std
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register, renamed


@register
class SimSiam(SSLMethod):
    """One encoder sees both views; a predictor turns the projection of one view into that of the other.

    There are neither negatives nor a second network. What keeps all features from becoming one point is the predictor,
    together with the gradient that stops at the other view's projection.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 2048,
        hidden_dim: int = 2048,
        layers: int = 3,
        predictor_dim: int = 512,
        constant_predictor_lr: bool = True,
    ) -> None:
        """Build encoder and predictor.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a projection and of a prediction.
            hidden_dim: width of the projector's hidden layers; the authors' code takes the encoder's.
            layers: of the projector, 2 or more; the paper has 3, and 2 on CIFAR-10.
            predictor_dim: width of the predictor's hidden layer, a quarter of ``dim`` in the paper.
            constant_predictor_lr: whether the predictor keeps the initial lr (paper, table 1).

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges(
            [
                (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 2048)"),
                (hidden_dim >= 1, f"hidden_dim is {hidden_dim}; it must be at least 1 (the paper's is 2048)"),
                (layers >= 2, f"layers is {layers}; it must be at least 2 (the paper's are 3, and 2 on CIFAR-10)"),
                (predictor_dim >= 1, f"predictor_dim is {predictor_dim}; it must be at least 1 (the paper's is 512)"),
            ]
        )
        self.dim, self.constant_predictor_lr = dim, constant_predictor_lr
        self.encoder = encoder(num_classes=dim)
        hidden = [hidden_dim] * (layers - 1)
        replace_head(self.encoder, lambda head: mlp([head.in_features, *hidden, dim], bias=False, last_norm="plain"))
        # The norm after it removes this bias; the authors' code has it in checkpoints, and keeps it from training.
        getattr(self.encoder, head_name(self.encoder))[-2].bias.requires_grad_(False)
        self.predictor = mlp([dim, predictor_dim, dim], bias=False)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image: Algorithm 1."""
        x1, x2 = views.images
        z1, z2 = self.encoder(x1), self.encoder(x2)  # (N, C); a pass for each view: batch statistics are a view's own
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.recording:
            self.recorded = {"feature_std": feature_std(z1)}
        return {"loss_similarity": -(cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2}

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the encoder's parameters and the predictor's, whose lr stays constant."""
        return [
            {"params": [p for p in self.encoder.parameters() if p.requires_grad]},
            {"params": self.predictor.parameters(), "constant_lr": self.constant_predictor_lr},
        ]

    def backbone(self) -> nn.Module:
        """Return the encoder without its projector."""
        return without_head(self.encoder)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, and the spread of the projections, which a collapse brings to 0 (paper, figure 2)."""
        return (Diagnostic("total_loss", "loss", "loss", ".4f", -1.0, "equal features"), feature_spread(self.dim))

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' training checkpoints: their names are these, after ``module.``."""
        return renamed(state, {})

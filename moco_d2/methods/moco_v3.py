"""MoCo v3 (Chen et al., arXiv 2104.02057), for ResNets and vision transformers (ViT).

Letters: N images per process, R processes, C feature dimension, m decay of the momentum encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.distributed import all_gather, own_part
from moco_d2.layers.ema import cosine_momentum, ema_update_
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import mlp, replace_head, without_head
from moco_d2.layers.losses import contrast_rank, in_batch_nce
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register, renamed, slow_target


@register
class MoCoV3(SSLMethod):
    """Momentum contrast without a queue: the negatives are the other images' keys in a large batch.

    The base encoder's queries pass a predictor, as in BYOL; the momentum encoder, its moving average, makes the keys.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 256,
        hidden_dim: int = 4096,
        momentum: float = 0.99,
        temperature: float = 1.0,
        projector_layers: int = 2,
        predictor_norm: bool = False,
    ) -> None:
        """Build base encoder, predictor and momentum encoder; the defaults are those of the authors' ResNet-50.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            hidden_dim: width of the hidden layers in projector and predictor.
            momentum: m in [0, 1] at the beginning, decay of the momentum encoder; it rises to 1 along a cosine.
            temperature: tau > 0, 1 for the authors' ResNet-50, 0.2 for their ViTs.
            projector_layers: number of Linear layers in the projector, 2 for the authors' ResNet-50, 3 for their ViTs.
            predictor_norm: end the predictor with a batch norm without gamma and beta, as for the authors' ViTs.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges(
            [
                (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 256)"),
                (hidden_dim >= 1, f"hidden_dim is {hidden_dim}; it must be at least 1 (the paper's is 4096)"),
                (0 <= momentum <= 1, f"momentum is {momentum}; it must be in [0, 1] (the authors' is 0.99 or 0.996)"),
                (temperature > 0, f"temperature is {temperature}; it must be positive (the authors' is 1 for ResNets)"),
                (projector_layers >= 1, f"projector_layers is {projector_layers}; it must be at least 1"),
            ]
        )
        self.dim, self.temperature = dim, temperature
        self.start, self.momentum = momentum, momentum
        self.base_encoder = encoder(num_classes=dim)
        hidden = [hidden_dim] * (projector_layers - 1)
        replace_head(
            self.base_encoder,
            lambda head: mlp([head.in_features, *hidden, dim], bias=False, last_bias=False, last_norm="plain"),
        )
        self.predictor = mlp(
            [dim, hidden_dim, dim], bias=False, last_bias=False, last_norm="plain" if predictor_norm else ""
        )
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)

    def before_step(self, progress: float, epoch: float) -> None:
        """Set the momentum encoder's decay."""
        self.momentum = cosine_momentum(self.start, progress)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image: Algorithm 1, each view a query once."""
        x1, x2 = views.images
        q1, q2 = unit_features(self._query, x1), unit_features(self._query, x2)  # (N, C); a pass for each view
        if self.training:
            ema_update_(self.momentum_encoder, self.base_encoder, self.momentum)
        k1, k2 = self._keys(x1), self._keys(x2)  # (R * N, C)
        if self.recording:
            self._record(q1, k2)
        return {"loss_contrast": contrast(q1, k2, self.temperature) + contrast(q2, k1, self.temperature)}

    def _query(self, x: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.predictor(self.base_encoder(x))
        return predicted

    @torch.no_grad()
    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(unit_features(self.momentum_encoder, x))

    @torch.no_grad()
    def _record(self, q: torch.Tensor, keys: torch.Tensor) -> None:
        # An image's own key is among the keys that count, and is as similar as itself.
        ranks = contrast_rank(q, own_part(keys), keys) - 1
        self.recorded = {"contrast_acc1": (ranks < 1).float().mean(), "feature_std": q.std(dim=0).mean()}

    def backbone(self) -> nn.Module:
        """Return the base encoder without its projector: MoCo transfers the queries' encoder."""
        return without_head(self.base_encoder)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the accuracy against the batch, and the spread of the queries, which a collapse ends."""
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f"),
            Diagnostic("contrast_acc1", "contrast accuracy", "acc@1"),
            feature_spread(self.dim),
        )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about a run too short for the momentum encoder."""
        return slow_target(self.start, steps)

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature, and the paper's remedy for ViTs (section 4.2)."""
        return ["a higher SSL.ARGS.temperature", "for a ViT, SSL.ENCODER.ARGS.freeze_patches True"]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' training checkpoints: their names are these, after ``module.``."""
        return renamed(state, {})


def contrast(q: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return 2 tau times the cross-entropy of each image's own key among all keys (Eq. 1, Algorithm 1).

    With equal similarities it is 2 tau log(R N). The factor makes the gradient's size depend less on tau.

    Args:
        q: (N, C) queries, L2-normalised.
        keys: (R * N, C) keys of all processes, L2-normalised, in the order of the processes.
        temperature: tau > 0.
    """
    return 2 * temperature * in_batch_nce(q, keys, temperature)

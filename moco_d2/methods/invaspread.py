"""InvaSpread (Ye et al., arXiv 1904.03436): invariant and spreading instance features.

Letters: N images per process, R processes, B = R * N, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.distributed import all_gather, rank
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import without_head
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register


@register
class InvaSpread(SSLMethod):
    """Two views of an image should be classified as the same instance, and no view of another image as that one."""

    def __init__(self, encoder: Callable[..., nn.Module], dim: int = 128, temperature: float = 0.1) -> None:
        """Build the encoder.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            temperature: tau > 0.

        Raises:
            ValueError: a value is out of range.
        """
        super().__init__()
        check_ranges([
            (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 128)"),
            (temperature > 0, f"temperature is {temperature}; it must be positive (the paper's is 0.1)"),
        ])  # fmt: skip
        self.temperature, self.dim = temperature, dim
        self.encoder = encoder(num_classes=dim)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image. Both views share a pass."""
        a, b = unit_features(self.encoder, torch.cat(views.images)).chunk(2)  # (N, C) each
        if self.recording:
            self._record(a.detach(), b.detach())
        return {"loss_instance": instance_loss(a, b, self.temperature)}

    def backbone(self) -> nn.Module:
        """Return the encoder without its head."""
        return without_head(self.encoder)

    def _record(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.recorded = {
            "positive_similarity": (a * b).sum(dim=1).mean(),
            "batch_similarity": (a.mean(dim=0) * b.mean(dim=0)).sum(),  # mean over all pairs
            "feature_std": a.std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the similarities within a process's batch, and the spread of the features."""
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f"),
            Diagnostic("positive_similarity", "cosine similarity", "-other view"),
            Diagnostic("batch_similarity", "cosine similarity", "-batch"),
            feature_spread(self.dim),
        )

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature: the gradient is proportional to its inverse."""
        return ["a higher SSL.ARGS.temperature"]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate the published code's state dict to the names used here.

        It calls the head ``linear`` and the shortcut of a block ``shortcut``.
        """
        renamed = {
            key.replace("linear.", "fc.").replace(".shortcut.", ".downsample."): value for key, value in state.items()
        }
        return {
            f"encoder.{key.removeprefix('module.').removeprefix('encoder.')}": value for key, value in renamed.items()
        }


def instance_loss(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """Negative log-likelihood of the binary decisions "same image or not", mean over all views.

    P_ij is the softmax over all other views j of view i. The loss is -log P of its partner, minus the sum of
    log(1 - P_ij) over the other images' views. As in the published code, the softmax is over both views, and only the
    feature i of a pair has a gradient. With equal features it is log(2B - 1) - (2B - 2) log(1 - 1 / (2B - 1)).

    Args:
        a: (N, C) first views of this process's images, L2-normalised.
        b: (N, C) second views.
        temperature: tau > 0.
    """
    with torch.autocast(a.device.type, enabled=False):
        everyone = torch.cat([all_gather(a.detach()), all_gather(b.detach())])  # (2B, C)
        scores = torch.cat([a, b]) @ everyone.T / temperature  # (2N, 2B)
        first = torch.arange(len(a), device=a.device) + len(a) * rank()  # of this process's images, among all
        second = first + len(everyone) // 2
        own, partner = torch.cat([first, second])[:, None], torch.cat([second, first])[:, None]
        log_p = scores.scatter(1, own, -torch.inf).log_softmax(dim=1)
        # P that rounds to 1 would make the loss infinite. The own view's P is 0.
        spread = torch.log1p(-log_p.exp().clamp(max=1 - 1e-7)).scatter(1, partner, 0.0).sum(dim=1)
        return -(log_p.gather(1, partner).squeeze(1) + spread).mean()

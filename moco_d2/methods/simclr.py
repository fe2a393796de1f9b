"""SimCLR v1 (Chen et al., arXiv 2002.05709) and v2 (Chen et al., arXiv 2006.10029).

Letters: N images per process, R processes, B = R * N, D features of the encoder, C feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import gather, rank
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import mlp, replace_head, without_head
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register


@register
class SimCLR(SSLMethod):
    """Contrast within the batch: a view should find the other view of its image among both views of all images.

    v1 and v2 differ in the depth of the head. Both transfer the encoder; :meth:`backbone` says what v2 does besides.
    """

    def __init__(
        self, encoder: Callable[..., nn.Module], dim: int = 128, head_layers: int = 2, temperature: float = 0.1
    ) -> None:
        """Build the encoder and its head: Linear, BN and ReLU, repeated, and at last Linear and BN without beta.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`. The paper's
                has ``norm SyncBN`` and ``zero_init_residual True``.
            dim: C, size of a feature.
            head_layers: number of Linears in the head, at least 1: 2 in v1, 3 in v2. Hidden layers have D features.
            temperature: tau > 0.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges([
            (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 128)"),
            (head_layers >= 1, f"head_layers is {head_layers}; it must be at least 1 (v1: 2, v2: 3)"),
            (temperature > 0, f"temperature is {temperature}; it must be positive (the paper's is 0.1)"),
        ])  # fmt: skip
        self.temperature, self.dim = temperature, dim
        self.encoder = encoder(num_classes=dim)
        replace_head(self.encoder, lambda fc: projection_head(fc.in_features, dim, head_layers))

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image: Algorithm 1. Both views share a pass."""
        a, b = unit_features(self.encoder, torch.cat(views.images)).chunk(2)  # (N, C) each
        if self.recording:
            self._record(a.detach(), b.detach())
        return {"loss_contrast": nt_xent(a, b, self.temperature)}

    def backbone(self) -> nn.Module:
        """Return the encoder without its head, which is what detectors take of v1 and v2.

        v2 fine-tunes *classifiers* from the head's first layer. It is in the checkpoint of the whole method
        (``encoder.fc.0``, ``encoder.fc.1``), but no part of ``backbone.pth`` or of a converted file.
        """
        return without_head(self.encoder)

    def _record(self, a: torch.Tensor, b: torch.Tensor) -> None:
        similarity = a @ b.T  # (N, N), of this process's images
        self.recorded = {
            "contrast_acc1": (similarity.argmax(dim=1) == torch.arange(len(a), device=a.device)).float().mean(),
            "positive_similarity": similarity.diagonal().mean(),
            "batch_similarity": similarity.mean(),
            "feature_std": a.std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, accuracy and similarities within a process's batch, and the spread of the features."""
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f"),
            Diagnostic("contrast_acc1", "contrast accuracy", "acc@1"),
            Diagnostic("positive_similarity", "cosine similarity", "-other view"),
            Diagnostic("batch_similarity", "cosine similarity", "-batch"),
            feature_spread(self.dim),
        )

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature: the gradient is proportional to its inverse."""
        return ["a higher SSL.ARGS.temperature"]


def projection_head(features: int, dim: int, layers: int) -> nn.Sequential:
    """Build the published head from ``features`` to ``dim``: no biases, weights N(0, .01), no beta in the last BN."""
    sizes = [features] * layers + [dim]
    head = mlp(sizes, bias=False, last_bias=False, last_norm="gamma")
    for layer in head:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    return head


def nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent: cross-entropy of a view's partner among both views of all images (Eq. 1).

    As in the published code, it is the sum of the means over the first and the second views, twice the paper's mean
    over all views. With equal features it is 2 log(2B - 1). All features receive a gradient.

    Args:
        a: (N, C) first views of this process's images, L2-normalised.
        b: (N, C) second views.
        temperature: tau > 0.
    """
    with torch.autocast(a.device.type, enabled=False):
        everyone = torch.cat([gather(a), gather(b)])  # (2B, C)
        logits = torch.cat([a, b]) @ everyone.T / temperature  # (2N, 2B)
        first = torch.arange(len(a), device=a.device) + len(a) * rank()  # of this process's images, among all
        second = first + len(everyone) // 2
        logits = logits.scatter(1, torch.cat([first, second])[:, None], -torch.inf)  # not with itself
        return 2 * F.cross_entropy(logits, torch.cat([second, first]))

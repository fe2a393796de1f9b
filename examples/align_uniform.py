#!/usr/bin/env python3
"""A self-supervised method in one file: alignment and uniformity (Wang and Isola, arXiv 2005.10242).

    examples/align_uniform.py --config-file examples/align_uniform.yaml --num-gpus 8 OUTPUT_DIR output/align_uniform

The script is ``moco-d2 pretrain`` with one method more: all its options work, and so do ``--dry-run`` and ``--resume``.
What it writes is converted, fine-tuned and reported by the ordinary commands.

Letters: N images per process, R processes, C feature dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.commands import cli
from moco_d2.commands.pretrain import main
from moco_d2.layers.distributed import gather
from moco_d2.layers.heads import without_head
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, register


@register
class AlignUniform(SSLMethod):
    """The two views of an image should lie close together, and all images spread over the unit sphere."""

    def __init__(
        self, encoder: Callable[..., nn.Module], dim: int = 128, alpha: float = 2.0, t: float = 2.0, weight: float = 1.0
    ) -> None:
        """Build the encoder. The arguments after ``encoder`` are the keys of ``SSL.ARGS``.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; returns a network whose last layer is ``fc``.
            dim: C, size of a feature.
            alpha: power of the distance between two views, > 0.
            t: scale of the Gaussian potential, > 0.
            weight: of the uniformity loss.

        Raises:
            ValueError: a value out of range.
        """
        super().__init__()
        if dim < 2 or alpha <= 0 or t <= 0:
            raise ValueError(f"SSL.ARGS: dim is {dim}, alpha is {alpha}, t is {t}; they must be >= 2, > 0 and > 0")
        self.dim, self.alpha, self.t, self.weight = dim, alpha, t, weight
        self.encoder = encoder(num_classes=dim)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute both losses of two views (N, 3, H, W) of each image."""
        x, y = (F.normalize(self.encoder(view).float(), dim=1) for view in views.images)  # (N, C) each
        spread = (uniformity(gather(x), self.t) + uniformity(gather(y), self.t)) / 2
        if self.recording:
            self.recorded = {"feature_std": x.detach().std(dim=0).mean()}
        return {"loss_align": alignment(x, y, self.alpha), "loss_uniform": self.weight * spread}

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss and how far the features spread; a warning follows if they collapse to a point."""
        even = 1 / math.sqrt(self.dim)
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f"),
            Diagnostic("feature_std", "feature std", "std", ".4f", even, "spread evenly, 1/sqrt(C)", even / 10),
        )

    def backbone(self) -> nn.Module:
        """Return the encoder without its head."""
        return without_head(self.encoder)


def alignment(x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the mean distance of positive pairs (N, C), to the power ``alpha`` (section 4.1)."""
    distances: torch.Tensor = torch.linalg.vector_norm(x - y, dim=1)  # (N,)
    return distances.pow(alpha).mean()


def uniformity(x: torch.Tensor, t: float) -> torch.Tensor:
    """Return the logarithm of the mean Gaussian potential over all pairs of features (R * N, C) (section 4.1)."""
    squared: torch.Tensor = torch.pdist(x).square()  # each pair once
    return torch.logsumexp(-t * squared, dim=0) - math.log(len(squared))


if __name__ == "__main__":
    cli.guard(main)

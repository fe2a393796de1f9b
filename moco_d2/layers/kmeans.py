"""Spherical k-means over the features of all processes (DeepCluster v2, arXiv 2006.09882, appendix).

Letters: N features per process, C feature dimension, K clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moco_d2.layers.distributed import total

_BLOCK = 4096  # number of features whose similarities to all centroids are in memory at a time


@torch.no_grad()
def spherical_kmeans(
    features: torch.Tensor, centroids: torch.Tensor, iterations: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster unit vectors by cosine similarity.

    Each iteration assigns every feature to the centroid with the largest dot product, and then sets each centroid to
    the normalised mean of its features; an empty cluster keeps its centroid. Sums run over all processes, so the result
    does not depend on which process holds which feature.

    Args:
        features: (N, C), L2-normalised; N may differ between processes.
        centroids: (K, C), the first ones, such as random features; the same in all processes.
        iterations: number of updates of the centroids.

    Returns:
        Centroids (K, C), L2-normalised and equal in all processes, and the cluster number of each of this process's
        features, (N,) int64.
    """
    for _ in range(iterations):
        labels = assign(features, centroids)
        sums = total(torch.zeros_like(centroids).index_add_(0, labels, features))  # (K, C)
        counts = total(torch.bincount(labels, minlength=len(centroids)))
        centroids = torch.where((counts > 0)[:, None], F.normalize(sums, dim=1), centroids)
    return centroids, assign(features, centroids)


@torch.no_grad()
def assign(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return, for each of the features (N, C), the number of the centroid (K, C) with the largest dot product: (N,)."""
    blocks = [(block @ centroids.T).argmax(dim=1) for block in features.split(_BLOCK)]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.long, device=features.device)

"""Spherical k-means over the features of all processes (DeepCluster v2, arXiv 2006.09882, appendix).

Letters: N features per process, C feature dimension, K clusters.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moco_d2.layers.distributed import total, world_size

_BLOCK = 4096  # number of features whose similarities to all centroids are held at a time


@torch.no_grad()
def spherical_kmeans(
    features: torch.Tensor, k: int, iterations: int = 10, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster unit vectors by cosine similarity.

    The first centroids are random features of rank 0. Each iteration assigns every feature to the centroid with the
    largest dot product, and then sets each centroid to the normalised mean of its features; an empty cluster keeps its
    centroid. Sums run over all processes, so the result does not depend on which process holds which feature.

    Args:
        features: (N, C), L2-normalised; N may differ between processes.
        k: K >= 1, at most the number of features in rank 0.
        iterations: number of updates of the centroids.
        generator: CPU generator for the choice of the first centroids; only rank 0's is used.

    Returns:
        Centroids (K, C), L2-normalised and equal in all processes, and the cluster number of each of this process's
        features, (N,) int64.

    Raises:
        ValueError: rank 0 has fewer than K features.
    """
    chosen = torch.randperm(len(features), generator=generator)[:k].to(features.device)
    enough = torch.tensor(len(features) >= k, device=features.device).long()
    if world_size() > 1:
        dist.broadcast(enough, src=0)
    if not enough:
        raise ValueError(f"k-means into {k} clusters needs at least {k} features in rank 0, which has fewer")
    centroids = features[chosen] if len(chosen) == k else features.new_zeros(k, features.shape[1])
    if world_size() > 1:
        dist.broadcast(centroids, src=0)
    for _ in range(iterations):
        labels = assign(features, centroids)
        sums = total(torch.zeros_like(centroids).index_add_(0, labels, features))  # (K, C)
        counts = total(torch.bincount(labels, minlength=k))
        centroids = torch.where((counts > 0)[:, None], F.normalize(sums, dim=1), centroids)
    return centroids, assign(features, centroids)


@torch.no_grad()
def assign(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return, for each of the features (N, C), the number of the centroid (K, C) with the largest dot product: (N,)."""
    blocks = [(block @ centroids.T).argmax(dim=1) for block in features.split(_BLOCK)]
    return torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.long, device=features.device)

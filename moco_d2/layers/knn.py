"""Weighted k-nearest-neighbour classification of features, as InstDisc introduced it (Wu et al., CVPR 2018, section 3.4).

Letters: M features in the bank, N queries, C feature dimension, L classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Similarities (N, M) that are held at a time: 64 Mi of them are 256 MB in float32.
_CHUNK = 1 << 26


def knn_scores(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, classes: int, k: int, temperature: float
) -> torch.Tensor:
    """Score every class of each query by its k most similar features, each with the weight exp(similarity / T).

    Bank and queries may be in float16, on the CPU or a GPU; similarities are computed in float32, a part of the queries
    at a time.

    Args:
        queries: (N, C), any length: features are normalised here.
        bank: (M, C).
        labels: (M,) int64, the bank's classes in [0, classes).
        classes: L.
        k: number of neighbours, at least 1; if the bank is smaller, all of it.
        temperature: T > 0; .07 in InstDisc and DINO, .1 in the MoCo authors' CIFAR-10 demo.

    Returns:
        (N, L) float32 sums of weights.

    Raises:
        ValueError: an empty bank, labels that do not fit, or k or T out of range.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and the temperature {temperature}; both must be positive")
    if len(bank) == 0 or len(bank) != len(labels):
        raise ValueError(f"the bank has {len(bank)} features and {len(labels)} labels; it needs one for each, and some")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels lie in [{labels.min()}, {labels.max()}]; with {classes} classes they end at {classes - 1}"
        )
    k = min(k, len(bank))
    keys = F.normalize(bank.float(), dim=1) if bank.dtype == torch.float32 else _normalized(bank)
    rows = max(1, _CHUNK // len(bank))
    scores = [_scores(part, keys, labels, classes, k, temperature) for part in queries.split(rows)]
    return torch.cat(scores) if scores else torch.empty(0, classes, device=queries.device)


def _normalized(bank: torch.Tensor) -> torch.Tensor:
    """Normalise a low-precision bank in its own type: float32 would double its memory."""
    norms = torch.cat([part.float().norm(dim=1) for part in bank.split(1 << 16)])
    return bank / norms.clamp_min(1e-6).to(bank.dtype)[:, None]


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, classes: int, k: int, temperature: float
) -> torch.Tensor:
    q = F.normalize(queries.float(), dim=1)  # (n, C)
    if keys.dtype == torch.float32:
        similar = q @ keys.T  # (n, M)
    else:
        similar = torch.cat([q @ part.float().T for part in keys.split(1 << 16)], dim=1)
    weights, nearest = similar.topk(k, dim=1)  # (n, k)
    scores = torch.zeros(len(q), classes, device=q.device)
    return scores.scatter_add_(1, labels[nearest], (weights / temperature).exp())


def accuracy(scores: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Return the percentage of rows whose class is among the ``top`` highest scores.

    Args:
        scores: (N, L).
        labels: (N,) int64.
        top: 1 or more; more than L counts as L.

    Raises:
        ValueError: there is no row.
    """
    if not len(labels):
        raise ValueError("accuracy of no pictures: the validation set is empty")
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices  # (N, top)
    return 100 * (best == labels[:, None]).any(dim=1).double().mean().item()

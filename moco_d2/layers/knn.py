"""Weighted k-nearest-neighbour classification of features, as in InstDisc (Wu et al., CVPR 2018, section 3.4).

Letters: M features in the bank, N queries, C feature dimension, L classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Similarities are computed for this many queries and features of the bank at a time: 256 MB in float32.
_QUERIES, _FEATURES = 1 << 10, 1 << 16


def nearest(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine similarities (N, k) and the places in the bank (N, k) of each query's nearest features.

    Bank and queries may be in float16; similarities are computed in float32, a block at a time.

    Args:
        queries: (N, C), of any length: features are normalised here.
        bank: (M, C), on the same device.
        k: 1 to M.
    """
    found = [_nearest(F.normalize(part.float(), dim=1), bank, k) for part in queries.split(_QUERIES)]
    return torch.cat([similar for similar, _ in found]), torch.cat([places for _, places in found])


def _nearest(queries: torch.Tensor, bank: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    best, places = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.int64)
    for first in range(0, len(bank), _FEATURES):
        keys = F.normalize(bank[first : first + _FEATURES].float(), dim=1)
        similar, place = (queries @ keys.T).topk(min(k, len(keys)), dim=1)
        best, places = torch.cat([best, similar], dim=1), torch.cat([places, place + first], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        places = places.gather(1, order)
    return best, places


def knn_scores(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, classes: int, ks: Sequence[int], temperature: float
) -> list[torch.Tensor]:
    """Score every class of each query by its k most similar features, each with the weight exp(similarity / T).

    Args:
        queries: (N, C), of any length: features are normalised here.
        bank: (M, C), on the same device.
        labels: (M,) int64, the bank's classes in [0, classes).
        classes: L.
        ks: numbers of neighbours, each at least 1; if the bank is smaller, all of it votes.
        temperature: T > 0; .07 in InstDisc and DINO, .1 in the MoCo authors' CIFAR-10 demo.

    Returns:
        For each k, (N, L) float32 sums of weights.

    Raises:
        ValueError: an empty bank, labels that do not fit, or k or T out of range.
    """
    check_votes(ks, temperature)
    if len(bank) == 0 or len(bank) != len(labels):
        raise ValueError(f"the bank has {len(bank)} features and {len(labels)} labels; it needs one for each, and some")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels lie in [{labels.min()}, {labels.max()}]; with {classes} classes they end at {classes - 1}"
        )
    similar, places = nearest(queries, bank, min(max(ks), len(bank)))
    weights, votes = (similar / temperature).exp(), labels[places]  # (N, k), the nearest first
    empty = weights.new_zeros(len(queries), classes)
    return [empty.scatter_add(1, votes[:, :k], weights[:, :k]) for k in ks]


def check_votes(ks: Sequence[int], temperature: float) -> None:
    """Check numbers of neighbours and a temperature.

    Raises:
        ValueError: one is not positive.
    """
    if not ks or min(ks) < 1 or not 0 < temperature < math.inf:
        raise ValueError(f"k is {', '.join(map(str, ks))} and the temperature {temperature}; both must be positive")


def hits(scores: torch.Tensor, labels: torch.Tensor, top: int = 1) -> int:
    """Return the number of rows whose class is among the ``top`` highest scores.

    Args:
        scores: (N, L).
        labels: (N,) int64.
        top: 1 or more; more than L counts as L.
    """
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices  # (N, top)
    return int((best == labels[:, None]).any(dim=1).sum())


def accuracy(scores: torch.Tensor, labels: torch.Tensor, top: int = 1) -> float:
    """Return :func:`hits` in percent.

    Raises:
        ValueError: there is no row.
    """
    if not len(labels):
        raise ValueError("the accuracy of no pictures was asked for: the validation set is empty")
    return 100 * hits(scores, labels, top) / len(labels)

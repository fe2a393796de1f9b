"""Losses as pure functions.

Letters: N batch, C feature dimension, K number of negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce_logits(q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """Similarities of a query with its positive key (column 0) and with the negatives, divided by the temperature.

    Args:
        q: (N, C) queries, L2-normalised.
        k: (N, C) positive keys, L2-normalised, without gradient.
        negatives: (K, C) keys, L2-normalised, without gradient.
        temperature: tau > 0.

    Returns:
        (N, 1 + K) logits, MoCo Eq. 1.
    """
    positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
    negative = q @ negatives.T  # (N, K)
    return torch.cat([positive, negative], dim=1).div_(temperature)


def info_nce(logits: torch.Tensor) -> torch.Tensor:
    """InfoNCE: cross-entropy with the positive in column 0, mean over the batch (MoCo, Eq. 1).

    With equal logits it is log(1 + K).
    """
    labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, labels)


@torch.no_grad()
def contrast_accuracy(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Share of queries whose positive is among the k largest logits, 0..1.

    A negative that ties with the positive counts against it, so a collapsed encoder scores 0, not 1.
    """
    better = (logits[:, 1:] >= logits[:, :1]).sum(dim=1)  # (N,)
    return (better < k).float().mean()

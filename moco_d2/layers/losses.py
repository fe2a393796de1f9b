"""Loss functions.

Letters: N batch, C feature dimension, K number of negatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Number of negatives in a block: N x 8192 similarities fit into a processor's cache.
BLOCK = 8192


def info_nce(q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE: cross-entropy of the positive among the negatives, mean over the batch (MoCo, Eq. 1).

    With equal similarities the loss is log(1 + K). The N x (1 + K) logit matrix is never materialised. The gradient is
    computed in the forward pass, so the negatives may be overwritten before backward.

    Args:
        q: (N, C) queries, L2-normalised; only they receive a gradient.
        k: (N, C) positive keys, L2-normalised.
        negatives: (K, C) keys, L2-normalised, of any floating-point type; they are cast to the queries' type.
        temperature: tau > 0.
    """
    with torch.autocast(q.device.type, enabled=False):
        loss: torch.Tensor = _InfoNCE.apply(q, k, negatives, temperature)
    return loss


class _InfoNCE(torch.autograd.Function):
    """The loss and its gradient, computed over blocks of negatives.

    With z the logits, the gradient of logsumexp(z) - z_positive with respect to q is (the softmax-weighted mean of all
    keys - the positive key) / temperature. Both logsumexp and weighted mean are accumulated over blocks, relative to
    the largest logit so far, so that nothing overflows.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float) -> Any:
        scaled = q / temperature
        positive = (scaled * k).sum(dim=1)  # (N,)
        largest, total, mean = positive, torch.ones_like(positive), k.to(q.dtype)  # sums: (N,), (N, C)
        for block in negatives.split(BLOCK):
            keys = block.to(q.dtype)
            weights = scaled @ keys.T  # (N, BLOCK)
            before, largest = largest, torch.maximum(largest, weights.amax(dim=1))
            weights.sub_(largest[:, None]).exp_()
            shrink = (before - largest).exp_()
            total = total * shrink + weights.sum(dim=1)
            mean = torch.addmm(mean * shrink[:, None], weights, keys)
        ctx.save_for_backward((mean / total[:, None] - k) / (temperature * len(q)))
        return (largest + total.log() - positive).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


@torch.no_grad()
def contrast_rank(q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """Count, for each query, the negatives that are at least as similar as its positive: (N,), 0 is best.

    Ties count against the positive, so a collapsed encoder shows K, not 0. To make equal vectors tie, the positive is
    rounded to the negatives' type, and similarities within the rounding error of a sum of C products count as equal.
    """
    rounded = k.to(negatives.dtype).to(q.dtype)
    positive = (q * rounded).sum(dim=1, keepdim=True)  # (N, 1)
    least = positive - q.shape[1] * torch.finfo(q.dtype).eps
    rank = torch.zeros(len(q), dtype=torch.long, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for block in negatives.split(BLOCK):
            rank += (q @ block.to(q.dtype).T >= least).sum(dim=1)
    return rank


def cosine(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine of p and z, both (N, C), in float32 or wider."""
    wide = torch.promote_types(p.dtype, torch.float32)
    with torch.autocast(p.device.type, enabled=False):
        return F.cosine_similarity(p.to(wide), z.to(wide), dim=1).mean()


def squared_correlations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the sum of the squares of all entries of a^T b, which is the sum of the entries of (a a^T) * (b b^T).

    The smaller of the two forms is computed: (C, C) or (N, N). A batch of 2048 with 8192 features needs a sixteenth of
    the first form's memory.

    Args:
        a: (N, C).
        b: (N, C); it may be the same tensor.
    """
    if len(a) >= a.shape[1]:
        return (a.T @ b).square().sum()
    left = a @ a.T
    return (left * (left if b is a else b @ b.T)).sum()

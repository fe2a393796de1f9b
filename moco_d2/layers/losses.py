"""Loss functions.

Letters: N batch, C feature dimension, K number of negatives, R processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moco_d2.layers.distributed import rank, total, world_size

# Number of negatives in a block: N x 8192 similarities fit into a processor's cache.
BLOCK = 8192
ROWS = 65536  # rows of a memory bank that are copied at a time: 32 MB of 128 float32


def info_nce(
    q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float, among: bool = False
) -> torch.Tensor:
    """InfoNCE: cross-entropy of the positive among the negatives, mean over the batch (MoCo, Eq. 1).

    With equal similarities the loss is log(1 + K). The N x (1 + K) logit matrix is never materialised. The gradient is
    computed in the forward pass, so the negatives may be overwritten before backward.

    Args:
        q: (N, C) queries, L2-normalised; only they receive a gradient.
        k: (N, C) positive keys, L2-normalised.
        negatives: (K, C) keys, L2-normalised, of any floating-point type; they are cast to the queries' type.
        temperature: tau > 0.
        among: whether the positive keys are among the negatives as well, as in the softmax over all rows of a memory
            bank. They then count once, and with equal similarities the loss is log(K).
    """
    with torch.autocast(q.device.type, enabled=False):
        loss: torch.Tensor = _InfoNCE.apply(q, k, negatives, temperature, among)
    return loss


class _InfoNCE(torch.autograd.Function):
    """The loss and its gradient, computed over blocks of negatives.

    With z the logits, the gradient of logsumexp(z) - z_positive with respect to q is (the softmax-weighted mean of all
    keys - the positive key) / temperature. Both logsumexp and weighted mean are accumulated over blocks, relative to
    the largest logit so far, so that nothing overflows.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float, among: bool
    ) -> Any:
        scaled = q / temperature
        positive = (scaled * k).sum(dim=1)  # (N,)
        largest, total, mean = positive, torch.ones_like(positive), k.to(q.dtype)  # sums: (N,), (N, C)
        if among:
            total, mean = torch.zeros_like(total), torch.zeros_like(mean)
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
        return gradient * grad, None, None, None, None


def in_batch_nce(q: torch.Tensor, keys: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE among the batch: cross-entropy of each query's own key among those of all processes.

    With equal similarities the loss is log(R * N). Queries and keys receive a gradient.

    Args:
        q: (N, C) queries of this process, L2-normalised.
        keys: (R * N, C) keys of all processes, L2-normalised.
        temperature: tau > 0.
    """
    with torch.autocast(q.device.type, enabled=False):
        own = torch.arange(len(q), device=q.device) + len(q) * rank()
        return F.cross_entropy(q @ keys.T / temperature, own)


def nce(
    f: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, normaliser: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Noise-contrastive estimation against rows of a memory bank, mean over the batch (Wu et al., Eq. 7).

    With p = exp(f . row / temperature) / Z and c = K / n, the loss is -log(p / (p + c)) of the positive plus the sum of
    -log(c / (p + c)) over the negatives. If every p is 1 / n, it is log(1 + K) + K log(1 + 1 / K). The published code
    adds 1e-7 to both denominators, and so does this. The gradient is computed in the forward pass, a block of queries
    at a time, so the bank may be changed before backward, and no more than a block of copied rows is in memory.

    Args:
        f: (N, C) features, L2-normalised; only they receive a gradient.
        bank: (n, C) rows of all images.
        index: (N, 1 + K) rows of each feature, its own image's first.
        normaliser: Z, a number.
        temperature: tau > 0.
    """
    with torch.autocast(f.device.type, enabled=False):
        loss: torch.Tensor = _NCE.apply(f, bank, index, normaliser, temperature)
    return loss


@torch.no_grad()
def nce_normaliser(f: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return InstDisc's estimate of Z: n times the mean of exp(score) over a batch of all processes.

    Args: those of :func:`nce`.
    """
    with torch.autocast(f.device.type, enabled=False):
        summed = sum(scores.exp().sum() for _, _, scores in _scored_rows(f, bank, index, temperature))
        return total(torch.as_tensor(summed)) * (len(bank) / (index.numel() * world_size()))


def _scored_rows(
    f: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, temperature: float
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield, a block of M queries at a time, which they are, their rows (M, 1 + K, C) and scores (M, 1 + K)."""
    step = max(1, ROWS // index.shape[1])
    for start in range(0, len(f), step):
        part = slice(start, start + step)
        rows = bank[index[part]].to(f.dtype)
        yield part, rows, (rows @ f[part, :, None]).squeeze(2) / temperature


class _NCE(torch.autograd.Function):
    """The loss and its gradient, computed over blocks of queries."""

    @staticmethod
    def forward(
        ctx: Any, f: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, normaliser: torch.Tensor, temperature: float
    ) -> Any:
        noise, eps = (index.shape[1] - 1) / len(bank), 1e-7
        loss, gradient = f.new_zeros(()), torch.empty_like(f)
        for part, rows, scores in _scored_rows(f, bank, index, temperature):
            p = scores.exp() / normaliser  # (M, 1 + K)
            both = p + noise + eps
            loss -= (p[:, 0] / both[:, 0]).log().sum() + (noise / both[:, 1:]).log().sum()
            slope = p / both  # d loss / d score of a negative
            slope[:, 0] = -(noise + eps) / both[:, 0]  # and of the positive
            gradient[part] = (slope[:, None] @ rows).squeeze(1)
        ctx.save_for_backward(gradient / (temperature * len(f)))
        return loss / len(f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


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

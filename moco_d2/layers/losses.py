"""Loss functions.

Letters: N batch, C feature dimension, K number of negatives or classes, R processes.
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
ROWS, CPU_ROWS = 65536, 16384  # rows of a memory bank that are copied at a time: 32 and 8 MB of 128 float32
WHOLE = 16  # On a CPU, a bank is multiplied as a whole if it has at most 16 times the rows that a query draws.


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
    """Yield, a block of M queries at a time, which they are, their rows (M, 1 + K, C) and scores (M, 1 + K).

    Instead of the copied rows it yields a small bank itself, (n, C). Copied rows are valid until the next block.
    """
    # Not on a GPU: there _weighted_rows would add equal rows in any order.
    cpu = f.device.type == "cpu"
    whole = cpu and len(bank) <= WHOLE * index.shape[1]
    # A block of products with a whole bank takes as much memory as ROWS.
    step = ROWS * f.shape[1] // len(bank) if whole else (CPU_ROWS if cpu else ROWS) // index.shape[1]
    step = max(1, step)
    rows = bank.to(f.dtype) if whole else bank.new_empty(min(step, len(f)) * index.shape[1], f.shape[1])
    for start in range(0, len(f), step):
        part = slice(start, start + step)
        own, drawn = f[part], index[part]
        if whole:
            yield part, rows, (own @ rows.T).gather(1, drawn) / temperature
            continue
        # Into memory that is there already: fresh memory would be paged in for every block.
        torch.index_select(bank, 0, drawn.flatten(), out=(copy := rows[: drawn.numel()]))
        copied = copy.unflatten(0, drawn.shape).to(f.dtype)
        yield part, copied, (copied @ own[:, :, None]).squeeze(2) / temperature


def _weighted_rows(weights: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the sum (M, C) of each query's rows, times weights (M, 1 + K); rows as from :func:`_scored_rows`."""
    if rows.ndim == 3:
        return (weights[:, None] @ rows).squeeze(1)
    return weights.new_zeros(len(weights), len(rows)).scatter_add_(1, index, weights) @ rows


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
            gradient[part] = _weighted_rows(slope, rows, index[part])
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


def cross_view_entropy(targets: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of each large view's targets with the predictions of all other views (SwAV, Eq. 2; DINO, Eq. 3).

    It is the mean over the images and the pairs (a, v) with v != a of ``-sum_k targets_a log softmax(scores_v / T)``.
    With equal scores it is log K.

    Args:
        targets: (A, N, K), distributions of the first A of the V views; they receive no gradient.
        scores: (V, N, K), V at least 2.
        temperature: T > 0.

    Raises:
        ValueError: there is a single view.
    """
    count, views = len(targets), len(scores)
    if views < 2:
        raise ValueError(f"the loss compares views of an image, and there is {views}: choose another DATA.AUGMENTATION")
    with torch.autocast(scores.device.type, enabled=False):
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        log_p = F.log_softmax(wide / temperature, dim=2)
        # A product may add its terms one by one: with N * K of them, DINO's log K was 2 % off in float32.
        block = next((d for d in range(256, 15, -1) if scores.shape[2] % d == 0), scores.shape[2])
        short = (x.reshape(len(x), -1, block) for x in (targets.detach(), log_p))
        pairs = -torch.einsum("ank,vnk->avn", *short).sum(dim=2) / scores.shape[1]
        others = 1 - torch.eye(count, views, dtype=pairs.dtype, device=pairs.device)
        return (pairs * others).sum() / (count * (views - 1))


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

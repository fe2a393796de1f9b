"""Prototypes and the balanced codes of SwAV (Caron et al., arXiv 2006.09882).

Letters: N features per process, B of all processes, C feature dimension, K prototypes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import total, world_size


class Prototypes(nn.Module):
    """K directions to compare features with: a Linear without bias whose rows have norm 1.

    Attributes:
        weight: (K, C) parameter.
    """

    def __init__(self, dim: int, count: int) -> None:
        """Make ``count`` (K) random prototypes of ``dim`` (C) components."""
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach())
        self.normalise_()

    @torch.no_grad()
    def normalise_(self) -> None:
        """Normalise every prototype to norm 1, as SwAV does before each step."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the scores (N, K) of features (N, C)."""
        return F.linear(features, self.weight)


@torch.no_grad()
def sinkhorn(
    scores: torch.Tensor, eps: float = 0.05, iterations: int = 3, *, past: int = 0, weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Return codes that use all prototypes equally, over the features of all processes (SwAV, Eq. 3).

    Q = exp(scores / eps) is scaled alternately so that every prototype has the same total and every feature a total of
    1. Sums run over all processes, so the result does not depend on which process holds which feature. The matrix is
    scaled once, at the end: an iteration finds the factors of its columns and rows by two products with a vector. It is
    computed in float32 or wider, because exp(1 / eps) is large.

    Args:
        scores: (P + N, K), the same P + N in every process.
        eps: smoothness of the codes, > 0.
        iterations: number of scalings, at least 1; fewer than 3 do not converge (SwAV, appendix).
        past: P, the number of rows at the beginning that take part, but need no code.
        weight: a number by which the past rows count; by default they count as the others do.

    Returns:
        (N, K) codes; every row sums to 1.
    """
    with torch.autocast(scores.device.type, enabled=False):
        q = scores.to(torch.promote_types(scores.dtype, torch.float32)) / eps
        largest = q.max()
        if world_size() > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        q.sub_(largest).exp_()  # the first scaling removes this common factor
        counts = torch.ones_like(q[:, 0])
        if weight is not None:
            counts[:past] = weight
        tiny, of_features = torch.finfo(q.dtype).tiny, counts
        for _ in range(iterations):
            # A prototype that is far from all features can underflow to 0 everywhere: it stays unused.
            of_prototypes = 1 / total(of_features @ q).clamp_min(tiny)  # (K,)
            of_features = counts / (q @ of_prototypes).clamp_min(tiny)  # (P + N,)
        return q[past:] * of_prototypes * of_features[past:, None]

"""How features spread over the sphere: std, effective rank, alignment, uniformity. None of them needs labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


@torch.no_grad()
def feature_std(features: torch.Tensor) -> torch.Tensor:
    """Return the std of normalised features over the batch, mean over components (SimSiam, figure 2).

    Args:
        features: (N, C), not normalised.

    Returns:
        A scalar: 0 if all point in one direction, 1 / sqrt(C) if they are spread evenly.
    """
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1).std(dim=0).mean()


def effective_rank(features: torch.Tensor) -> float:
    """Return RankMe (Garrido et al., ICML 2023, Eq. 1): the exponential of the entropy of the singular values.

    Args:
        features: (N, C), not normalised.

    Returns:
        From 1 (all features on a line) to min(N, C).
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + 1e-7
    return float((-(p * p.log()).sum()).exp())


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean squared distance of two views' normalised features (Wang and Isola, ICML 2020, alpha = 2).

    Args:
        first: (N, C) features of one view of each picture.
        second: (N, C) of another.

    Returns:
        From 0 (equal) to 4.
    """
    distance = F.normalize(first.double(), dim=1) - F.normalize(second.double(), dim=1)
    return float(distance.square().sum(dim=1).mean())


def uniformity(features: torch.Tensor) -> float:
    """Return the log of the mean Gaussian potential of all pairs (Wang and Isola, ICML 2020, t = 2); lower is better.

    Args:
        features: (N, C), N at least 2; normalised here.

    Returns:
        0 if all are one point; about -4 for many features spread evenly over a sphere of many dimensions.
    """
    return float(torch.pdist(F.normalize(features.double(), dim=1)).square().mul(-2).exp().mean().log())

"""NCE, Sinkhorn and LARS against plain forms of their equations: ``python -m benchmarks parts``, on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.measure import alternate, compare
from moco_d2.layers import lars, losses
from moco_d2.layers.lars import Lars
from moco_d2.layers.prototypes import sinkhorn

BANKS = (4, 16, 32, 256)  # rows of a bank, in rows that a query draws: 16,384 to 1,048,576
SHAPES = ((8192, 2048), (8192, 8192), (8192, 8192), *[(512, 512, 3, 3)] * 8, *[(2048, 512, 1, 1)] * 4)

Works = dict[str, Callable[[], object]]


def plain_nce(f: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, z: torch.Tensor, t: float) -> None:
    """Do as the published code of InstDisc: copy all drawn rows, and let autograd keep every intermediate result."""
    p = ((bank[index] @ f[:, :, None]).squeeze(2) / t).exp() / z
    noise = (index.shape[1] - 1) / len(bank)
    negatives = (noise / (p[:, 1:] + noise + 1e-7)).log().sum()
    (-((p[:, 0] / (p[:, 0] + noise + 1e-7)).log().sum() + negatives) / len(f)).backward()


def nce_works(times: int, scale: float) -> Works:
    """Return the forms of NCE of 32 queries of 128 numbers that draw 4,096 rows from ``times`` as many."""
    drawn = max(8, round(4096 * scale))
    bank = nn.functional.normalize(torch.randn(times * drawn, 128))
    f = nn.functional.normalize(torch.randn(32, 128)).requires_grad_()
    given = f, bank, torch.randint(len(bank), (32, drawn)), torch.tensor(float(len(bank))), 0.07

    def ours(whole: int, block: int = losses.CPU_ROWS) -> None:
        with patch.object(losses, "WHOLE", whole), patch.object(losses, "CPU_ROWS", block):
            losses.nce(*given).backward()

    return {
        "plain": partial(plain_nce, *given), "drawn rows": partial(ours, 0),
        "drawn rows in a GPU's blocks": partial(ours, 0, losses.ROWS), "whole bank": partial(ours, times),
    }  # fmt: skip


def plain_sinkhorn(scores: torch.Tensor) -> torch.Tensor:
    """Scale the matrix itself, as SwAV's Eq. 3 reads."""
    q = ((scores - scores.max()) / 0.05).exp()
    for _ in range(3):
        q = q / q.sum(dim=0)
        q = q / q.sum(dim=1, keepdim=True)
    return q


def sinkhorn_works(scale: float) -> Works:
    """Return the forms of SwAV's codes of a batch of 32 after a queue of 3,840, for 3,000 prototypes."""
    queue, prototypes = round(3840 * scale), max(8, round(3000 * scale))
    scores = torch.rand(queue + 32, prototypes)
    return {"plain": partial(plain_sinkhorn, scores), "factors": partial(sinkhorn, scores, past=queue)}


def lars_works(scale: float) -> Works:
    """Return a step of SGD, and of LARS in its forms, over 175 M weights: VICReg's head, and convolutions."""
    weights = [nn.Parameter(torch.randn(max(1, round(n * scale)), *rest) / 50) for n, *rest in SHAPES]
    for weight in weights:
        weight.grad = torch.randn_like(weight) / 1000
    settings: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-6, "fused": True}
    one_by_one = Lars(weights, **settings, foreach=False)

    def undivided() -> None:
        with patch.object(lars, "BLOCK", max(weight.numel() for weight in weights)):
            one_by_one.step()

    return {
        "SGD": SGD(weights, **settings).step, "tensor by tensor": one_by_one.step,
        "tensor by tensor, norms undivided": undivided, "together": Lars(weights, **settings, foreach=True).step,
    }  # fmt: skip


def rows(repeats: int, scale: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Return a table a part: median CPU seconds of each form, quartiles, and the ratio to the first form.

    Args:
        repeats: turns of each form.
        scale: of the sizes; 1: those of the papers.
    """
    torch.manual_seed(0)
    works = {f"NCE, a bank of {times} times the rows drawn": partial(nce_works, times, scale) for times in BANKS}
    works |= {"Sinkhorn": partial(sinkhorn_works, scale), "LARS": partial(lars_works, scale)}
    return {title: compare(alternate(made(), repeats, warm_up=1)) for title, made in works.items()}

"""Schedules of pretraining as pure functions: learning rate with warm-up, and weight decay.

Letters: t time, T length of training; both in epochs if ``SOLVER.EPOCHS`` is set, else in iterations.

To add a schedule, put its function and keys into ``SCHEDULES``.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from detectron2.config import CfgNode

# Maps (t, T, SOLVER) to lr / peak lr in [0, 1]. t and T exclude the warm-up, except for ``step``.
Schedule = Callable[[float, float, CfgNode], float]


def cosine(t: float, length: float, solver: CfgNode) -> float:
    """Return end + (1 - end) (1 + cos(pi t / T)) / 2, with end = ``SOLVER.END_FACTOR``."""
    end: float = solver.END_FACTOR
    return end + (1 - end) * (0.5 * (1 + math.cos(math.pi * t / length)))


def step(t: float, length: float, solver: CfgNode) -> float:
    """Return GAMMA ** n, where n is the number of ``SOLVER.STEPS`` that have passed."""
    return float(solver.GAMMA ** bisect.bisect_right(sorted(solver.STEPS), t))


def constant(t: float, length: float, solver: CfgNode) -> float:
    """Return 1."""
    return 1.0


# SOLVER.SCHEDULE -> function, and the keys of SOLVER that it reads.
SCHEDULES: dict[str, tuple[Schedule, tuple[str, ...]]] = {
    "step": (step, ("GAMMA", "STEPS")),
    "cosine": (cosine, ("FIRST_EPOCH", "END_FACTOR")),
    "constant": (constant, ()),
}


def lr_factor(cfg: CfgNode, iteration: int, steps_per_epoch: int) -> float:
    """Return lr / peak lr at an iteration.

    During ``SOLVER.WARMUP`` epochs or iterations the factor rises linearly from ``SOLVER.WARMUP_FROM`` to 1, at every
    iteration. ``SOLVER.SCHEDULE`` runs over the rest. If ``SOLVER.EPOCHS`` is set, the schedule is evaluated once per
    epoch, as in MoCo's code, or at every iteration (``SOLVER.LR_EVERY iteration``), as in the code of most later
    papers. ``step`` counts its ``STEPS`` from the start of training, and ``cosine`` counts epochs from
    ``SOLVER.FIRST_EPOCH``.

    Args:
        cfg: config of a pretraining run.
        iteration: from 0.
        steps_per_epoch: iterations per epoch.
    """
    solver = cfg.SOLVER
    by_epoch = solver.EPOCHS > 0
    now = iteration / steps_per_epoch if by_epoch else iteration
    if now < solver.WARMUP:
        return float(solver.WARMUP_FROM + (1 - solver.WARMUP_FROM) * now / solver.WARMUP)
    time: float = iteration // steps_per_epoch if by_epoch and solver.LR_EVERY == "epoch" else now
    length = solver.EPOCHS if by_epoch else solver.MAX_ITER
    schedule, _ = SCHEDULES[solver.SCHEDULE]
    if solver.SCHEDULE == "step":
        return schedule(time, length, solver)
    first = solver.FIRST_EPOCH if by_epoch and solver.SCHEDULE == "cosine" else 0
    # If the warm-up ends inside an epoch, that epoch began before its end: max() keeps the time from being negative.
    return schedule(max(time - solver.WARMUP, 0) + first, length - solver.WARMUP, solver)


def weight_decay(cfg: CfgNode, progress: float) -> float:
    """Return the weight decay at ``progress``, the fraction of training that is done, in [0, 1].

    It follows a cosine from ``SOLVER.WEIGHT_DECAY`` to ``SOLVER.WEIGHT_DECAY_END`` (DINO). If the end is negative, it
    is constant.
    """
    start, end = cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_END
    if end < 0:
        return float(start)
    return float(end + (start - end) * (0.5 * (1 + math.cos(math.pi * progress))))

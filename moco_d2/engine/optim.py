"""The optimizer and the learning-rate schedules of MoCo's code."""

from __future__ import annotations

import bisect
import functools
import logging
import math
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)


def build_sgd(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """Return SGD over all trainable parameters, weight decay on each (BN and biases too, as published)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(
        parameters,
        lr=scaled_lr(cfg),
        momentum=cfg.SOLVER.MOMENTUM,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        nesterov=cfg.SOLVER.NESTEROV,
        fused=cfg.ENGINE.FUSED_SGD or None,
    )
    # Zeros are where momentum starts in any case. Left to itself, the fused kernel makes room for it in a first step
    # that loss scaling may then skip, and adds what happened to be there.
    for parameter in parameters if cfg.SOLVER.MOMENTUM else ():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.register_load_state_dict_post_hook(functools.partial(_fit_state, fused=cfg.ENGINE.FUSED_SGD or None))
    return optimizer


def _fit_state(optimizer: torch.optim.Optimizer, fused: bool | None) -> None:
    """Give a resumed optimizer this run's switches: kind of kernel, and the memory order of the weights.

    The fused kernel on the CPU pairs elements by their place in memory: momentum saved in another order would be added
    to the wrong weights, without a word.
    """
    for group in optimizer.param_groups:
        group["fused"] = fused
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def trajectory(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings that an update of the weights follows from, by name: a resumed run must have the same.

    Most of them it could not even change: optimizer and scheduler take the checkpoint's.
    """
    keys = ["BASE_LR", "REFERENCE_BATCH", "MOMENTUM", "NESTEROV", "WEIGHT_DECAY", "EPOCHS", "SCHEDULE"]
    keys += ["GAMMA", "STEPS"] if cfg.SOLVER.SCHEDULE == "step" else ["FIRST_EPOCH"]
    return {f"SOLVER.{key}": cfg.SOLVER[key] for key in keys}


def scaled_lr(cfg: CfgNode) -> float:
    """Return ``BASE_LR`` scaled linearly from ``REFERENCE_BATCH`` to ``IMS_PER_BATCH``; 0 for the former: unscaled."""
    reference = cfg.SOLVER.REFERENCE_BATCH
    if reference == 0 or reference == cfg.SOLVER.IMS_PER_BATCH:
        return cfg.SOLVER.BASE_LR
    lr = cfg.SOLVER.BASE_LR * cfg.SOLVER.IMS_PER_BATCH / reference
    logger.info(
        "lr %g = %g * %d / %d: BASE_LR is meant for a batch of %d (SOLVER.REFERENCE_BATCH 0 turns this off)",
        lr, cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH, reference, reference,
    )  # fmt: skip
    return lr


def total_steps(cfg: CfgNode, steps_per_epoch: int) -> int:
    """Return the length of pretraining in iterations."""
    return cfg.SOLVER.EPOCHS * steps_per_epoch or cfg.SOLVER.MAX_ITER


def lr_factor(cfg: CfgNode, iteration: int, steps_per_epoch: int) -> float:
    """Return lr / base lr at an iteration.

    Time runs in epochs if ``SOLVER.EPOCHS`` is set (the lr then changes once an epoch, as in the authors' code), else
    in iterations. ``cosine`` is 0.5 (1 + cos(pi t / T)) with t counted from ``SOLVER.FIRST_EPOCH``; ``step`` multiplies
    by ``GAMMA`` at each of ``STEPS``, counted from 0.
    """
    by_epoch = cfg.SOLVER.EPOCHS > 0
    time = iteration // steps_per_epoch if by_epoch else iteration
    if cfg.SOLVER.SCHEDULE == "step":
        return cfg.SOLVER.GAMMA ** bisect.bisect_right(sorted(cfg.SOLVER.STEPS), time)
    end = cfg.SOLVER.EPOCHS if by_epoch else cfg.SOLVER.MAX_ITER
    return 0.5 * (1 + math.cos(math.pi * (time + (cfg.SOLVER.FIRST_EPOCH if by_epoch else 0)) / end))


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> LambdaLR:
    """Return the per-iteration scheduler of :func:`lr_factor`."""
    return LambdaLR(optimizer, lambda iteration: lr_factor(cfg, iteration, steps_per_epoch))

"""Optimizers of pretraining: their registry, the groups of parameters, gradient clipping, and the scheduler.

To add an optimizer, put an :class:`OptimizerKind` into ``OPTIMIZERS``.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch.optim.lr_scheduler import LambdaLR

from moco_d2.engine.schedules import SCHEDULES, lr_factor, weight_decay
from moco_d2.layers.lars import FORMS, Lars
from moco_d2.methods import SSLMethod

logger = logging.getLogger(__name__)

Groups = list[dict[str, Any]]


class OptimizerKind(NamedTuple):
    """An entry of ``OPTIMIZERS``.

    Attributes:
        build: maps (groups, config) to the optimizer.
        keys: keys of SOLVER that it reads besides the lr and the weight decay; a resumed run must have the same.
    """

    build: Callable[[Groups, CfgNode], torch.optim.Optimizer]
    keys: tuple[str, ...]


def _sgd(groups: Groups, cfg: CfgNode) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    optimizer = torch.optim.SGD(
        groups,
        lr=scaled_lr(cfg),
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        nesterov=solver.NESTEROV,
        fused=cfg.ENGINE.FUSED_SGD or None,
    )
    # Momentum starts at zero. Without this, the fused kernel would allocate it uninitialised in the first step; if loss
    # scaling then skipped that step, the next one would add the uninitialised values.
    for group in optimizer.param_groups if solver.MOMENTUM else ():
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _adamw(groups: Groups, cfg: CfgNode) -> torch.optim.Optimizer:
    fused = cfg.ENGINE.FUSED_SGD or None
    return torch.optim.AdamW(groups, lr=scaled_lr(cfg), weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=fused)


def _lars(form: str, groups: Groups, cfg: CfgNode) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    fused = cfg.ENGINE.FUSED_SGD or None
    return Lars(groups, scaled_lr(cfg), solver.MOMENTUM, solver.WEIGHT_DECAY, solver.TRUST, form, fused)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "sgd": OptimizerKind(_sgd, ("MOMENTUM", "NESTEROV")),
    "adamw": OptimizerKind(_adamw, ()),
    **{form: OptimizerKind(functools.partial(_lars, form), ("MOMENTUM", "TRUST")) for form in FORMS},
}


def build_optimizer(cfg: CfgNode, method: SSLMethod) -> torch.optim.Optimizer:
    """Return the optimizer ``SOLVER.OPTIMIZER`` for a method's groups of parameters."""
    optimizer = OPTIMIZERS[cfg.SOLVER.OPTIMIZER].build(parameter_groups(cfg, method), cfg)
    fused = optimizer.defaults.get("fused")
    optimizer.register_load_state_dict_post_hook(functools.partial(_fit_state, fused=fused))
    return optimizer


def build_clipper(cfg: CfgNode) -> Callable[[torch.nn.Parameter], Any] | None:
    """Return a function that clips one parameter's gradient as ``SOLVER.CLIP_GRADIENTS`` says; None if it is off.

    As in Detectron2 and DINO, each parameter is clipped separately. Detectron2's own clipping is not used, because it
    fails for parameters without a gradient (frozen layers).
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return None
    if clip.CLIP_TYPE == "value":
        return lambda parameter: torch.nn.utils.clip_grad_value_(parameter, clip.CLIP_VALUE)
    return lambda parameter: torch.nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)


def parameter_groups(cfg: CfgNode, method: SSLMethod) -> Groups:
    """Return a method's groups of trainable parameters with their lr and weight decay.

    With ``SOLVER.EXCLUDE_1D`` each group is split in two: one-dimensional parameters (biases, norms) get no weight
    decay and no layer-wise rate (``adapt``), and their lr is multiplied by ``SOLVER.LR_FACTOR_1D``.
    """
    groups: Groups = []
    for given in method.param_groups():
        parameters, lr = list(given["params"]), scaled_lr(cfg, quiet=True) * given.get("lr_factor", 1.0)
        decay = 0.0 if given.get("no_weight_decay") else cfg.SOLVER.WEIGHT_DECAY
        own = {"lr": lr, "weight_decay": decay}
        own |= {"constant_lr": True} if given.get("constant_lr") else {}
        if not cfg.SOLVER.EXCLUDE_1D:
            groups.append({"params": parameters, **own})
            continue
        vectors = {"lr": lr * cfg.SOLVER.LR_FACTOR_1D, "weight_decay": 0.0, "adapt": False}
        groups.append({"params": [p for p in parameters if p.ndim > 1], **own})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], **own, **vectors})
    return [group for group in groups if group["params"]]


def _fit_state(optimizer: torch.optim.Optimizer, fused: bool | None) -> None:
    """Give a resumed optimizer this run's kind of kernel and the memory format of its weights.

    The fused CPU kernel pairs elements by their position in memory: momentum saved in another memory format would
    silently be added to the wrong weights.
    """
    for group in optimizer.param_groups:
        if "fused" in optimizer.defaults:  # LARS of earlier versions saved none
            group["fused"] = fused
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


# Values of these settings in runs of earlier versions, whose checkpoints do not record them.
IMPLIED = {
    "SOLVER.OPTIMIZER": "sgd", "SOLVER.EXCLUDE_1D": False, "SOLVER.WARMUP": 0.0, "SOLVER.LR_EVERY": "epoch",
    "SOLVER.LR_RULE": "linear", "SOLVER.WEIGHT_DECAY_END": -1.0, "SOLVER.END_FACTOR": 0.0,
    "SOLVER.CLIP_GRADIENTS.ENABLED": False,
}  # fmt: skip


def trajectory(cfg: CfgNode) -> dict[str, Any]:
    """Return, by name, the settings that determine the updates of the weights; a resumed run must have the same.

    It could not change most of them anyway, because optimizer and scheduler restore the checkpoint's.
    """
    solver = cfg.SOLVER
    keys = ["BASE_LR", "REFERENCE_BATCH", "WEIGHT_DECAY", "EPOCHS", "SCHEDULE", "OPTIMIZER", "EXCLUDE_1D", "WARMUP"]
    keys += ["LR_RULE", "WEIGHT_DECAY_END", "CLIP_GRADIENTS.ENABLED", *OPTIMIZERS[solver.OPTIMIZER].keys]
    keys += SCHEDULES[solver.SCHEDULE][1]
    keys += ["LR_EVERY"] if solver.EPOCHS else []
    keys += ["LR_FACTOR_1D"] if solver.EXCLUDE_1D else []
    keys += ["WARMUP_FROM"] if solver.WARMUP else []
    if solver.CLIP_GRADIENTS.ENABLED:
        keys += [f"CLIP_GRADIENTS.{key}" for key in ("CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE")]
    values = {key: functools.reduce(lambda node, name: node[name], key.split("."), solver) for key in keys}
    return {f"SOLVER.{key}": value for key, value in values.items()}


def scaled_lr(cfg: CfgNode, quiet: bool = False) -> float:
    """Return the peak lr: ``BASE_LR`` scaled from ``REFERENCE_BATCH`` to ``IMS_PER_BATCH``.

    ``SOLVER.LR_RULE`` is ``linear`` or ``sqrt`` (the square root of the ratio, SimCLR's alternative). A reference of 0
    turns scaling off. ``quiet`` suppresses the log line.
    """
    solver = cfg.SOLVER
    if solver.REFERENCE_BATCH == 0 or solver.REFERENCE_BATCH == solver.IMS_PER_BATCH:
        return float(solver.BASE_LR)
    ratio = solver.IMS_PER_BATCH / solver.REFERENCE_BATCH
    lr = solver.BASE_LR * (math.sqrt(ratio) if solver.LR_RULE == "sqrt" else ratio)
    if not quiet:
        logger.info(
            "the lr is %g: SOLVER.BASE_LR %g is for a batch of %d, and the batch is %d (%s rule; "
            "SOLVER.REFERENCE_BATCH 0 turns this off)",
            lr, solver.BASE_LR, solver.REFERENCE_BATCH, solver.IMS_PER_BATCH, solver.LR_RULE,
        )  # fmt: skip
    return float(lr)


def total_steps(cfg: CfgNode, steps_per_epoch: int) -> int:
    """Return the length of pretraining in iterations."""
    return int(cfg.SOLVER.EPOCHS * steps_per_epoch or cfg.SOLVER.MAX_ITER)


class ScheduledOptimizer(LambdaLR):
    """Per-iteration scheduler of each group's lr (:func:`lr_factor`) and weight decay (:func:`weight_decay`).

    The lr of a group with ``constant_lr`` stays as it is, and so does a weight decay of 0.
    """

    def __init__(self, cfg: CfgNode, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> None:
        self.cfg, self.length = cfg, total_steps(cfg, steps_per_epoch)

        def factor(iteration: int) -> float:
            return lr_factor(cfg, iteration, steps_per_epoch)

        constant = [group.get("constant_lr", False) for group in optimizer.param_groups]
        super().__init__(optimizer, [(lambda _: 1.0) if held else factor for held in constant])

    def step(self, epoch: int | None = None) -> None:
        """Advance to the next iteration."""
        super().step(epoch)
        if self.cfg.SOLVER.WEIGHT_DECAY_END >= 0:
            decay = weight_decay(self.cfg, min(1.0, self.last_epoch / self.length))
            for group in self._decayed():
                group["weight_decay"] = decay

    def _decayed(self) -> Iterator[dict[str, Any]]:
        yield from (group for group in self.optimizer.param_groups if group["weight_decay"] > 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule, without the config."""
        return {key: value for key, value in super().state_dict().items() if key not in ("cfg", "length")}

"""Preflight checks for pretraining: all settings, with all mistakes reported at once."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from detectron2.config import CfgNode

from moco_d2.config import flat, get_cfg, mistyped_keys, unread_keys
from moco_d2.config.roles import PRETRAINING
from moco_d2.config.values import fits, wrong_type
from moco_d2.data import AUGMENTATIONS, BACKENDS, build_augmentation
from moco_d2.engine.build import outline
from moco_d2.engine.monitor import monitor_problems
from moco_d2.engine.optim import OPTIMIZERS
from moco_d2.engine.schedules import SCHEDULES
from moco_d2.engine.step import AUTOCAST
from moco_d2.layers.encoders import ENCODERS, encoder_args
from moco_d2.messages import unknown_name
from moco_d2.methods import METHODS, default_args, method_class
from moco_d2.running.compilation import compile_problem
from moco_d2.running.precision import TF32
from moco_d2.running.workers import AUTO
from moco_d2.signature import types


def check_config(cfg: CfgNode, world_size: int) -> None:
    """Check type, range and consistency of every key that pretraining reads, and that no other key is set.

    Args:
        cfg: config of a pretraining run.
        world_size: number of processes.

    Raises:
        ValueError: something is wrong; the message has a line for each problem.
    """
    if problems := config_problems(cfg, world_size):
        raise ValueError("\n".join(problems))


def config_problems(cfg: CfgNode, world_size: int) -> list[str]:
    """Return the problems that :func:`check_config` raises."""
    mistyped = mistyped_keys(cfg, PRETRAINING)
    cfg = cfg.clone()
    cfg.defrost()
    for key in mistyped:  # A wrong type cannot be compared: use the default, and drop its complaints below.
        *groups, name = key.split(".")
        functools.reduce(operator.getitem, groups, cfg)[name] = flat(get_cfg())[key]
    found = [*_ssl_problems(cfg, world_size), *_data_problems(cfg), *_solver_problems(cfg, world_size)]
    found += [*monitor_problems(cfg), *_engine_problems(cfg), *unread_keys(cfg, PRETRAINING)]
    return [*mistyped.values(), *(text for text in found if not any(key in text for key in mistyped))]


def _ssl_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    ssl = cfg.SSL
    problems = list(
        itertools.chain(
            _unknown("SSL.METHOD", ssl.METHOD, METHODS),
            _unknown("SSL.ENCODER.NAME", ssl.ENCODER.NAME, ENCODERS),
            _encoder_problems(ssl.ENCODER) if ssl.ENCODER.NAME in ENCODERS else (),
            _method_problems(ssl) if ssl.METHOD in METHODS else (),
        )
    )
    yield from problems
    if problems:
        return
    try:  # The constructors know the ranges.
        method = outline(cfg)
        ENCODERS[ssl.ENCODER.NAME].describe(method.backbone())  # as every checkpoint does
    except ValueError as error:
        yield str(error)
        return
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch <= 0 or batch % world_size:
        return
    try:
        method.check_batch(batch // world_size)
    except ValueError as error:
        yield f"SOLVER.IMS_PER_BATCH is {batch}: {error}"


def _method_problems(ssl: CfgNode) -> Iterator[str]:
    return _argument_problems("SSL.ARGS", ssl.ARGS, method_class(ssl.METHOD), default_args(ssl.METHOD))


def _encoder_problems(encoder: CfgNode) -> Iterator[str]:
    build = ENCODERS[encoder.NAME].build
    return _argument_problems("SSL.ENCODER.ARGS", encoder.ARGS, build, encoder_args(encoder.NAME))


def _argument_problems(
    group: str, args: Mapping[str, Any], function: Callable[..., Any], accepted: Mapping[str, Any]
) -> Iterator[str]:
    """Yield messages about arguments that a function does not have, or that are of another type than it states."""
    annotations = types(function)
    for key, value in args.items():
        if key not in accepted:
            yield unknown_name(f"an argument in {group}", key, accepted)
        elif not fits(value, wanted := annotations[key]):
            if get_origin(wanted) is Literal:
                yield unknown_name(f"{group}.{key}", value, get_args(wanted))
            elif accepted[key] is None:
                yield f"{group}.{key} is {value!r}; it must be {inspect.formatannotation(wanted)}"
            else:
                yield wrong_type(f"{group}.{key}", value, accepted[key])


def _data_problems(cfg: CfgNode) -> Iterator[str]:
    yield from _unknown("DATA.AUGMENTATION", cfg.DATA.AUGMENTATION, AUGMENTATIONS)
    yield from _unknown("DATA.BACKEND", cfg.DATA.BACKEND, ("auto", *BACKENDS))
    if cfg.DATA.CROP_SIZE < 1:
        yield f"DATA.CROP_SIZE is {cfg.DATA.CROP_SIZE}; it must be positive"
    elif cfg.DATA.AUGMENTATION in AUGMENTATIONS:
        try:  # The records know the ranges.
            build_augmentation(cfg.DATA.AUGMENTATION, cfg.DATA.CROP_SIZE)
        except ValueError as error:
            yield f"DATA.AUGMENTATION {cfg.DATA.AUGMENTATION}: {error}"
    if cfg.DATALOADER.NUM_WORKERS < AUTO:
        rule = f"{AUTO} (as many as the cores allow), 0 (no worker processes) or more"
        yield f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}; it must be {rule}"
    batch = cfg.SOLVER.IMS_PER_BATCH
    rules = [
        ("MAX_SKIPPED", 0 <= cfg.DATA.MAX_SKIPPED <= 1, "a fraction of the images, in [0, 1]"),
        ("MAX_PIXELS", cfg.DATA.MAX_PIXELS > 0, "positive"),
        ("DRY_RUN_PICTURES", cfg.DATA.DRY_RUN_PICTURES >= 0, "positive, or 0 for all"),
        ("SHUFFLE_SHARDS", cfg.DATA.SHUFFLE_SHARDS >= 0, "positive, or 0 for all"),
        (
            "LANES",
            cfg.DATA.LANES >= 0 and not batch % max(1, cfg.DATA.LANES),
            f"0 or a divisor of SOLVER.IMS_PER_BATCH, {batch}",
        ),
        ("CACHE_GB", cfg.DATA.CACHE_GB > 0, "positive"),
        ("CACHE_FOLDER", _is_writable(cfg.DATA.CACHE_FOLDER), "a writable folder"),
    ]
    yield from (f"DATA.{key} is {cfg.DATA[key]!r}; it must be {rule}" for key, holds, rule in rules if not holds)


def _is_writable(folder: str) -> bool:
    """Tell whether files can be created in a folder, which need not exist yet; empty stands for the default folder."""
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    return not folder or (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK))


def _solver_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    solver = cfg.SOLVER
    yield from _unknown("SOLVER.SCHEDULE", solver.SCHEDULE, SCHEDULES)
    yield from _optimizer_problems(solver)
    if solver.IMS_PER_BATCH <= 0 or solver.IMS_PER_BATCH % world_size:
        yield (
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}; it must be a positive multiple of the number of "
            f"processes, {world_size}"
        )
    rules = [
        ("BASE_LR", solver.BASE_LR > 0, "positive"),
        ("MOMENTUM", 0 <= solver.MOMENTUM < 1, "in [0, 1)"),
        ("NESTEROV", solver.MOMENTUM > 0 or not solver.NESTEROV, "False if SOLVER.MOMENTUM is 0"),
        ("WEIGHT_DECAY", solver.WEIGHT_DECAY >= 0, "0 or more"),
        ("GAMMA", 0 < solver.GAMMA <= 1, "in (0, 1]"),
        ("REFERENCE_BATCH", solver.REFERENCE_BATCH >= 0, "positive, or 0 to turn scaling off"),
        ("CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD > 0, "positive"),
        ("CHECKPOINT_KEEP", solver.CHECKPOINT_KEEP >= 0, "positive, or 0 to keep all"),
        (
            "CHECKPOINT_KEEP_EVERY",
            solver.CHECKPOINT_KEEP_EVERY >= 0 and not solver.CHECKPOINT_KEEP_EVERY % max(1, solver.CHECKPOINT_PERIOD),
            "0 or a multiple of SOLVER.CHECKPOINT_PERIOD",
        ),
        ("EPOCHS", solver.EPOCHS >= 0, "positive, or 0 to count iterations"),
        ("FIRST_EPOCH", 0 <= solver.FIRST_EPOCH <= 1, "0 (MoCo on ImageNet) or 1 (its CIFAR demo)"),
    ]
    yield from (f"SOLVER.{key} is {solver[key]}; it must be {rule}" for key, holds, rule in rules if not holds)
    if not 0 <= cfg.SEED < 2**64:
        yield f"SEED is {cfg.SEED}; it must be in [0, 2**64) (the commands draw a seed for -1)"
    yield from _length_problems(solver)


def _optimizer_problems(solver: CfgNode) -> Iterator[str]:
    yield from _unknown("SOLVER.OPTIMIZER", solver.OPTIMIZER, OPTIMIZERS)
    yield from _unknown("SOLVER.LR_EVERY", solver.LR_EVERY, ("epoch", "iteration"))
    yield from _unknown("SOLVER.LR_RULE", solver.LR_RULE, ("linear", "sqrt"))
    if solver.CLIP_GRADIENTS.ENABLED:
        yield from _unknown("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", solver.CLIP_GRADIENTS.CLIP_TYPE, ("value", "norm"))
    length = solver.EPOCHS or solver.MAX_ITER
    rules = [
        ("TRUST", solver.TRUST > 0, "positive"),
        ("LR_FACTOR_1D", solver.LR_FACTOR_1D >= 0, "0 or more"),
        ("LR_FACTOR_1D", solver.EXCLUDE_1D or solver.LR_FACTOR_1D == 1, "1 if SOLVER.EXCLUDE_1D is False"),
        ("WARMUP", solver.WARMUP == 0 or 0 < solver.WARMUP < length, "0, or positive and shorter than training"),
        ("WARMUP_FROM", 0 <= solver.WARMUP_FROM <= 1, "a fraction of the peak lr, in [0, 1]"),
        ("END_FACTOR", 0 <= solver.END_FACTOR <= 1, "a fraction of the peak lr, in [0, 1]"),
        (
            "WEIGHT_DECAY_END",
            solver.WEIGHT_DECAY_END < 0 or solver.WEIGHT_DECAY > 0,
            "negative (off) if SOLVER.WEIGHT_DECAY is 0",
        ),
    ]
    yield from (f"SOLVER.{key} is {solver[key]}; it must be {rule}" for key, holds, rule in rules if not holds)


def _engine_problems(cfg: CfgNode) -> Iterator[str]:
    yield from _unknown("ENGINE.AUTOCAST", cfg.ENGINE.AUTOCAST, ("", "auto", *AUTOCAST))
    if problem := compile_problem(cfg):
        yield problem
    yield from _unknown("ENGINE.TF32", cfg.ENGINE.TF32, ("", *TF32))
    cuda = cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available()
    if cuda and cfg.ENGINE.AUTOCAST == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "ENGINE.AUTOCAST is 'bfloat16', which this GPU does not support: set it to float16 or auto"


def _length_problems(solver: CfgNode) -> Iterator[str]:
    unit, length = ("epochs", solver.EPOCHS) if solver.EPOCHS else ("iterations", solver.MAX_ITER)
    if solver.EPOCHS == 0 and solver.MAX_ITER <= 0:
        yield f"SOLVER.EPOCHS is 0 and SOLVER.MAX_ITER {solver.MAX_ITER}; one of them must be positive"
    elif solver.EPOCHS and solver.MAX_ITER != get_cfg().SOLVER.MAX_ITER:
        yield (
            f"SOLVER.MAX_ITER is {solver.MAX_ITER} and SOLVER.EPOCHS {solver.EPOCHS}, but only one of them can set the "
            "length: to train for MAX_ITER iterations, set SOLVER.EPOCHS 0"
        )
    elif solver.SCHEDULE == "step":
        steps = list(solver.STEPS)
        if steps != sorted(set(steps)) or not all(0 < step < length for step in steps):
            yield f"SOLVER.STEPS is {tuple(steps)}; the steps must increase and lie within the {length} {unit}"


def _unknown(key: str, value: Any, choices: Iterable[str]) -> Iterator[str]:
    """Yield an error if a name is not one of the choices."""
    known = list(choices)
    if value not in known:
        yield unknown_name(key, value, known)

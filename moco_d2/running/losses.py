"""Losses that stay on the device until those of several steps are read at once.

Reading a loss makes the host wait for the device, which then waits for the host.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

LOG_PERIOD = 20  # steps between two readings, and between two lines of the log

# Steps whose losses are not read yet: (iteration, {name of the loss: scalar on the device}).
Unread = list[tuple[int, dict[str, torch.Tensor]]]


def record_losses(steps: Unread) -> None:
    """Record losses, each averaged over processes, under their own iterations, and empty the list.

    Every process must call this with the same iterations, also before a checkpoint is written: then no checkpoint
    follows a step whose loss was not finite. The values are those that Detectron2's ``SimpleTrainer`` records.

    Raises:
        FloatingPointError: a loss of any process is not finite; raised in all processes, with the iteration.
    """
    everyone = comm.all_gather(_read(steps))
    storage = get_event_storage()
    for (iteration, own), *others in zip(steps, *everyone, strict=True):
        means = {name: float(np.mean([other[name] for other in others])) for name in own}
        total = sum(means.values())
        if not np.isfinite(total):
            raise FloatingPointError(f"Loss became infinite or NaN at iteration={iteration}!\nloss_dict = {means}")
        storage.put_scalar("total_loss", total, cur_iter=iteration)
        if len(means) > 1:
            storage.put_scalars(cur_iter=iteration, **means)
    steps.clear()


def _read(steps: Unread) -> list[dict[str, float]]:
    """Return this process's losses of each step, waiting for the device once."""
    losses = [loss for _, losses in steps for loss in losses.values()]
    values = iter(torch.stack(losses).tolist() if losses else [])
    return [dict(zip(losses, itertools.islice(values, len(losses)), strict=True)) for _, losses in steps]

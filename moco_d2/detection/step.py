"""Training steps with gradient accumulation, or under bfloat16 autocast."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class AccumulatingTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with several batches a step, and optional autocast.

    The gradient of a step is the mean of its batches' gradients. For losses that are means over images (as Detectron2's
    are, up to the numbers of sampled regions) it is the gradient of the whole batch.
    """

    def __init__(
        self, model: nn.Module, data_loader: Any, optimizer: torch.optim.Optimizer, batches: int, autocast: str
    ) -> None:
        """Set up.

        Args:
            model: the detector, or its DDP wrapper.
            data_loader: yields the batches.
            optimizer: the model's.
            batches: number of batches in a step.
            autocast: ``bfloat16``, or empty for float32.
        """
        super().__init__(model, data_loader, optimizer)
        self.batches, self.autocast = batches, autocast

    def run_step(self) -> None:
        """Accumulate the gradients of ``batches`` batches, record the mean losses, and step."""
        assert self.model.training
        self.optimizer.zero_grad()
        means: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(()))
        data_time = 0.0
        for index in range(self.batches):
            start = time.perf_counter()
            data = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            with self._without_sync(last=index == self.batches - 1):
                losses = self._losses(data)
                (sum(losses.values()) / self.batches).backward()  # type: ignore[union-attr]
            for name, loss in losses.items():
                means[name] = means[name] + loss.detach().cpu() / self.batches
        self.after_backward()
        self._write_metrics(means, data_time)
        self.optimizer.step()

    def _losses(self, data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=bool(self.autocast)):
            losses: dict[str, torch.Tensor] = self.model(data)
        return losses

    def _without_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        # DDP sums gradients over processes at every backward pass; the last one is enough.
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()


def build_step(cfg: CfgNode, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer) -> SimpleTrainer:
    """Return the trainer of single steps for a config: Detectron2's own, unless an option needs ours."""
    if cfg.SOLVER.AMP.ENABLED:
        return AMPTrainer(model, loader, optimizer)
    if cfg.SOLVER.ACCUMULATE > 1 or cfg.ENGINE.AUTOCAST:
        return AccumulatingTrainer(model, loader, optimizer, cfg.SOLVER.ACCUMULATE, cfg.ENGINE.AUTOCAST)
    return SimpleTrainer(model, loader, optimizer)

"""Training steps of detectors: Detectron2's, and one with gradient accumulation or under bfloat16 autocast."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moco_d2.running.losses import LOG_PERIOD, Unread, record_losses


class PlainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer``, which reads the losses of :data:`LOG_PERIOD` steps at once.

    Attributes:
        max_iter: total number of steps; the losses are also read after the last one.
    """

    max_iter = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Set up as Detectron2's."""
        super().__init__(*args, **kwargs)
        self._unread: Unread = []
        self._waits: list[float] = []

    def _write_metrics(
        self, loss_dict: Mapping[str, torch.Tensor], data_time: float, prefix: str = "", iter: int | None = None
    ) -> None:
        """Keep the losses of a step (Detectron2 reads them here), and record them if they are due."""
        get_event_storage().put_scalar("rank_data_time", data_time)
        self._unread.append((self.iter, {name: loss.detach() for name, loss in loss_dict.items()}))
        self._waits.append(data_time)
        if (self.iter + 1) % LOG_PERIOD == 0 or self.iter + 1 == self.max_iter:
            self.flush()

    def flush(self) -> None:
        """Record what :func:`record_losses` does, and the longest wait for data of any process, of each unread step.

        Raises:
            FloatingPointError: a loss of any process is not finite.
        """
        waits = comm.all_gather(self._waits)
        for (iteration, _), *each in zip(self._unread, *waits, strict=True):
            get_event_storage().put_scalar("data_time", max(each), cur_iter=iteration)
        self._waits.clear()
        record_losses(self._unread)


class HalfStep(PlainStep, AMPTrainer):
    """Detectron2's ``AMPTrainer``, float16 with loss scaling, which reads losses as :class:`PlainStep` does."""


class AccumulatingTrainer(PlainStep):
    """:class:`PlainStep` with several batches a step, and optional autocast.

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
                means[name] = means[name] + loss.detach() / self.batches
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


def build_step(cfg: CfgNode, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer) -> PlainStep:
    """Return the trainer of single steps for a config: Detectron2's own step, unless an option needs ours."""
    step: PlainStep
    if cfg.SOLVER.AMP.ENABLED:
        step = HalfStep(model, loader, optimizer)
    elif cfg.SOLVER.ACCUMULATE > 1 or cfg.ENGINE.AUTOCAST:
        step = AccumulatingTrainer(model, loader, optimizer, cfg.SOLVER.ACCUMULATE, cfg.ENGINE.AUTOCAST)
    else:
        step = PlainStep(model, loader, optimizer)
    step.max_iter = cfg.SOLVER.MAX_ITER
    return step

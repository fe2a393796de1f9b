"""Online monitor of pretraining: what the backbone has learned, measured on labelled pictures while it trains.

A probe takes the backbone's features of two labelled sets and computes the kNN accuracy on the held-out one, with
RankMe, alignment and uniformity beside it. The backbone is in evaluation mode meanwhile, so its batch norms use their
running statistics: those of process 0, as in the checkpoints. Training is the same to the bit with and without it.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn

from moco_d2.data import build_augmentation
from moco_d2.data.labelled import LabelledSet, open_pair
from moco_d2.data.labelled_loader import LabelledLoader
from moco_d2.data.view_pairs import view_pairs
from moco_d2.io.pictures import describe
from moco_d2.layers.distributed import gather_rows, rank, share, total, world_size
from moco_d2.layers.features import extract
from moco_d2.layers.knn import hits, knn_scores
from moco_d2.layers.spread import alignment, effective_rank, uniformity
from moco_d2.methods import Diagnostic, SSLMethod
from moco_d2.running.picture_check import evenly
from moco_d2.running.workers import worker_count

logger = logging.getLogger(__name__)

# What a probe records, and how it is drawn.
DIAGNOSTICS = (
    Diagnostic("monitor/knn_top1", "kNN top-1 of held-out pictures, %", "kNN", ".1f"),
    Diagnostic("monitor/effective_rank", "effective rank of the features", "RankMe", ".1f"),
    Diagnostic("monitor/alignment", "alignment, uniformity", "alignment", ".3f"),
    Diagnostic("monitor/uniformity", "alignment, uniformity", "uniformity", ".3f"),
)
# Held-out pictures, at most, for the last three: uniformity needs all pairs of them, and the rank is at most their
# number, which is the dimension of a ResNet-50's features.
_SPREAD = 2048
_LARGE = 1 << 17  # pictures; features of a larger bank are kept in float16 (1 GB in float32 at 2048 features each)


def probe_period(cfg: CfgNode, steps_per_epoch: int) -> int:
    """Return the number of iterations from one probe to the next."""
    return int(cfg.SSL.MONITOR.PERIOD * (steps_per_epoch if cfg.SOLVER.EPOCHS else 1))


def probe_count(cfg: CfgNode, steps_per_epoch: int, steps: int) -> int:
    """Return the number of probes in a run: one before the first step, one each period, one at the end."""
    return 1 + math.ceil(steps / probe_period(cfg, steps_per_epoch))


def monitor_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield what is wrong with ``SSL.MONITOR``: ranges, and sets that do not exist, have no labels or do not match."""
    monitor = cfg.SSL.MONITOR
    rules = [
        ("PERIOD", monitor.PERIOD >= 1, "1 or more"),
        ("K", monitor.K >= 1, "1 or more"),
        ("TEMPERATURE", monitor.TEMPERATURE > 0, "positive"),
        ("PICTURES", monitor.PICTURES >= 0, "positive, or 0 for all"),
    ]
    yield from (f"SSL.MONITOR.{key} is {monitor[key]}; it must be {rule}" for key, holds, rule in rules if not holds)
    if not monitor.DATASET:
        return
    # The commands check the config a first time before they register the user's own data sets.
    own = {entry.get("name") for entry in cfg.DATASETS.CUSTOM if isinstance(entry, Mapping)}
    if any(name in own and name not in DatasetCatalog for name in (monitor.DATASET, monitor.VAL)):
        return
    try:
        labelled_sets(monitor.DATASET, monitor.VAL)
    except ValueError as error:
        yield str(error)


def labelled_sets(name: str, held_out_name: str) -> tuple[LabelledSet, LabelledSet]:
    """Open the sets of a monitor: the pictures that are looked up, and the held-out ones that are classified.

    Args:
        name: ``SSL.MONITOR.DATASET``.
        held_out_name: ``SSL.MONITOR.VAL``; empty for the ``val`` half of the other.

    Raises:
        ValueError: a set cannot be opened, its classes are not the other's, or it shares pictures with the other.
    """
    try:
        bank, held_out = _opened(name, held_out_name or name)
    except ValueError as error:
        raise ValueError(f"SSL.MONITOR: {error}") from error
    except Exception as error:  # a user's function in the catalogue may raise anything
        raise ValueError(f"SSL.MONITOR: the sets cannot be read: {type(error).__name__}: {error}") from error
    if len(bank.labels.unique()) < 2:
        raise ValueError(f"SSL.MONITOR.DATASET is {name!r}, whose pictures are all of one class; it needs two or more")
    return bank, held_out


# Preflight and the monitor itself read the same sets.
_opened = functools.lru_cache(maxsize=1)(open_pair)


class Monitor:
    """Probes of a method's backbone. Every process takes a share of the pictures, and all must call :meth:`probe`."""

    def __init__(self, cfg: CfgNode, method: SSLMethod) -> None:
        """Open the labelled sets.

        Raises:
            ValueError: see :func:`labelled_sets`.
        """
        monitor = cfg.SSL.MONITOR
        self.method, self.k, self.temperature = method, monitor.K, monitor.TEMPERATURE
        self.augmentation = build_augmentation(cfg.DATA.AUGMENTATION, cfg.DATA.CROP_SIZE)
        self.size, self.device = cfg.DATA.CROP_SIZE, torch.device(cfg.MODEL.DEVICE)
        self.options = {
            "batch": min(256, cfg.SOLVER.IMS_PER_BATCH // world_size()),
            "workers": worker_count(cfg), "max_pixels": cfg.DATA.MAX_PIXELS, "device": self.device,
        }  # fmt: skip
        bank, held_out = labelled_sets(monitor.DATASET, monitor.VAL)
        self.bank, self.held_out = (s.part(evenly(len(s), monitor.PICTURES)) for s in (bank, held_out))
        self.spread = evenly(len(self.held_out), _SPREAD)

    def probe(self) -> dict[str, float]:
        """Measure the backbone.

        Returns:
            In process 0 the :data:`DIAGNOSTICS` and ``monitor/seconds``; in others nothing.

        Raises:
            ValueError: a process could not read a picture or compute a feature, or features are not finite; raised in
                all processes.
        """
        start = time.perf_counter()
        bank, held_out, pairs = self._features()
        if not all(part.isfinite().all() for part in (bank, held_out, pairs)):
            raise ValueError("the monitor (SSL.MONITOR): the backbone's features are not finite")
        labels = share(self.held_out.labels).to(self.device)
        known, classes = self.bank.labels.to(self.device), len(self.bank.classes)
        (scores,) = knn_scores(share(held_out), bank, known, classes, [self.k], self.temperature)
        right = total(torch.tensor(hits(scores, labels), device=self.device)).item()
        if rank():
            return {}
        features = held_out[self.spread].cpu()
        first, second = pairs.cpu().unbind(1)
        found = (100 * right / len(held_out), effective_rank(features), alignment(first, second), uniformity(features))
        values = {one.key: value for one, value in zip(DIAGNOSTICS, found, strict=True)}
        return {**values, "monitor/seconds": time.perf_counter() - start}

    def describe(self, values: dict[str, float]) -> str:
        """Return a probe's result in words."""
        knn, *others = (f"{one.label} {values[one.key]:{one.form}}" for one in DIAGNOSTICS)
        sets = f"(k {self.k}, {len(self.bank)} known pictures, {len(self.held_out)} held-out ones)"
        return f"{knn} % {sets}, {', '.join(others)}; {values['monitor/seconds']:.1f} s"

    def _features(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return features of the bank (M, C), of the held-out pictures (N, C) and of pairs of views (S, 2, C)."""
        network = self.method.backbone()
        error, found = "", []
        with _statistics_of_process_0(network):
            try:
                for pictures in (self.bank, self.held_out):
                    dtype = torch.float16 if len(pictures) > _LARGE else torch.float32
                    own = pictures.part(share(range(len(pictures))))
                    loader = LabelledLoader(own, self.augmentation.pixels, self.size, **self.options)
                    found.append(extract(network, loader, len(loader), dtype=dtype)[0])
                numbers = share(self.spread)
                pairs = view_pairs(self.held_out, numbers, self.augmentation, **self.options)
                views, _ = extract(
                    network, ((images, images.new_empty(len(images))) for images in pairs), 2 * len(numbers)
                )
                found.append(views.unflatten(0, (-1, 2)))
            except (OSError, RuntimeError, ValueError) as problem:
                error = describe(problem)
        # Before any process waits for the others' features.
        if problems := [theirs for theirs in comm.all_gather(error) if theirs]:
            raise ValueError(f"the monitor (SSL.MONITOR): {problems[0]}")
        bank, held_out, views = map(gather_rows, found)
        return bank, held_out, views


@contextmanager
def _statistics_of_process_0(network: nn.Module) -> Iterator[None]:
    """Give a network process 0's buffers for a block: each process has batch statistics of its own."""
    if world_size() == 1:
        yield
        return
    own = [buffer.clone() for buffer in network.buffers()]
    try:
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)
        yield
    finally:
        for buffer, value in zip(network.buffers(), own, strict=True):
            buffer.copy_(value)


class MonitorHook(HookBase):
    """Probe before the first step, every ``period`` steps and after the last one; record and log the results."""

    def __init__(self, monitor: Monitor, period: int, writers: Sequence[EventWriter]) -> None:
        """Set up.

        Args:
            monitor: the probes.
            period: number of iterations.
            writers: write each result at once, because a writer keeps only the latest value of a period.
        """
        self.monitor, self.period, self.writers = monitor, period, writers

    def before_train(self) -> None:
        """Measure the weights that a new run starts from.

        Raises:
            ValueError: the pictures cannot be read; the run has cost nothing yet.
        """
        if self.trainer.start_iter == 0:
            self._record(0, "before training")

    def after_step(self) -> None:
        """Probe if it is time. If a probe fails, the log says so and training goes on: its weights do not need it."""
        done = self.trainer.iter + 1
        if done % self.period == 0 or done == self.trainer.max_iter:
            try:
                self._record(self.trainer.iter, f"after {done} iterations")
            except ValueError as error:
                logger.warning("no probe after %d iterations: %s", done, error)

    def _record(self, iteration: int, when: str) -> None:
        values = self.monitor.probe()
        if not values:
            return
        get_event_storage().put_scalars(cur_iter=iteration, smoothing_hint=False, **values)
        logger.info("monitor, %s: %s", when, self.monitor.describe(values))
        for writer in self.writers:
            writer.write()

"""Dry run of pretraining: a check of settings, data, memory, speed and resuming that takes a minute."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from moco_d2.config import use_available_device
from moco_d2.data import ViewDataset, ViewLoader
from moco_d2.data.decode import EncodedImage
from moco_d2.engine.build import outline
from moco_d2.engine.monitor import Monitor, probe_count
from moco_d2.engine.optim import scaled_lr, total_steps
from moco_d2.engine.preflight import check_config
from moco_d2.engine.step import performance_advice
from moco_d2.engine.trainer import PretrainTrainer, recipe_changes
from moco_d2.io.files import atomic_write
from moco_d2.io.pictures import describe
from moco_d2.layers.views import Views
from moco_d2.resources import AHEAD
from moco_d2.running.dry_run import duration, one_list, parameters, peak_memory, quiet, recipe
from moco_d2.running.picture_check import check_each, evenly
from moco_d2.running.workers import worker_count

STEPS = 2
_CPU_BATCH = 16  # images per process on the CPU, where a full batch can take minutes and more memory than there is


class TimedTrainer(PretrainTrainer):
    """A trainer that measures each step, without the time spent waiting for data."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.step_seconds: list[float] = []

    def run_step(self) -> None:
        """Run a step and record its duration."""
        start = time.perf_counter()
        super().run_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        waited, _ = self.storage.latest().get("data_time", (0.0, 0))
        self.step_seconds.append(time.perf_counter() - start - waited)

    def _replay(self) -> Iterator[Views]:
        """Yield a few batches only: a pass over all images (DeepCluster's before training) would take long."""
        yield from itertools.islice(super()._replay(), STEPS)


def rehearse(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Check all settings, then run the first steps; yield the findings as ``(subject, finding)``.

    The images on disk are decoded (``DATA.DRY_RUN_PICTURES``). Two steps run in ``OUTPUT_DIR``, with a checkpoint after
    each; a second trainer resumes from the first checkpoint and must reach the same weights; then the loader runs alone
    to measure its speed. On the CPU the batch is smaller.

    Args:
        cfg: config of the run, with a temporary ``OUTPUT_DIR``.

    Raises:
        ValueError: something is wrong; the message has a line for each problem.
    """
    full = _ready(cfg)
    small = _shorten(full, comm.get_world_size())
    with quiet():
        trainer = TimedTrainer(small)
        trainer.resume_or_load(resume=False)
    images = len(trainer.data_loader.dataset)
    steps = total_steps(full, images // full.SOLVER.IMS_PER_BATCH)
    yield "recipe", recipe(full.PROTOCOL, recipe_changes(full, trainer.method))
    yield "data", f"{', '.join(full.DATASETS.TRAIN)}: {images} images"
    yield from _check_pictures(trainer.data_loader.dataset, full)
    yield "schedule", _schedule(full, steps)
    advice = trainer.method.advice(images, full.SOLVER.IMS_PER_BATCH, steps)
    for warning in [*advice, *performance_advice(full)]:
        yield "advice", warning
    yield "weights", full.MODEL.WEIGHTS or f"none: random values of seed {small.SEED}"
    yield "model", f"{full.SSL.METHOD}, {full.SSL.ENCODER.NAME}: {parameters(trainer.method)}"
    probes = 0.0
    if full.SSL.MONITOR.DATASET:
        probes, finding = _monitor(Monitor(full, trainer.method), full, images, steps)
        yield "monitor", finding
    with quiet():
        trainer.train()
    memory = peak_memory()  # before a second trainer exists
    batch, full_batch = small.SOLVER.IMS_PER_BATCH, full.SOLVER.IMS_PER_BATCH
    yield "training", _training(trainer, batch, full_batch)
    yield "checkpoint", _resume(trainer)
    yield "memory", memory + (f" with {batch} instead of {full_batch} images" if batch < full_batch else "")
    computes, loads = batch / trainer.step_seconds[-1], _loading_speed(trainer.data_loader, batch)
    speed, finding = _bottleneck(computes, loads, trainer.data_loader.workers)
    yield "bottleneck", finding
    yield "ETA", f"{duration(steps * full_batch / speed + probes)} at {speed:.1f} images/s, this machine's speed now"


def _check_pictures(dataset: ViewDataset, cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Decode the images; yield how many can be decoded, and name the others.

    Raises:
        ValueError: so many cannot be decoded that the run would stop.
    """
    source = dataset.source
    if source.remote_sizes:
        yield "pictures", "not checked, because they are streamed over a network"
        return

    def problem(number: int) -> str:
        try:
            EncodedImage(source.read(number), dataset.max_pixels).decode()
        except Exception as error:  # as in the loader: on a damaged file a decoder may raise anything
            return f"{source.name(number)}: {describe(error)}"
        return ""

    numbers = evenly(len(source), cfg.DATA.DRY_RUN_PICTURES)
    found = yield from check_each(problem, numbers, worker_count(cfg))
    summary = f"{len(numbers) - len(found)} of {len(numbers)} can be decoded"
    if len(found) > cfg.DATA.MAX_SKIPPED * len(numbers):
        rule = f"DATA.MAX_SKIPPED allows a fraction of {cfg.DATA.MAX_SKIPPED:g} to fail"
        raise ValueError(one_list([f"{summary}, but {rule}. Repair or remove these, or raise it:", *found]))
    yield "pictures", summary + (f"; left out: {one_list(found, 5)}" if found else "")


def _ready(cfg: CfgNode) -> CfgNode:
    """Return the config as it will run on this machine.

    Raises:
        ValueError: the settings or the data are wrong.
    """
    cfg = cfg.clone()
    cfg.defrost()
    use_available_device(cfg)
    cfg.SEED = max(cfg.SEED, 0)
    cfg.freeze()
    check_config(cfg, comm.get_world_size())
    PretrainTrainer.build_train_loader(cfg)  # checks that there are enough images for the full batch
    return cfg


def _shorten(full: CfgNode, world_size: int) -> CfgNode:
    """Return the config of the dry run: only a few steps and, on the CPU, a smaller batch."""
    cfg = full.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.REFERENCE_BATCH = scaled_lr(full), 0
    cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP = 0, STEPS, (), 0.0
    cfg.SSL.MONITOR.DATASET = ""  # one probe is made on its own
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP = 1, 0  # keep the first, to resume from it
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.IMS_PER_BATCH = world_size * _smaller_batch(cfg, world_size)
    cfg.freeze()
    return cfg


def _smaller_batch(cfg: CfgNode, world_size: int) -> int:
    """Return the smallest batch per process, from ``_CPU_BATCH`` on, that the method and ``DATA.LANES`` accept."""
    method, full = outline(cfg), cfg.SOLVER.IMS_PER_BATCH // world_size
    for size in range(min(full, _CPU_BATCH), full):
        with contextlib.suppress(ValueError):
            method.check_batch(size)
            if world_size * size % max(1, cfg.DATA.LANES) == 0:
                return size
    return full


def _schedule(full: CfgNode, steps: int) -> str:
    epochs = f"{full.SOLVER.EPOCHS} epochs, " if full.SOLVER.EPOCHS else ""
    return f"{epochs}{steps} iterations of {full.SOLVER.IMS_PER_BATCH} images, lr {scaled_lr(full):g}"


def _training(trainer: TimedTrainer, batch: int, full_batch: int) -> str:
    loss, _ = trainer.storage.latest().get("total_loss", (math.nan, 0))  # recorded in the main process only
    text = f"{STEPS} steps, loss {loss:.3f}, {trainer.step_seconds[-1] * full_batch / batch:.2f} s per step"
    return text if batch == full_batch else f"{text} (extrapolated from {batch} of {full_batch} images)"


def _resume(trainer: TimedTrainer) -> str:
    """Repeat the last step from the checkpoint before it.

    Raises:
        ValueError: the resumed run starts at another iteration, or does not reach the same weights.
    """
    folder = Path(trainer.cfg.OUTPUT_DIR)
    comm.synchronize()
    if comm.is_main_process():
        with atomic_write(folder / "last_checkpoint") as file:
            file.write(f"model_{STEPS - 2:07d}.pth".encode())
    comm.synchronize()
    with quiet():
        again = TimedTrainer(trainer.cfg)
        again.resume_or_load(resume=True)
        if again.start_iter != STEPS - 1:
            raise ValueError(f"a resumed run starts at iteration {again.start_iter}, not {STEPS - 1}")
        again.train()
    if not comm.is_main_process():  # Each process has its own batch statistics; checkpoints hold the main process's.
        return ""
    pairs = zip(trainer.method.state_dict().items(), again.method.state_dict().values(), strict=True)
    apart = {name: (a.double() - b.double()).abs().max().item() for (name, a), b in pairs}
    worst = max(apart, key=lambda name: apart[name])
    # The order of some sums on a GPU is not deterministic.
    if not apart[worst] <= (0 if trainer.cfg.MODEL.DEVICE == "cpu" else 1e-2):
        raise ValueError(
            f"a resumed run does not end with the uninterrupted run's weights: {worst} differs by {apart[worst]:g}"
        )
    same = "bit for bit" if apart[worst] == 0 else f"within {apart[worst]:.1g}"
    size = (folder / "model_final.pth").stat().st_size / 2**20
    return f"{size:.0f} MiB, saved and resumed to the same weights, {same}"


def _monitor(monitor: Monitor, full: CfgNode, images: int, steps: int) -> tuple[float, str]:
    """Make one probe; return the seconds that all probes of the run will take, and the finding."""
    start = time.perf_counter()
    values = monitor.probe()
    seconds = time.perf_counter() - start
    count = probe_count(full, images // full.SOLVER.IMS_PER_BATCH, steps)
    each = monitor.describe(values) if values else ""  # in the main process only
    return count * seconds, f"{each} a probe, {count} probes: {duration(count * seconds)} of the run"


def _loading_speed(loader: ViewLoader, batch: int) -> float:
    """Return the images per second of the loader alone, for all processes together."""
    batches = iter(loader)
    # The first batches were prepared while the workers started, and arrive at once. Only later ones are timed, in whole
    # rounds of all workers.
    _take(batches, 1 + AHEAD * loader.workers)
    timed = 2 * max(2, loader.workers)
    start = time.perf_counter()
    _take(batches, timed)
    return timed * batch / (time.perf_counter() - start)


def _take(batches: Iterator[object], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass


def _bottleneck(computes: float, loads: float, workers: int) -> tuple[float, str]:
    """Return the speed of a run in images per second, and what limits it."""
    speeds = f"network {computes:.1f} images/s, loader {loads:.1f} images/s with {workers} worker(s) per process"
    if workers == 0:
        both = 1 / (1 / computes + 1 / loads)
        return both, f"they take turns: {speeds}; set DATALOADER.NUM_WORKERS to 1 or more to run them in parallel"
    if loads < computes:
        return loads, f"the loader: {speeds}; raise DATALOADER.NUM_WORKERS if there are idle cores"
    return computes, f"the network: {speeds}"

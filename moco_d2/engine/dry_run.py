"""A rehearsal of pretraining in a minute: settings, data, memory, speed, and whether the run could be resumed."""

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
from moco_d2.data.decode import Picture
from moco_d2.engine.build import outline
from moco_d2.engine.optim import scaled_lr, total_steps
from moco_d2.engine.preflight import check_config
from moco_d2.engine.trainer import PretrainTrainer, recipe_changes
from moco_d2.io.files import atomic_write
from moco_d2.io.pictures import describe
from moco_d2.running.dry_run import duration, one_list, parameters, peak_memory, quiet, recipe
from moco_d2.running.picture_check import check_each, evenly

STEPS = 2
_CPU_BATCH = 16  # images a process on the CPU, where a full batch would take minutes and more memory than there is
_PREFETCHED = 2  # batches that a DataLoader's worker makes ahead


class Rehearsal(PretrainTrainer):
    """A trainer that notes the time of each step, without the wait for its data."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.step_seconds: list[float] = []

    def run_step(self) -> None:
        """Take a step, and its time."""
        start = time.perf_counter()
        super().run_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        waited, _ = self.storage.latest().get("data_time", (0.0, 0))
        self.step_seconds.append(time.perf_counter() - start - waited)


def rehearse(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Check every setting, then run a little of the run; yield what was found as ``(subject, finding)``.

    Every picture on a disk is decoded (``DATA.DRY_RUN_PICTURES``). In ``OUTPUT_DIR``: 2 steps with a checkpoint after
    each; a second trainer that resumes from the first checkpoint and has to arrive at the same weights; the loader
    alone, for its speed. On the CPU the batch is smaller.

    Args:
        cfg: config of the run, with an ``OUTPUT_DIR`` that nobody needs.

    Raises:
        ValueError: names every problem found, a line each.
    """
    full = _ready(cfg)
    small = _shorten(full, comm.get_world_size())
    with quiet():
        trainer = Rehearsal(small)
        trainer.resume_or_load(resume=False)
    images = len(trainer.data_loader.dataset)
    steps = total_steps(full, images // full.SOLVER.IMS_PER_BATCH)
    yield "recipe", recipe(full.PROTOCOL, recipe_changes(full, trainer.method))
    yield "data", f"{', '.join(full.DATASETS.TRAIN)}: {images} images"
    yield from _check_pictures(trainer.data_loader.dataset, full)
    yield "schedule", _schedule(full, steps)
    for warning in trainer.method.advice(images, full.SOLVER.IMS_PER_BATCH, steps):
        yield "advice", warning
    yield "weights", full.MODEL.WEIGHTS or f"none: random values of seed {small.SEED}"
    yield "model", f"{full.SSL.METHOD}, {full.SSL.ENCODER.NAME}: {parameters(trainer.method)}"
    with quiet():
        trainer.train()
    memory = peak_memory()  # before there is a second trainer
    batch, whole = small.SOLVER.IMS_PER_BATCH, full.SOLVER.IMS_PER_BATCH
    yield "training", _training(trainer, batch, whole)
    yield "checkpoint", _resume(trainer)
    yield "memory", memory + (f" with {batch} images of {whole}" if batch < whole else "")
    computes, loads = batch / trainer.step_seconds[-1], _loading_speed(trainer.data_loader, batch)
    speed, finding = _bottleneck(computes, loads, small.DATALOADER.NUM_WORKERS)
    yield "bottleneck", finding
    yield "ETA", f"{duration(steps * whole / speed)} at {speed:.1f} images/s, this machine's speed now"


def _check_pictures(dataset: ViewDataset, cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Decode the pictures, yield how many can be, and name those that cannot.

    Raises:
        ValueError: so many cannot be decoded that the run would end.
    """
    source = dataset.source
    if source.stream_sizes:
        yield "pictures", "not decoded, because they come over a network"
        return

    def problem(number: int) -> str:
        try:
            Picture(source.read(number), dataset.max_pixels).decode()
        except Exception as error:  # as in the loader: a damaged file makes decoders raise anything
            return f"{source.name(number)}: {describe(error)}"
        return ""

    numbers = evenly(len(source), cfg.DATA.DRY_RUN_PICTURES)
    found = yield from check_each(problem, numbers, cfg.DATALOADER.NUM_WORKERS)
    said = f"{len(numbers) - len(found)} of {len(numbers)} can be decoded"
    if len(found) > cfg.DATA.MAX_SKIPPED * len(numbers):
        rule = f"{said}; DATA.MAX_SKIPPED is {cfg.DATA.MAX_SKIPPED:g}. Repair or remove the others, or raise it"
        raise ValueError(one_list([rule, *found]))
    yield "pictures", said + (f"; left out: {one_list(found, 5)}" if found else "")


def _ready(cfg: CfgNode) -> CfgNode:
    """Return the config as this machine runs it.

    Raises:
        ValueError: what is wrong with the settings or the data.
    """
    cfg = cfg.clone()
    cfg.defrost()
    use_available_device(cfg)
    cfg.SEED = max(cfg.SEED, 0)
    cfg.freeze()
    check_config(cfg, comm.get_world_size())
    PretrainTrainer.build_train_loader(cfg)  # with the whole batch, for which there must be images
    return cfg


def _shorten(full: CfgNode, world_size: int) -> CfgNode:
    """Return the config of the rehearsal: as it stands, but for a few steps and, on the CPU, a smaller batch."""
    cfg = full.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.REFERENCE_BATCH = scaled_lr(full), 0
    cfg.SOLVER.EPOCHS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP = 0, STEPS, (), 0.0
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.CHECKPOINT_KEEP = 1, 0  # the first is resumed from
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.IMS_PER_BATCH = world_size * _part_of(cfg, world_size)
    cfg.freeze()
    return cfg


def _part_of(cfg: CfgNode, world_size: int) -> int:
    """Return the smallest part, from ``_CPU_BATCH`` images on, of a process's batch that method and lanes can take."""
    method, batch = outline(cfg), cfg.SOLVER.IMS_PER_BATCH // world_size
    for part in range(min(batch, _CPU_BATCH), batch):
        with contextlib.suppress(ValueError):
            method.check_batch(part)
            if world_size * part % max(1, cfg.DATA.LANES) == 0:
                return part
    return batch


def _schedule(full: CfgNode, steps: int) -> str:
    epochs = f"{full.SOLVER.EPOCHS} epochs, " if full.SOLVER.EPOCHS else ""
    return f"{epochs}{steps} iterations of {full.SOLVER.IMS_PER_BATCH} images, lr {scaled_lr(full):g}"


def _training(trainer: Rehearsal, batch: int, whole: int) -> str:
    loss, _ = trainer.storage.latest().get("total_loss", (math.nan, 0))  # recorded in the main process only
    text = f"{STEPS} steps, loss {loss:.3f}, {trainer.step_seconds[-1] * whole / batch:.2f} s a step"
    return text if batch == whole else f"{text} (reckoned from {batch} images of {whole})"


def _resume(trainer: Rehearsal) -> str:
    """Take the last step again from the checkpoint before it.

    Raises:
        ValueError: it starts elsewhere, or does not arrive at the same weights.
    """
    folder = Path(trainer.cfg.OUTPUT_DIR)
    comm.synchronize()
    if comm.is_main_process():
        with atomic_write(folder / "last_checkpoint") as file:
            file.write(f"model_{STEPS - 2:07d}.pth".encode())
    comm.synchronize()
    with quiet():
        again = Rehearsal(trainer.cfg)
        again.resume_or_load(resume=True)
        if again.start_iter != STEPS - 1:
            raise ValueError(f"a resumed run starts at iteration {again.start_iter}, not {STEPS - 1}")
        again.train()
    if not comm.is_main_process():  # Batch statistics are each process's own; checkpoints hold the main one's.
        return ""
    pairs = zip(trainer.method.state_dict().items(), again.method.state_dict().values(), strict=True)
    apart = {name: (a.double() - b.double()).abs().max().item() for (name, a), b in pairs}
    worst = max(apart, key=lambda name: apart[name])
    # Some of a GPU's sums are taken in any order.
    if not apart[worst] <= (0 if trainer.cfg.MODEL.DEVICE == "cpu" else 1e-2):
        raise ValueError(f"a resumed run does not end as the uninterrupted one: {worst} differs by {apart[worst]:g}")
    same = "bit for bit" if apart[worst] == 0 else f"within {apart[worst]:.1g}"
    size = (folder / "model_final.pth").stat().st_size / 2**20
    return f"{size:.0f} MiB, saved and resumed to the same weights, {same}"


def _loading_speed(loader: ViewLoader, batch: int) -> float:
    """Return the images per second of the loader alone, all processes together."""
    batches = iter(loader)
    # Workers start, then hand out together what they made meanwhile: only what comes after that takes its time. Whole
    # rounds of all workers are timed.
    _take(batches, 1 + _PREFETCHED * loader.workers)
    timed = 2 * max(2, loader.workers)
    start = time.perf_counter()
    _take(batches, timed)
    return timed * batch / (time.perf_counter() - start)


def _take(batches: Iterator[object], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass


def _bottleneck(computes: float, loads: float, workers: int) -> tuple[float, str]:
    """Return the speed of a run, images per second, and what limits it."""
    speeds = f"network {computes:.1f} images/s, loader {loads:.1f} images/s with {workers} worker(s) a process"
    if workers == 0:
        return 1 / (1 / computes + 1 / loads), f"{speeds}, one after the other: DATALOADER.NUM_WORKERS 1 or more"
    if loads < computes:
        return loads, f"the loader: {speeds}; more DATALOADER.NUM_WORKERS help while there are cores"
    return computes, f"the network: {speeds}"

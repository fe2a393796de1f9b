"""Construction of the data loader from the config."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from moco_d2.data import (
    EpochSampler,
    ImageSource,
    ShardCache,
    Skip,
    SkipLog,
    ViewDataset,
    ViewLoader,
    build_augmentation,
    open_source,
)
from moco_d2.data.backends import build_backend
from moco_d2.io.paths import cache_folder
from moco_d2.running.compilation import compile_mode
from moco_d2.running.workers import worker_count


def build_loader(cfg: CfgNode) -> ViewLoader:
    """List the images and build this process's loader.

    Raises:
        ValueError: there are fewer images than a batch, processes list different images, or the cache is too small for
            the streamed shards.
    """
    data, batch, device = cfg.DATA, cfg.SOLVER.IMS_PER_BATCH, torch.device(cfg.MODEL.DEVICE)
    rank, world = comm.get_rank(), comm.get_world_size()
    folder = Path(data.CACHE_FOLDER) if data.CACHE_FOLDER else cache_folder() / "shards"
    source = open_source(cfg.DATASETS.TRAIN, ShardCache(folder, data.CACHE_GB * 1e9))
    _agree(source)
    if len(source) < batch:
        raise ValueError(
            f"{', '.join(cfg.DATASETS.TRAIN)} has {len(source)} images, fewer than a batch of {batch}: add images, or "
            "lower SOLVER.IMS_PER_BATCH"
        )
    lanes = data.LANES or (world if source.remote_sizes else 1)
    check_cache(source, cfg, lanes)
    skips = SkipLog(cfg.OUTPUT_DIR, data.MAX_SKIPPED, rank)
    if comm.is_main_process():  # all processes list the same folders, so one records what is unreadable
        skips.record(Skip(path, error, -1) for path, error in source.unreadable)
    augmentation = build_augmentation(data.AUGMENTATION, data.CROP_SIZE)
    backend = build_backend(data.BACKEND, device)
    dataset = ViewDataset(source, augmentation, cfg.SEED, backend, data.MAX_PIXELS, data.REDUCED_DECODING)
    sampler = EpochSampler(
        source.lengths, batch, cfg.SEED, rank, world, window=data.SHUFFLE_SHARDS, streams=lanes, prepare=source.prepare,
        fingerprint=source.fingerprint,
    )  # fmt: skip
    # On a CPU, index lists are faster than masks that the compiler has fused.
    compiled = bool(compile_mode(cfg)) and device.type != "cpu"
    return ViewLoader(dataset, sampler, worker_count(cfg), device, skips, compiled)


def _agree(source: ImageSource) -> None:
    """Raise ValueError if processes list different images: some images would be read twice and others never."""
    found = comm.all_gather((len(source), source.fingerprint))
    for other, theirs in enumerate(found):
        if theirs != found[0]:
            raise ValueError(
                f"process 0 lists {found[0][0]} images and process {other} lists {theirs[0]}, or the same number of "
                "different ones: DATASETS.TRAIN must name the same files on every machine"
            )


def check_cache(source: ImageSource, cfg: CfgNode, lanes: int) -> None:
    """Raise ValueError if a machine's cache cannot hold the shards that its processes read and fetch ahead."""
    if not source.remote_sizes:
        return
    data = cfg.DATA
    here = max(1, lanes // max(1, comm.get_world_size() // comm.get_local_size()))
    largest = max(source.remote_sizes)
    window = data.SHUFFLE_SHARDS or len(source.remote_sizes)

    def size(window: int) -> int:
        # The shards at the ends of a stream may be shared with its neighbours.
        return min(_windows_held(source, cfg, lanes, window) * window * here * largest, sum(source.remote_sizes))

    wanted = size(window)
    if wanted > data.CACHE_GB * 1e9:
        fits = next((n for n in range(window - 1, 0, -1) if size(n) <= data.CACHE_GB * 1e9), 0)
        hint = f", or set DATA.SHUFFLE_SHARDS {fits}" if fits else ""
        windows = _windows_held(source, cfg, lanes, window)
        raise ValueError(
            f"DATA.CACHE_GB is {data.CACHE_GB:g}, but {windows} windows of {window} shards (DATA.SHUFFLE_SHARDS) of up "
            f"to {largest / 1e6:.3g} MB in {here} stream(s) (DATA.LANES) on this machine take {wanted / 1e9:.3g} GB: "
            f"raise DATA.CACHE_GB{hint}"
        )


def _windows_held(source: ImageSource, cfg: CfgNode, lanes: int, window: int) -> int:
    """Return a stream's windows in the cache: the one that begins, the next, and those that workers still read.

    The sampler is ahead of training by the batches that workers prepare (two per worker, torch's default) and one more.
    """
    behind = (1 + 2 * worker_count(cfg)) * cfg.SOLVER.IMS_PER_BATCH / lanes
    return 2 + math.ceil(behind / (window * max(1.0, float(source.lengths.mean()))))

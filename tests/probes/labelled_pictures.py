"""Labelled pictures that a random network can tell apart, and a small backbone to probe, for tests of probes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from PIL import Image

from moco_d2.config import load_cfg

WORDS = (
    "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", "0.125", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE",
    "cpu", "SEED", "3",
)  # fmt: skip


def grow(root: Path, train: int = 16, val: int = 4, noise: int = 100) -> Path:
    """Draw a red, a green and a blue class in ``train/`` and ``val/``."""
    rng = np.random.default_rng(0)
    for half, count in (("train", train), ("val", val)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / half / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, noise, (40, 48, 3))
                pixels[..., channel] += 255 - noise
                Image.fromarray(pixels.astype(np.uint8)).save(root / half / name / f"{i}.png")
    return root


def config(output: Path, *more: Any) -> CfgNode:
    """Return the config of a probe on the CPU."""
    return load_cfg("", [*WORDS, "OUTPUT_DIR", str(output), *map(str, more)])


def in_two_processes(work: Callable[[Path], None], folder: Path) -> None:
    """Call ``work(folder)`` in two processes, forks of this one."""
    torch.multiprocessing.start_processes(_one_of_two, (work, folder), nprocs=2, start_method="fork")


def _one_of_two(rank: int, work: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(folder)
    dist.barrier()
    dist.destroy_process_group()

"""Labelled pictures that a random network can tell apart, and a small backbone to probe, for tests of probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
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

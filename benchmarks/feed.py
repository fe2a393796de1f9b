"""How well files feed a step: ``python -m benchmarks feed``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from benchmarks.data import draw_photo
from benchmarks.step import WARM_UP, Ours, made_up_views, rate
from moco_d2.engine.loader import build_loader


def measure(cfg: CfgNode, workers: Sequence[int], steps: int, images: int) -> list[dict[str, Any]]:
    """Compare steps on image files with steps on views that are there already, the synthetic rate.

    Args:
        cfg: of a pretraining with MoCo; without ``DATASETS.TRAIN``, photographs are drawn.
        workers: numbers of loader processes.
        steps: that are timed, after :data:`~benchmarks.step.WARM_UP` others.
        images: number of photographs to draw, at least a batch.

    Returns:
        For each number of loader processes, images/s of the loader alone and of the training, and the training's share
        of the synthetic rate.
    """
    cfg = cfg.clone()
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        if not cfg.DATASETS.TRAIN:
            pictures = Path(folder) / "pictures"
            pictures.mkdir()
            for number in range(max(images, cfg.SOLVER.IMS_PER_BATCH)):
                (pictures / f"{number}.jpg").write_bytes(draw_photo(number))
            cfg.DATASETS.TRAIN = [str(pictures)]
        with EventStorage():
            trained = Ours(cfg, made_up_views(cfg))
            synthetic = rate(trained.run, steps, cfg, WARM_UP)
            return [_row(cfg, trained, count, steps, synthetic) for count in workers]


def _row(cfg: CfgNode, trained: Ours, workers: int, steps: int, synthetic: float) -> dict[str, Any]:
    cfg.DATALOADER.NUM_WORKERS = workers
    warm_up = WARM_UP + 2 * workers  # the batches that were prepared before the first step
    alone = rate(partial(next, iter(build_loader(cfg))), steps, cfg, warm_up)
    trained.step.reset_data_loader(lambda: build_loader(cfg))
    fed = rate(trained.run, steps, cfg, warm_up)
    rates = {"loader images/s": alone, "training images/s": fed, "synthetic images/s": synthetic}
    return {"loader processes": workers, **rates, "of the synthetic rate": fed / synthetic}

"""The number of loader processes: ``DATALOADER.NUM_WORKERS``, or what the machine has room for."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from moco_d2.data import build_augmentation
from moco_d2.resources import cores, loader_processes

AUTO = -1


def worker_count(cfg: CfgNode) -> int:
    """Return ``DATALOADER.NUM_WORKERS`` of a pretraining or probe; for :data:`AUTO`, choose, and log the choice once.

    :func:`moco_d2.resources.loader_processes` has the rule.
    """
    if cfg.DATALOADER.NUM_WORKERS != AUTO:
        return int(cfg.DATALOADER.NUM_WORKERS)
    here = comm.get_local_size()
    views = build_augmentation(cfg.DATA.AUGMENTATION, cfg.DATA.CROP_SIZE).views
    batch = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size() * sum(3 * view.crop.size**2 for view in views)
    count = loader_processes(here, cfg.MODEL.DEVICE != "cpu", batch)
    text = f"DATALOADER.NUM_WORKERS {AUTO}: {count} loader process(es), as {here} process(es) share {cores()} core(s)"
    log_first_n(logging.INFO, text, name=__name__)
    return count

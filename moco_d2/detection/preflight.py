"""What is checked before a detector is built: a mistake shall cost seconds, not the time that reading COCO takes."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Sequence

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from moco_d2.detection.evaluators import evaluator_type
from moco_d2.detection.weights import all_names, load_weights, pretrained_names

logger = logging.getLogger(__name__)


def fit_to_machine(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return the config as this machine can run it; every change is logged.

    Without a GPU the device is the CPU. There, in several processes, ``nn.SyncBatchNorm`` does not work and
    Detectron2's naiveSyncBN, which synchronises through plain collectives, takes its place. In the heads it is the
    variant that weighs processes by their number of boxes and so accepts none.
    """
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        logger.info("no GPU here: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and world_size > 1:
        for name, node in cfg.MODEL.items():
            if isinstance(node, CfgNode) and node.get("NORM") in ("SyncBN", "nnSyncBN"):
                node.NORM = "naiveSyncBN_N" if name.startswith("ROI_") else "naiveSyncBN"
                logger.warning("SyncBN does not work in CPU processes: MODEL.%s.NORM is %s", name, node.NORM)
    cfg.freeze()
    return cfg


def check_run(cfg: CfgNode, world_size: int, train: bool = True) -> None:
    """Check batch and data sets, and that each test set has an evaluator. Nothing is read but names of files.

    Args:
        cfg: config of the detector.
        world_size: number of processes.
        train: whether the training sets are needed.

    Raises:
        ValueError: names all problems at once.
    """
    problems = list(_batch_problems(cfg, world_size)) if train else []
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        problems += _dataset_problems(cfg, name)
    for name in cfg.DATASETS.TEST:
        if name in DatasetCatalog:
            try:
                evaluator_type(name)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def starting_point(cfg: CfgNode, resume: bool) -> tuple[str, bool]:
    """Return the file that training starts from, and whether it is the checkpoint of an interrupted run.

    Raises:
        ValueError: a fresh start was asked for, but ``OUTPUT_DIR`` holds a run, which would be overwritten.
    """
    keeper = DetectionCheckpointer(nn.Identity(), cfg.OUTPUT_DIR)
    if not keeper.has_checkpoint():
        return cfg.MODEL.WEIGHTS, False
    last = keeper.get_checkpoint_file()
    if not resume:
        raise ValueError(
            f"{cfg.OUTPUT_DIR} holds a run already ({last}): continue it with --resume, or choose another OUTPUT_DIR"
        )
    return last, True


def check_weights(cfg: CfgNode, resume: bool = False) -> None:
    """Load the weights into a detector built on the CPU and thrown away, so that a bad file shows before data are read.

    Raises:
        ValueError: see :func:`moco_d2.detection.weights.load_weights` and :func:`starting_point`.
    """
    path, resuming = starting_point(cfg, resume)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    # The trainer's own initialisation, which follows from the seed, must not depend on this one.
    with torch.random.fork_rng(devices=[]):
        checkpointer = DetectionCheckpointer(build_model(cfg))
        load_weights(checkpointer, cfg, path, all_names if resuming else pretrained_names)


def _batch_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch < world_size or batch % world_size:
        yield f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of the {world_size} processes"
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty; name a registered data set"


def _dataset_problems(cfg: CfgNode, name: str) -> Iterator[str]:
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        yield f"no data set {name!r} is registered{hint}"
        return
    meta = MetadataCatalog.get(name)
    missing = [path for path in _dataset_files(name) if not PathManager.exists(path)]
    if missing:
        root = os.getenv("DETECTRON2_DATASETS")
        said = f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is not set, so ./datasets is used"
        yield (
            f"data set {name!r} is not there ({said}); missing:\n"
            + "\n".join(f"    {path}" for path in missing)
            + "\n  datasets/README.md shows the expected folders"
        )
    classes = meta.get("thing_classes")
    if classes and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN" and len(classes) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        yield f"data set {name!r} has {len(classes)} classes: pass MODEL.ROI_HEADS.NUM_CLASSES {len(classes)}"


def _dataset_files(name: str) -> Sequence[str]:
    """Return what the metadata of VOC- and COCO-like data sets say must be on disk; others are left to their loader."""
    meta = MetadataCatalog.get(name)
    if meta.get("json_file"):
        return [path for path in (meta.json_file, meta.get("image_root")) if path]
    if meta.get("dirname") and meta.get("split"):
        split = os.path.join("ImageSets", "Main", f"{meta.split}.txt")
        return [os.path.join(meta.dirname, part) for part in (split, "Annotations", "JPEGImages")]
    return []

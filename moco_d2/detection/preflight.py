"""What is checked before a detector is built: a mistake shall cost seconds, not the time that reading COCO takes."""

from __future__ import annotations

import itertools
import logging
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, PanopticFPN, build_model
from detectron2.utils.file_io import PathManager

from moco_d2.config import flat, mistyped_keys, unread_keys, use_available_device
from moco_d2.config.roles import DETECTION
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.metrics.evaluators import evaluator_type
from moco_d2.detection.missing import is_voc_list, listed_files, missing_files, unreadable
from moco_d2.detection.proposals import proposal_problems
from moco_d2.detection.weights import all_names, load_weights, pretrained_names
from moco_d2.messages import did_you_mean
from moco_d2.running.checkpoints import check_resumable, last_intact
from moco_d2.running.dry_run import quiet
from moco_d2.running.folder import refuse_to_overwrite

logger = logging.getLogger(__name__)

# Where an architecture says its number of classes, and which of a data set's classes those are.
_CLASSES = {
    "GeneralizedRCNN": ("ROI_HEADS", "thing_classes"),
    "RetinaNet": ("RETINANET", "thing_classes"),
    "SemanticSegmentor": ("SEM_SEG_HEAD", "stuff_classes"),
}

_FLIPS = ("horizontal", "vertical", "none")


def fit_to_machine(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return the config as this machine can run it; every change is logged.

    Without a GPU the device is the CPU. There, in several processes, ``nn.SyncBatchNorm`` does not work and
    naiveSyncBN, which synchronises through plain collectives (:mod:`moco_d2.detection.sync_norm`), takes its place. In
    the heads it is the variant that weighs processes by their number of boxes.
    """
    cfg = cfg.clone()
    cfg.defrost()
    use_available_device(cfg)
    if cfg.MODEL.DEVICE == "cpu" and world_size > 1:
        for name, node in cfg.MODEL.items():
            if isinstance(node, CfgNode) and node.get("NORM") in ("SyncBN", "nnSyncBN"):
                node.NORM = "naiveSyncBN_N" if name.startswith("ROI_") else "naiveSyncBN"
                logger.warning("SyncBN does not work in CPU processes: MODEL.%s.NORM is %s", name, node.NORM)
    cfg.freeze()
    return cfg


def scale_to_processes(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return the config for another number of processes than the ``SOLVER.REFERENCE_WORLD_SIZE`` it is meant for.

    Batch and lr are scaled in proportion, iterations against it (Detectron2's ``auto_scale_workers``).
    ``SOLVER.ACCUMULATE`` counts as so many processes. Precise-BN takes as many images as it would have.

    Args:
        cfg: config as written.
        world_size: number of processes.

    Raises:
        ValueError: the batch cannot be shared.
    """
    reference, accumulate = cfg.SOLVER.REFERENCE_WORLD_SIZE, max(1, cfg.SOLVER.ACCUMULATE)
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, no multiple of the {reference} processes that the "
            "config is written for: pass SOLVER.REFERENCE_WORLD_SIZE 0 to take batch, lr and schedule as they stand"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size * accumulate).clone()
    scaled.defrost()
    forward = scaled.SOLVER.IMS_PER_BATCH / accumulate  # images that pass through the network at once
    scaled.TEST.PRECISE_BN.NUM_ITER = round(cfg.TEST.PRECISE_BN.NUM_ITER * cfg.SOLVER.IMS_PER_BATCH / forward)
    period = max(1, cfg.SOLVER.CHECKPOINT_PERIOD)
    scaled.SOLVER.CHECKPOINT_KEEP_EVERY = cfg.SOLVER.CHECKPOINT_KEEP_EVERY * scaled.SOLVER.CHECKPOINT_PERIOD // period
    scaled.freeze()
    return scaled


def changes(asked: CfgNode, used: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return ``{key: (value asked for, value used)}`` where two configs differ."""
    before, after = flat(asked), flat(used)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def check_run(cfg: CfgNode, world_size: int, train: bool = True) -> None:
    """Check settings, batch and data sets, that each test set has an evaluator, and that its pictures are there.

    The pictures of training sets are looked for when their labels have been read (but VOC's, which text files list).

    Args:
        cfg: config of the detector.
        world_size: number of processes.
        train: whether the training sets are needed.

    Raises:
        ValueError: names all problems at once.
    """
    problems = list(run_problems(cfg, world_size, train))
    if problems:
        raise ValueError("\n".join(problems))


def run_problems(cfg: CfgNode, world_size: int, train: bool = True) -> Iterator[str]:
    """Yield what :func:`check_run` complains about."""
    mistyped = mistyped_keys(cfg, DETECTION).values()
    yield from mistyped
    yield from unread_keys(cfg, DETECTION)
    if mistyped:  # What is no number cannot be compared.
        return
    yield from _range_problems(cfg)
    yield from _augmentation_problems(cfg)
    yield from proposal_problems(cfg, train)
    yield from _picture_problems(cfg)
    if train:
        yield from _batch_problems(cfg, world_size)
    names = dict.fromkeys((*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST))
    for name in names:
        yield from _dataset_problems(cfg, name)
    yield from _class_problems(cfg, list(names))
    for name in cfg.DATASETS.TEST:
        if name in DatasetCatalog:
            try:
                evaluator_type(name, cfg)
            except ValueError as error:
                yield str(error)


def starting_point(cfg: CfgNode, resume: bool) -> tuple[str, bool]:
    """Return the file that training starts from, and whether it is the checkpoint of an interrupted run.

    Raises:
        ValueError: a fresh start was asked for, but ``OUTPUT_DIR`` holds a run, which would be overwritten; or its
            checkpoints are no run's.
    """
    if not resume:
        refuse_to_overwrite(cfg.OUTPUT_DIR)
        return cfg.MODEL.WEIGHTS, False
    path = last_intact(cfg.OUTPUT_DIR)
    if path:
        check_resumable(path)
    return path or cfg.MODEL.WEIGHTS, bool(path)


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
        with building():
            model = build_model(cfg)
        checkpointer = TransferCheckpointer(model)
        load_weights(checkpointer, cfg, path, all_names if resuming else pretrained_names)


def check_resume(cfg: CfgNode) -> None:
    """Check for a dry run that the detector takes the checkpoint of the run that is to be continued, if there is one.

    Raises:
        ValueError: see :func:`check_weights`.
    """
    found = last_intact(cfg.OUTPUT_DIR)
    with quiet():
        if found:
            check_weights(cfg, resume=True)


@contextmanager
def building() -> Iterator[None]:
    """Turn what Detectron2 raises at values of ``MODEL`` that it cannot build a detector from into a ValueError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        library = next((name for name in ("detectron2", "fvcore", "torch") if f"/{name}/" in place.filename), "")
        if not library or "CUDA" in str(error):  # a fault of ours or in code of the user's own, or of the machine
            raise
        raise ValueError(
            f"{library} cannot build this detector: {type(error).__name__}: {' '.join(str(error).split())[:300]} (at "
            f"`{place.line}` of {Path(place.filename).name}); correct the keys of MODEL that it follows from"
        ) from error


def _batch_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    batch, accumulate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    if accumulate < 1:
        yield f"SOLVER.ACCUMULATE is {accumulate}; it must be at least 1"
    elif batch < world_size * accumulate or batch % (world_size * accumulate):
        yield f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of the {world_size} processes" + (
            f" times SOLVER.ACCUMULATE {accumulate}" if accumulate > 1 else ""
        )
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        yield f"SOLVER.CHECKPOINT_PERIOD is {cfg.SOLVER.CHECKPOINT_PERIOD}; it must be at least 1"
    if cfg.ENGINE.AUTOCAST not in ("", "bfloat16"):
        yield f"ENGINE.AUTOCAST is {cfg.ENGINE.AUTOCAST!r}; it must be bfloat16, or empty"
    if cfg.SOLVER.AMP.ENABLED and (accumulate > 1 or cfg.ENGINE.AUTOCAST):
        yield "SOLVER.AMP.ENABLED (float16) goes with neither SOLVER.ACCUMULATE nor ENGINE.AUTOCAST; take bfloat16"
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty; name a registered data set"


def _range_problems(cfg: CfgNode) -> Iterator[str]:
    solver, test = cfg.SOLVER, cfg.TEST
    rules = [
        ("DATA.MAX_PIXELS", cfg.DATA.MAX_PIXELS > 0, "positive"),
        ("DATA.DRY_RUN_PICTURES", cfg.DATA.DRY_RUN_PICTURES >= 0, "a number of pictures, or 0 for all"),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS >= 0, "0 (no worker processes) or more"),
        ("SEED", cfg.SEED < 2**32, "below 2**32, or -1 to have one drawn"),
        ("SOLVER.MAX_ITER", solver.MAX_ITER > 0, "positive"),
        ("SOLVER.BASE_LR", solver.BASE_LR > 0, "positive"),
        ("SOLVER.MOMENTUM", 0 <= solver.MOMENTUM < 1, "in [0, 1)"),
        ("SOLVER.NESTEROV", solver.MOMENTUM > 0 or not solver.NESTEROV, "False without SOLVER.MOMENTUM"),
        ("SOLVER.WEIGHT_DECAY", solver.WEIGHT_DECAY >= 0, "0 or more"),
        ("SOLVER.WARMUP_ITERS", solver.WARMUP_ITERS >= 0, "0 (no warm-up) or more"),
        ("SOLVER.STEPS", list(solver.STEPS) == sorted(set(solver.STEPS)), "iterations that rise"),
        ("SOLVER.REFERENCE_WORLD_SIZE", solver.REFERENCE_WORLD_SIZE >= 0, "a number of processes, or 0"),
        ("SOLVER.CHECKPOINT_KEEP", solver.CHECKPOINT_KEEP >= 0, "positive, or 0 to keep all"),
        ("SOLVER.CHECKPOINT_KEEP_EVERY", solver.CHECKPOINT_KEEP_EVERY >= 0, "0 or more"),
        (
            "INPUT.MIN_SIZE_TRAIN",
            cfg.INPUT.MIN_SIZE_TRAIN or cfg.INPUT.RANDOM_SCALE,
            "short sides in pixels",
        ),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING in ("choice", "range"), "choice or range"),
        ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP in _FLIPS, f"one of {', '.join(_FLIPS)}"),
        ("INPUT.MAX_SIZE_TRAIN", cfg.INPUT.MAX_SIZE_TRAIN > 0, "positive"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE > 0, "positive"),
        ("TEST.DETECTIONS_PER_IMAGE", test.DETECTIONS_PER_IMAGE > 0, "positive"),
        (
            "TEST.EXPECTED_RESULTS",
            all(map(_is_expected, test.EXPECTED_RESULTS)),
            "of [task, metric, value, tolerance]",
        ),
        ("TEST.PRECISE_BN.NUM_ITER", test.PRECISE_BN.NUM_ITER > 0 or not test.PRECISE_BN.ENABLED, "positive"),
    ]
    values = flat(cfg)
    yield from (f"{key} is {values[key]!r}; it must be {rule}" for key, holds, rule in rules if not holds)


def _is_expected(item: Any) -> bool:
    numbers = item[2:] if isinstance(item, list | tuple) and len(item) == 4 else ("",)
    return all(isinstance(number, int | float) for number in numbers)


def _augmentation_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield why Detectron2 has no test-time augmentation for a detector, where ``TEST.AUG`` asks for it."""
    model, augmentation = cfg.MODEL, cfg.TEST.AUG
    if not augmentation.ENABLED:
        return
    architecture = META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
    unable = {
        f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}": not (
            isinstance(architecture, type)
            and issubclass(architecture, GeneralizedRCNN)
            and not issubclass(architecture, PanopticFPN)
        ),
        "MODEL.KEYPOINT_ON True": model.KEYPOINT_ON,
        "MODEL.LOAD_PROPOSALS True": model.LOAD_PROPOSALS,
    }
    for setting in (setting for setting, holds in unable.items() if holds):
        yield (
            "TEST.AUG.ENABLED is True, but Detectron2's test-time augmentation is for boxes and masks of "
            f"GeneralizedRCNN, and does not know {setting}: pass TEST.AUG.ENABLED False"
        )
    if not augmentation.MIN_SIZES or min(augmentation.MIN_SIZES) < 1:
        yield f"TEST.AUG.MIN_SIZES is {augmentation.MIN_SIZES}; it must name the short sides of the pictures, in pixels"


def _picture_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield what is wrong with how pictures are read and fed, and with what of the detector is frozen or sampled."""
    inputs, model = cfg.INPUT, cfg.MODEL
    rules = [
        ("INPUT.FORMAT", inputs.FORMAT in ("RGB", "BGR"), "RGB or BGR"),
        ("INPUT.MIN_SIZE_TRAIN", min(inputs.MIN_SIZE_TRAIN, default=1) > 0, "of sizes above 0"),
        ("INPUT.MIN_SIZE_TEST", inputs.MIN_SIZE_TEST >= 0, "positive, or 0 for pictures as they are"),
        ("INPUT.CROP.SIZE", len(inputs.CROP.SIZE) == 2 and min(inputs.CROP.SIZE) > 0, "height and width, above 0"),
        ("MODEL.PIXEL_MEAN", len(model.PIXEL_MEAN) == 3, "three numbers"),
        ("MODEL.PIXEL_STD", len(model.PIXEL_STD) == 3 and min(model.PIXEL_STD) > 0, "three numbers above 0"),
        ("MODEL.BACKBONE.FREEZE_AT", 0 <= model.BACKBONE.FREEZE_AT <= 5, "0 (nothing is frozen) to 5 (all stages are)"),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", model.RPN.BATCH_SIZE_PER_IMAGE > 0, "positive"),
        ("SOLVER.GAMMA", cfg.SOLVER.GAMMA > 0, "positive"),
    ]
    values = flat(cfg)
    yield from (f"{key} is {values[key]!r}; it must be {rule}" for key, holds, rule in rules if not holds)


def _dataset_problems(cfg: CfgNode, name: str) -> Iterator[str]:
    if name not in DatasetCatalog:
        yield f"no data set {name!r} is registered{did_you_mean(name, DatasetCatalog.list(), most=3)}"
        return
    meta = MetadataCatalog.get(name)
    files = {path: PathManager.exists(path) for path in _dataset_files(name)}
    if not all(files.values()):
        root = os.getenv("DETECTRON2_DATASETS")
        said = f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is not set, so ./datasets is used"
        yield (
            f"data set {name!r} is not there ({said}); it consists of:\n"
            + "\n".join(f"    {path}{'' if there else '   <- missing'}" for path, there in files.items())
            + "\n  datasets/README.md shows the expected folders"
        )
    elif not meta.get("custom") and (name in cfg.DATASETS.TEST or is_voc_list(name)):  # a custom one is checked already
        yield from _missing_pictures(name, read=name in cfg.DATASETS.TEST)
    key, kind = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE, ("", ""))
    classes = meta.get(kind)
    if classes and len(classes) != cfg.MODEL[key].NUM_CLASSES:
        yield f"data set {name!r} has {len(classes)} classes: pass MODEL.{key}.NUM_CLASSES {len(classes)}"


def _missing_pictures(name: str, read: bool) -> Iterator[str]:
    try:
        problem = missing_files(name, listed_files(name))
        if read and not problem and is_voc_list(name):  # Other lists are in the labels, which have been read by now.
            DatasetCatalog.get(name)
    except Exception as error:  # loaders raise anything, AssertionError and KeyError included
        problem = unreadable(name, error)
    if problem:
        yield problem


def _class_problems(cfg: CfgNode, names: Sequence[str]) -> Iterator[str]:
    """Yield the data sets whose classes, by number, are not those of the first one."""
    _, kind = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE, ("", ""))
    known = [name for name in names if name in DatasetCatalog and MetadataCatalog.get(name).get(kind)]
    for name in known[1:]:
        first, other = (list(MetadataCatalog.get(n).get(kind)) for n in (known[0], name))
        pairs = enumerate(itertools.zip_longest(first, other, fillvalue="nothing"))
        different = [(number, a, b) for number, (a, b) in pairs if a != b]
        if different:
            number, a, b = different[0]
            yield (
                f"data sets {known[0]!r} and {name!r} number their classes differently: {number} is {a} in one and {b} "
                "in the other. Give them the same list of classes in DATASETS.CUSTOM"
            )


def _dataset_files(name: str) -> Sequence[str]:
    """Return what must be on disk, as far as the metadata say."""
    meta = MetadataCatalog.get(name)
    if meta.get("custom"):  # read when it was registered
        return []
    if meta.get("dirname") and meta.get("split"):  # VOC
        split = os.path.join("ImageSets", "Main", f"{meta.split}.txt")
        return [os.path.join(meta.dirname, part) for part in (split, "Annotations", "JPEGImages")]
    if meta.get("evaluator_type") == "lvis":  # COCO's pictures; LVIS's val has some of COCO's train
        folders = ("train2017",) if name.endswith("train") else ("train2017", "val2017")
        return [meta.json_file, *(os.path.join(meta.image_root, folder) for folder in folders)]
    # COCO (json_file, image_root), semantic segmentation (sem_seg_root), Cityscapes (image_dir, gt_dir), ...
    keys = ("split_file", "json_file", "image_root", "sem_seg_root", "image_dir", "gt_dir", "panoptic_root")
    return [meta.get(key) for key in keys if meta.get(key)]

"""Preflight checks of a fine-tuning run: a mistake in the config ends it in seconds, before any label file is read."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
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
from moco_d2.detection.backbones import backbone_problems
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.metrics.evaluators import evaluator_type
from moco_d2.detection.missing import is_voc_list, listed_files, missing_files, needed_files, unreadable
from moco_d2.detection.optimizer import OPTIMIZERS
from moco_d2.detection.proposals import proposal_problems
from moco_d2.detection.weights import all_names, load_weights, pretrained_names
from moco_d2.messages import did_you_mean, unknown_name
from moco_d2.running.checkpoints import check_resumable, last_intact
from moco_d2.running.compilation import compile_problem
from moco_d2.running.dry_run import quiet
from moco_d2.running.folder import refuse_to_overwrite
from moco_d2.running.precision import TF32

logger = logging.getLogger(__name__)

# The key of an architecture's NUM_CLASSES, and the metadata that name those classes.
_CLASSES = {
    "GeneralizedRCNN": ("ROI_HEADS", "thing_classes"),
    "RetinaNet": ("RETINANET", "thing_classes"),
    "SemanticSegmentor": ("SEM_SEG_HEAD", "stuff_classes"),
}
# The group of keys whose IN_FEATURES the anchors lie on.
_ANCHORS = {"GeneralizedRCNN": "RPN", "PanopticFPN": "RPN", "ProposalNetwork": "RPN", "RetinaNet": "RETINANET"}

_FLIPS = ("horizontal", "vertical", "none")


def fit_to_machine(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return the config as this machine can run it; every change is logged.

    Without a GPU the device is the CPU. In several CPU processes ``nn.SyncBatchNorm`` does not work; naiveSyncBN, which
    synchronises by plain collectives (:mod:`moco_d2.detection.sync_norm`), replaces it. The heads get the variant that
    weighs processes by their number of boxes. The CPU computes in float32: Detectron2's AMP works on GPUs only.
    """
    cfg = cfg.clone()
    cfg.defrost()
    use_available_device(cfg)
    if cfg.MODEL.DEVICE == "cpu" and cfg.SOLVER.AMP.ENABLED:
        cfg.SOLVER.AMP.ENABLED = False
        logger.warning("AMP does not work on the CPU: SOLVER.AMP.ENABLED is False")
    if cfg.MODEL.DEVICE == "cpu" and world_size > 1:
        for name, node in cfg.MODEL.items():
            if isinstance(node, CfgNode) and node.get("NORM") in ("SyncBN", "nnSyncBN"):
                node.NORM = "naiveSyncBN_N" if name.startswith("ROI_") else "naiveSyncBN"
                logger.warning("SyncBN does not work in CPU processes: MODEL.%s.NORM is %s", name, node.NORM)
    cfg.freeze()
    return cfg


def scale_to_processes(cfg: CfgNode, world_size: int) -> CfgNode:
    """Return the config for another number of processes than its ``SOLVER.REFERENCE_WORLD_SIZE``.

    Batch and lr are multiplied by the ratio, iterations divided by it (Detectron2's ``auto_scale_workers``).
    ``SOLVER.ACCUMULATE`` batches count as that many processes. Precise-BN sees the same number of images.

    Args:
        cfg: config as written.
        world_size: number of processes.

    Raises:
        ValueError: the batch cannot be divided among the reference processes.
    """
    reference, accumulate = cfg.SOLVER.REFERENCE_WORLD_SIZE, max(1, cfg.SOLVER.ACCUMULATE)
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the {reference} processes "
            "that the config is written for (SOLVER.REFERENCE_WORLD_SIZE). To use batch, lr and schedule without "
            "scaling, pass SOLVER.REFERENCE_WORLD_SIZE 0"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size * accumulate).clone()
    scaled.defrost()
    forward = scaled.SOLVER.IMS_PER_BATCH / accumulate  # images in one forward pass, all processes together
    scaled.TEST.PRECISE_BN.NUM_ITER = round(cfg.TEST.PRECISE_BN.NUM_ITER * cfg.SOLVER.IMS_PER_BATCH / forward)
    period = max(1, cfg.SOLVER.CHECKPOINT_PERIOD)
    scaled.SOLVER.CHECKPOINT_KEEP_EVERY = cfg.SOLVER.CHECKPOINT_KEEP_EVERY * scaled.SOLVER.CHECKPOINT_PERIOD // period
    scaled.freeze()
    return scaled


def changes(asked: CfgNode, used: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Return ``{key: (value written, value used)}`` for the keys in which two configs differ."""
    before, after = flat(asked), flat(used)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def check_run(cfg: CfgNode, world_size: int, train: bool = True) -> None:
    """Check settings, batch and data sets, and that each test set has an evaluator and its pictures.

    The pictures of training sets are looked for after their labels are read, except VOC's, which text files list.

    Args:
        cfg: config of the detector.
        world_size: number of processes.
        train: whether the training sets are needed.

    Raises:
        ValueError: lists all problems.
    """
    problems = list(run_problems(cfg, world_size, train))
    if problems:
        raise ValueError("\n".join(problems))


def run_problems(cfg: CfgNode, world_size: int, train: bool = True) -> Iterator[str]:
    """Yield the problems that :func:`check_run` lists."""
    mistyped = mistyped_keys(cfg, DETECTION).values()
    yield from mistyped
    yield from unread_keys(cfg, DETECTION)
    if mistyped:  # A value of another type cannot be compared with a range.
        return
    yield from _range_problems(cfg)
    yield from backbone_problems(cfg)
    yield from _anchor_problems(cfg)
    yield from _augmentation_problems(cfg)
    yield from proposal_problems(cfg, train)
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
        ValueError: a fresh start would overwrite a run in ``OUTPUT_DIR``, or the checkpoint there cannot be resumed.
    """
    if not resume:
        refuse_to_overwrite(cfg.OUTPUT_DIR)
        return cfg.MODEL.WEIGHTS, False
    path = last_intact(cfg.OUTPUT_DIR)
    if path:
        check_resumable(path)
    return path or cfg.MODEL.WEIGHTS, bool(path)


def check_weights(cfg: CfgNode, resume: bool = False) -> None:
    """Load the weights into a temporary detector on the CPU, so that a bad file shows before data are read.

    Raises:
        ValueError: see :func:`moco_d2.detection.weights.load_weights` and :func:`starting_point`.
    """
    path, resuming = starting_point(cfg, resume)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    # The trainer's own initialisation follows from the seed and must not depend on this one.
    with torch.random.fork_rng(devices=[]):
        with building():
            model = build_model(cfg)
        checkpointer = TransferCheckpointer(model)
        load_weights(checkpointer, cfg, path, all_names if resuming else pretrained_names)


def check_resume(cfg: CfgNode) -> None:
    """Check, for a dry run with ``--resume``, that the run's checkpoint (if there is one) fits the detector.

    Raises:
        ValueError: see :func:`check_weights`.
    """
    found = last_intact(cfg.OUTPUT_DIR)
    with quiet():
        if found:
            check_weights(cfg, resume=True)


@contextmanager
def building() -> Iterator[None]:
    """Turn what Detectron2 raises when it cannot build a detector from ``MODEL`` into a ValueError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        library = next((name for name in ("detectron2", "fvcore", "torch") if f"/{name}/" in place.filename), "")
        if not library or "CUDA" in str(error):  # a fault of ours, of the user's own code, or of the machine
            raise
        raise ValueError(
            f"{library} cannot build this detector: {type(error).__name__}: {' '.join(str(error).split())[:300]} (at "
            f"`{place.line}` of {Path(place.filename).name}); {_remedy(error)}"
        ) from error


def _remedy(error: BaseException) -> str:
    missing = str(error.args[0]) if isinstance(error, KeyError) and error.args else ""
    if re.fullmatch(r"stem|(res|p)\d", missing):
        return (
            f"the backbone has no output {missing}: correct the IN_FEATURES of MODEL, or what decides the strides of "
            "the outputs (with a ViT MODEL.VIT.PATCH_SIZE and SCALES)"
        )
    return "correct the keys of MODEL that cause it"


def _batch_problems(cfg: CfgNode, world_size: int) -> Iterator[str]:
    batch, accumulate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    if accumulate < 1:
        yield f"SOLVER.ACCUMULATE is {accumulate}; it must be at least 1"
    elif batch < world_size * accumulate or batch % (world_size * accumulate):
        yield f"SOLVER.IMS_PER_BATCH is {batch}; it must be a multiple of {world_size} (the number of processes)" + (
            f" times {accumulate} (SOLVER.ACCUMULATE)" if accumulate > 1 else ""
        )
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        yield f"SOLVER.CHECKPOINT_PERIOD is {cfg.SOLVER.CHECKPOINT_PERIOD}; it must be at least 1"
    if cfg.ENGINE.AUTOCAST not in ("", "bfloat16"):
        yield f"ENGINE.AUTOCAST is {cfg.ENGINE.AUTOCAST!r}; it must be bfloat16, or empty"
    if problem := compile_problem(cfg, sizes_vary=True):
        yield problem
    if cfg.ENGINE.TF32 not in ("", *TF32):
        yield unknown_name("ENGINE.TF32", cfg.ENGINE.TF32, ["", *TF32])
    if cfg.SOLVER.AMP.ENABLED and (accumulate > 1 or cfg.ENGINE.AUTOCAST):
        yield (
            "SOLVER.AMP.ENABLED (float16) cannot be combined with SOLVER.ACCUMULATE or ENGINE.AUTOCAST: pass "
            "SOLVER.AMP.ENABLED False and, for mixed precision, ENGINE.AUTOCAST bfloat16"
        )
    if not cfg.DATASETS.TRAIN:
        yield "DATASETS.TRAIN is empty; name a registered data set"


def _range_problems(cfg: CfgNode) -> Iterator[str]:
    solver, test, inputs, model = cfg.SOLVER, cfg.TEST, cfg.INPUT, cfg.MODEL
    rules = [
        ("DATA.MAX_PIXELS", cfg.DATA.MAX_PIXELS > 0, "positive"),
        ("DATA.DRY_RUN_PICTURES", cfg.DATA.DRY_RUN_PICTURES >= 0, "a number of pictures, or 0 for all"),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS >= 0, "0 (no worker processes) or more"),
        ("SEED", cfg.SEED < 2**32, "below 2**32, or -1 to have one drawn"),
        ("SOLVER.MAX_ITER", solver.MAX_ITER > 0, "positive"),
        ("SOLVER.BASE_LR", solver.BASE_LR > 0, "positive"),
        ("SOLVER.OPTIMIZER", solver.OPTIMIZER in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)} in fine-tuning"),
        ("SOLVER.LAYER_DECAY", 0 < solver.LAYER_DECAY <= 1, "in (0, 1]"),
        ("SOLVER.MOMENTUM", 0 <= solver.MOMENTUM < 1, "in [0, 1)"),
        ("SOLVER.NESTEROV", solver.MOMENTUM > 0 or not solver.NESTEROV, "False without SOLVER.MOMENTUM"),
        ("SOLVER.WEIGHT_DECAY", solver.WEIGHT_DECAY >= 0, "0 or more"),
        ("SOLVER.WARMUP_ITERS", solver.WARMUP_ITERS >= 0, "0 (no warm-up) or more"),
        ("SOLVER.STEPS", list(solver.STEPS) == sorted(set(solver.STEPS)), "iterations in rising order"),
        ("SOLVER.GAMMA", solver.GAMMA > 0, "positive"),
        ("SOLVER.REFERENCE_WORLD_SIZE", solver.REFERENCE_WORLD_SIZE >= 0, "a number of processes, or 0"),
        ("SOLVER.CHECKPOINT_KEEP", solver.CHECKPOINT_KEEP >= 0, "positive, or 0 to keep all"),
        ("SOLVER.CHECKPOINT_KEEP_EVERY", solver.CHECKPOINT_KEEP_EVERY >= 0, "0 or more"),
        ("INPUT.FORMAT", inputs.FORMAT in ("RGB", "BGR"), "RGB or BGR"),
        (
            "INPUT.MIN_SIZE_TRAIN",
            min(inputs.MIN_SIZE_TRAIN, default=1 if inputs.RANDOM_SCALE else 0) > 0,
            "one or more short sides in pixels, above 0",
        ),
        (
            "INPUT.JITTER.SCALE",
            not inputs.JITTER.SCALE
            or (len(inputs.JITTER.SCALE) == 2 and 0 < inputs.JITTER.SCALE[0] <= inputs.JITTER.SCALE[1]),
            "two positive factors, the smaller first, or ()",
        ),
        ("INPUT.JITTER.SIZE", inputs.JITTER.SIZE > 0, "positive"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", inputs.MIN_SIZE_TRAIN_SAMPLING in ("choice", "range"), "choice or range"),
        ("INPUT.RANDOM_FLIP", inputs.RANDOM_FLIP in _FLIPS, f"one of {', '.join(_FLIPS)}"),
        ("INPUT.MAX_SIZE_TRAIN", inputs.MAX_SIZE_TRAIN > 0, "positive"),
        ("INPUT.MIN_SIZE_TEST", inputs.MIN_SIZE_TEST >= 0, "positive, or 0 for pictures in their own size"),
        ("INPUT.CROP.SIZE", len(inputs.CROP.SIZE) == 2 and min(inputs.CROP.SIZE) > 0, "height and width, above 0"),
        ("MODEL.PIXEL_MEAN", len(model.PIXEL_MEAN) == 3, "three numbers"),
        ("MODEL.PIXEL_STD", len(model.PIXEL_STD) == 3 and min(model.PIXEL_STD) > 0, "three numbers above 0"),
        ("MODEL.BACKBONE.FREEZE_AT", 0 <= model.BACKBONE.FREEZE_AT <= 5, "0 (nothing is frozen) to 5 (all stages are)"),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", model.RPN.BATCH_SIZE_PER_IMAGE > 0, "positive"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", model.ROI_HEADS.BATCH_SIZE_PER_IMAGE > 0, "positive"),
        ("TEST.DETECTIONS_PER_IMAGE", test.DETECTIONS_PER_IMAGE > 0, "positive"),
        (
            "TEST.EXPECTED_RESULTS",
            all(map(_is_expected, test.EXPECTED_RESULTS)),
            "a list of [task, metric, value, tolerance]",
        ),
        ("TEST.PRECISE_BN.NUM_ITER", test.PRECISE_BN.NUM_ITER > 0 or not test.PRECISE_BN.ENABLED, "positive"),
    ]
    values = flat(cfg)
    yield from (f"{key} is {values[key]!r}; it must be {rule}" for key, holds, rule in rules if not holds)


def _is_expected(item: Any) -> bool:
    numbers = item[2:] if isinstance(item, list | tuple) and len(item) == 4 else ("",)
    return all(isinstance(number, int | float) for number in numbers)


def _anchor_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield what is wrong with the lists of anchors: one list of positive numbers for each feature map, or for all."""
    model, generator = cfg.MODEL, cfg.MODEL.ANCHOR_GENERATOR
    reader = _ANCHORS.get(model.META_ARCHITECTURE)
    precomputed = reader == "RPN" and model.PROPOSAL_GENERATOR.NAME != "RPN"
    if not reader or precomputed or generator.NAME != "DefaultAnchorGenerator":
        return
    key, features = f"MODEL.{reader}.IN_FEATURES", model[reader].IN_FEATURES
    if not features:
        yield f"{key} is {features!r}; it must name one or more feature maps of the backbone"
        return
    counts = []
    for name in ("SIZES", "ASPECT_RATIOS"):
        lists = generator[name]
        if len(lists) not in (1, len(features)) or not all(
            numbers and 0 < min(numbers) <= max(numbers) < math.inf for numbers in lists
        ):
            yield (
                f"MODEL.ANCHOR_GENERATOR.{name} is {lists!r}; it must be one list of positive numbers for all feature "
                f"maps, or one list for each of the {len(features)} in {key}"
            )
            return
        counts.append([len(numbers) for numbers in lists])
    sizes, ratios = (numbers * len(features) if len(numbers) == 1 else numbers for numbers in counts)
    anchors = {a * b for a, b in zip(sizes, ratios, strict=True)}
    if len(anchors) > 1:
        yield (
            "MODEL.ANCHOR_GENERATOR.SIZES times ASPECT_RATIOS gives "
            f"{' or '.join(map(str, sorted(anchors)))} anchors a position; all feature maps must have equally many"
        )


def _augmentation_problems(cfg: CfgNode) -> Iterator[str]:
    """Yield why Detectron2 has no test-time augmentation for a detector, if ``TEST.AUG`` is enabled."""
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
            "TEST.AUG.ENABLED is True, but Detectron2's test-time augmentation supports only boxes and masks of "
            f"GeneralizedRCNN, not {setting}: pass TEST.AUG.ENABLED False"
        )
    if not augmentation.MIN_SIZES or min(augmentation.MIN_SIZES) < 1:
        yield f"TEST.AUG.MIN_SIZES is {augmentation.MIN_SIZES}; it must be one or more short sides in pixels, above 0"


def _dataset_problems(cfg: CfgNode, name: str) -> Iterator[str]:
    if name not in DatasetCatalog:
        yield f"no data set {name!r} is registered{did_you_mean(name, DatasetCatalog.list(), most=3)}"
        return
    meta = MetadataCatalog.get(name)
    files = {path: PathManager.exists(path) for path in needed_files(name)}
    if not all(files.values()):
        root = os.getenv("DETECTRON2_DATASETS")
        place = f"DETECTRON2_DATASETS is {root}" if root else "DETECTRON2_DATASETS is not set, so ./datasets is used"
        yield (
            f"data set {name!r} is incomplete ({place}); it consists of:\n"
            + "\n".join(f"    {path}{'' if there else '   <- missing'}" for path, there in files.items())
            + "\n  datasets/README.md shows the expected folders"
        )
    elif not meta.get("custom") and (name in cfg.DATASETS.TEST or is_voc_list(name)):  # custom sets were checked before
        yield from _missing_pictures(name, read=name in cfg.DATASETS.TEST)
    key, kind = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE, ("", ""))
    classes = meta.get(kind)
    if classes and len(classes) != cfg.MODEL[key].NUM_CLASSES:
        yield f"data set {name!r} has {len(classes)} classes: pass MODEL.{key}.NUM_CLASSES {len(classes)}"


def _missing_pictures(name: str, read: bool) -> Iterator[str]:
    try:
        problem = missing_files(name, listed_files(name))
        if read and not problem and is_voc_list(name):  # listed_files() has read the labels of other sets
            DatasetCatalog.get(name)
    except Exception as error:  # loaders raise anything, AssertionError and KeyError included
        problem = unreadable(name, error)
    if problem:
        yield problem


def _class_problems(cfg: CfgNode, names: Sequence[str]) -> Iterator[str]:
    """Yield the data sets whose class numbers have other names than the first one's."""
    _, kind = _CLASSES.get(cfg.MODEL.META_ARCHITECTURE, ("", ""))
    known = [name for name in names if name in DatasetCatalog and MetadataCatalog.get(name).get(kind)]
    for name in known[1:]:
        first, other = (list(MetadataCatalog.get(n).get(kind)) for n in (known[0], name))
        pairs = enumerate(itertools.zip_longest(first, other, fillvalue="nothing"))
        different = [(number, a, b) for number, (a, b) in pairs if a != b]
        if different:
            number, a, b = different[0]
            yield (
                f"data sets {known[0]!r} and {name!r} number their classes differently: class {number} is {a} in the "
                f"first and {b} in the second. Give them the same list of classes in DATASETS.CUSTOM"
            )

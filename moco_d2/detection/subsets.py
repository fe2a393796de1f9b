"""Subsets of the training images (``DATASETS.FRACTION``), to measure how many labels a pretraining saves.

Each image has a fixed place in an order that depends only on its id and on ``DATASETS.FRACTION_SEED``. A subset is the
beginning of that order. Subsets are therefore nested (1% is part of 2%), and depend neither on the order of the
labels nor on a library's random generator. (Detectron2's ``RandomSubsetTrainingSampler`` draws anew in every run.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_few_keypoints, filter_images_with_only_crowd_annotations
from detectron2.utils import comm

from moco_d2.detection.missing import unreadable
from moco_d2.io.files import atomic_write

logger = logging.getLogger(__name__)

FILE = "training_subset.json"


def select(ids: Sequence[str], percent: float, seed: int = 0) -> list[int]:
    """Choose images at random, the same ones for the same ids and seed.

    Args:
        ids: one for each image, in any order.
        percent: share of the images, 0 < percent <= 100. The number of images is rounded, and at least 1.
        seed: seed of the draw.

    Returns:
        Increasing indices into ``ids``. The indices of a smaller percentage are among those of a larger one.

    Raises:
        ValueError: the percentage is out of range.
    """
    check_percent(percent)
    places = [hashlib.sha256(f"{seed} {image_id}".encode()).digest() for image_id in ids]
    order = sorted(range(len(ids)), key=lambda index: places[index])
    return sorted(order[: max(1, round(len(ids) * percent / 100))])


def check_percent(percent: float) -> None:
    """Raise ValueError if ``percent`` is not a valid ``DATASETS.FRACTION``."""
    if not 0 < percent <= 100:
        raise ValueError(f"DATASETS.FRACTION is {percent}; it must be a percentage, above 0 and at most 100")


def training_records(cfg: CfgNode, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the images of training sets, without those that Detectron2's own loader leaves out.

    Args:
        cfg: config of the detector.
        names: the data sets.

    Raises:
        ValueError: the labels cannot be read, or no image has an object to train on.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None
    try:
        found = get_detection_dataset_dicts(names, filter_empty=False, proposal_files=proposals)
    except Exception as error:  # loaders raise anything
        raise ValueError(next(filter(None, map(_fault, names)), f"{type(error).__name__}: {error}")) from error
    records = list(found)
    _check_crowds(records)
    if isinstance(found, list) and "annotations" in records[0]:  # Detectron2 filters no other kind of data set.
        if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
            records = filter_images_with_only_crowd_annotations(records)
        if keypoints:
            records = filter_images_with_few_keypoints(records, keypoints)
    if not records:
        raise ValueError(
            f"no picture of {', '.join(names)} has an object to train on: it needs one that is not a crowd"
            + f", and {keypoints} keypoints (MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE)" * bool(keypoints)
        )
    return records


def _check_crowds(records: Sequence[dict[str, Any]]) -> None:
    """Refuse a crowd flag other than 0 and 1, because Detectron2 leaves out such an object without a word."""
    for record in records:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0) not in (0, 1):
                raise ValueError(
                    f"{record['file_name']}: an annotation (bbox {annotation.get('bbox')}) has iscrowd "
                    f"{annotation['iscrowd']!r}; it must be 0 or 1: correct it in the labels"
                )


def _fault(name: str) -> str:
    """Return why a data set cannot be read; empty if it can."""
    try:
        DatasetCatalog.get(name)
    except Exception as error:
        return unreadable(name, error)
    return ""


def training_set(cfg: CfgNode) -> list[dict[str, Any]] | None:
    """Choose the images to train on. A proper subset is listed in ``OUTPUT_DIR/training_subset.json``.

    Args:
        cfg: config of the detector.

    Returns:
        Their records, or None for all images of ``DATASETS.TRAIN``: the argument ``dataset`` of Detectron2's
        ``build_detection_train_loader``.

    Raises:
        ValueError: ``DATASETS.FRACTION`` is out of range.
    """
    percent, seed = cfg.DATASETS.FRACTION, cfg.DATASETS.FRACTION_SEED
    check_percent(percent)
    if percent == 100:
        return None
    records = training_records(cfg, cfg.DATASETS.TRAIN)
    # With the file's name, as two data sets may use the same ids; without its folder, which differs between machines.
    ids = [f"{record.get('image_id', '')} {os.path.basename(record['file_name'])}" for record in records]
    chosen = [records[index] for index in select(ids, percent, seed)]
    logger.info("DATASETS.FRACTION: %g%% of the labels, %d of %d images", percent, len(chosen), len(records))
    if comm.is_main_process():
        content = {
            "datasets": list(cfg.DATASETS.TRAIN), "percent": percent, "seed": seed, "images_in_all": len(records),
            "image_ids": [record.get("image_id", os.path.basename(record["file_name"])) for record in chosen],
        }  # fmt: skip
        with atomic_write(os.path.join(cfg.OUTPUT_DIR, FILE)) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    return chosen

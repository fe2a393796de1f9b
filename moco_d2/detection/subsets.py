"""A part of the training images, for the question how much a pretraining saves in labels.

``DATASETS.FRACTION`` percent of the images are kept. Each image has a fixed place in an order that follows from its id
and ``DATASETS.FRACTION_SEED`` alone, and a subset is the order's beginning. So subsets are nested (1% lies within 2%),
and neither the order of the data set's files nor a library's random generator moves them. (Detectron2's
``RandomSubsetTrainingSampler`` draws anew in every run.)
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
from detectron2.utils import comm

from moco_d2.detection.missing import unreadable
from moco_d2.io.files import atomic_write

logger = logging.getLogger(__name__)

FILE = "training_subset.json"


def select(ids: Sequence[str], percent: float, seed: int = 0) -> list[int]:
    """Choose images at random, the same ones for the same ids and seed.

    Args:
        ids: one an image, in any order.
        percent: how many of them, 0 < percent <= 100; rounded, and at least one image.
        seed: of the draw.

    Returns:
        Increasing indices into ``ids``. Those of a smaller percentage are among those of a larger one.

    Raises:
        ValueError: the percentage is out of range.
    """
    check_percent(percent)
    places = [hashlib.sha256(f"{seed} {image_id}".encode()).digest() for image_id in ids]
    order = sorted(range(len(ids)), key=lambda index: places[index])
    return sorted(order[: max(1, round(len(ids) * percent / 100))])


def check_percent(percent: float) -> None:
    """Raise ValueError unless ``percent`` can be a ``DATASETS.FRACTION``."""
    if not 0 < percent <= 100:
        raise ValueError(f"DATASETS.FRACTION is {percent}; it must be a percentage above 0 and at most 100")


def training_records(cfg: CfgNode, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the images of training sets as Detectron2's own loader takes them: without those that have no object.

    Args:
        cfg: config of the detector.
        names: the data sets.

    Raises:
        ValueError: the labels cannot be read, or no image is left.
    """
    try:
        return list(
            get_detection_dataset_dicts(
                names,
                filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
                proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
            )
        )
    except Exception as error:  # loaders raise anything
        if not str(error).startswith("No valid data found"):
            raise ValueError(next(filter(None, map(_fault, names)), f"{type(error).__name__}: {error}")) from error
        raise ValueError(
            f"no picture of {', '.join(names)} has an object to train on ({error}): a crowd is none, and "
            "with MODEL.KEYPOINT_ON a picture needs MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE keypoints"
        ) from None


def _fault(name: str) -> str:
    """Say why a data set cannot be read; empty if it can."""
    try:
        DatasetCatalog.get(name)
    except Exception as error:
        return unreadable(name, error)
    return ""


def training_set(cfg: CfgNode) -> list[dict[str, Any]] | None:
    """Choose the images to train on, and list them in ``OUTPUT_DIR/training_subset.json`` unless they are all.

    Args:
        cfg: config of the detector.

    Returns:
        The argument ``dataset`` of Detectron2's ``build_detection_train_loader``: their records, or None to let it read
        all of ``DATASETS.TRAIN``.

    Raises:
        ValueError: ``DATASETS.FRACTION`` is out of range.
    """
    percent, seed = cfg.DATASETS.FRACTION, cfg.DATASETS.FRACTION_SEED
    check_percent(percent)
    if percent == 100:
        return None
    records = training_records(cfg, cfg.DATASETS.TRAIN)
    # Not the path, which differs between machines. Two data sets may use the same ids for different images.
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

"""Precomputed proposals, read without running code: Detectron2 would open their files with plain pickle."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build
from detectron2.structures import BoxMode

from moco_d2.io.checkpoints import open_checkpoint
from moco_d2.io.errors import CheckpointError, some
from moco_d2.io.unpickle import Stub
from moco_d2.running.weights import local_path

logger = logging.getLogger(__name__)

_PRECOMPUTED = "PrecomputedProposals"
_KEYS = {"indexes": "ids", "scores": "objectness_logits"}  # Detectron's keys -> Detectron2's
_BOX_MODE = "detectron2.structures.boxes.BoxMode"


def proposal_problems(cfg: CfgNode, train: bool = True) -> Iterator[str]:
    """Yield the problems of the settings and files of precomputed proposals. Each file is read.

    Args:
        cfg: config of a detector.
        train: whether the training sets are used.
    """
    taken, precomputed = cfg.MODEL.LOAD_PROPOSALS, cfg.MODEL.PROPOSAL_GENERATOR.NAME == _PRECOMPUTED
    if taken != precomputed and cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        yield (
            f"MODEL.LOAD_PROPOSALS is {taken} and MODEL.PROPOSAL_GENERATOR.NAME is "
            f"{cfg.MODEL.PROPOSAL_GENERATOR.NAME}; to read proposals from files set them to True and {_PRECOMPUTED}, "
            "otherwise set neither"
        )
    used: list[str] = []
    for kind in ("TRAIN", "TEST") if taken else ():
        names, paths = cfg.DATASETS[kind], cfg.DATASETS[f"PROPOSAL_FILES_{kind}"]
        if kind == "TRAIN" and not train:
            continue
        if len(names) != len(paths):
            yield f"DATASETS.PROPOSAL_FILES_{kind} names {len(paths)} files; it must name one per data set"
            continue
        used += paths
    for path in dict.fromkeys(used):
        try:
            read_proposals(path)
        except ValueError as error:
            yield str(error)


def read_proposals(path: str) -> dict[str, Any]:
    """Read a file of proposals: ``ids``, ``boxes``, ``objectness_logits`` and ``bbox_mode`` (default ``XYXY_ABS``).

    Raises:
        ValueError: the file does not exist, would run code, or holds something else.
    """
    checkpoint = open_checkpoint(local_path(path, "the file of proposals"))
    content = {_KEYS.get(key, key): value for key, value in checkpoint.content.items()}
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    foreign = [name for name in checkpoint.stubbed if name != _BOX_MODE]
    lists: list[Any] = [content.get(key) for key in ("ids", "boxes", "objectness_logits")]
    if foreign or not all(isinstance(items, list | np.ndarray) for items in lists):
        what = f"refers to code ({some(foreign, 3)})" if foreign else "is not a file of proposals"
        raise CheckpointError(
            f"{path} {what}; it must be a pickle of the lists `ids`, `boxes` and `objectness_logits` (the last two of "
            "arrays), as Detectron2 writes it"
        )
    if len({len(items) for items in lists}) > 1:
        raise CheckpointError(f"{path}: `ids`, `boxes` and `objectness_logits` differ in length; write the file again")
    try:
        content["bbox_mode"] = BoxMode(mode.arguments[0] if isinstance(mode, Stub) else mode)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: `bbox_mode` is not a BoxMode of Detectron2; write the file again") from error
    return content


def load_proposals(records: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """Add proposals to a data set's records, in place of Detectron2's ``load_proposals_into_dataset``.

    Args:
        records: the data set's records; they are changed.
        path: the file of proposals.

    Returns:
        The records.

    Raises:
        ValueError: the file cannot be read, or has no proposals for a picture.
    """
    logger.info("loading proposals from %s", path)
    content = read_proposals(path)
    place = {str(name): number for number, name in enumerate(content["ids"])}
    if missing := [str(record["image_id"]) for record in records if str(record["image_id"]) not in place]:
        raise ValueError(
            f"{path} has no proposals for {len(missing)} of {len(records)} pictures (image_id {some(missing, 3)}); "
            "name the file that was made for this data set"
        )
    for record in records:
        record |= _of_picture(content, place[str(record["image_id"])])
    return records


def _of_picture(content: Mapping[str, Any], number: int) -> dict[str, Any]:
    boxes, scores = (np.asarray(content[key][number]) for key in ("boxes", "objectness_logits"))
    order = scores.argsort()[::-1]
    return {
        "proposal_boxes": boxes[order],
        "proposal_objectness_logits": scores[order],
        "proposal_bbox_mode": content["bbox_mode"],
    }


def with_proposals(cfg: CfgNode, name: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a test set's records, with their proposals if the detector reads them from files."""
    if not cfg.MODEL.LOAD_PROPOSALS:
        return records
    return load_proposals(records, cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)])


# Detectron2 calls it by this name wherever it reads data sets, also in its own training script.
build.load_proposals_into_dataset = load_proposals

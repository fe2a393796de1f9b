"""The evaluator of a test set, chosen by what the data set says about itself (``evaluator_type`` in its metadata)."""

from __future__ import annotations

import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator that a test set asks for.

    Args:
        cfg: config of the detector; its tasks and ``OUTPUT_DIR`` are used.
        dataset_name: a registered data set.

    Raises:
        ValueError: the data set names no evaluator, or one that is not supported.
    """
    return EVALUATORS[evaluator_type(dataset_name)](cfg, dataset_name)


def evaluator_type(dataset_name: str) -> str:
    """Return the ``evaluator_type`` of a data set, having checked that an evaluator exists for it.

    Raises:
        ValueError: there is none.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        said = f"evaluator_type {kind!r}" if kind else "no evaluator_type"
        raise ValueError(
            f"test set {dataset_name!r} has {said} in its metadata; it must be one of {', '.join(sorted(EVALUATORS))}. "
            f"Set it where the data set is registered: MetadataCatalog.get({dataset_name!r}).evaluator_type = ..."
        )
    return kind


def _coco(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    # The tasks are named, because Detectron2 would infer them from the predictions: a detector that finds nothing would
    # then lose its mask columns.
    tasks = ["bbox"] + ["segm"] * cfg.MODEL.MASK_ON + ["keypoints"] * cfg.MODEL.KEYPOINT_ON
    return COCOEvaluator(
        dataset_name,
        tasks=tuple(tasks),
        output_dir=os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name),
        # The official implementation when the compiled one did not load; Detectron2 decides that and says so.
        use_fast_impl=True,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _pascal_voc(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    # AP is the mean over IoU .50:.05:.95 of the year's own AP: 11 points for 2007, the area for 2012.
    return PascalVOCDetectionEvaluator(dataset_name)


EVALUATORS: dict[str, Callable[[CfgNode, str], DatasetEvaluator]] = {"coco": _coco, "pascal_voc": _pascal_voc}

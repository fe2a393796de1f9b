"""The evaluator of a test set, chosen by what the data set says about itself (``evaluator_type`` in its metadata)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any, NamedTuple
from unittest import mock

import detectron2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    DatasetEvaluator,
    SemSegEvaluator,
)
from detectron2.utils.file_io import PathManager
from PIL import Image

import moco_d2
from moco_d2.detection.metrics.coco import ExactCOCOEvaluator, SavedDetections, choose_backend, evaluated_with
from moco_d2.detection.metrics.lvis import ExactLVISEvaluator, choose_lvis_library
from moco_d2.detection.metrics.old_numpy import old_numpy_names
from moco_d2.detection.metrics.voc import VOCEvaluator
from moco_d2.io.files import file_name
from moco_d2.io.pictures import naming


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator that a test set asks for.

    Args:
        cfg: config of the detector; its tasks, ``TEST`` and ``OUTPUT_DIR`` are used.
        dataset_name: a registered data set.

    Raises:
        ValueError: see :func:`evaluator_type`.
    """
    return EVALUATORS[evaluator_type(dataset_name, cfg)].build(cfg, dataset_name)


def evaluator_type(dataset_name: str, cfg: CfgNode | None = None) -> str:
    """Return the ``evaluator_type`` of a data set, having checked that its evaluator exists and can run here.

    Args:
        dataset_name: a registered data set.
        cfg: config of the detector; given, what it asks of the evaluator is checked, too.

    Raises:
        ValueError: there is no such evaluator, a package that it needs is not installed, or the config does not fit it.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        said = f"evaluator_type {kind!r}" if kind else "no evaluator_type"
        raise ValueError(
            f"test set {dataset_name!r} has {said} in its metadata; it must be one of {', '.join(sorted(EVALUATORS))}. "
            f"Set it where the data set is registered: MetadataCatalog.get({dataset_name!r}).evaluator_type = ..."
        )
    missing = " ".join(package for package in EVALUATORS[kind].needs if importlib.util.find_spec(package) is None)
    if missing:
        raise ValueError(f"test set {dataset_name!r} needs {missing} to be read and evaluated: pip install {missing}")
    if cfg is not None and kind in ("coco", "lvis"):
        choose_backend(cfg.TEST.COCO_BACKEND)
    if cfg is not None and kind == "cityscapes_instance" and not cfg.MODEL.MASK_ON:
        raise ValueError(f"test set {dataset_name!r} is evaluated by masks: pass MODEL.MASK_ON True")
    return kind


def evaluate_file(cfg: CfgNode, dataset_name: str, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of detections in a file, which are those of the evaluation that saved it.

    Args:
        cfg: config; its ``TEST`` and ``OUTPUT_DIR`` are used.
        dataset_name: a registered data set.
        path: the file, as the data set's evaluator saves it.

    Raises:
        ValueError: the file is of another form or another data set, or no file can be evaluated on this one.
    """
    evaluator = build_evaluator(cfg, dataset_name)
    if not isinstance(evaluator, (SavedDetections, VOCEvaluator)):
        raise ValueError(
            f"{dataset_name!r} (evaluator_type {evaluator_type(dataset_name)}) cannot be evaluated from a file"
        )
    return evaluator.evaluate_file(path)


def describe_backend(cfg: CfgNode) -> dict[str, str]:
    """Return, for each test set, the library that computes its metrics and the library's version.

    After an evaluation it is what was used, which for a COCO file that is not plain differs from what the config says.
    """
    return {
        name: evaluated_with.get(name) or EVALUATORS[evaluator_type(name)].library(cfg.TEST.COCO_BACKEND)
        for name in cfg.DATASETS.TEST
    }


def _folder(cfg: CfgNode, dataset_name: str) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference", file_name(dataset_name))


def _tasks(cfg: CfgNode) -> tuple[str, ...]:
    # The tasks are named, because Detectron2 would infer them from the predictions: a detector that finds nothing would
    # then lose its mask columns.
    return ("bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON)


def _coco(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    return ExactCOCOEvaluator(
        dataset_name,
        cfg.TEST.COCO_BACKEND,
        tasks=_tasks(cfg),
        output_dir=_folder(cfg, dataset_name),
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def _lvis(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    tasks = tuple(task for task in _tasks(cfg) if task != "keypoints")
    return ExactLVISEvaluator(dataset_name, cfg.TEST.COCO_BACKEND, tasks=tasks, output_dir=_folder(cfg, dataset_name))


def _pascal_voc(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    return VOCEvaluator(dataset_name, output_dir=_folder(cfg, dataset_name))


class _CityscapesInstanceEvaluator(CityscapesInstanceEvaluator):
    def evaluate(self) -> Any:
        scripts = import_module("cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling")
        # They would write matches.json to the working directory, and fail at it with NumPy's whole numbers.
        with old_numpy_names(), mock.patch.object(scripts, "writeDict2JSON"):
            return super().evaluate()


class _CityscapesSemSegEvaluator(CityscapesSemSegEvaluator):
    def evaluate(self) -> Any:
        with old_numpy_names():
            return super().evaluate()


def _cityscapes_instance(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    return _CityscapesInstanceEvaluator(dataset_name)


def _cityscapes_sem_seg(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    return _CityscapesSemSegEvaluator(dataset_name)


def _sem_seg(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    return SemSegEvaluator(dataset_name, output_dir=_folder(cfg, dataset_name), sem_seg_loading_fn=_read_labels)


def _read_labels(path: str, dtype: Any = int) -> Any:
    """Read a picture of class indices; Detectron2's own function asks NumPy 2 for what it refuses (``copy=False``)."""
    with naming(path), PathManager.open(path, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


class Evaluator(NamedTuple):
    """What belongs to an ``evaluator_type``."""

    build: Callable[[CfgNode, str], DatasetEvaluator]
    # Names the library that computes, given TEST.COCO_BACKEND.
    library: Callable[[str], str]
    # Packages without which the data cannot be read or evaluated.
    needs: tuple[str, ...] = ()


def _version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


EVALUATORS: dict[str, Evaluator] = {
    "coco": Evaluator(_coco, lambda backend: str(choose_backend(backend))),
    "lvis": Evaluator(_lvis, lambda backend: str(choose_lvis_library(backend)), ("lvis",)),
    "pascal_voc": Evaluator(_pascal_voc, lambda _: f"moco_d2 {moco_d2.__version__}"),
    "cityscapes_instance": Evaluator(
        _cityscapes_instance, lambda _: _version("cityscapesscripts"), ("cityscapesscripts", "shapely")
    ),
    "cityscapes_sem_seg": Evaluator(
        _cityscapes_sem_seg, lambda _: _version("cityscapesscripts"), ("cityscapesscripts",)
    ),
    "sem_seg": Evaluator(_sem_seg, lambda _: f"detectron2 {detectron2.__version__}"),
}

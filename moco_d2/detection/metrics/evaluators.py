"""The evaluator of a test set, chosen by ``evaluator_type`` in the data set's metadata."""

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
from moco_d2.detection.metrics.coco import ExactCOCOEvaluator, SavedDetections, choose_backend
from moco_d2.detection.metrics.lvis import ExactLVISEvaluator, choose_lvis_library
from moco_d2.detection.metrics.old_numpy import old_numpy_names
from moco_d2.detection.metrics.voc import VOCEvaluator
from moco_d2.io.files import file_name
from moco_d2.io.pictures import naming


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator of a test set.

    Args:
        cfg: config of the detector; its tasks, ``TEST`` and ``OUTPUT_DIR`` are read.
        dataset_name: a registered data set.

    Raises:
        ValueError: see :func:`evaluator_type`.
    """
    return EVALUATORS[evaluator_type(dataset_name, cfg)].build(cfg, dataset_name)


def evaluator_type(dataset_name: str, cfg: CfgNode | None = None) -> str:
    """Return the ``evaluator_type`` of a data set after checking that its evaluator exists and can run.

    Args:
        dataset_name: a registered data set.
        cfg: config of the detector; if given, it is checked against the evaluator, too.

    Raises:
        ValueError: there is no such evaluator, a package that it needs is not installed, or the config does not fit it.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in EVALUATORS:
        found = f"evaluator_type {kind!r}" if kind else "no evaluator_type"
        raise ValueError(
            f"test set {dataset_name!r} has {found} in its metadata; it must be one of "
            f"{', '.join(sorted(EVALUATORS))}. Set it where the data set is registered: "
            f"MetadataCatalog.get({dataset_name!r}).evaluator_type = ..."
        )
    missing = " ".join(package for package in EVALUATORS[kind].needs if importlib.util.find_spec(package) is None)
    if missing:
        raise ValueError(
            f"test set {dataset_name!r} cannot be read and evaluated without {missing}: pip install {missing}"
        )
    if cfg is not None and kind in ("coco", "lvis"):
        choose_backend(cfg.TEST.COCO_BACKEND)
    if cfg is not None and kind == "cityscapes_instance" and not cfg.MODEL.MASK_ON:
        raise ValueError(f"test set {dataset_name!r} is evaluated by masks: pass MODEL.MASK_ON True")
    return kind


def evaluate_file(
    cfg: CfgNode, dataset_name: str, path: str | os.PathLike[str]
) -> tuple[dict[str, dict[str, float]], str]:
    """Evaluate the detections in a file; the metrics equal those of the evaluation that saved it.

    Args:
        cfg: config; its ``TEST`` and ``OUTPUT_DIR`` are read.
        dataset_name: a registered data set.
        path: the file, in the format in which the data set's evaluator saves detections.

    Returns:
        The metrics by task, and the library that computed them.

    Raises:
        ValueError: the file has another format or belongs to another data set, or this data set's evaluator does not
            save detections.
    """
    evaluator = build_evaluator(cfg, dataset_name)
    if not isinstance(evaluator, (SavedDetections, VOCEvaluator)):
        raise ValueError(
            f"{dataset_name!r} (evaluator_type {evaluator_type(dataset_name)}) cannot be evaluated from a file"
        )
    metrics = evaluator.evaluate_file(path)
    return metrics, library(cfg, dataset_name, evaluator)


def library(cfg: CfgNode, dataset_name: str, evaluator: DatasetEvaluator | None = None) -> str:
    """Return the library that computes a test set's metrics, with its version.

    Args:
        cfg: config; ``TEST.COCO_BACKEND`` is read.
        dataset_name: a registered data set.
        evaluator: if given, it has evaluated: it knows whether the reference library took over.
    """
    used = getattr(evaluator, "library", "")
    return used or EVALUATORS[evaluator_type(dataset_name)].library(cfg.TEST.COCO_BACKEND)


def _folder(cfg: CfgNode, dataset_name: str) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference", file_name(dataset_name))


def _tasks(cfg: CfgNode) -> tuple[str, ...]:
    # Detectron2 would infer the tasks from the predictions: a detector that finds nothing would lose its mask columns.
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
        # Without the patch the scripts write matches.json to the working directory, and fail on NumPy's integers.
        with old_numpy_names(), mock.patch.object(scripts, "writeDict2JSON"):
            return super().evaluate()


class _CityscapesSemSegEvaluator(CityscapesSemSegEvaluator):
    def evaluate(self) -> Any:
        with old_numpy_names():
            return super().evaluate()


def _sem_seg(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    return SemSegEvaluator(dataset_name, output_dir=_folder(cfg, dataset_name), sem_seg_loading_fn=_read_labels)


def _read_labels(path: str, dtype: Any = int) -> Any:
    """Read a picture of class indices. Detectron2's own function fails with NumPy 2 (``copy=False``)."""
    with naming(path), PathManager.open(path, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


class Evaluator(NamedTuple):
    """An ``evaluator_type``.

    Attributes:
        build: maps (config, data set's name) to the evaluator.
        library: maps ``TEST.COCO_BACKEND`` to the library that computes, with its version.
        needs: packages without which the data cannot be read or evaluated.
    """

    build: Callable[[CfgNode, str], DatasetEvaluator]
    library: Callable[[str], str]
    needs: tuple[str, ...] = ()


def _cityscapes_version(_: str) -> str:
    return f"cityscapesscripts {metadata.version('cityscapesscripts')}"


EVALUATORS: dict[str, Evaluator] = {
    "coco": Evaluator(_coco, lambda backend: str(choose_backend(backend))),
    "lvis": Evaluator(_lvis, lambda backend: str(choose_lvis_library(backend)), ("lvis",)),
    "pascal_voc": Evaluator(_pascal_voc, lambda _: f"moco_d2 {moco_d2.__version__}"),
    "cityscapes_instance": Evaluator(
        lambda _, name: _CityscapesInstanceEvaluator(name), _cityscapes_version, ("cityscapesscripts", "shapely")
    ),
    "cityscapes_sem_seg": Evaluator(
        lambda _, name: _CityscapesSemSegEvaluator(name), _cityscapes_version, ("cityscapesscripts",)
    ),
    "sem_seg": Evaluator(_sem_seg, lambda _: f"detectron2 {detectron2.__version__}"),
}

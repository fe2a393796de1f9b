"""LVIS's metrics with the numbers of the ``lvis`` package, computed by hotcoco if it is installed.

The labels are federated. Each image was searched for some categories only: those with objects in it, and a negative
set; detections of other categories do not count. Some categories were not labelled exhaustively; their unmatched
detections do not count either. The ``lvis`` package is always needed, because Detectron2 reads the data sets (v0.5
and v1) with it. Its own evaluation consists of Python loops and needs names of NumPy 1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from detectron2.evaluation import LVISEvaluator
from detectron2.utils.logger import create_small_table
from pycocotools import mask as mask_api

from moco_d2.detection.metrics.coco import BACKENDS, SavedDetections, labels_problem
from moco_d2.detection.metrics.old_numpy import old_numpy_names

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
MAX_DETECTIONS = 300  # per image


def _labels_problem(dataset: Mapping[str, Any]) -> str | None:
    for image in dataset["images"]:
        if not {"neg_category_ids", "not_exhaustive_category_ids"} <= image.keys():
            return f"image {image['id']} lacks neg_category_ids or not_exhaustive_category_ids"
    if any(label.get("ignore") or label.get("iscrowd") for label in dataset["annotations"]):
        return "annotations are marked ignore or iscrowd, which LVIS does not have"
    return labels_problem(dataset, crowds=False)


def _without_boxes(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Drop the boxes, so that a detection's area is its mask's."""
    return [{key: value for key, value in found.items() if key != "bbox"} for found in results]


def _by_lvis(labels: Any, results: Sequence[Mapping[str, Any]], task: str, limit: int) -> Mapping[str, float]:
    """Evaluate with the ``lvis`` package."""
    lvis = import_module("lvis")

    with old_numpy_names():
        evaluation = lvis.LVISEval(labels, lvis.LVISResults(labels, copy.deepcopy(list(results)), limit), task)
        evaluation.run()
    found: Mapping[str, float] = evaluation.get_results()
    return found


def _by_hotcoco(labels: Any, results: Sequence[Mapping[str, Any]], task: str, limit: int) -> Mapping[str, float]:
    """Evaluate with hotcoco. It has all rules of ``lvis`` but one: ``lvis`` ignores objects without area."""
    hotcoco = import_module("hotcoco")

    content = dict(labels.dataset)
    content["annotations"] = [label for label in content["annotations"] if label["area"] > 0]
    capped = [found for found in _capped(results, limit) if _area(found, task) > 0]
    dataset = hotcoco.COCO(content)
    evaluation = hotcoco.LVISEval(dataset, hotcoco.LVISResults(dataset, capped, max_dets=-1), task)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    found: Mapping[str, float] = evaluation.get_results()
    return found


def _capped(results: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Keep the ``limit`` best detections of each image, over all categories; of equal scores, the first ones."""
    if limit < 0:
        return list(results)
    images: dict[int, list[Mapping[str, Any]]] = {}
    for found in results:
        images.setdefault(found["image_id"], []).append(found)
    for image, found_there in images.items():
        if len(found_there) > limit:
            images[image] = sorted(found_there, key=lambda found: found["score"], reverse=True)[:limit]
    return list(itertools.chain.from_iterable(images.values()))


def _area(found: Mapping[str, Any], task: str) -> float:
    if task == "segm":
        return float(mask_api.area(found["segmentation"]))
    return float(found["bbox"][2] * found["bbox"][3])


@dataclass(frozen=True)
class Library:
    """A package that computes LVIS's metrics, and the function that calls it."""

    package: str
    evaluate: Callable[[Any, Sequence[Mapping[str, Any]], str, int], Mapping[str, float]]

    def __str__(self) -> str:
        return f"{self.package} {metadata.version(self.package)}"


HOTCOCO, REFERENCE = Library("hotcoco", _by_hotcoco), Library("lvis", _by_lvis)


def choose_lvis_library(backend: str) -> Library:
    """Return LVIS's library for a ``TEST.COCO_BACKEND``: hotcoco for ``hotcoco`` and ``auto``, otherwise lvis."""
    return HOTCOCO if backend in ("auto", "hotcoco") and BACKENDS[0].installed else REFERENCE


class ExactLVISEvaluator(SavedDetections, LVISEvaluator):
    """Detectron2's ``LVISEvaluator``, made fast and compatible with NumPy 2."""

    results_file = "lvis_instances_results.json"
    first_id = 1
    reference = REFERENCE

    def __init__(self, dataset_name: str, backend: str = "auto", **kwargs: Any) -> None:
        """Read the labels.

        Args:
            dataset_name: a registered data set.
            backend: the value of ``TEST.COCO_BACKEND``.
            **kwargs: see :class:`detectron2.evaluation.LVISEvaluator`.
        """
        super().__init__(dataset_name, **kwargs)
        self._set_up(dataset_name, choose_lvis_library(backend), self._lvis_api, _labels_problem)

    def _score_task(self, results: list[dict[str, Any]], task: str) -> dict[str, float]:
        if not self._lvis_api.dataset["annotations"]:
            return dict.fromkeys(METRICS, float("nan"))
        results = results or self._false_positive(task)
        limit = MAX_DETECTIONS if self._max_dets_per_image is None else self._max_dets_per_image
        found = self._backend.evaluate(
            self._lvis_api, _without_boxes(results) if task == "segm" else results, task, limit
        )
        scores = {metric: float(found[metric] * 100) for metric in METRICS}
        logger.info("%s, %d detections per image:\n%s", task, limit, create_small_table(scores))
        return scores

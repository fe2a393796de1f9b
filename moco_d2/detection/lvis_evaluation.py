"""LVIS's metrics: the numbers of the ``lvis`` package, by hotcoco where it is installed.

The labels are federated. In an image only some categories were looked for: those with objects there, and a negative
set; detections of others do not count. Some were not labelled exhaustively: unmatched detections of those do not
count either. Detectron2 reads the data sets, v0.5 and v1, through ``lvis``, so that it is needed in any case. Its own
evaluation is written in Python loops, for NumPy 1.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from typing import Any

from detectron2.evaluation import LVISEvaluator
from detectron2.utils.logger import create_small_table
from pycocotools import mask as mask_api

from moco_d2.atomic import atomic_write
from moco_d2.detection.coco_evaluation import (
    BACKENDS,
    detections_problem,
    evaluated_with,
    labels_problem,
    read_results,
    to_dataset_ids,
)
from moco_d2.detection.old_numpy import old_numpy_names

logger = logging.getLogger(__name__)

RESULTS_FILE = "lvis_instances_results.json"
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
MAX_DETECTIONS = 300  # per image


def choose_lvis_library(backend: str) -> str:
    """Return the package that evaluates LVIS under a ``TEST.COCO_BACKEND``: hotcoco for it and ``auto``, else lvis."""
    return "hotcoco" if backend in ("auto", "hotcoco") and BACKENDS[0].installed else "lvis"


class ExactLVISEvaluator(LVISEvaluator):
    """Detectron2's ``LVISEvaluator`` on today's NumPy, and fast."""

    def __init__(self, dataset_name: str, backend: str = "auto", **kwargs: Any) -> None:
        """Read the labels.

        Args:
            dataset_name: a registered data set.
            backend: the value of ``TEST.COCO_BACKEND``.
            **kwargs: see :class:`detectron2.evaluation.LVISEvaluator`.
        """
        super().__init__(dataset_name, **kwargs)
        self._name, self._library = dataset_name, choose_lvis_library(backend)
        if self._do_evaluation and (problem := _labels_problem(self._lvis_api.dataset)):
            self._leave_to_reference(f"{self._metadata.json_file}: {problem}")

    def evaluate_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Return what :meth:`evaluate` returns for the detections that it saved to this file.

        Raises:
            ValueError: the file does not hold detections in COCO's form.
        """
        results = read_results(path)
        if not self._do_evaluation:
            raise ValueError(f"{self._name!r} has no labels: nothing to evaluate")
        tasks = self._tasks_from_predictions(results) if results else self._tasks or ("bbox",)
        return self._score(results, tasks)

    def _eval_predictions(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        tasks = self._tasks or self._tasks_from_predictions(results)
        to_dataset_ids(results, self._metadata.get("thing_dataset_id_to_contiguous_id"), first=1)
        if self._output_dir:
            with atomic_write(os.path.join(self._output_dir, RESULTS_FILE)) as file:
                file.write(json.dumps(results).encode())
        if not self._do_evaluation:
            logger.info("%s has no labels: nothing to evaluate", self._name)
            return
        self._results.update(self._score(results, tasks))

    def _score(self, results: list[dict[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        if foreign := {found["image_id"] for found in results} - set(self._lvis_api.imgs):
            raise ValueError(f"a detection is of image {min(foreign, key=str)!r}, which is not in {self._name!r}")
        if problem := detections_problem(results):
            self._leave_to_reference(problem)
        limit = MAX_DETECTIONS if self._max_dets_per_image is None else self._max_dets_per_image
        scores = {}
        for task in sorted(tasks):
            scores[task] = dict.fromkeys(METRICS, float("nan"))
            if results:
                evaluate = _by_hotcoco if self._library == "hotcoco" else _by_lvis
                found = evaluate(self._lvis_api, _without_boxes(results) if task == "segm" else results, task, limit)
                scores[task] = {metric: float(found[metric] * 100) for metric in METRICS}
            evaluated_with[self._name] = f"{self._library} {metadata.version(self._library)}"
            logger.info(
                "%s, %s, %d detections per image: evaluated with %s\n%s",
                self._name, task, limit, evaluated_with[self._name], create_small_table(scores[task]),
            )  # fmt: skip
        return scores

    def _leave_to_reference(self, why: str) -> None:
        if self._library != "lvis":
            logger.warning("%s: lvis evaluates instead of %s, and slowly", why, self._library)
            self._library = "lvis"


def _labels_problem(dataset: Mapping[str, Any]) -> str | None:
    for image in dataset["images"]:
        if not {"neg_category_ids", "not_exhaustive_category_ids"} <= image.keys():
            return f"image {image['id']} lacks neg_category_ids or not_exhaustive_category_ids"
    if any(label.get("ignore") or label.get("iscrowd") for label in dataset["annotations"]):
        return "annotations to be ignored, which LVIS does not know"
    return labels_problem(dataset, crowds=False)


def _without_boxes(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return detections whose area is that of the mask, not of the box."""
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
    """Evaluate with hotcoco, which has LVIS's rules but for one: ``lvis`` overlooks what has no area."""
    hotcoco = import_module("hotcoco")

    plain = dict(labels.dataset)
    plain["annotations"] = [label for label in plain["annotations"] if label["area"] > 0]
    capped = [found for found in _capped(results, limit) if _area(found, task) > 0]
    dataset = hotcoco.COCO(plain)
    evaluation = hotcoco.LVISEval(dataset, hotcoco.LVISResults(dataset, capped, max_dets=-1), task)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    found: Mapping[str, float] = evaluation.get_results()
    return found


def _capped(results: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """Keep the best detections of each image over all categories; the order decides between equal scores."""
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

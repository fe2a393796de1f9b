"""COCO's metrics by the fastest installed library whose numbers equal those of pycocotools.

``TEST.COCO_BACKEND`` chooses among :data:`BACKENDS`. They agree on well-formed files: every id is present and unique,
every number is finite. Other files are interpreted or repaired by each library in its own way, so pycocotools evaluates
those, and the log says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import detectron2
import numpy as np
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, coco_evaluation
from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_d2.detection.labels.masks import packed
from moco_d2.detection.metrics.saved import read_detections
from moco_d2.io.files import atomic_write
from moco_d2.messages import unknown_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A library that computes COCO's metrics.

    Attributes:
        name: the value of ``TEST.COCO_BACKEND``.
        package: its name for pip.
        module: the module to import.
        classes: returns its classes COCO and COCOeval, which must be used together.
    """

    name: str
    package: str
    module: str
    classes: Callable[[], tuple[Any, Any]]

    @property
    def installed(self) -> bool:
        """Whether it can be used here."""
        if self.name == "detectron2":  # the compiled part may exist and fail to load
            return coco_evaluation.COCOeval_opt is not COCOeval
        return importlib.util.find_spec(self.module) is not None

    def __str__(self) -> str:
        return f"{self.name} {detectron2.__version__ if self.name == 'detectron2' else metadata.version(self.package)}"


def _hotcoco() -> tuple[Any, Any]:
    library = import_module("hotcoco")
    return library.COCO, library.COCOeval


def _faster() -> tuple[Any, Any]:
    library = import_module("faster_coco_eval")

    def evaluation(labels: Any, found: Any, task: str) -> Any:
        evaluator = library.COCOeval_faster(labels, found, task)
        evaluator.params.catIds = sorted(labels.getCatIds())  # for keypoints it omits categories without objects
        return evaluator

    return library.COCO, evaluation


# The fastest first (measured in docs/evaluation.md).
BACKENDS = (
    Backend("hotcoco", "hotcoco", "hotcoco", _hotcoco),
    Backend("faster", "faster-coco-eval", "faster_coco_eval", _faster),
    Backend("detectron2", "detectron2", "detectron2", lambda: (COCO, coco_evaluation.COCOeval_opt)),
    Backend("pycocotools", "pycocotools", "pycocotools", lambda: (COCO, COCOeval)),
)
REFERENCE = BACKENDS[-1]
# Detections of a class in a picture, the best ones, that COCO's AP of boxes and masks counts.
COUNTED = 100

# The field of a record that each task compares.
_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}


def choose_backend(name: str) -> Backend:
    """Return the backend that ``TEST.COCO_BACKEND`` names; ``auto`` is the fastest installed one.

    Raises:
        ValueError: the backend does not exist or is not installed.
    """
    if name == "auto":
        return next(backend for backend in BACKENDS if backend.installed)
    names = [backend.name for backend in BACKENDS]
    if name not in names:
        raise ValueError(unknown_name("TEST.COCO_BACKEND", name, ["auto", *names]))
    backend = BACKENDS[names.index(name)]
    if not backend.installed:
        how = "build Detectron2 from source" if name == "detectron2" else f"pip install {backend.package}"
        raise ValueError(
            f"TEST.COCO_BACKEND is {name!r}, which is not installed: {how}, or pass TEST.COCO_BACKEND auto"
        )
    return backend


class SavedDetections(DatasetEvaluator):
    """A mixin for Detectron2's COCO and LVIS evaluators; it must precede them among the bases.

    Detections are saved to a file, which can be evaluated again. If labels or detections are not well-formed, the
    reference library evaluates them.

    Attributes:
        results_file: name of the file.
        first_id: category id of class 0 if the metadata do not map classes to ids.
        reference: the library whose numbers define the metric.
    """

    results_file: str
    first_id = 0
    reference: Any

    def _set_up(
        self, dataset_name: str, backend: Any, labels: Any, check: Callable[[Mapping[str, Any]], str | None]
    ) -> None:
        self._name, self._backend, self._labels = dataset_name, backend, labels
        self._problem = check(labels.dataset) if self._do_evaluation else None
        if self._problem:
            self._use_reference(f"{self._metadata.json_file}: {self._problem}")

    @property
    def library(self) -> str:
        """The library and its version: before an evaluation the chosen one, afterwards the one that computed."""
        return str(self._backend)

    def evaluate_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Return what ``evaluate`` returns for detections that it saved to a file, or for others in COCO's format.

        Raises:
            ValueError: the file does not hold detections of this data set in COCO's format.
        """
        if not self._do_evaluation:
            raise ValueError(f"{self._name!r} has no labels: nothing to evaluate")
        images = self._own_ids("image_id", self._labels.imgs)
        categories = self._own_ids("category_id", self._labels.cats)
        results = read_detections(
            path,
            {own: self._labels.imgs[used] for own, used in images.items()},
            {own: self._labels.cats[used]["name"] for own, used in categories.items()},
            self._name,
            self._metadata.get("left_out_ids", ()),
        )
        for found in results:
            found["image_id"], found["category_id"] = images[found["image_id"]], categories[found["category_id"]]
        tasks = self._tasks_from_predictions(results) if results else self._tasks or ("bbox",)
        return self._score(results, [task for task in tasks if self._can_be_evaluated(task, results)])

    def _own_ids(self, key: str, ids: Iterable[int]) -> dict[Any, int]:
        """Map the ids of the user's file to those of the normalised labels, which may be renumbered."""
        own = self._metadata.get("own_ids", {}).get(key, {})
        return {own.get(used, used): used for used in sorted(ids)}

    def _can_be_evaluated(self, task: str, results: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the labels have the field that a task compares; warn if they do not.

        Raises:
            ValueError: labels and detections have different numbers of keypoints.
        """
        field, labels = _FIELDS[task], self._labels.dataset["annotations"]
        if without := sum(not label.get(field) for label in labels):
            logger.warning("%s: %d objects have no %s, so %s is not evaluated", self._name, without, field, task)
            return False
        if task == "keypoints" and results and labels:
            counts = [len(self._kpt_oks_sigmas) or 17, len(labels[0][field]) // 3, len(results[0][field]) // 3]
            if len({*counts}) > 1:
                raise ValueError(
                    f"TEST.KEYPOINT_OKS_SIGMAS is for {counts[0]} keypoints, the labels of {self._name!r} have "
                    f"{counts[1]}, the detections {counts[2]}; they must agree"
                )
        return True

    def _eval_predictions(self, predictions: Sequence[Mapping[str, Any]], **options: Any) -> None:
        results = list(itertools.chain(*(image["instances"] for image in predictions)))
        tasks = self._tasks or self._tasks_from_predictions(results)
        to_dataset_ids(results, self._metadata.get("thing_dataset_id_to_contiguous_id"), self.first_id)
        if self._output_dir:
            own = self._metadata.get("own_ids", {})  # other programs read the file, too
            saved = [found | {key: ids[found[key]] for key, ids in own.items()} for found in results]
            with atomic_write(os.path.join(self._output_dir, self.results_file)) as file:
                file.write(json.dumps(saved).encode())
        if not self._do_evaluation:
            logger.warning("%s has no labels: nothing to evaluate; the detections are saved", self._name)
            return
        self._results.update(self._score(results, tasks, **options))

    def _false_positive(self, task: str) -> list[dict[str, Any]]:
        """Return a detection that matches no object. It stands for an empty list, which libraries refuse: AP 0."""
        image, category = next(iter(self._labels.imgs.values())), min(self._labels.cats)
        found = {"image_id": image["id"], "category_id": category, "score": 0.0, "bbox": [0.0, 0.0, 0.0, 0.0]}
        height, width = image.get("height", 1), image.get("width", 1)
        if task == "segm":
            found["segmentation"] = packed({"size": [height, width], "counts": [height * width]})
        if task == "keypoints":
            found["keypoints"] = [0.0] * 3 * (len(self._kpt_oks_sigmas) or 17)
        return [found]

    def _score(
        self, results: list[dict[str, Any]], tasks: Iterable[str], **options: Any
    ) -> dict[str, dict[str, float]]:
        if foreign := {found["image_id"] for found in results} - set(self._labels.imgs):
            raise ValueError(f"a detection is of image {min(foreign, key=str)!r}, which is not in {self._name!r}")
        if problem := detections_problem(results):
            self._use_reference(problem)
        scores = {}
        for task in sorted(tasks):
            try:
                scores[task] = self._score_task(results, task, **options)
            except Exception as error:
                if self._backend == self.reference and self._problem:
                    raise ValueError(
                        f"{self._metadata.json_file}: {self._problem}, and {self.reference} cannot evaluate that. "
                        "Correct the file, or list it in DATASETS.CUSTOM, which fills in values that are certain"
                    ) from error
                if self._backend == self.reference:
                    raise
                self._use_reference(f"{self._backend} failed ({type(error).__name__}: {error})")
                scores[task] = self._score_task(results, task, **options)
            logger.info("%s, %s: evaluated with %s", self._name, task, self._backend)
        return scores

    def _use_reference(self, why: str) -> None:
        """Switch to the reference library, even if the config names another: days of training may depend on it."""
        if self._backend != self.reference:
            logger.warning("%s: %s evaluates instead of %s, and is slower", why, self.reference, self._backend)
            self._backend = self.reference


class ExactCOCOEvaluator(SavedDetections, COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with a choice of libraries, all of which give the same numbers."""

    results_file = "coco_instances_results.json"
    reference = REFERENCE

    def __init__(self, dataset_name: str, backend: str = "auto", **kwargs: Any) -> None:
        """Read the labels.

        Args:
            dataset_name: a registered data set.
            backend: the value of ``TEST.COCO_BACKEND``.
            **kwargs: see :class:`detectron2.evaluation.COCOEvaluator`.

        Raises:
            ValueError: see :func:`choose_backend`.
        """
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        self._set_up(dataset_name, choose_backend(backend), self._coco_api, labels_problem)

    def _score_task(
        self, results: list[dict[str, Any]], task: str, img_ids: Sequence[int] | None = None
    ) -> dict[str, float]:
        path, evaluated = PathManager.get_local_path(self._metadata.json_file), None
        labels = self._labels.dataset["annotations"]
        if results or (labels and all(_FIELDS[task] in label for label in labels)):
            results = results or self._false_positive(task)
            options = {"kpt_oks_sigmas": self._kpt_oks_sigmas, "img_ids": img_ids}
            evaluated = evaluate_coco(self._backend, path, results, task, **options)
        classes = self._metadata.get("thing_classes")
        scores: dict[str, float] = self._derive_coco_results(evaluated, task, class_names=classes)
        own = most_of_a_class(labels)
        if evaluated is not None and task != "keypoints" and own > COUNTED:
            extra = ap_at(own, self._backend, path, results, task, img_ids)
            logger.info(
                "%s: pictures have up to %d objects of a class, and AP counts %d detections of each class; with %d: %s",
                self._name, own, COUNTED, own, ", ".join(f"{key} {value:.3f}" for key, value in extra.items()),
            )  # fmt: skip
            scores |= extra
        return scores


def evaluate_coco(backend: Backend, labels: str, results: list[dict[str, Any]], task: str, **options: Any) -> Any:
    """Evaluate with a backend, log its table, and return its COCOeval.

    Args:
        backend: the library.
        labels: path of the COCO file.
        results: detections in COCO's format, not empty.
        task: ``bbox``, ``segm`` or ``keypoints``.
        **options: those of Detectron2's ``_evaluate_predictions_on_coco``.
    """
    dataset, evaluation = backend.classes()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluated = coco_evaluation._evaluate_predictions_on_coco(
            dataset(labels), results, task, cocoeval_fn=evaluation, **options
        )
    table = [line for line in printed.getvalue().splitlines() if "@[" in line]
    if table:  # libraries that print from C code cannot be captured
        logger.info("%s by %s:\n%s", task, backend, "\n".join(table))
    return evaluated


def most_of_a_class(labels: Iterable[Mapping[str, Any]]) -> int:
    """Return the largest number of objects of one class in one picture, without crowds."""
    counts = Counter((label["image_id"], label["category_id"]) for label in labels if not label.get("iscrowd"))
    return max(counts.values(), default=0)


def ap_at(
    limit: int,
    backend: Backend,
    labels: str,
    results: Sequence[Mapping[str, Any]],
    task: str,
    img_ids: Sequence[int] | None = None,
) -> dict[str, float]:
    """Return AP, AP50 and AP75 with another number of counted detections, in percent, as ``AP@limit`` and so on.

    Args:
        limit: detections of a class in a picture that count, the best ones.
        backend: the library.
        labels: path of the COCO file.
        results: detections in COCO's format, not empty.
        task: ``bbox`` or ``segm``.
        img_ids: the pictures; None for all.
    """
    dataset, evaluation = backend.classes()
    # With its box, the size of a mask would be the box's, as in Detectron2.
    own = [{key: value for key, value in found.items() if task == "bbox" or key != "bbox"} for found in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = dataset(labels)
        evaluated = evaluation(truth, truth.loadRes(own), task)
        evaluated.params.maxDets = [1, 10, limit]
        if img_ids is not None:
            evaluated.params.imgIds = img_ids
        evaluated.evaluate()
        evaluated.accumulate()
    precision = np.asarray(evaluated.eval["precision"])[..., 0, -1]  # IoU, recall, class; all sizes, ``limit``
    scores = {}
    for name, of in (("AP", precision), ("AP50", precision[0]), ("AP75", precision[5])):
        known = of[of > -1]
        scores[f"{name}@{limit}"] = float(100 * known.mean()) if known.size else float("nan")
    return scores


def to_dataset_ids(results: Iterable[dict[str, Any]], contiguous: Mapping[int, int] | None, first: int = 0) -> None:
    """Replace the detector's class indices by the data set's category ids, in place.

    Args:
        results: detections in COCO's format.
        contiguous: ``thing_dataset_id_to_contiguous_id`` of the metadata.
        first: category id of class 0 if the metadata have no such mapping; the others follow.
    """
    back = {index: category for category, index in contiguous.items()} if contiguous else None
    for found in results:
        index = found["category_id"]
        if back is not None and index not in back:
            raise ValueError(f"a detection is of class {index}, but the data set has {len(back)} classes")
        found["category_id"] = index + first if back is None else back[index]


def labels_problem(dataset: Mapping[str, Any], crowds: bool = True) -> str | None:
    """Return why labels in COCO's format are not well-formed, or None if they are.

    Args:
        dataset: the file's content.
        crowds: whether objects must have ``iscrowd``.
    """
    needed = ("id", "image_id", "category_id", "bbox", "area", *["iscrowd"] * crowds)
    for label in dataset["annotations"]:
        if missing := [key for key in needed if key not in label]:
            return f"annotation {label.get('id')!r} lacks {', '.join(missing)}"
        # pycocotools counts a detection that matches id 0 as unmatched.
        if not isinstance(label["id"], int) or label["id"] < 1:
            return f"an annotation has the id {label['id']!r}, which is not a positive integer"
        if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in (label["area"], *label["bbox"])):
            return f"annotation {label['id']} has a non-finite area or box"
    for key in ("annotations", "categories", "images"):
        ids = [record["id"] for record in dataset[key]]
        if not all(isinstance(number, int) for number in ids):
            return f"ids of {key} are not integers"
        if len(set(ids)) < len(ids):
            return f"ids of {key} are not unique"
    return None


def detections_problem(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why detections are not well-formed, or None if they are."""
    for key in ("bbox", "keypoints"):
        numbers = np.fromiter(itertools.chain.from_iterable(found.get(key, ()) for found in results), float)
        if not np.isfinite(numbers).all():
            return f"detections with a non-finite {key}"
    if not np.isfinite(np.array([found["score"] for found in results], float)).all():
        return "detections with a non-finite score"
    return None

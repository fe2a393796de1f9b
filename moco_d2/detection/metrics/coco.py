"""COCO's metrics by the fastest library at hand whose numbers are those of pycocotools.

``TEST.COCO_BACKEND`` chooses among :data:`BACKENDS`. Their equality is tested on files that are plain: every id is
given, and given once, every number is finite. Some libraries read other files in their own way, or mend them; such a
file is therefore left to pycocotools, and the log says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import logging
import os
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
        module: what has to be there.
        classes: returns its classes COCO and COCOeval, which belong together.
    """

    name: str
    package: str
    module: str
    classes: Callable[[], tuple[Any, Any]]

    @property
    def installed(self) -> bool:
        """Whether it can be used here."""
        if self.name == "detectron2":  # the compiled part may be there and not load
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
        made = library.COCOeval_faster(labels, found, task)
        made.params.catIds = sorted(labels.getCatIds())  # for keypoints it leaves out categories without objects
        return made

    return library.COCO, evaluation


# The fastest first (measured in docs/evaluation.md).
BACKENDS = (
    Backend("hotcoco", "hotcoco", "hotcoco", _hotcoco),
    Backend("faster", "faster-coco-eval", "faster_coco_eval", _faster),
    Backend("detectron2", "detectron2", "detectron2", lambda: (COCO, coco_evaluation.COCOeval_opt)),
    Backend("pycocotools", "pycocotools", "pycocotools", lambda: (COCO, COCOeval)),
)
REFERENCE = BACKENDS[-1]

# What each task compares.
_FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}

# What evaluated a data set last in this process, by its name: what describe_backend() reports.
evaluated_with: dict[str, str] = {}


def choose_backend(name: str) -> Backend:
    """Return the backend that ``TEST.COCO_BACKEND`` names; ``auto`` is the fastest that is installed.

    Raises:
        ValueError: no such backend, or not installed.
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
    """What the evaluators of COCO and LVIS add to Detectron2's, before which they name this class among their bases.

    Detections are saved and can be evaluated again from the file. What libraries might read in different ways is left
    to the reference.

    Attributes:
        results_file: name of the file.
        first_id: category id of class 0 where the metadata have none.
        reference: the library whose numbers are right.
    """

    results_file: str
    first_id = 0
    reference: Any

    def _begin(
        self, dataset_name: str, backend: Any, labels: Any, check: Callable[[Mapping[str, Any]], str | None]
    ) -> None:
        self._name, self._backend, self._labels = dataset_name, backend, labels
        self._problem = check(labels.dataset) if self._do_evaluation else None
        if self._problem:
            self._leave_to_reference(f"{self._metadata.json_file}: {self._problem}")

    def evaluate_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Return what ``evaluate`` returns for the detections that it saved to this file, or others in COCO's form.

        Raises:
            ValueError: the file does not hold detections of this data set in COCO's form.
        """
        if not self._do_evaluation:
            raise ValueError(f"{self._name!r} has no labels: nothing to evaluate")
        images, categories = (
            self._own_ids("image_id", self._labels.imgs),
            self._own_ids("category_id", self._labels.cats),
        )
        results = read_detections(
            path,
            {own: self._labels.imgs[plain] for own, plain in images.items()},
            {own: self._labels.cats[plain]["name"] for own, plain in categories.items()},
            self._name,
            self._metadata.get("left_out_ids", ()),
        )
        for found in results:
            found["image_id"], found["category_id"] = images[found["image_id"]], categories[found["category_id"]]
        tasks = self._tasks_from_predictions(results) if results else self._tasks or ("bbox",)
        return self._score(results, [task for task in tasks if self._can_be_evaluated(task, results)])

    def _own_ids(self, key: str, ids: Iterable[int]) -> dict[Any, int]:
        """Return the ids of the user's file -> the ids of the labels as they are read, which may be numbered anew."""
        own = self._metadata.get("own_ids", {}).get(key, {})
        return {own.get(plain, plain): plain for plain in sorted(ids)}

    def _can_be_evaluated(self, task: str, results: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether labels and detections of a file have what a task compares; a warning says if not.

        Raises:
            ValueError: their numbers of keypoints differ.
        """
        field, labels = _FIELDS[task], self._labels.dataset["annotations"]
        if without := sum(not label.get(field) for label in labels):
            logger.warning("%s: %d objects have no %s: %s is left out", self._name, without, field, task)
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
            own = self._metadata.get("own_ids", {})  # the file is for other programs, too
            saved = [found | {key: ids[found[key]] for key, ids in own.items()} for found in results]
            with atomic_write(os.path.join(self._output_dir, self.results_file)) as file:
                file.write(json.dumps(saved).encode())
        if not self._do_evaluation:
            logger.warning("%s has no labels: nothing to evaluate; the detections are saved", self._name)
            return
        self._results.update(self._score(results, tasks, **options))

    def _nothing(self, task: str) -> list[dict[str, Any]]:
        """Return a detection that meets no object: libraries do not take none at all, whose AP is 0."""
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
            self._leave_to_reference(problem)
        scores = {}
        for task in sorted(tasks):
            try:
                scores[task] = self._score_task(results, task, **options)
            except Exception as error:
                if self._backend == self.reference and self._problem:
                    raise ValueError(
                        f"{self._metadata.json_file}: {self._problem}, and {self.reference} cannot evaluate that: "
                        "correct it, or name the file in DATASETS.CUSTOM, which fills in what is certain"
                    ) from error
                if self._backend == self.reference:
                    raise
                self._leave_to_reference(f"{self._backend} failed ({type(error).__name__}: {error})")
                scores[task] = self._score_task(results, task, **options)
            evaluated_with[self._name] = str(self._backend)
            logger.info("%s, %s: evaluated with %s", self._name, task, self._backend)
        return scores

    def _leave_to_reference(self, why: str) -> None:
        """Take the reference from here on, also where another was asked for: after days of training figures count."""
        if self._backend != self.reference:
            logger.warning("%s: %s evaluates instead of %s, and slowly", why, self.reference, self._backend)
            self._backend = self.reference


class ExactCOCOEvaluator(SavedDetections, COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with a choice of the library that computes, none of which changes the numbers."""

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
        self._begin(dataset_name, choose_backend(backend), self._coco_api, labels_problem)

    def _score_task(
        self, results: list[dict[str, Any]], task: str, img_ids: Sequence[int] | None = None
    ) -> dict[str, float]:
        path, evaluated = PathManager.get_local_path(self._metadata.json_file), None
        labels = self._labels.dataset["annotations"]
        if results or (labels and all(_FIELDS[task] in label for label in labels)):
            results = results or self._nothing(task)
            options = {"kpt_oks_sigmas": self._kpt_oks_sigmas, "img_ids": img_ids}
            evaluated = evaluate_coco(self._backend, path, results, task, **options)
        classes = self._metadata.get("thing_classes")
        scores: dict[str, float] = self._derive_coco_results(evaluated, task, class_names=classes)
        return scores


def evaluate_coco(backend: Backend, labels: str, results: list[dict[str, Any]], task: str, **options: Any) -> Any:
    """Return a backend's COCOeval after evaluation, its table in the log.

    Args:
        backend: what computes.
        labels: path of the COCO file.
        results: detections in COCO's form, not empty.
        task: ``bbox``, ``segm`` or ``keypoints``.
        **options: those of Detectron2's ``_evaluate_predictions_on_coco``.
    """
    dataset, evaluation = backend.classes()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        evaluated = coco_evaluation._evaluate_predictions_on_coco(
            dataset(labels), results, task, cocoeval_fn=evaluation, **options
        )
    table = [line for line in said.getvalue().splitlines() if "@[" in line]
    if table:  # some libraries print past Python
        logger.info("%s by %s:\n%s", task, backend, "\n".join(table))
    return evaluated


def to_dataset_ids(results: Iterable[dict[str, Any]], contiguous: Mapping[int, int] | None, first: int = 0) -> None:
    """Replace, in place, the detector's class indices by the data set's category ids.

    Args:
        results: detections in COCO's form.
        contiguous: ``thing_dataset_id_to_contiguous_id`` of the metadata.
        first: the category id of class 0 where the metadata have none; the others follow.
    """
    back = {index: category for category, index in contiguous.items()} if contiguous else None
    for found in results:
        index = found["category_id"]
        if back is not None and index not in back:
            raise ValueError(f"a detection is of class {index}, but the data set has {len(back)} classes")
        found["category_id"] = index + first if back is None else back[index]


def labels_problem(dataset: Mapping[str, Any], crowds: bool = True) -> str | None:
    """Return what keeps labels in COCO's form from being plain, or None.

    Args:
        dataset: the file's content.
        crowds: whether objects must have ``iscrowd``.
    """
    needed = ("id", "image_id", "category_id", "bbox", "area", *["iscrowd"] * crowds)
    for label in dataset["annotations"]:
        if missing := [key for key in needed if key not in label]:
            return f"annotation {label.get('id')!r} lacks {', '.join(missing)}"
        # pycocotools takes a detection matched with id 0 for one that is not matched.
        if not isinstance(label["id"], int) or label["id"] < 1:
            return f"an annotation has the id {label['id']!r}, which is no positive number"
        if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in (label["area"], *label["bbox"])):
            return f"annotation {label['id']} has an area or box that is not finite"
    for key in ("annotations", "categories", "images"):
        ids = [record["id"] for record in dataset[key]]
        if not all(isinstance(number, int) for number in ids):
            return f"ids of {key} are no whole numbers"
        if len(set(ids)) < len(ids):
            return f"ids of {key} are not unique"
    return None


def detections_problem(results: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what keeps detections from being plain, or None."""
    for key in ("bbox", "keypoints"):
        numbers = np.fromiter(itertools.chain.from_iterable(found.get(key, ()) for found in results), float)
        if not np.isfinite(numbers).all():
            return f"detections with a {key} that is not finite"
    if not np.isfinite(np.array([found["score"] for found in results], float)).all():
        return "detections with a score that is not finite"
    return None

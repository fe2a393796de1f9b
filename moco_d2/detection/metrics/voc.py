"""PASCAL VOC's AP with the numbers of Detectron2's ``PascalVOCDetectionEvaluator``, in a fiftieth of its time.

Detectron2 loops over a class's detections once for each of ten IoU thresholds. Here the object that each detection
overlaps most is found once, because it depends neither on the threshold nor on earlier detections. At a threshold, the
true positives are the first detection of each object that is not difficult. Everything that affects the last bit is as
in Detectron2: the rounding of written detections, ``np.argsort``'s order of equal scores, the order of operations.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from moco_d2.detection.metrics.saved import read_voc_detections
from moco_d2.io.files import atomic_write

logger = logging.getLogger(__name__)

RESULTS_FILE = "voc_instances_results.json"
THRESHOLDS = tuple(percent / 100.0 for percent in range(50, 100, 5))
_AT_50, _AT_75 = THRESHOLDS.index(0.5), THRESHOLDS.index(0.75)

Array = npt.NDArray[Any]
# Detections of one class in the order in which they were made: names of the images, and (N, 5) score, x0, y0, x1, y1.
Detections = tuple[list[str], Array]


class VOCEvaluator(DatasetEvaluator):
    """AP of VOC-format data sets: the mean over IoU .50:.05:.95, at .50 and at .75.

    The metadata give the images and labels: ``dirname``, ``split`` (a list in ``ImageSets/Main``) and
    ``thing_classes``. ``year`` 2007 means the 11-point AP, 2012 the area below the curve. Call it in every process.

    Attributes:
        aps: (10, classes) AP in percent by IoU threshold and class, in the main process after :meth:`evaluate`.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        """Read the metadata.

        Args:
            dataset_name: a registered data set.
            output_dir: folder for ``voc_instances_results.json``, the detections; ``None`` does not save them.

        Raises:
            ValueError: the metadata are incomplete.
        """
        self._name, self._output_dir = dataset_name, output_dir
        self._meta = MetadataCatalog.get(dataset_name)
        missing = [key for key in ("dirname", "split", "year", "thing_classes") if self._meta.get(key) is None]
        if missing:
            raise ValueError(f"the metadata of VOC data set {dataset_name!r} lack {', '.join(missing)}")
        if self._meta.year not in (2007, 2012):
            raise ValueError(
                f"the metadata of {dataset_name!r} have year {self._meta.year!r}; it must be 2007 (11-point AP) or "
                "2012 (area)"
            )
        self._labelled = self._meta.get("labelled", True)
        self.aps: Array | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self._found: list[tuple[str, Array, Array]] = []  # image, classes (N,), rows (N, 5)

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Take the detections of a batch, rounded as in a file: score to .001, box to .1, with pixels from 1."""
        for image, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor.numpy().copy()
            boxes[:, :2] += 1  # VOC counts pixels from 1; added in the tensor's precision, as in Detectron2
            rows = np.column_stack([_rounded(instances.scores.numpy(), 3), _rounded(boxes, 1)])
            self._found.append((str(image["image_id"]), instances.pred_classes.numpy(), rows))

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gather the detections, save them, and in the main process return AP, AP50, AP75 and ``AP-<class>``."""
        gathered = comm.gather(self._found, dst=0)
        if not comm.is_main_process():
            return None
        detections = self._by_class([image for process in gathered for image in process])
        if self._output_dir:
            content = {
                name: [[image, *row] for image, row in zip(images, rows.tolist(), strict=True)]
                for name, (images, rows) in detections.items()
            }
            with atomic_write(os.path.join(self._output_dir, RESULTS_FILE)) as file:
                file.write(json.dumps(content).encode())
        if not self._labelled:
            logger.warning("%s has no labels: nothing to evaluate; the detections are saved", self._name)
            return {}
        return self._score(detections)

    def evaluate_file(self, path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
        """Return what :meth:`evaluate` returned when it saved this file.

        Raises:
            ValueError: the file does not have the format that :meth:`evaluate` saves, or belongs to another data set.
        """
        if not self._labelled:
            raise ValueError(f"{self._name!r} has no labels: nothing to evaluate")
        images = _image_names(self._meta.dirname, self._meta.split)
        content = read_voc_detections(path, self._meta.thing_classes, set(images))
        detections = {
            name: ([row[0] for row in rows], np.array([row[1:] for row in rows], float).reshape(-1, 5))
            for name, rows in content.items()
        }
        return self._score(detections)

    def _by_class(self, found: Sequence[tuple[str, Array, Array]]) -> dict[str, Detections]:
        names = np.repeat([image for image, _, _ in found], [len(rows) for _, _, rows in found])
        classes = np.concatenate([np.empty(0, int), *(classes for _, classes, _ in found)])
        rows = np.concatenate([np.empty((0, 5)), *(rows for _, _, rows in found)])
        own = (classes == index for index in range(len(self._meta.thing_classes)))
        return {
            name: (names[chosen].tolist(), rows[chosen])
            for name, chosen in zip(self._meta.thing_classes, own, strict=True)
        }

    def _score(self, detections: Mapping[str, Detections]) -> dict[str, dict[str, float]]:
        eleven_points = self._meta.year == 2007
        logger.info("evaluating %s with the AP of VOC %s (not the official Matlab code's)", self._name, self._meta.year)
        objects = _read_objects(self._meta.dirname, self._meta.split, self._meta.thing_classes)
        columns = [_class_aps(detections[name], objects[name], eleven_points) for name in self._meta.thing_classes]
        self.aps = np.ascontiguousarray(100 * np.array(columns).T)
        self._log_classes([objects[name].positives for name in self._meta.thing_classes], self.aps)
        means = [np.mean(row) for row in self.aps]
        by_class = zip(self._meta.thing_classes, self.aps.mean(0), strict=True)
        return {
            "bbox": {
                "AP": np.mean(means), "AP50": means[_AT_50], "AP75": means[_AT_75],
                **{f"AP-{name}": ap for name, ap in by_class},
            }
        }  # fmt: skip

    def _log_classes(self, positives: Sequence[int], aps: Array) -> None:
        classes = self._meta.thing_classes
        rows = zip(classes, positives, aps.mean(0), aps[_AT_50], aps[_AT_75], strict=True)
        headers = ("class", "objects", "AP", "AP50", "AP75")
        logger.info("AP by class:\n%s", tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f"))
        if without := [name for name, count in zip(classes, positives, strict=True) if not count]:
            # As in Detectron2. Without these classes the mean could not be compared with other people's.
            logger.warning(
                "%s has no objects (other than difficult ones) of %s: the AP of such a class is 0, or nan if it has "
                "detections and the year is 2012", self._name, ", ".join(without),
            )  # fmt: skip


@dataclass(frozen=True)
class _Objects:
    """The labels of one class.

    Attributes:
        place: an image's index, by name.
        starts: (images + 1,) index in the arrays below at which each image's objects begin.
        boxes: (N, 4) x0, y0, x1, y1.
        difficult: (N,)
        positives: the number of objects to be found.
    """

    place: Mapping[str, int]
    starts: Array
    boxes: Array
    difficult: Array
    positives: int


def _read_objects(dirname: str, split: str, classes: Sequence[str]) -> dict[str, _Objects]:
    """Read the labels of a split. Every evaluation reads them anew, so edited files take effect."""
    lines = _image_names(dirname, split)
    folder = PathManager.get_local_path(os.path.join(dirname, "Annotations/"))
    place = {name: index for index, name in enumerate(dict.fromkeys(lines))}
    repeats = np.zeros(len(place), int)
    np.add.at(repeats, [place[name] for name in lines], 1)
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in classes}
    for name, index in place.items():
        for item in ElementTree.parse(os.path.join(folder, f"{name}.xml")).findall("object"):
            if (kind := item.findtext("name", "")) in rows:
                corners = (float(item.findtext(f"bndbox/{key}", "nan")) for key in ("xmin", "ymin", "xmax", "ymax"))
                rows[kind].append((index, int(item.findtext("difficult", "0")), *corners))
    objects = {}
    for kind, found in rows.items():
        table = np.array(found, float).reshape(-1, 6)
        images, difficult = table[:, 0].astype(int), table[:, 1] != 0
        starts = np.concatenate([[0], np.cumsum(np.bincount(images, minlength=len(place)))])
        # The objects of an image that is listed twice count twice here, although they can be found only once.
        positives = int(repeats[images[~difficult]].sum())
        objects[kind] = _Objects(place, starts, table[:, 2:], difficult, positives)
    return objects


def _image_names(dirname: str, split: str) -> list[str]:
    with PathManager.open(os.path.join(dirname, "ImageSets", "Main", f"{split}.txt")) as file:
        return [line.strip() for line in file if line.strip()]


def _class_aps(detections: Detections, objects: _Objects, eleven_points: bool) -> list[float]:
    """Return the AP of one class at each threshold."""
    names, rows = detections
    try:
        images = np.array([objects.place[name] for name in names], int)
    except KeyError as error:
        raise ValueError(f"a detection is of image {error}, which is not in the test set") from None
    # Not a stable sort, as in Detectron2: rounding makes many scores equal, and AP depends on which comes first.
    order = np.argsort(-rows[:, 0])
    overlaps, nearest = _best_overlaps(images[order], rows[order, 1:], objects)
    aps = []
    for threshold in THRESHOLDS:
        hit = overlaps > threshold
        candidates = np.flatnonzero(hit)
        candidates = candidates[~objects.difficult[nearest[candidates]]]
        true, false = np.zeros(len(names)), np.zeros(len(names))
        false[~hit] = false[candidates] = 1  # a detection of a difficult object is neither true nor false
        first = candidates[np.unique(nearest[candidates], return_index=True)[1]]
        true[first], false[first] = 1, 0
        true, false = np.cumsum(true), np.cumsum(false)
        with np.errstate(invalid="ignore"):  # a class without objects
            recall = true / float(objects.positives)
        precision = true / np.maximum(true + false, np.finfo(np.float64).eps)
        aps.append((_ap_11_points if eleven_points else _ap_area)(recall, precision))
    return aps


def _best_overlaps(images: Array, boxes: Array, objects: _Objects) -> tuple[Array, Array]:
    """Return each detection's largest IoU, and the index of the (first) object that has it.

    Args:
        images: (N,) indices of the detections' images.
        boxes: (N, 4) the detections.
        objects: the labels of the class.
    """
    counts = objects.starts[images + 1] - objects.starts[images]
    with_objects = np.flatnonzero(counts)
    counts = counts[with_objects]
    overlaps, nearest = np.full(len(images), -np.inf), np.zeros(len(images), int)
    if not len(with_objects):
        return overlaps, nearest
    # All pairs of a detection and an object of its image; the pairs of one detection are adjacent.
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    which = np.repeat(with_objects, counts)
    other = np.arange(len(which)) - np.repeat(begins, counts) + objects.starts[images[which]]
    iou = _iou(boxes[which], objects.boxes[other])
    overlaps[with_objects] = np.maximum.reduceat(iou, begins)
    best = np.flatnonzero(iou == overlaps[which])
    found, first = np.unique(which[best], return_index=True)
    nearest[found] = other[best[first]]
    return overlaps, nearest


def _iou(detections: Array, objects: Array) -> Array:
    """Return the IoU of boxes (N, 4) pair by pair; a box includes its last row and column of pixels."""
    low, high = np.maximum(detections[:, :2], objects[:, :2]), np.minimum(detections[:, 2:], objects[:, 2:])
    sides = np.maximum(high - low + 1.0, 0.0)
    intersection = sides[:, 0] * sides[:, 1]
    areas = [(boxes[:, 2] - boxes[:, 0] + 1.0) * (boxes[:, 3] - boxes[:, 1] + 1.0) for boxes in (detections, objects)]
    with np.errstate(divide="ignore", invalid="ignore"):  # boxes of negative width or height
        iou: Array = intersection / (areas[0] + areas[1] - intersection)
    return iou


def _ap_11_points(recall: Array, precision: Array) -> float:
    """Return the mean over recalls 0, .1, ... 1 of the best precision at that recall or a higher one."""
    ap = 0.0
    if len(recall) and not np.isnan(recall[-1]):
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        for value in best[np.searchsorted(recall, np.arange(0.0, 1.1, 0.1))]:
            ap = ap + value / 11.0
    return ap


def _ap_area(recall: Array, precision: Array) -> float:
    """Return the area below the curve of the best precision at each recall or a higher one."""
    recall = np.concatenate(([0.0], recall, [1.0]))
    best = np.maximum.accumulate(np.concatenate(([0.0], precision, [0.0]))[::-1])[::-1]
    steps = np.where(recall[1:] != recall[:-1])[0]
    return float(np.sum((recall[steps + 1] - recall[steps]) * best[steps + 1]))


def _rounded(values: Array, digits: int) -> Array:
    """Return ``float(f"{value:.{digits}f}")`` of each value."""
    if values.dtype == np.float64:
        return np.array([float(f"{value:.{digits}f}") for value in values.flat]).reshape(values.shape)
    # A float32 times 1000 is exact in float64, so this rounds as printing does.
    scale = 10.0**digits
    rounded: Array = np.rint(values.astype(np.float64) * scale) / scale
    return rounded

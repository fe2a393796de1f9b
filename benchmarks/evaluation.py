"""Benchmark of the evaluators on synthetic detections (``python -m benchmarks eval``)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances

from benchmarks.measure import Row, largest_difference, timed
from moco_d2 import __version__
from moco_d2.detection.metrics.coco import BACKENDS, evaluate_coco
from moco_d2.detection.metrics.voc import VOCEvaluator

Array = npt.NDArray[Any]

WIDTH, HEIGHT = 640, 480
COCO_CLASSES, COCO_OBJECTS = 80, 7  # objects per image, as in COCO
VOC_CLASSES, VOC_OBJECTS = 20, 3  # objects per image, as in VOC
SHARE_FOUND = 0.3  # share of the detections that are an object, moved a little; the others are random boxes


def coco_rows(images: int, detections: int) -> Iterator[Row]:
    """Time each installed COCO backend on boxes, from reading the labels to the table; pycocotools is the reference."""
    labels, found = _coco(images, detections)
    problem = f"COCO boxes, {images} x {detections}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.json"
        path.write_text(json.dumps(labels))
        reference = None
        for backend in reversed([backend for backend in BACKENDS if backend.installed]):
            backend.classes()  # so that imports are not measured
            with contextlib.redirect_stdout(io.StringIO()):
                evaluated, seconds, cpu = timed(partial(evaluate_coco, backend, str(path), found, "bbox"))
            precision = np.asarray(evaluated.eval["precision"])
            reference = reference or (precision, cpu)
            difference = largest_difference(precision, reference[0])
            yield Row(problem, str(backend), seconds, cpu, reference[1] / cpu, difference)


def voc_rows(images: int, detections: int) -> Iterator[Row]:
    """Time both VOC evaluators on both of VOC's metrics; Detectron2's is the reference."""
    logging.getLogger("detectron2").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        outputs = _voc(Path(folder), images, detections)
        for year in (2007, 2012):
            name = f"benchmark_voc_{year}"
            classes = [f"class{index}" for index in range(VOC_CLASSES)]
            MetadataCatalog.get(name).set(dirname=folder, split="test", year=year, thing_classes=classes)
            reference = None
            for by, kind in (
                ("detectron2", PascalVOCDetectionEvaluator),
                (f"moco_d2 {__version__}", VOCEvaluator),
            ):
                scores, seconds, cpu = timed(partial(_evaluate, kind(name), outputs))
                reference = reference or (scores, cpu)
                difference = largest_difference(
                    [scores[metric] for metric in reference[0]], list(reference[0].values())
                )
                problem = f"VOC {year}, {images} x {detections}"
                yield Row(problem, by, seconds, cpu, reference[1] / cpu, difference)


def _evaluate(evaluator: Any, outputs: list[tuple[str, Instances]]) -> dict[str, float]:
    evaluator.reset()
    for image, instances in outputs:
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    scores: dict[str, float] = evaluator.evaluate()["bbox"]
    return scores


def _boxes(random: np.random.Generator, count: int) -> Array:
    """Return boxes (count, 4) x0, y0, x1, y1 of all sizes, rounded to whole pixels."""
    sides = np.exp(random.uniform(np.log(8), np.log(HEIGHT), (count, 2)))
    corner = random.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    return np.column_stack([corner, corner + sides]).round()


def _scene(
    random: np.random.Generator, classes: int, mean_objects: int, detections: int
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """Return an image's objects (boxes, classes), and detections (boxes, classes, scores) like a detector's."""
    # The first class is the most frequent, as persons are in COCO.
    draw = np.where(random.random((2, detections + 50)) < 0.3, 0, random.integers(0, classes, (2, detections + 50)))
    count = min(50, random.poisson(mean_objects))
    objects, kinds = _boxes(random, count), draw[0, :count]
    boxes, found_kinds, scores = _boxes(random, detections), draw[1, :detections], random.random(detections) ** 3
    hits = int(SHARE_FOUND * detections) if count else 0
    which = random.integers(0, max(count, 1), hits)
    boxes[:hits] = objects[which] + random.normal(0, 0.05, (hits, 4)) * np.tile(
        objects[which, 2:] - objects[which, :2], 2
    )
    found_kinds[:hits], scores[:hits] = kinds[which], random.random(hits)
    return (objects, kinds), (boxes.astype(np.float32), found_kinds, scores.astype(np.float32))


def _coco(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return COCO labels, including crowds, and detections in COCO's format."""
    random = np.random.default_rng(0)
    labels: list[dict[str, Any]] = []
    results = []
    for image in range(1, images + 1):
        (objects, kinds), (boxes, found_kinds, scores) = _scene(random, COCO_CLASSES, COCO_OBJECTS, detections)
        for box, kind in zip(_to_xywh(objects), kinds.tolist(), strict=True):
            crowd = int(random.random() < 0.01)
            label = {"image_id": image, "category_id": kind + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            labels.append({**label, "id": len(labels) + 1})
        for box, kind, score in zip(_to_xywh(boxes), found_kinds.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": image, "category_id": kind + 1, "bbox": box, "score": score})
    pictures = [{"id": i, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(1, images + 1)]
    categories = [{"id": i, "name": f"class{i}"} for i in range(1, COCO_CLASSES + 1)]
    return {"info": {}, "images": pictures, "annotations": labels, "categories": categories}, results


def _to_xywh(boxes: Array) -> list[list[float]]:
    result: list[list[float]] = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]]).tolist()
    return result


def _voc(folder: Path, images: int, detections: int) -> list[tuple[str, Instances]]:
    """Write a VOC data set's labels, including difficult objects, and return detections by image."""
    random = np.random.default_rng(0)
    outputs = []
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for image in range(images):
        name = f"{image:06d}"
        (objects, kinds), (boxes, found_kinds, scores) = _scene(random, VOC_CLASSES, VOC_OBJECTS, detections)
        lines = []
        for box, kind in zip(np.add(objects, [1, 1, 0, 0]).astype(int).tolist(), kinds.tolist(), strict=True):
            corners = "".join(
                f"<{key}>{at}</{key}>" for key, at in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            )
            lines.append(
                f"<object><name>class{kind}</name><pose>Left</pose><truncated>0</truncated>"
                f"<difficult>{int(random.random() < 0.15)}</difficult><bndbox>{corners}</bndbox></object>"
            )
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(lines)}</annotation>")
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes, instances.scores = Boxes(torch.from_numpy(boxes)), torch.from_numpy(scores)
        instances.pred_classes = torch.from_numpy(found_kinds)
        outputs.append((name, instances))
    names = "\n".join(name for name, _ in outputs)
    (folder / "ImageSets" / "Main" / "test.txt").write_text(f"{names}\n")
    return outputs

"""Detections on pictures without labels: drawn, and as a file in COCO's form."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image
from pycocotools import mask as rle

from moco_d2.data.listing import Listing, counted
from moco_d2.detection.predictor import Predictor
from moco_d2.detection.results import to_json
from moco_d2.io.files import atomic_write, empty_folder
from moco_d2.io.pictures import PictureError
from moco_d2.io.provenance import provenance, sha256
from moco_d2.reports.pictures import Scene, draw_scene

FILE = "predictions.json"
Report = Callable[[str], None]


def predict(
    run: str | os.PathLike[str],
    pictures: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    score: float = 0.5,
    opts: Sequence[str] = (),
    report: Report = print,
) -> int:
    """Find objects on pictures; write ``predictions.json``, and a drawing of each picture into ``pictures/``.

    The file is a COCO data set with a ``score`` in each annotation; ``file_name`` starts at the folder of the pictures.
    A segmenter leaves ``classes/NAME.png`` instead, whose grey values are the classes' numbers.

    Args:
        run: the folder of a finished run, or one of its checkpoints.
        pictures: files, and folders, which are searched with their subfolders.
        folder: of the output; new or empty.
        score: lowest score of a detection that is drawn. The file has all that the detector returns
            (``MODEL.ROI_HEADS.SCORE_THRESH_TEST``).
        opts: ``KEY VALUE`` overrides of the run's config.
        report: called with a line for each picture that cannot be used, and for other remarks.

    Returns:
        The number of pictures that could not be used.

    Raises:
        ValueError: a path does not exist, there is no picture, the output folder is not empty, or the detector cannot
            be loaded.
    """
    root, files = list_files(pictures, report)
    folder = empty_folder(folder, "--output")
    predictor = Predictor(run, opts)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path, name in zip(files, _names(files, root), strict=True):
        try:
            pixels = predictor.read(path)
        except PictureError as error:
            report(f"left out: {error}")
            continue
        found = predictor(pixels)
        size = {"width": pixels.shape[1], "height": pixels.shape[0]}
        images.append({"id": len(images) + 1, "file_name": os.path.relpath(path, root), **size})
        _draw(folder / "pictures" / f"{name}.jpg", pixels, predictor, found, score)
        if "instances" in found:
            annotations += _annotations(found["instances"], images[-1]["id"], len(annotations))
        else:
            _write_image(folder / "classes" / f"{name}.png", found["sem_seg"].argmax(0).numpy().astype(np.uint8), "PNG")
    if not images:
        raise ValueError(f"none of the {len(files)} pictures can be read")
    with atomic_write(folder / FILE) as file:
        file.write(to_json({**_head(predictor, annotations), "images": images, "annotations": annotations}))
    report(f"{len(annotations)} detections on {len(images)} pictures")
    return len(files) - len(images)


def _head(predictor: Predictor, annotations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the origin of a file of detections, and its categories."""
    info = {"detector": predictor.checkpoint.name, "sha256": sha256(predictor.checkpoint)}
    names = predictor.classes or [str(n) for n in range(max((a["category_id"] for a in annotations), default=0))]
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return {"info": {**info, "protocol": predictor.cfg.PROTOCOL, **provenance()}, "categories": categories}


def list_files(pictures: Sequence[str | os.PathLike[str]], report: Report) -> tuple[str, list[str]]:
    """Return the folder that all pictures have in common, and the pictures, each once.

    Raises:
        ValueError: a path does not exist, or there is no picture.
    """
    files: list[str] = []
    folders: list[str] = []
    for given in map(os.path.abspath, pictures):
        if os.path.isdir(given):
            listing = Listing(given)
            files += listing.files
            folders.append(given)
            if listing.others:
                report(f"{given}: left out {counted(listing.others)}")
        elif os.path.isfile(given):
            files.append(given)
            folders.append(os.path.dirname(given))
        else:
            raise ValueError(f"{given} does not exist; name pictures, or folders of pictures")
    if not files:
        raise ValueError(f"there is no picture in {', '.join(folders)}")
    return os.path.commonpath(folders), list(dict.fromkeys(files))


def _names(files: Sequence[str], root: str) -> list[str]:
    """Return a name for each picture's drawing: its path without the extension, unless two pictures share that."""
    paths = [os.path.relpath(path, root) for path in files]
    stems = Counter(os.path.splitext(path)[0] for path in paths)
    return [stem if stems[stem := os.path.splitext(path)[0]] == 1 else path for path in paths]


def _draw(path: Path, pixels: np.ndarray, predictor: Predictor, found: Mapping[str, Any], score: float) -> None:
    scene = Scene.predicted(found)
    if scene.scores is not None:
        scene = scene.choose([index for index, value in enumerate(scene.scores) if value >= score])
    _write_image(path, draw_scene(pixels, predictor.names, scene), "JPEG", quality=90)


def _write_image(path: Path, pixels: np.ndarray, kind: str, **options: Any) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _annotations(instances: Any, image: int, before: int) -> list[dict[str, Any]]:
    """Return a picture's detections in COCO's form."""
    records: list[dict[str, Any]] = instances_to_coco_json(instances, image)
    for number, record in enumerate(records, start=before + 1):
        width, height = record["bbox"][2:]
        area = float(rle.area(record["segmentation"])) if "segmentation" in record else width * height
        record |= {"id": number, "category_id": record["category_id"] + 1, "area": area, "iscrowd": 0}
    return records

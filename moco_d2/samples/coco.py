"""Labels of the sample data in the formats of COCO (instances, keypoints) and LVIS."""

from __future__ import annotations

import importlib.util
import runpy
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from moco_d2.samples.scenes import SUPERSAMPLING, Thing
from moco_d2.samples.shapes import KEYPOINTS

Record = dict[str, Any]
SMALLEST_HOLE = 24  # pixels of the mask; smaller holes are filled
# VOC's class names that differ from COCO's -> COCO's.
COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
# COCO's class names -> LVIS's, for the kinds in COCO's pictures. LVIS reports rare, common and frequent categories
# separately, and has no number for a group without objects. So the boats, which have sails, are dinghies (rare in both
# versions), and the trains, which have pointed noses, are bullet trains (common).
LVIS_NAMES = {
    "airplane": "airplane",
    "boat": "dinghy",
    "car": "car_(automobile)",
    "cow": "cow",
    "horse": "horse",
    "potted plant": "flowerpot",
    "train": "bullet_train",
}
# Pairs of keypoints, numbered from 1, in the order of COCO's annotation files.
SKELETON = [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9], [8, 10], [9, 11],
    [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip
HIDDEN, SEEN = 1, 2  # visibility of a keypoint; 0 means: not labelled


@cache
def detectron2_lists(name: str) -> Record:
    """Return the names that a file of constants in ``detectron2.data.datasets`` defines.

    The file is run without importing Detectron2, which would take longer than drawing COCO's pictures.
    """
    spec = importlib.util.find_spec("detectron2")
    if spec is None or not spec.submodule_search_locations:
        problem = "Detectron2, which has the names of the categories, is not installed; run make install"
        raise ModuleNotFoundError(problem, name="detectron2")
    return runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "data" / "datasets" / f"{name}.py"))


def coco_categories() -> list[Record]:
    """Return COCO's 80 categories with their real ids."""
    return [
        {"id": c["id"], "name": c["name"]} for c in detectron2_lists("builtin_meta")["COCO_CATEGORIES"] if c["isthing"]
    ]


def person_category() -> Record:
    """Return the only category of the keypoint files."""
    return {"id": 1, "name": "person", "supercategory": "person", "keypoints": list(KEYPOINTS), "skeleton": SKELETON}


def instance(thing: Thing) -> Record:
    """Return category, box, area and segmentation of an object: polygons, or a run-length mask for a crowd."""
    from pycocotools import mask as coco_mask

    x0, y0, x1, y1 = thing.box
    ids = {c["name"]: c["id"] for c in coco_categories()}
    annotation = {
        "category_id": ids[COCO_NAMES.get(thing.kind, thing.kind)],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(thing.mask.sum()) / SUPERSAMPLING**2,
        "iscrowd": int(thing.crowd),
    }
    if thing.crowd:
        code = coco_mask.encode(np.asfortranarray(thing.mask[::SUPERSAMPLING, ::SUPERSAMPLING].astype(np.uint8)))
        return {**annotation, "segmentation": {"size": code["size"], "counts": code["counts"].decode()}}
    return {**annotation, "segmentation": polygons(thing.mask)}


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Return a mask's outlines as in COCO, [x0, y0, x1, y1, ...] in picture coordinates.

    COCO's polygons have no holes, so an object with a hole is cut in two through the hole.
    """
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for contour, (*_, parent) in zip(contours, tree[0] if contours else (), strict=True):
        if parent >= 0 and cv2.contourArea(contour) > SMALLEST_HOLE:
            cut = int(contour[:, 0, 0].mean())
            left, right = mask.copy(), mask.copy()
            left[:, cut:], right[:, :cut] = False, False
            return polygons(left) + polygons(right)
    outer = [c for c, (*_, parent) in zip(contours, tree[0], strict=True) if parent < 0] if contours else []
    # A contour runs through the centres of border pixels, hence the half pixel. A polygon has at least three corners.
    return [((c[:, 0] + 0.5) / SUPERSAMPLING).ravel().tolist() for c in outer if len(c) >= 3]


def person(thing: Thing) -> Record:
    """Return :func:`instance` of a jointed person with its keypoints [x, y, visibility, ...] in whole pixels.

    A covered joint is hidden; a joint outside the picture, or outside the box of the visible part, has no label.
    """
    assert thing.keypoints is not None
    x0, y0, x1, y1 = thing.box
    labels: list[int] = []
    for x, y in thing.keypoints:
        inside = x0 <= x < x1 and y0 <= y < y1
        seen = inside and thing.mask[int(y * SUPERSAMPLING), int(x * SUPERSAMPLING)]
        labels += [int(x), int(y), SEEN if seen else HIDDEN] if inside else [0, 0, 0]
    return {**instance(thing), "keypoints": labels, "num_keypoints": sum(v > 0 for v in labels[2::3])}


def lvis_content(images: Iterable[Record], annotations: Iterable[Record], version: str) -> Record:
    """Return the content of an LVIS file, made from images and annotations in COCO's format.

    Args:
        images: COCO's images.
        annotations: COCO's annotations of these images; those of other images are ignored.
        version: ``v0_5`` or ``v1``. The file has all categories of that version with their real ids.
    """
    known = detectron2_lists(f"lvis_{version}_categories")["LVIS_CATEGORIES"]
    ids = {c["name"]: c["id"] for c in known}
    drawn = {c["id"]: ids[LVIS_NAMES[c["name"]]] for c in coco_categories() if c["name"] in LVIS_NAMES}
    of_image: dict[int, list[Record]] = {image["id"]: [] for image in images}
    crowds: dict[int, set[int]] = {number: set() for number in of_image}
    for annotation in annotations:
        number, category = annotation["image_id"], drawn[annotation["category_id"]]
        if number in of_image and annotation["iscrowd"]:  # LVIS notes that not all objects are labelled
            crowds[number].add(category)
        elif number in of_image:
            kept = {key: annotation[key] for key in ("bbox", "area", "segmentation")}
            of_image[number].append({"image_id": number, "category_id": category, **kept})
    present = {number: {a["category_id"] for a in found} for number, found in of_image.items()}
    objects = [{"id": i, **a} for i, a in enumerate((a for found in of_image.values() for a in found), start=1)]
    image_count = Counter(category for found in present.values() for category in found)
    instance_count = Counter(a["category_id"] for a in objects)
    counts = ("image_count", image_count), ("instance_count", instance_count)
    return {
        "info": {"description": "moco_d2's drawn sample pictures", "version": version},
        "licenses": [],
        "images": [
            {
                **image,
                "neg_category_ids": sorted(set(drawn.values()) - present[image["id"]] - crowds[image["id"]]),
                "not_exhaustive_category_ids": sorted(present[image["id"]] & crowds[image["id"]]),
            }
            for image in images
        ],
        "annotations": objects,
        "categories": [{**c, **{name: count[c["id"]] for name, count in counts}} for c in known],
    }

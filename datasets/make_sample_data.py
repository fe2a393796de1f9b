#!/usr/bin/env python3
"""Draw a small $DETECTRON2_DATASETS root: VOC2007, VOC2012, coco and imagenet/train, some hundred pictures in seconds.

    datasets/make_sample_data.py OUT

The folders, file formats, class names and category ids are those of the real data sets, so every shipped config runs on
them unchanged (but for a schedule that fits). The same seed gives the same files. See datasets/README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from sample_scenes import KINDS, SUPERSAMPLING, Scene, Thing, draw_scene

MARKER = "SAMPLE_DATA.json"  # says that a folder was made by this script and may be made anew
JPEG_QUALITY = 92
SMALLEST_HOLE = 24  # in a mask, in its pixels; smaller ones are filled
# Pictures per split. The order is the seed's second part, so a new split goes to the end.
SPLITS = {
    "imagenet/train": 300,
    "VOC2007/trainval": 120,
    "VOC2007/test": 80,
    "VOC2012/trainval": 120,
    "coco/train2017": 160,
    "coco/val2017": 80,
}
# COCO's pictures show fewer kinds: its evaluator averages over those that occur, so a short run has more of each.
COCO_KINDS = KINDS[::3]
# VOC's names where COCO has others.
COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def scenes(split: str, count: int, seed: int) -> Iterator[Scene]:
    """Draw a split's pictures; each follows from (seed, split, number) alone.

    Kinds take turns, so that every class has objects in every split.
    """
    stream = list(SPLITS).index(split)
    for number in range(count):
        rng = np.random.default_rng((seed, stream, number))
        height, width = int(rng.integers(110, 151)), int(rng.integers(140, 201))
        if rng.random() < 0.25:
            height, width = width, height
        if split.startswith("imagenet"):  # one thing fills the picture, as in ImageNet
            yield draw_scene(rng, height, width, [KINDS[number % len(KINDS)]], (0.45, 0.85))
            continue
        pool = COCO_KINDS if split.startswith("coco") else KINDS
        others = rng.choice(len(pool), int(rng.integers(1, 4)))
        kinds = [pool[number % len(pool)], *(pool[i] for i in others)]
        crowd = "cow" if split == "coco/val2017" and number % 20 == 16 else None
        yield draw_scene(rng, height, width, kinds, crowd=crowd)


def save_jpeg(scene: Scene, path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path, quality=JPEG_QUALITY)


def bounding_box(thing: Thing) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1) of what is seen, in picture coordinates with half-pixel steps."""
    rows, cols = np.flatnonzero(thing.mask.any(axis=1)), np.flatnonzero(thing.mask.any(axis=0))
    corners = (cols[0], rows[0], cols[-1] + 1, rows[-1] + 1)
    return tuple(float(c) / SUPERSAMPLING for c in corners)  # type: ignore[return-value]


def make_imagenet(root: Path, seed: int) -> None:
    """Write one folder a kind, as ImageFolder wants it; the names look like synsets but are none."""
    for number, scene in enumerate(scenes("imagenet/train", SPLITS["imagenet/train"], seed)):
        folder = f"n9000{number % len(KINDS):04d}"
        save_jpeg(scene, root / "imagenet" / "train" / folder / f"{folder}_{number}.JPEG")


def make_voc(root: Path, year: int, seed: int) -> None:
    """Write ``VOC<year>``: JPEGImages, Annotations and ImageSets/Main."""
    folder = root / f"VOC{year}"
    lists: dict[str, list[str]] = {}
    for split in (name for name in SPLITS if name.startswith(f"VOC{year}/")):
        names = []
        for number, scene in enumerate(scenes(split, SPLITS[split], seed)):
            name = f"{len(lists)}{number:05d}" if year == 2007 else f"{year}_{number:06d}"
            save_jpeg(scene, folder / "JPEGImages" / f"{name}.jpg")
            annotation = folder / "Annotations" / f"{name}.xml"
            annotation.parent.mkdir(exist_ok=True)
            ET.ElementTree(voc_annotation(scene, name, year)).write(annotation)
            names.append(name)
        lists[split.partition("/")[2]] = names
    lists["train"], lists["val"] = lists["trainval"][::2], lists["trainval"][1::2]
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in lists.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def voc_annotation(scene: Scene, name: str, year: int) -> ET.Element:
    """Return VOC's XML of a scene; an object that is mostly hidden, or tiny, is marked difficult."""
    height, width = scene.image.shape[:2]
    root = ET.Element("annotation")
    for key, value in (("folder", f"VOC{year}"), ("filename", f"{name}.jpg")):
        ET.SubElement(root, key).text = value
    size = ET.SubElement(root, "size")
    for key, number in (("width", width), ("height", height), ("depth", 3)):
        ET.SubElement(size, key).text = str(number)
    for thing in scene.things:
        item = ET.SubElement(root, "object")
        difficult = thing.visible < 0.7 or thing.full_area < 250 * SUPERSAMPLING**2
        flags = {"truncated": str(int(thing.visible < 0.95)), "difficult": str(int(difficult))}
        for key, text in {"name": thing.kind, "pose": "Unspecified", **flags}.items():
            ET.SubElement(item, key).text = text
        box = ET.SubElement(item, "bndbox")
        x0, y0, x1, y1 = bounding_box(thing)
        # Whole pixels counted from 1, as VOC's annotators did.
        for key, edge in (("xmin", int(x0) + 1), ("ymin", int(y0) + 1), ("xmax", ceil(x1)), ("ymax", ceil(y1))):
            ET.SubElement(box, key).text = str(edge)
    return root


def make_coco(root: Path, split: str, seed: int) -> None:
    """Write ``coco/<split>`` and its instances file, with all 80 categories under their real ids."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    ids = {c["name"]: c["id"] for c in categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes(f"coco/{split}", SPLITS[f"coco/{split}"], seed), start=1):
        file_name = f"{number:012d}.jpg"
        save_jpeg(scene, root / "coco" / split / file_name)
        height, width = scene.image.shape[:2]
        images.append({"id": number, "file_name": file_name, "height": height, "width": width})
        for thing in scene.things:
            annotation = coco_annotation(thing)
            annotation |= {"id": len(annotations) + 1, "image_id": number}
            annotation["category_id"] = ids[COCO_NAMES.get(thing.kind, thing.kind)]
            annotations.append(annotation)
    info = {"description": "moco_d2's drawn sample pictures"}
    content = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    path = root / "coco" / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def coco_annotation(thing: Thing) -> dict[str, Any]:
    """Return box, area and segmentation of an object: polygons, or for a crowd a run-length code."""
    from pycocotools import mask as coco_mask

    x0, y0, x1, y1 = bounding_box(thing)
    annotation = {
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": float(thing.mask.sum()) / SUPERSAMPLING**2,
        "iscrowd": int(thing.crowd),
    }
    if thing.crowd:
        code = coco_mask.encode(np.asfortranarray(thing.mask[::SUPERSAMPLING, ::SUPERSAMPLING].astype(np.uint8)))
        return {**annotation, "segmentation": {"size": code["size"], "counts": code["counts"].decode()}}
    return {**annotation, "segmentation": polygons(thing.mask)}


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Return a mask's outlines as COCO writes them, [x0, y0, x1, y1, ...] in picture coordinates.

    COCO's polygons have no holes. Where something lies in the middle of an object, the object is cut in two through it.
    """
    contours, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for contour, (*_, parent) in zip(contours, tree[0] if contours else (), strict=True):
        if parent >= 0 and cv2.contourArea(contour) > SMALLEST_HOLE:
            cut = int(contour[:, 0, 0].mean())
            left, right = mask.copy(), mask.copy()
            left[:, cut:], right[:, :cut] = False, False
            return polygons(left) + polygons(right)
    outer = [c for c, (*_, parent) in zip(contours, tree[0], strict=True) if parent < 0] if contours else []
    # A contour runs through the centres of border pixels, hence the half pixel; a polygon has three corners at least.
    return [((c[:, 0] + 0.5) / SUPERSAMPLING).ravel().tolist() for c in outer if len(c) >= 3]


def make_all(out: Path, seed: int) -> None:
    """Make the whole root in a temporary folder beside ``out`` and put it in place.

    Raises:
        ValueError: ``out`` holds something that this script did not make.
    """
    if out.exists() and not (out / MARKER).is_file():
        if not out.is_dir():
            raise ValueError(f"{out} is a file; name a folder that is empty or not there yet")
        if any(out.iterdir()):
            raise ValueError(f"{out} is not empty and was not made by this script; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        root = Path(temporary) / "root"
        root.mkdir()
        make_imagenet(root, seed)
        make_voc(root, 2007, seed)
        make_voc(root, 2012, seed)
        make_coco(root, "train2017", seed)
        make_coco(root, "val2017", seed)
        (root / MARKER).write_text(json.dumps({"seed": seed, "pictures": SPLITS}, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        root.rename(out)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make; emptied if this script made it")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other pictures (default: 0)")
    args = parser.parse_args()
    try:
        make_all(args.out, args.seed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for split, count in SPLITS.items():
        print(f"{count:5d} pictures  {args.out / split}")
    print(f"use it with: export DETECTRON2_DATASETS={args.out}")


if __name__ == "__main__":
    main()

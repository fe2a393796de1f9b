"""Maker of a small $DETECTRON2_DATASETS folder for all shipped configs: some thousand pictures in half a minute.

    moco-d2 samples OUT

It writes VOC2007, VOC2012 (objects and semantic segmentation), coco (objects and keypoints), lvis, cityscapes and
imagenet. Folders, file formats, class names and category ids are those of the real data sets, so every shipped
config can read them; only schedule and sizes have to be smaller. The same seed gives the same files. See
datasets/README.md.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moco_d2.builtin_sets import voc_colors
from moco_d2.samples.coco import (
    Record,
    coco_categories,
    detectron2_lists,
    instance,
    lvis_content,
    person,
    person_category,
)
from moco_d2.samples.scenes import SUPERSAMPLING, Scene, draw_scene
from moco_d2.samples.shapes import KINDS
from moco_d2.samples.streets import draw_street

ABOUT = "SAMPLE_DATA.json"  # seed and number of pictures
JPEG_QUALITY = 92
VOID = 255  # label of ignored pixels in VOC and Cityscapes
# Pictures per split. The position in this table is part of each picture's seed, so a new split goes to the end.
SPLITS = {
    # For pretraining and probes. A queue of negatives needs many pictures; they are small instead.
    "imagenet/train": 4000,
    "VOC2007/trainval": 120,
    "VOC2007/test": 80,
    "VOC2012/trainval": 120,
    "coco/train2017": 160,
    "coco/val2017": 80,
    # Separate pictures in coco's folders, so that the instances files stay small.
    "person_keypoints/train2017": 80,
    "person_keypoints/val2017": 40,
    "cityscapes/train": 24,
    "cityscapes/val": 8,
    "imagenet/val": 800,
}
OBJECT_SIDE = 72  # of a picture of imagenet

CITIES = {"train": ("inkton", "paperville"), "val": ("brushford",)}
STREET_SIZE = (128, 256)
# COCO's evaluator averages over the kinds that occur; with fewer kinds a short run sees more of each.
COCO_KINDS = KINDS[::3]
ONE_OF = 8  # one in eight of COCO's training pictures is in LVIS v1's val, which has pictures of both folders


def generator(split: str, number: int, seed: int) -> np.random.Generator:
    """Return the random generator of a picture."""
    return np.random.default_rng((seed, list(SPLITS).index(split), number))


def scenes(split: str, count: int, seed: int) -> Iterator[Scene]:
    """Draw a split's pictures; each depends only on (seed, split, number).

    Kinds take turns, so that every class has objects in every split.
    """
    for number in range(count):
        rng = generator(split, number, seed)
        if split.startswith("imagenet"):  # one object fills the picture, as in ImageNet
            kinds, scale = [KINDS[number % len(KINDS)]], (0.45, 0.8)
            yield draw_scene(rng, OBJECT_SIDE, OBJECT_SIDE, kinds, scale, clutter=False, border=0.2)
            continue
        height, width = int(rng.integers(110, 151)), int(rng.integers(140, 201))
        if rng.random() < 0.25:
            height, width = width, height
        pool = COCO_KINDS if split.startswith("coco") else KINDS
        if split.startswith("person_keypoints"):
            others = rng.choice([kind for kind in KINDS if kind != "person"], int(rng.integers(0, 3)))
            kinds = ["person", *others, *["person"] * int(rng.integers(0, 3))]
            yield draw_scene(rng, height, width, kinds, (0.45, 0.8), jointed=True)
            continue
        others = rng.choice(len(pool), int(rng.integers(1, 4)))
        kinds = [pool[number % len(pool)], *(pool[i] for i in others)]
        crowd = "cow" if split == "coco/val2017" and number % 20 == 16 else None
        yield draw_scene(rng, height, width, kinds, crowd=crowd)


def save_jpeg(scene: Scene, path: Path) -> None:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(path, quality=JPEG_QUALITY)


def make_imagenet(root: Path, split: str, seed: int) -> None:
    """Write one folder for each kind, as ImageFolder expects; the names look like synsets but are invented."""
    for number, scene in enumerate(scenes(f"imagenet/{split}", SPLITS[f"imagenet/{split}"], seed)):
        folder = f"n9000{number % len(KINDS):04d}"
        save_jpeg(scene, root / "imagenet" / split / folder / f"{folder}_{number}.JPEG")


def make_voc(root: Path, year: int, seed: int) -> None:
    """Write ``VOC<year>``: JPEGImages, Annotations and ImageSets/Main; for 2012 also the semantic segmentation."""
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
            if year == 2012:
                save_voc_labels(scene, folder, name)
            names.append(name)
        lists[split.partition("/")[2]] = names
    lists["train"], lists["val"] = lists["trainval"][::2], lists["trainval"][1::2]
    write_lists(folder / "ImageSets" / "Main", lists)
    if year == 2012:
        write_lists(folder / "ImageSets" / "Segmentation", {**lists, "train_aug": lists["train"]})


def write_lists(folder: Path, lists: dict[str, list[str]]) -> None:
    """Write each split's names."""
    folder.mkdir(parents=True)
    for split, names in lists.items():
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def voc_labels(scene: Scene) -> np.ndarray:
    """Return the class of each pixel, (height, width) uint8; 0 is background, 255 the outlines of objects."""
    height, width = scene.image.shape[:2]
    labels = np.zeros((height, width), np.uint8)
    for thing in scene.things:
        blocks = thing.mask.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING)
        labels[blocks.sum(axis=(1, 3)) >= SUPERSAMPLING**2 / 2] = 1 + KINDS.index(thing.kind)
    padded = np.pad(labels, 1, mode="edge")
    shifted = [padded[y : y + height, x : x + width] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
    return np.where(np.any([labels != other for other in shifted], axis=0), np.uint8(VOID), labels)


def save_voc_labels(scene: Scene, folder: Path, name: str) -> None:
    """Write a picture's classes with VOC's palette, and without a palette, as in the augmented set."""
    labels = Image.fromarray(voc_labels(scene))
    for kind in ("SegmentationClassAug", "SegmentationClass"):
        (folder / kind).mkdir(exist_ok=True)
        if kind == "SegmentationClass":
            labels.putpalette([value for colour in voc_colors(256) for value in colour])
        labels.save(folder / kind / f"{name}.png")


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
        x0, y0, x1, y1 = thing.box
        # Whole pixels that start at 1, as in VOC.
        for key, edge in (("xmin", int(x0) + 1), ("ymin", int(y0) + 1), ("xmax", ceil(x1)), ("ymax", ceil(y1))):
            ET.SubElement(box, key).text = str(edge)
    return root


def make_coco(root: Path, split: str, seed: int) -> None:
    """Write ``coco/<split>``, its instances and keypoint files."""
    objects, persons = f"coco/{split}", f"person_keypoints/{split}"
    annotations = root / "coco" / "annotations"
    annotations.mkdir(parents=True, exist_ok=True)
    for source, file_name, categories in (
        (objects, f"instances_{split}.json", coco_categories()),
        (persons, f"person_keypoints_{split}.json", [person_category()]),
    ):
        content = coco_content(root / objects, source, seed)
        (annotations / file_name).write_text(json.dumps({**content, "categories": categories}))


def coco_content(folder: Path, source: str, seed: int) -> Record:
    """Write a split's pictures and return their images and annotations in COCO's format."""
    images: list[Record] = []
    annotations: list[Record] = []
    first = list(SPLITS).index(source) * 100_000 + 1  # ids are unique across splits, as in COCO
    for number, scene in enumerate(scenes(source, SPLITS[source], seed), start=first):
        file_name = f"{number:012d}.jpg"
        save_jpeg(scene, folder / file_name)
        height, width = scene.image.shape[:2]
        url = f"http://images.cocodataset.org/{folder.name}/{file_name}"
        images.append({"id": number, "file_name": file_name, "height": height, "width": width, "coco_url": url})
        found = [person(t) for t in scene.things if t.keypoints is not None] or [instance(t) for t in scene.things]
        annotations += [{"id": len(annotations) + i, "image_id": number, **a} for i, a in enumerate(found, start=1)]
    info = {"description": "moco_d2's drawn sample pictures"}
    return {"info": info, "licenses": [], "images": images, "annotations": annotations}


def make_lvis(root: Path) -> None:
    """Write LVIS's files for COCO's pictures: v0.5 keeps COCO's splits, v1 moves some training pictures to val."""
    train, val = (
        json.loads((root / "coco" / "annotations" / f"instances_{split}.json").read_text())
        for split in ("train2017", "val2017")
    )
    moved = train["images"][::ONE_OF]
    kept = [image for image in train["images"] if image not in moved]
    files = {
        ("v0_5", "train"): train["images"], ("v0_5", "val"): val["images"],
        ("v1", "train"): kept, ("v1", "val"): val["images"] + moved,
    }  # fmt: skip
    (root / "lvis").mkdir()
    for (version, split), images in files.items():
        content = lvis_content(images, train["annotations"] + val["annotations"], version)
        (root / "lvis" / f"lvis_{version.replace('_', '.')}_{split}.json").write_text(json.dumps(content))


def make_cityscapes(root: Path, split: str, seed: int) -> None:
    """Write ``cityscapes/leftImg8bit/<split>`` and ``cityscapes/gtFine/<split>``."""
    height, width = STREET_SIZE
    for number in range(SPLITS[f"cityscapes/{split}"]):
        street = draw_street(generator(f"cityscapes/{split}", number, seed), height, width)
        city = CITIES[split][number % len(CITIES[split])]
        name = f"{city}_{number:06d}_000019"
        pictures, truth = (root / "cityscapes" / kind / split / city for kind in ("leftImg8bit", "gtFine"))
        for folder in (pictures, truth):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(street.image).save(pictures / f"{name}_leftImg8bit.png")
        objects = [{"label": label, "polygon": polygon.tolist()} for label, polygon in street.outlines]
        content = {"imgHeight": height, "imgWidth": width, "objects": objects}
        (truth / f"{name}_gtFine_polygons.json").write_text(json.dumps(content))
        for kind, image in street_labels(street.outlines, (width, height)).items():
            image.save(truth / f"{name}_gtFine_{kind}.png")


def street_labels(outlines: list[tuple[str, np.ndarray]], size: tuple[int, int]) -> dict[str, Image.Image]:
    """Return Cityscapes' label images from outlines, each painted over the earlier ones.

    Args:
        outlines: label and polygon.
        size: width and height.

    Returns:
        ``labelIds`` and ``labelTrainIds`` hold the two numbers of a pixel's class. ``instanceIds`` holds 1000 times the
        class plus the object's number, or just the class if its objects are not numbered.
    """
    classes = {c["name"]: c for c in detectron2_lists("builtin_meta")["CITYSCAPES_CATEGORIES"]}
    classes["ego vehicle"] = {"id": 1, "trainId": VOID, "isthing": 0}
    images = {"labelIds": Image.new("L", size), "labelTrainIds": Image.new("L", size, VOID)}
    images["instanceIds"] = Image.new("I;16", size)
    seen: dict[str, int] = {}
    for label, polygon in outlines:
        record = classes[label.removesuffix("group")]
        numbered = record["isthing"] and not label.endswith("group")
        instance_id = record["id"] * 1000 + seen.get(label, 0) if numbered else record["id"]
        seen[label] = seen.get(label, 0) + 1
        corners = [tuple(corner) for corner in polygon.tolist()]
        for kind, value in (
            ("labelIds", record["id"]),
            ("labelTrainIds", record["trainId"]),
            ("instanceIds", instance_id),
        ):
            ImageDraw.Draw(images[kind]).polygon(corners, fill=value)
    return images


def make_all(out: Path, seed: int) -> None:
    """Make all data sets in a temporary folder beside ``out``, then rename it to ``out``.

    Raises:
        ValueError: ``out`` holds files that this script did not write.
    """
    from moco_d2.io.files import replaced_folder

    with replaced_folder(out.resolve(), "OUT") as root:
        make_imagenet(root, "train", seed)
        make_imagenet(root, "val", seed)
        make_voc(root, 2007, seed)
        make_voc(root, 2012, seed)
        make_coco(root, "train2017", seed)
        make_coco(root, "val2017", seed)
        make_lvis(root)
        make_cityscapes(root, "train", seed)
        make_cityscapes(root, "val", seed)
        (root / ABOUT).write_text(json.dumps({"seed": seed, "pictures": SPLITS}, indent=2) + "\n")

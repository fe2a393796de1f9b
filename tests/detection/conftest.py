"""Converted weights of quarter width, and data sets of a few drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.convert.convert import convert_checkpoint
from moco_d2.facts import IMAGENET_RGB
from moco_d2.layers.resnet import build_resnet, describe


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory):
    """An unconverted backbone.pth: a random ResNet-50 of quarter width under torchvision's names."""
    torch.manual_seed(0)
    network = build_resnet("resnet50", width=0.25)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    facts = describe(network, IMAGENET_RGB, origin="a test", recipe="moco_test")
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save({"state_dict": state, "facts": facts.as_dict()}, path)
    return path


@pytest.fixture(scope="session")
def converted_file(backbone_file):
    """The same, converted: what a user passes as MODEL.WEIGHTS."""
    path = backbone_file.with_name("converted.pth")
    convert_checkpoint(backbone_file, path, proof=False)
    return path


@pytest.fixture
def altered(converted_file, tmp_path):
    """Write a variant of the converted file: ``altered(lambda content: ...)`` changes it in place."""

    def alter(change):
        content = torch.load(converted_file)
        change(content)
        path = tmp_path / "altered.pth"
        torch.save(content, path)
        return path

    return alter


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory):
    """A $DETECTRON2_DATASETS folder: VOC2007, VOC2012 and coco with four pictures each, of different sizes."""
    root = tmp_path_factory.mktemp("datasets")
    sizes = [(120, 90), (96, 128), (150, 80), (100, 100)]
    for year in (2007, 2012):
        _write_voc(root / f"VOC{year}", sizes)
    for split in ("train2017", "val2017"):
        _write_coco(root / "coco", split, sizes)
    return root


def _picture(path: Path, size, seed):
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    noise[20:60, 20:70] = (200, 30, 30)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)


def _write_voc(folder: Path, sizes):
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets/Main").mkdir(parents=True)
    names = [f"{i:06d}" for i in range(len(sizes))]
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        _picture(folder / f"JPEGImages/{name}.jpg", size, i)
        (folder / f"Annotations/{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>"
            "<depth>3</depth></size><object><name>dog</name><pose>Left</pose><truncated>0</truncated>"
            "<difficult>0</difficult><bndbox><xmin>21</xmin><ymin>21</ymin><xmax>70</xmax><ymax>60</ymax></bndbox>"
            "</object></annotation>"
        )
    for split in ("trainval", "test"):
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")


def _write_coco(folder: Path, split, sizes):
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    images, annotations = [], []
    for i, (width, height) in enumerate(sizes, start=1):
        _picture(folder / split / f"{i:012d}.jpg", (width, height), i)
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": width, "height": height})
        annotations.append({
            "id": i, "image_id": i, "category_id": 18, "iscrowd": 0, "area": 2000, "bbox": [20, 20, 50, 40],
            "segmentation": [[20, 20, 70, 20, 70, 60, 20, 60]],
        })  # fmt: skip
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))

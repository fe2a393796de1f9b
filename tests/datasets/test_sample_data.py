"""The sample data is what Detectron2 takes it for: same layout, same names, boxes and masks of what is seen."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_voc_instances
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances, polygons_to_bitmask
from PIL import Image

FEW = 20
# pycocotools hands NumPy its run-length codes in a way that NumPy 2 means to drop.
_RLE = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _instances(record: dict, masks: bool = False) -> Instances:
    """A record's objects as a perfect detector would return them."""
    objects = [item for item in record["annotations"] if not item.get("iscrowd")]
    boxes = torch.tensor([item["bbox"] for item in objects])
    if masks:
        boxes[:, 2:] += boxes[:, :2]  # COCO: width and height
    size = (record["height"], record["width"])
    found = Instances(size, pred_boxes=Boxes(boxes), scores=torch.ones(len(objects)))
    found.pred_classes = torch.tensor([item["category_id"] for item in objects])
    if masks:
        polygons = [[np.array(p) for p in item["segmentation"]] for item in objects]
        found.pred_masks = torch.stack([torch.from_numpy(polygons_to_bitmask(p, *size)) for p in polygons])
    return found


def test_same_seed_same_bytes(maker: ModuleType, sample: Path, tmp_path: Path) -> None:
    maker.make_all(tmp_path / "again", seed=0)
    assert _files(tmp_path / "again") == _files(sample)


def test_pictures_follow_from_seed_split_and_number(maker: ModuleType) -> None:
    def images(split: str, count: int, seed: int) -> list[bytes]:
        return [scene.image.tobytes() for scene in maker.scenes(split, count, seed)]

    first = images("VOC2007/trainval", 4, seed=0)
    assert images("VOC2007/trainval", 2, seed=0) == first[:2]
    others = images("VOC2007/trainval", 4, seed=1) + images("VOC2012/trainval", 4, seed=0)
    assert len(set(first + others)) == 12


def test_kinds_need_more_than_one_cue(maker: ModuleType) -> None:
    import sample_scenes

    assert sample_scenes.KINDS == CLASS_NAMES
    cues = [(sample_scenes._KIND_HUE[kind], sample_scenes._KIND_TEXTURE[kind]) for kind in CLASS_NAMES]
    assert len(set(cues)) == 20
    assert set(Counter(hue for hue, _ in cues).values()) == {2}
    assert set(Counter(texture for _, texture in cues).values()) == {4}


def test_everything_drawn_can_be_seen(maker: ModuleType) -> None:
    for scene in maker.scenes("coco/train2017", FEW, seed=3):
        masks = np.stack([thing.mask for thing in scene.things])
        assert masks.sum(axis=0).max() == 1  # a pixel shows one object
        assert all(thing.visible >= 0.6 for thing in scene.things)
        assert masks.shape[1:] == tuple(2 * side for side in scene.image.shape[:2])


@pytest.mark.parametrize(("year", "split"), [(2007, "trainval"), (2007, "test"), (2012, "trainval")])
def test_voc_is_read_by_detectron2(sample: Path, year: int, split: str) -> None:
    records = load_voc_instances(str(sample / f"VOC{year}"), split, CLASS_NAMES)
    assert len(records) == FEW
    assert {item["category_id"] for record in records for item in record["annotations"]} == set(range(20))
    for record in records:
        with Image.open(record["file_name"]) as image:
            assert (image.width, image.height, image.mode) == (record["width"], record["height"], "RGB")
        for x0, y0, x1, y1 in (item["bbox"] for item in record["annotations"]):
            assert 0 <= x0 < x1 <= record["width"] and 0 <= y0 < y1 <= record["height"]


def test_voc_splits_belong_together(sample: Path) -> None:
    lists = {path.stem: path.read_text().split() for path in (sample / "VOC2007" / "ImageSets" / "Main").glob("*.txt")}
    assert sorted(lists) == ["test", "train", "trainval", "val"]
    assert sorted(lists["train"] + lists["val"]) == sorted(lists["trainval"])
    assert not set(lists["trainval"]) & set(lists["test"])


def test_perfect_detections_score_100_on_voc(sample: Path) -> None:
    records = load_voc_instances(str(sample / "VOC2007"), "test", CLASS_NAMES)
    metadata = {"thing_classes": list(CLASS_NAMES), "dirname": str(sample / "VOC2007"), "split": "test", "year": 2007}
    MetadataCatalog.get("sample_voc_test").set(**metadata)
    evaluator = PascalVOCDetectionEvaluator("sample_voc_test")
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": _instances(record)}])
    # The average is over all twenty classes: it is 100 only if each has an object that counts.
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


@_RLE
def test_perfect_detections_score_100_on_coco(sample: Path, tmp_path: Path) -> None:
    annotations = str(sample / "coco" / "annotations" / "instances_val2017.json")
    MetadataCatalog.get("sample_coco_val").set(json_file=annotations, **_get_builtin_metadata("coco"))
    records = load_coco_json(annotations, str(sample / "coco" / "val2017"), "sample_coco_val")
    evaluator = COCOEvaluator("sample_coco_val", ("bbox", "segm"), output_dir=str(tmp_path), use_fast_impl=False)
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": _instances(record, masks=True)}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] > 99.9
    assert results["segm"]["AP"] > 99.9


@_RLE
def test_coco_has_real_categories_and_a_crowd(sample: Path) -> None:
    from pycocotools.coco import COCO

    coco = COCO(str(sample / "coco" / "annotations" / "instances_val2017.json"))
    real = _get_builtin_metadata("coco")
    assert set(coco.getCatIds()) == set(real["thing_dataset_id_to_contiguous_id"])
    assert [c["name"] for c in coco.loadCats(sorted(coco.getCatIds()))] == real["thing_classes"]
    assert {a["category_id"] for a in coco.anns.values()} == set(coco.getCatIds(list(_coco_kinds())))
    crowds = [a for a in coco.anns.values() if a["iscrowd"]]
    assert crowds and all(isinstance(a["segmentation"], dict) and coco.annToMask(a).any() for a in crowds)
    for annotation in coco.anns.values():
        # Polygons run through the middle of border pixels, which costs a thin object some of its area.
        assert coco.annToMask(annotation).sum() == pytest.approx(annotation["area"], rel=0.25)


def _coco_kinds() -> set[str]:
    other = {"aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle"}
    other |= {"pottedplant": "potted plant", "sofa": "couch", "tvmonitor": "tv"}
    return {other.get(name, name) for name in CLASS_NAMES[::3]}


def test_registered_names_load_unchanged(sample: Path) -> None:
    names = ["voc_2007_trainval", "voc_2007_test", "voc_2012_trainval", "coco_2017_train", "coco_2017_val"]
    script = (
        "import moco_d2; from detectron2.data import DatasetCatalog; from moco_d2.data import list_images\n"
        f"counts = {{name: len(DatasetCatalog.get(name)) for name in {names}}}\n"
        "counts['imagenet_train'] = len(list_images(['imagenet_train']))\n"
        "import json; print(json.dumps(counts))"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": str(sample)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys([*names, "imagenet_train"], FEW)
    assert len(list((sample / "imagenet" / "train").iterdir())) == 20


def test_only_its_own_folder_is_replaced(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maker, "SPLITS", dict.fromkeys(maker.SPLITS, 1))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not made by this script"):
        maker.make_all(theirs, seed=0)
    with pytest.raises(ValueError, match="is a file"):
        maker.make_all(theirs / "thesis.tex", seed=0)
    assert _files(theirs) == {"thesis.tex": b"years of work"}

    ours = tmp_path / "deep" / "ours"
    maker.make_all(ours, seed=0)
    (ours / "stale.jpg").write_text("from an older version")
    maker.make_all(ours, seed=0)
    assert "stale.jpg" not in _files(ours)


def test_a_failure_leaves_nothing_half_made(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(maker, "SPLITS", dict.fromkeys(maker.SPLITS, 1))
    monkeypatch.setattr(maker, "make_coco", fail)
    with pytest.raises(OSError, match="no space"):
        maker.make_all(tmp_path / "out", seed=0)
    assert not list(tmp_path.iterdir())

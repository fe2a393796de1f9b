"""The sample data is what Detectron2 takes it for: same layout, same names, boxes and masks of what is seen."""

from __future__ import annotations

import importlib.util
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
from PIL import Image, ImageDraw

FEW = 40
FEW_STREETS = 6
V1_MOVED = 5  # of FEW training pictures, those that LVIS v1 has in val
# pycocotools hands NumPy its run-length codes in a way that NumPy 2 means to drop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _masks(record: dict, objects: list[dict]) -> torch.Tensor:
    size = record["height"], record["width"]
    polygons = ([np.array(part) for part in item["segmentation"]] for item in objects)
    return torch.stack([torch.from_numpy(polygons_to_bitmask(parts, *size)) for parts in polygons])


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
        found.pred_masks = _masks(record, objects)
    if "keypoints" in objects[0]:
        found.pred_keypoints = torch.tensor([item["keypoints"] for item in objects], dtype=torch.float).view(-1, 17, 3)
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
    from moco_d2.samples import scenes as sample_scenes

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


def test_a_mask_is_what_was_painted(maker: ModuleType) -> None:
    from moco_d2.samples import scenes as sample_scenes
    from moco_d2.samples import shapes as sample_shapes

    rng = np.random.default_rng(5)
    for shape in [*CLASS_NAMES, *(sample_shapes.jointed_person(rng, walking) for walking in (True, False))]:
        canvas = np.full((80, 90, 3), -1, np.float32)
        thing = sample_scenes.put(rng, canvas, [], shape, 70, np.array([40.3, 34.8]), np.diag((-1, 1)))
        assert np.array_equal((canvas >= 0).all(axis=2), thing.mask)
        assert 0.6 <= thing.visible <= 1.05


def test_a_street_s_outlines_are_what_was_painted(maker: ModuleType) -> None:
    from moco_d2.samples import shapes as sample_shapes
    from moco_d2.samples import streets as sample_streets

    painter = sample_streets._Painter(np.random.default_rng(3), 128, 256)
    for shape, x in ((sample_shapes.jointed_person(painter.rng, walking=True), 60), ("car", 200)):
        before = painter.canvas.copy()
        painter.outline("a thing", painter.stand(shape, x, 100, 0.9).mask)
        painted = (painter.canvas != before).any(axis=2).reshape(128, 2, 256, 2).mean(axis=(1, 3)) >= 0.5
        image = Image.new("1", (256, 128))
        ImageDraw.Draw(image).polygon([tuple(corner) for corner in painter.outlines[-1][1].tolist()], fill=1)
        outlined = np.asarray(image)
        assert (painted & outlined).sum() > 0.95 * (painted | outlined).sum()


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


def test_voc_s_labels_agree_with_its_boxes(sample: Path) -> None:
    root = sample / "VOC2012"
    lists = {path.stem: path.read_text().split() for path in (root / "ImageSets" / "Segmentation").glob("*.txt")}
    assert lists["train_aug"] and lists["val"] and not set(lists["train_aug"]) & set(lists["val"])
    for record in load_voc_instances(str(root), "trainval", CLASS_NAMES):
        with Image.open(root / "SegmentationClass" / f"{record['image_id']}.png") as image:
            labels, colours = np.asarray(image), image.convert("RGB")
            assert image.mode == "P"
        with Image.open(root / "SegmentationClassAug" / f"{record['image_id']}.png") as image:
            assert image.mode == "L" and np.array_equal(np.asarray(image), labels)
        boxes = {index: np.zeros(labels.shape, bool) for index in range(1, 21)}
        for item in record["annotations"]:
            x0, y0, x1, y1 = map(int, item["bbox"])
            boxes[item["category_id"] + 1][y0:y1, x0:x1] = True
            inside = labels[y0:y1, x0:x1] == item["category_id"] + 1
            assert inside.any() and (np.asarray(colours)[y0:y1, x0:x1][inside] == _voc_colour(item)).all()
        assert all(covered[labels == index].all() for index, covered in boxes.items())
        assert 0 < (labels == 255).mean() < 0.3


def _voc_colour(item: dict) -> list[int]:
    published = {"aeroplane": [128, 0, 0], "bicycle": [0, 128, 0], "person": [192, 128, 128], "tvmonitor": [0, 64, 128]}
    name = CLASS_NAMES[item["category_id"]]
    index = item["category_id"] + 1
    bits = [[index >> 0 & 1, index >> 1 & 1, index >> 2 & 1], [index >> 3 & 1, index >> 4 & 1, 0]]
    derived = [128 * high + 64 * low for high, low in zip(*bits, strict=True)]
    return published.get(name, derived)


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


def _keypoint_records(sample: Path) -> list[dict]:
    annotations = str(sample / "coco" / "annotations" / "person_keypoints_val2017.json")
    MetadataCatalog.get("sample_keypoints_val").set(json_file=annotations, **_get_builtin_metadata("coco_person"))
    return load_coco_json(annotations, str(sample / "coco" / "val2017"), "sample_keypoints_val")


def test_keypoints_lie_on_their_person(sample: Path) -> None:
    records = _keypoint_records(sample)
    seen = Counter()
    for record in records:
        for item, mask in zip(record["annotations"], _masks(record, record["annotations"]), strict=True):
            points = np.array(item["keypoints"]).reshape(17, 3)  # Detectron2 has added half a pixel
            x0, y0, width, height = item["bbox"]
            labelled = points[points[:, 2] > 0]
            assert (labelled[:, :2] >= (x0, y0)).all() and (labelled[:, :2] <= (x0 + width, y0 + height)).all()
            on_person = [bool(mask[int(y), int(x)]) for x, y, v in points if v == 2]
            # Polygons run through the middle of border pixels; a face's edge may fall out.
            assert np.mean(on_person) > 0.85
            seen.update(points[:, 2].astype(int).tolist())
            left, right = points[5], points[6]  # shoulders: persons face the viewer, mirrored ones too
            assert left[0] > right[0] or 0 in (left[2], right[2])
    assert seen[2] > 0.6 * seen.total() and seen[1] and seen[0]


def test_keypoint_names_are_coco_s(sample: Path) -> None:
    content = json.loads((sample / "coco" / "annotations" / "person_keypoints_train2017.json").read_text())
    real = _get_builtin_metadata("coco_person")
    (category,) = content["categories"]
    names = category["keypoints"]
    assert tuple(names) == real["keypoint_names"]
    bones = {frozenset(names[i - 1] for i in bone) for bone in category["skeleton"]}
    assert {frozenset(rule[:2]) for rule in real["keypoint_connection_rules"]} - bones == set()
    assert all(a["num_keypoints"] == sum(v > 0 for v in a["keypoints"][2::3]) for a in content["annotations"])
    instances = json.loads((sample / "coco" / "annotations" / "instances_train2017.json").read_text())
    assert not {image["id"] for image in content["images"]} & {image["id"] for image in instances["images"]}


def test_perfect_keypoints_score_100(sample: Path, tmp_path: Path) -> None:
    records = _keypoint_records(sample)
    evaluator = COCOEvaluator("sample_keypoints_val", ("keypoints",), output_dir=str(tmp_path), use_fast_impl=False)
    evaluator.reset()
    for record in records:
        evaluator.process([record], [{"instances": _instances(record, masks=True)}])
    assert evaluator.evaluate()["keypoints"]["AP"] > 99.9


@pytest.mark.parametrize("version", ["v0.5", "v1"])
def test_perfect_detections_score_100_on_lvis(sample: Path, version: str) -> None:
    pytest.importorskip("lvis")
    from detectron2.data.datasets.lvis import get_lvis_instances_meta, load_lvis_json

    from moco_d2.detection.metrics.lvis import ExactLVISEvaluator

    annotations, name = str(sample / "lvis" / f"lvis_{version}_val.json"), f"sample_lvis_{version}_val"
    MetadataCatalog.get(name).set(json_file=annotations, **get_lvis_instances_meta(name))
    evaluator = ExactLVISEvaluator(name, tasks=("bbox", "segm"))
    evaluator.reset()
    for record in load_lvis_json(annotations, str(sample / "coco") + "/", name):
        assert Path(record["file_name"]).is_file()
        found = [{"instances": _instances(record, masks=True)}] if record["annotations"] else [{}]
        evaluator.process([record], found)
    results = evaluator.evaluate()
    # Rare, common and frequent categories: none of the groups is without objects.
    assert min(results[task][group] for task in ("bbox", "segm") for group in ("AP", "APr", "APc", "APf")) > 99.9


@pytest.mark.parametrize(("version", "count"), [("v0_5", 1230), ("v1", 1203)])
def test_lvis_has_all_fields(sample: Path, version: str, count: int) -> None:
    real = importlib.import_module(f"detectron2.data.datasets.lvis_{version}_categories").LVIS_CATEGORIES
    content = json.loads((sample / "lvis" / f"lvis_{version.replace('_', '.')}_val.json").read_text())
    assert len(content["categories"]) == count
    extra = {"image_count", "instance_count"}
    assert [{k: v for k, v in c.items() if k not in extra} for c in content["categories"]] == real
    assert sum(c["instance_count"] for c in content["categories"]) == len(content["annotations"])
    assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"])
    present = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    for image in content["images"]:
        assert image["neg_category_ids"] and not set(image["neg_category_ids"]) & present[image["id"]]
        assert set(image["not_exhaustive_category_ids"]) <= present[image["id"]]
    folders = {image["coco_url"].split("/")[-2] for image in content["images"]}
    assert folders == ({"val2017"} if version == "v0_5" else {"train2017", "val2017"})


def test_cityscapes_labels_are_those_of_its_own_scripts(sample: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    from cityscapesscripts.helpers.annotation import Annotation
    from cityscapesscripts.helpers.labels import name2label
    from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
    from cityscapesscripts.preparation.json2labelImg import createLabelImage

    groups = 0
    for path in (sample / "cityscapes" / "gtFine").rglob("*_polygons.json"):
        annotation = Annotation()
        annotation.fromJsonFile(str(path))
        groups += sum(obj.label.endswith("group") for obj in annotation.objects)
        theirs = {
            "labelIds": createLabelImage(annotation, "ids"), "labelTrainIds": createLabelImage(annotation, "trainIds"),
            "instanceIds": createInstanceImage(annotation, "ids"),
        }  # fmt: skip
        for kind, image in theirs.items():
            with Image.open(str(path).replace("polygons.json", f"{kind}.png")) as ours:
                assert np.array_equal(np.asarray(ours), np.asarray(image))
    assert groups
    assert {"car", "person", "bus"} <= set(name2label)


def test_perfect_streets_score_100_on_cityscapes(sample: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    from detectron2.data.datasets.cityscapes import load_cityscapes_semantic

    from moco_d2.config import load_cfg
    from moco_d2.detection.metrics.evaluators import build_evaluator

    folders = [str(sample / "cityscapes" / kind / "val") for kind in ("leftImg8bit", "gtFine")]
    metadata = {"gt_dir": folders[1], **_get_builtin_metadata("cityscapes")}
    cfg = load_cfg("", ["MODEL.MASK_ON", "True"])
    evaluators = []
    for kind in ("cityscapes_instance", "cityscapes_sem_seg"):
        MetadataCatalog.get(f"sample_{kind}_val").set(evaluator_type=kind, **metadata)
        evaluators.append(build_evaluator(cfg, f"sample_{kind}_val"))
        evaluators[-1].reset()
    instances, semantic = evaluators
    for record in load_cityscapes_semantic(*folders):
        with Image.open(record["file_name"]) as image:
            assert (image.width, image.height, image.mode) == (record["width"], record["height"], "RGB")
        with Image.open(record["sem_seg_file_name"]) as image:
            labels = torch.from_numpy(np.array(image)).long()
        one_hot = torch.nn.functional.one_hot(labels.clamp(max=19), 20)[..., :19]
        semantic.process([record], [{"sem_seg": one_hot.permute(2, 0, 1).float()}])
        with Image.open(record["sem_seg_file_name"].replace("labelTrainIds", "instanceIds")) as image:
            numbers = torch.from_numpy(np.array(image).astype(np.int64))
        ids = numbers.unique()[numbers.unique() >= 1000]
        found = Instances(tuple(numbers.shape), pred_masks=numbers == ids[:, None, None], scores=torch.ones(len(ids)))
        names = {24: "person", 26: "car", 28: "bus", 32: "motorcycle", 33: "bicycle"}
        classes = [metadata["thing_classes"].index(names[int(i) // 1000]) for i in ids]
        found.pred_classes = torch.tensor(classes)
        instances.process([record], [{"instances": found}])
    assert semantic.evaluate()["sem_seg"]["IoU"] == pytest.approx(100)
    assert instances.evaluate()["segm"]["AP"] == pytest.approx(100)


def test_registered_names_load_unchanged(sample: Path) -> None:
    names = ["voc_2007_trainval", "voc_2007_test", "voc_2012_trainval", "coco_2017_train", "coco_2017_val"]
    expected = dict.fromkeys([*names, "keypoints_coco_2017_train", "keypoints_coco_2017_val"], FEW)
    expected |= {"voc_2012_train_aug_sem_seg": FEW // 2, "voc_2012_val_sem_seg": FEW // 2}
    if importlib.util.find_spec("lvis"):
        expected |= {"lvis_v0.5_train": FEW, "lvis_v0.5_val": FEW}
        expected |= {"lvis_v1_train": FEW - V1_MOVED, "lvis_v1_val": FEW + V1_MOVED}
    if importlib.util.find_spec("cityscapesscripts"):
        expected |= {"cityscapes_fine_sem_seg_train": FEW_STREETS, "cityscapes_fine_sem_seg_val": FEW_STREETS}
        if importlib.util.find_spec("shapely"):
            names = [f"cityscapes_fine_instance_seg_{split}" for split in ("train", "val")]
            expected |= dict.fromkeys(names, FEW_STREETS)
    script = (
        "import moco_d2; from detectron2.data import DatasetCatalog; from moco_d2.data import list_images\n"
        "import moco_d2.detection, json, pathlib\n"
        f"records = {{name: DatasetCatalog.get(name) for name in {list(expected)}}}\n"
        "assert all(pathlib.Path(r['file_name']).is_file() for found in records.values() for r in found)\n"
        "counts = {name: len(found) for name, found in records.items()}\n"
        "counts['imagenet_train'] = len(list_images(['imagenet_train']))\n"
        "print(json.dumps(counts))"
    )
    environment = {**os.environ, "DETECTRON2_DATASETS": str(sample)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {**expected, "imagenet_train": FEW}
    assert len(list((sample / "imagenet" / "train").iterdir())) == 20


@pytest.mark.filterwarnings("ignore:The 'resolution' argument is deprecated:DeprecationWarning")  # Detectron2's call
def test_cityscapes_instances_are_the_same_from_outlines_and_from_pixels(sample: Path) -> None:
    pytest.importorskip("cityscapesscripts")
    pytest.importorskip("shapely")
    from detectron2.data.datasets.cityscapes import _cityscapes_files_to_dict
    from pycocotools import mask as coco_mask

    for path in sorted((sample / "cityscapes" / "gtFine" / "train").rglob("*_polygons.json")):
        base = str(path).removesuffix("polygons.json")
        picture = base.replace("gtFine_", "leftImg8bit.png").replace("gtFine", "leftImg8bit")
        files = (picture, f"{base}instanceIds.png", f"{base}labelIds.png", str(path))
        assert Path(picture).is_file()
        outlines = _cityscapes_files_to_dict(files, from_json=True, to_polygons=True)
        pixels = _cityscapes_files_to_dict(files, from_json=False, to_polygons=False)
        drawn = [coco_mask.decode(item["segmentation"]).astype(bool) for item in pixels["annotations"]]
        drawn = {(item["category_id"], m.tobytes()): m for item, m in zip(pixels["annotations"], drawn, strict=True)}
        objects = outlines["annotations"]
        assert len(objects) >= len(drawn)
        masks = _masks(outlines, objects).numpy()
        for (category, _), mask in drawn.items():
            same = [m for m, item in zip(masks, objects, strict=True) if item["category_id"] == category]
            best = max((mask & other).sum() / (mask | other).sum() for other in same)
            assert best > 0.8 or mask.sum() < 100


def test_only_its_own_folder_is_replaced(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maker, "SPLITS", dict.fromkeys(maker.SPLITS, 1))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"contains thesis\.tex, which this command did not write"):
        maker.make_all(theirs, seed=0)
    with pytest.raises(ValueError, match="is a file"):
        maker.make_all(theirs / "thesis.tex", seed=0)
    assert _files(theirs) == {"thesis.tex": b"years of work"}

    ours = tmp_path / "deep" / "ours"
    maker.make_all(ours, seed=0)
    before = _files(ours)
    maker.make_all(ours, seed=0)
    assert _files(ours) == before
    (ours / "VOC2007" / "mine.jpg").write_text("")
    with pytest.raises(ValueError, match=r"contains VOC2007/mine\.jpg, which"):
        maker.make_all(ours, seed=0)
    (ours / "VOC2007" / "mine.jpg").unlink()
    (ours / "my_photos").mkdir()
    with pytest.raises(ValueError, match="contains my_photos, which"):
        maker.make_all(ours, seed=0)
    assert (ours / "my_photos").is_dir()


def test_a_failure_leaves_nothing_half_made(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(maker, "SPLITS", dict.fromkeys(maker.SPLITS, 1))
    monkeypatch.setattr(maker, "make_coco", fail)
    with pytest.raises(ValueError, match=r"no space left on device.*free some space"):
        maker.make_all(tmp_path / "out", seed=0)
    assert not list(tmp_path.iterdir())


def test_a_failure_to_put_it_in_place_keeps_the_old_one(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maker, "SPLITS", dict.fromkeys(maker.SPLITS, 1))
    out = tmp_path / "out"
    maker.make_all(out, seed=0)
    before = _files(out)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("disk on fire")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ValueError, match="disk on fire"):
        maker.make_all(out, seed=1)
    assert _files(out) == before
    assert list(tmp_path.iterdir()) == [out]

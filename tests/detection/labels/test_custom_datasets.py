"""Users' own labels: what tools write is read, what is wrong is named by file and line, and detectors train on it."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import nullcontext as does_not_raise
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_FLIP_MAP, COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_api
from small_detector import COCO_FPN, SHORT, VOC_C4, small_cfg

from moco_d2.builtin_sets import voc_colors
from moco_d2.config import load_cfg
from moco_d2.data import list_images
from moco_d2.detection import datasets
from moco_d2.detection.datasets import custom_problems, register_custom
from moco_d2.detection.label_images import LabelIndexHandler, load_sem_seg
from moco_d2.detection.labels.files import record_lines
from moco_d2.detection.labels.keypoints import mirror_pairs
from moco_d2.detection.labels.masks import unpacked
from moco_d2.detection.metrics.evaluators import build_evaluator, evaluate_file
from moco_d2.detection.preflight import check_run
from moco_d2.detection.trainer import TransferTrainer
from tests.two_processes import in_two_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _catalogs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where ./output is
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def picture(path: Path, size=(100, 80), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def coco_content():
    """As a labelling tool may write it: ids from 0 and with gaps, subfolders, nothing that is optional."""
    images = [{"id": f"p{i}", "file_name": f"batch 1/{i}.png", "width": 100, "height": 80} for i in range(4)]
    annotations = [
        {"id": i, "image_id": f"p{i}", "category_id": 7 if i % 2 else 30, "bbox": [10, 10, 40.5, 30],
         "segmentation": [[10, 10, 50, 10, 50, 40, 10, 40]]}
        for i in range(4)
    ]  # fmt: skip
    crowd = {"id": 9, "image_id": "p0", "category_id": 30, "bbox": [60, 0, 40, 80], "iscrowd": 1,
             "segmentation": {"size": [80, 100], "counts": [60 * 80, 40 * 80]}}  # fmt: skip
    categories = [{"id": 30, "name": "screw"}, {"id": 7, "name": "bolt"}]
    return {"images": images, "annotations": [*annotations, crowd], "categories": categories}


@pytest.fixture
def coco(tmp_path):
    """Write a COCO data set, its content changed, and return its entry."""

    def write(change=lambda content: None, name="parts", **entry):
        content = coco_content()
        change(content)
        for i in range(4):
            picture(tmp_path / f"pictures/batch 1/{i}.png", seed=i)
        (tmp_path / "labels.json").write_text(json.dumps(content, indent=1))
        return {"name": name, "format": "coco", "json": str(tmp_path / "labels.json"),
                "images": str(tmp_path / "pictures"), **entry}  # fmt: skip

    return write


XML = """<annotation>
  <filename>{file}</filename>
  <size><width>100</width><height>80</height></size>
  <object>
    <name>{kind}</name>
    <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
  </object>
</annotation>
"""


@pytest.fixture
def voc(tmp_path):
    """Write a VOC folder, changed, and return its entry: float boxes, no difficult, spaces, columns, two extensions."""

    def write(change=lambda root: None, name="tools", **entry):
        root = tmp_path / "voc"
        for folder in ("Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        names = ["a 1", "b", "c.v2", "d"]
        for i, stem in enumerate(names):
            file = stem + (".JPG" if i % 2 else ".png")
            picture(root / "JPEGImages" / file, seed=i)
            kind = ("wrench", "hammer & nail")[i % 2]
            text = XML.format(file=file, kind=kind.replace("&", "&amp;"), box=(11, 11.5, 50, 40))
            (root / f"Annotations/{stem}.xml").write_text(text)
        (root / "ImageSets/Main/train.txt").write_text("a 1  1\nb -1\r\n\nc.v2 1\nd.JPG\n")
        change(root)
        return {"name": name, "format": "voc", "root": str(root), "split": "train", **entry}

    return write


def config(*entries, base=COCO_FPN, opts=()):
    names = tuple(entry["name"] for entry in entries)
    sets = ["DATASETS.TRAIN", names, "DATASETS.TEST", names[-1:], "DATASETS.CUSTOM", list(entries)]
    return small_cfg(base, *SHORT, *sets, *opts)


BOXES = ("MODEL.MASK_ON", False)


def test_what_tools_write_trains_and_its_own_labels_score_100(coco, tmp_path):
    cfg = config(coco(), opts=["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path / "run"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    assert custom_problems(cfg) == []
    register_custom(cfg)
    register_custom(cfg)  # again, as another stage in the same process would
    meta = MetadataCatalog.get("parts")
    assert meta.thing_classes == ["bolt", "screw"]  # in the order of their ids
    assert meta.json_file == str(tmp_path / "run/datasets/parts.json")
    assert json.loads((tmp_path / "labels.json").read_text()) == coco_content()  # untouched
    assert perfect_score(cfg, "parts") == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})

    trainer = TransferTrainer(cfg)
    trainer.train()
    assert set(json.loads((tmp_path / "run/results.json").read_text())["metrics"]["parts"]) == {"bbox", "segm"}


def test_a_voc_folder_trains_and_its_own_labels_score_100(voc, tmp_path):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path / "run"]
    cfg = config(voc(), base=VOC_C4, opts=opts)
    assert custom_problems(cfg) == []
    register_custom(cfg)
    meta = MetadataCatalog.get("tools")
    assert meta.thing_classes == ["hammer & nail", "wrench"]
    records = DatasetCatalog.get("tools")
    assert [record["image_id"] for record in records] == ["a 1", "b", "c.v2", "d"]
    assert records[0]["annotations"][0]["bbox"] == [10, 10.5, 50, 40]  # VOC counts from 1
    assert perfect_score(cfg, "tools")["AP"] == pytest.approx(100)

    trainer = TransferTrainer(cfg)
    trainer.train()
    assert set(json.loads((tmp_path / "run/results.json").read_text())["metrics"]["tools"]["bbox"]) >= {"AP", "AP50"}


def perfect_score(cfg, name):
    """Evaluate the labels themselves as detections."""
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        objects = [item for item in record["annotations"] if not item.get("iscrowd")]
        found = Instances((record["height"], record["width"]))
        boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in objects]
        found.pred_boxes = Boxes(torch.tensor(boxes))
        found.scores = torch.ones(len(objects))
        found.pred_classes = torch.tensor([item["category_id"] for item in objects])
        if cfg.MODEL.MASK_ON:
            found.pred_masks = torch.zeros(len(objects), record["height"], record["width"], dtype=torch.bool)
        evaluator.process([record], [{"instances": found}])
    scores = evaluator.evaluate()["bbox"]
    return {key: scores[key] for key in ("AP", "AP50", "AP75")}


def test_plain_data_are_used_as_they_are_and_read_as_detectron2_reads_them(dataset_root, tmp_path):
    root = str(dataset_root / "VOC2007")
    entries = [
        {"name": "v", "format": "voc", "root": root, "split": "trainval", "classes": list(CLASS_NAMES)},
        {"name": "c", "format": "coco", "root": str(dataset_root / "coco"), "split": "val2017"},
    ]
    for base, entry in zip((VOC_C4, COCO_FPN), entries, strict=True):
        register_custom(config(entry, base=base, opts=["OUTPUT_DIR", tmp_path / "run"]))
    assert not (tmp_path / "run").exists()
    ours = DatasetCatalog.get("v")
    for record in ours:
        for item in record["annotations"]:
            assert item.pop("difficult") is False
    assert ours == load_voc_instances(root, "trainval", CLASS_NAMES)
    labels = MetadataCatalog.get("c").json_file
    assert DatasetCatalog.get("c") == load_coco_json(labels, str(dataset_root / "coco/val2017"), "theirs")
    assert MetadataCatalog.get("c").thing_classes == MetadataCatalog.get("theirs").thing_classes
    MetadataCatalog.remove("theirs")


def pictures(cfg, name, labels):
    """Return a set's records for fine-tuning (``labels``) or pretraining."""
    register_custom(cfg, labels=labels)
    return DatasetCatalog.get(name)


def _set(key, index, **fields):
    return lambda content: content[key][index].update(fields)


COCO_PROBLEMS = {
    "missing image": (_set("images", 2, file_name="x.png"), r"json:15: images\[2\] \(id 'p2'\) missing image: .*x.png"),
    "a flat folder": (_set("images", 0, file_name="0.png"), "missing image"),
    "outside": (_set("annotations", 1, bbox=[90, 10, 20, 20]), r"\[1\] \(id 1\).* outside the image of 100 x 80"),
    "beyond the edge": (_set("annotations", 1, bbox=[100, 10, 1, 20]), "box .* outside the image of 100 x 80"),
    "before the edge": (_set("annotations", 1, bbox=[10, -0.5, 9, 0.5]), "box .* outside the image of 100 x 80"),
    "a picture by two paths": (
        _set("images", 1, file_name="./batch 1/0.png"),
        r"images\[1\] .* of another image; list",
    ),
    "zero area": (
        _set("annotations", 1, bbox=[9, 10, 0, 20]),
        r":\d+: annotations\[1\] \(id 1\) has a box .* zero area",
    ),
    "no numbers": (_set("annotations", 1, bbox=[1, 2, None, 4]), r"must be \[x, y, width, height\]"),
    "unknown class": (
        _set("annotations", 3, category_id=8),
        r"unknown category_id 8; the categories are 7 \(bolt\), 30 \(screw\)",
    ),
    "duplicate image": (_set("images", 1, id="p0"), "id of another image; give it its own"),
    "duplicate box": (
        _set("annotations", 1, id=0),
        r"annotations\[1\] \(id 0\) has the id of another annotation",
    ),
    "orphan": (_set("annotations", 1, image_id=1), "image_id 1, but no image has that id"),
    "empty split": (lambda c: c.update(images=[], annotations=[]), "no usable image; the list"),
    "nothing labelled": (lambda c: c.update(annotations=[]), "none of the 4 images has a usable object"),
    "no mask": (
        _set("annotations", 0, segmentation=[]),
        "has no segmentation; add a mask, or pass MODEL.MASK_ON",
    ),
    "run lengths": (
        _set("annotations", 0, segmentation={"size": [80, 100], "counts": [8000]}),
        "pass INPUT.MASK_FORMAT bitmask",
    ),
    "a line": (_set("annotations", 0, segmentation=[[1, 2, 3, 4]]), "polygon of fewer than three points"),
    "two of a name": (_set("categories", 1, name="screw"), r"categories\[1\].*another category; rename"),
    "negative area": (_set("annotations", 1, area=-1), r"annotations\[1\] \(id 1\) has area -1; .*if you remove it"),
    "an area beyond the picture": (
        _set("annotations", 1, area=1e9),
        "area 1000000000.0, but its image has 100 x 80 pixels",
    ),
    "a crowd of 2": (_set("annotations", 1, iscrowd=2), "has iscrowd 2; it must be 0 or 1"),
    "not a number": (_set("annotations", 1, bbox=[float("nan"), 1, 2, 3]), r"has bbox \[nan, 1, 2, 3\]; it must be"),
    "a flag as id": (
        _set("annotations", 1, category_id=True),
        "has category_id True; it must be a whole number or text",
    ),
    "a list as id": (_set("annotations", 1, image_id=[1]), r"has image_id \[1\]; it must be"),
    "another text": (
        _set("annotations", 1, image_id="P0"),
        "image_id 'P0', but no .*; the ids of the images are 'p0', 'p1', 'p2', ...",
    ),
    "negative width": (
        _set("images", 1, width=-1),
        r"images\[1\] \(id 'p1'\) has width -1; it must be a positive whole",
    ),
    "half a size": (
        _set("images", 1, width=None, height=81),
        "width None and height 81, but .* has 100 x 80 pixels",
    ),
    "a name of 300 letters": (_set("images", 1, file_name="x" * 300), "missing image"),
    "no extension": (
        _set("images", 1, file_name="batch 1/1"),
        r"missing image: .* does not exist; .*batch 1/1\.png exists: correct file_name",
    ),
    "a polygon in another country": (_set("annotations", 0, segmentation=[[1, 1, 1e12, 1, 5, 5]]), "far outside"),
    "no class is left": (lambda c: c.update(categories=[], annotations=[]), "there are no categories; add classes"),
    "crowds only": (
        lambda c: [item.update(iscrowd=1) for item in c["annotations"]],
        "all objects of the 4 images are crowds, .* set iscrowd to 0 for single objects$",
    ),
    "no object": (lambda c: c["images"].append(3), r"images\[4\] is 3; it must be an object"),
}


@pytest.mark.parametrize("kind", COCO_PROBLEMS)
def test_coco_problems_are_named(coco, kind):
    change, message = COCO_PROBLEMS[kind]
    with pytest.raises(ValueError, match=message):
        register_custom(config(coco(change)))


def test_a_test_set_of_crowds_has_nothing_to_evaluate(coco):
    with pytest.raises(ValueError, match=r"all objects of the 4 images are crowds, .*, or remove annotations to save"):
        register_custom(config(coco(COCO_PROBLEMS["crowds only"][0])), train=False)


def test_a_problem_of_a_category_is_told_once(coco):
    problems = custom_problems(config(coco(_set("categories", 0, name=5)), opts=["MODEL.ROI_HEADS.NUM_CLASSES", 1]))
    assert [problem.partition("categories[0]")[2] for problem in problems] == [" (id 30) has name 5; it must be text"]


def test_a_supercategory_that_is_no_text_is_dropped(coco):
    register_custom(config(coco(_set("categories", 0, supercategory=["fasteners"]))))
    with open(MetadataCatalog.get("parts").json_file) as file:
        assert not any("supercategory" in category for category in json.load(file)["categories"])


def test_a_class_that_is_nearly_known_is_not_left_out(coco):
    with pytest.raises(ValueError, match=r"class 'bolt'; the classes are bolts, screw; did you mean 'bolts'\?$"):
        register_custom(config(coco(classes=["bolts", "screw"])))
    with pytest.raises(ValueError, match=r"the classes are screw; to ignore its objects add leave_out: \[bolt\] to"):
        register_custom(config(coco(classes=["screw"])))


@pytest.mark.parametrize(("said", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_that_another_system_composes_of_other_characters(coco, tmp_path, said, there):
    entry = coco(_set("images", 1, file_name=normalize(said, "batch 1/\u00fc.png")))
    (tmp_path / "pictures/batch 1/1.png").rename(tmp_path / normalize(there, "pictures/batch 1/\u00fc.png"))
    for labels in (True, False):
        assert all(Path(record["file_name"]).is_file() for record in pictures(config(entry), "parts", labels))


def test_polygons_without_a_pixel_are_told(coco, caplog):
    def change(content):
        for index, polygon in enumerate(([5, 5, 9, 5, 7, 5], [120, 1, 130, 1, 130, 90], [2, 2, 9, 2, 9, 2.4, 2, 2.4])):
            _set("annotations", index, segmentation=[polygon])(content)

    with caplog.at_level(logging.INFO, "moco_d2"):
        register_custom(config(coco(change)))
    assert "polygons cover no pixel: 3, the first with bbox [10, 10, 40.5, 30] in batch 1/0.png; no det" in caplog.text


RUNS = {
    "too long": ([100, 200, 10**6], "of 1000300 pixels for an image of 100 x 80"),
    "too short": ([100, 200], "of 300 pixels"),
    "negative": ([-5, 8005], "with a negative count"),
    "text": (["a"], "neither whole numbers nor"),
    "empty": ([8000], "without a pixel"),
    "packed, cut off": ("PPP", "neither whole numbers nor"),
    "packed, too long": ("0" + "oooooo0", "pixels for an image"),
    "packed, no end": ("o" * 9, "neither whole numbers nor"),
    "packed, strange": ("\u00e9~", "neither whole numbers nor"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_run_lengths_are_added_up_before_a_library_reads_them(coco, kind):
    counts, message = RUNS[kind]
    cfg = config(
        coco(_set("annotations", 1, segmentation={"size": [80, 100], "counts": counts})),
        opts=["INPUT.MASK_FORMAT", "bitmask"],
    )
    with pytest.raises(ValueError, match=rf"annotations\[1\] \(id 1\) has a run-length mask .*{message}"):
        register_custom(cfg)


def test_packed_run_lengths_are_read_as_pycocotools_packs_them():
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width = random.integers(1, 80, 2)
        mask = np.asfortranarray(random.random((height, width)) < random.random(), np.uint8)
        runs = unpacked(mask_api.encode(mask)["counts"].decode())
        values = np.repeat(np.arange(len(runs)) % 2, runs)
        assert (values.reshape(height, width, order="F") == mask).all()


def test_fields_of_certain_meaning_are_made_plain(coco, tmp_path):
    """What a file says as null, text or another kind of number: trained and evaluated on as it is meant."""

    def change(content):
        for item, fields in zip(content["annotations"], [
            {"iscrowd": None, "area": None, "ignore": None, "id": None, "num_keypoints": "x", "keypoints": "y"},
            {"iscrowd": "0", "area": "1200", "bbox": ["10", "10", "40.5", "30"], "image_id": "p1", "ignore": False},
            {"iscrowd": False, "category_id": "30", "segmentation": [["10", 10, 50, 10, 50, 40, 10, 40]]},
            {"iscrowd": 0.0, "area": 1200.0, "category_id": 7.0, "ignore": "0"},
            {"segmentation": None},
        ], strict=True):  # fmt: skip
            item |= fields
        content["images"][0] |= {"width": None, "height": None}
        content["images"][1] |= {"width": "100", "height": 80.0}
        content["categories"][0] |= {"supercategory": None, "keypoints": 5, "skeleton": "x"}

    cfg = config(coco(change), opts=["OUTPUT_DIR", tmp_path / "run"])
    register_custom(cfg)
    plain = json.loads((tmp_path / "run/datasets/parts.json").read_text())
    assert [item["iscrowd"] for item in plain["annotations"]] == [0, 0, 0, 0, 1]
    assert [item["area"] for item in plain["annotations"]] == [1200, 1200, 1200, 1200, 3200]
    assert plain["annotations"][1]["bbox"] == [10, 10, 40.5, 30]
    assert plain["annotations"][2]["segmentation"] == [[10, 10, 50, 10, 50, 40, 10, 40]]
    assert not any({"ignore", "keypoints", "num_keypoints"} & item.keys() for item in plain["annotations"])
    assert {(image["width"], image["height"]) for image in plain["images"]} == {(100, 80)}
    assert "null" not in (tmp_path / "run/datasets/parts.json").read_text()
    assert perfect_score(cfg, "parts")["AP"] == pytest.approx(100)  # of the crowd, too, the mask is there


def test_values_that_python_takes_for_equal_are_made_plain_too(coco, tmp_path):
    def change(content):
        for number, item in enumerate(content["annotations"], 1):
            item |= {"id": number, "iscrowd": 0, "area": 1200, "image_id": 1}
        content["images"] = [{**content["images"][0], "id": 1}]
        content["categories"].reverse()  # into the order of their ids

    for number, field in enumerate(({}, {"iscrowd": False}, {"id": 1.0})):
        cfg = config(
            coco(lambda content, field=field: (change(content), content["annotations"][0].update(field))),
            opts=[*BOXES, "OUTPUT_DIR", tmp_path / f"run{number}"],
        )
        register_custom(cfg)
        assert (tmp_path / f"run{number}").exists() is bool(number), field


def test_ids_that_are_text_in_one_place_only_mean_the_same(coco, tmp_path):
    def change(content):
        for number, image in enumerate(content["images"]):
            image["id"] = number
        for item in content["annotations"]:
            item |= {"image_id": item["image_id"].removeprefix("p"), "category_id": str(item["category_id"])}

    register_custom(config(coco(change)))
    assert [len(record["annotations"]) for record in DatasetCatalog.get("parts")] == [2, 1, 1, 1]

    def twice(content):
        change(content)
        content["images"][3]["id"] = "1"

    with pytest.raises(ValueError, match=r"image_id '0', .*the ids of the images are 0, 1, 2"):
        register_custom(config(coco(twice)))


def test_classes_can_be_left_out_on_purpose(coco, voc, caplog, tmp_path):
    with pytest.raises(ValueError, match=r"unknown class 'bolt'; .*leave_out: \[bolt\] to the entry"):
        register_custom(config(coco(classes=["screw"])))
    with pytest.raises(ValueError, match=r"unknown class 'wrench'; .*leave_out: \[wrench\] to the entry"):
        register_custom(config(voc(classes=["hammer & nail"]), base=VOC_C4))
    for entry in (coco(leave_out=["bolt"]), coco(classes=["screw"], leave_out=["bolt"])):
        cfg = config(entry)
        with caplog.at_level(logging.INFO):
            register_custom(cfg)
        assert "data set parts: 2 objects of bolt are left out" in caplog.text
        assert MetadataCatalog.get("parts").thing_classes == ["screw"]
        assert perfect_score(cfg, "parts")["AP"] == pytest.approx(100)
    for classes in ([], ["wrench"]):
        cfg = config(voc(leave_out=["hammer & nail"], classes=classes), base=VOC_C4)
        with caplog.at_level(logging.INFO):
            register_custom(cfg)
        assert "data set tools: 2 objects of hammer & nail are left out" in caplog.text
        assert perfect_score(cfg, "tools")["AP"] == pytest.approx(100)
    for entry, message in (
        (coco(leave_out=["bolts"]), "leave_out names 'bolts', which is not a category of .*; did you mean 'bolt'"),
        (voc(leave_out=["wrensh"]), "leave_out names 'wrensh', but .* has no such object; did you mean 'wrench'"),
        (coco(leave_out=["bolt"], classes=["bolt"]), "leave_out names 'bolt', and so does classes"),
        (coco(leave_out="bolt"), "leave_out is 'bolt'; it must be a list of names"),
        (coco(leave_out=["bolt", "screw"]), "leave_out names every class"),
    ):
        with pytest.raises(ValueError, match=message):
            register_custom(config(entry, opts=BOXES))


ROOT_CATEGORY = {"id": 0, "supercategory": "none"}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["screw", "parts"])
def test_a_root_category_that_no_object_is_of_is_no_class(coco, name, labelled, caplog):
    def change(content):
        for category in content["categories"]:
            category["supercategory"] = name
        content["categories"].insert(0, {**ROOT_CATEGORY, "name": name})
        if not labelled:
            del content["annotations"]

    with caplog.at_level(logging.INFO):
        register_custom(config(coco(change)), train=labelled)
    assert "category 0 (" in caplog.text
    assert MetadataCatalog.get("parts").thing_classes == ["bolt", "screw"]

    def used(content):
        change(content)
        content["annotations"][0]["category_id"] = 0

    if labelled:
        with (
            pytest.raises(ValueError, match="has the name 'screw' of another") if name == "screw" else does_not_raise()
        ):
            register_custom(config(coco(used)))
    if labelled and name == "parts":
        assert MetadataCatalog.get("parts").thing_classes == ["parts", "bolt", "screw"]


def test_detections_have_the_ids_of_the_users_own_file(coco, tmp_path):
    cfg = config(coco(classes=["screw", "bolt"]), opts=[*BOXES, "OUTPUT_DIR", tmp_path / "run"])
    register_custom(cfg)
    perfect_score(cfg, "parts")
    path = tmp_path / "run/inference/parts/coco_instances_results.json"
    found = json.loads(path.read_text())
    assert [(one["image_id"], one["category_id"]) for one in found] == [("p0", 30), ("p1", 7), ("p2", 30), ("p3", 7)]
    assert evaluate_file(cfg, "parts", path)[0]["bbox"]["AP"] == pytest.approx(100)
    cfg = config(coco(leave_out=["bolt"]), opts=[*BOXES, "OUTPUT_DIR", tmp_path / "other"])
    register_custom(cfg)  # a detector of both classes, compared in one
    assert evaluate_file(cfg, "parts", path)[0]["bbox"]["AP"] == pytest.approx(100)


def test_a_test_set_without_labels_gives_detections(coco, voc, tmp_path, caplog):
    for number, change in enumerate((lambda c: c.update(annotations=[]), lambda c: c.pop("annotations"))):
        cfg = config(coco(change), opts=[*BOXES, "OUTPUT_DIR", tmp_path / f"run{number}"])
        with pytest.raises(ValueError, match="none of the 4 images has a usable object"):
            register_custom(cfg)
        register_custom(cfg, train=False)
        records = DatasetCatalog.get("parts")
        assert not any("annotations" in record for record in records)
        assert detections_only(cfg, "parts", records) == {}
        saved = tmp_path / f"run{number}/inference/parts/coco_instances_results.json"
        assert [one["image_id"] for one in json.loads(saved.read_text())] == ["p0"]
        with pytest.raises(ValueError, match="'parts' has no labels: nothing to evaluate"):
            evaluate_file(cfg, "parts", saved)

    def without(root):
        for path in (root / "Annotations").iterdir():
            path.unlink()

    with pytest.raises(ValueError, match="'tools' has no labels; add classes"):
        register_custom(config(voc(without), base=VOC_C4), train=False)
    cfg = config(voc(without, classes=["wrench"]), base=VOC_C4, opts=["OUTPUT_DIR", tmp_path / "voc run"])
    register_custom(cfg, train=False)
    assert detections_only(cfg, "tools", DatasetCatalog.get("tools")) == {}
    assert caplog.text.count("has no labels: nothing to evaluate; the detections are saved") == 3
    saved = tmp_path / "voc run/inference/tools/voc_instances_results.json"
    assert [row[0] for row in json.loads(saved.read_text())["wrench"]] == ["a 1"]


def detections_only(cfg, name, records):
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    found = Instances((80, 100))
    found.pred_boxes, found.scores = Boxes(torch.tensor([[1.0, 2, 30, 40]])), torch.ones(1)
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    evaluator.process(records[:1], [{"instances": found}])
    return evaluator.evaluate()


def _xml(old, new, name="b"):
    def change(root, name=name):
        path = root / f"Annotations/{name}.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def _split(text):
    return lambda root: (root / "ImageSets/Main/train.txt").write_text(text)


VOC_PROBLEMS = {
    "no flag": (
        _xml("</name>", "</name><difficult>2</difficult>"),
        "b.xml:4: object .* has difficult '2'; it must be 0 or 1",
    ),
    "negative size": (
        _xml("<width>100", "<width>-100"),
        r"b.xml:1: has size \['-100', '80'\]; width and height must be",
    ),
    "an endless size": (_xml("<width>100", "<width>1e400"), "b.xml:1: has size"),
    "no VOC": (
        lambda r: (r / "Annotations/b.xml").write_text("<svg/>"),
        "b.xml:1: not a VOC annotation; the root must be <annotation>, not <svg>",
    ),
    "a bomb": (
        _xml("<annotation>", '<!DOCTYPE a [<!ENTITY a "b"><!ENTITY c "&a;&a;">]><annotation>'),
        "b.xml:1: declares the entity 'a'",
    ),
    "another file": (
        _xml("<annotation>", '<!DOCTYPE a [<!ENTITY a SYSTEM "/etc/passwd">]><annotation>'),
        "b.xml:1: declares the entity 'a'; remove the DOCTYPE",
    ),
    "an unknown encoding": (_xml("<annotation>", '<?xml version="1.0" encoding="klingon"?><annotation>'), "'klingon'"),
    "another encoding": (
        lambda r: (r / "Annotations/b.xml").write_bytes("<annotation>\n\u00e9</annotation>".encode("latin-1")),
        "b.xml:2: the text is not in UTF-8; save the file as UTF-8, or declare",
    ),
    "a list of another encoding": (
        lambda r: (r / "ImageSets/Main/train.txt").write_bytes(b"b\n\xe9\n"),
        "train.txt:2: the text is not in UTF-8; save the file as UTF-8$",
    ),
    "a picture and its mask": (
        lambda r: (r / "JPEGImages/c.v2.bmp").touch() or _xml("c.v2.png", "")(r, "c.v2"),
        r"c.v2.xml:1: several pictures are called c.v2 \(c.v2.bmp, c.v2.png\), and <filename> in the anno.* is ''; set",
    ),
    "a picture of two annotations": (
        lambda r: (r / "JPEGImages/d.JPG").unlink() or _xml("d.JPG", "b.JPG", "d")(r),
        r"d.xml:1: has the picture of .*Annotations/b.xml, .*JPEGImages/b.JPG; remove one annotation",
    ),
    "missing image": (
        lambda r: (r / "JPEGImages/b.JPG").unlink(),
        r"b.xml:1: missing image: .*JPEGImages/b does not exist with any of .jpg",
    ),
    "missing xml": (
        lambda r: (r / "Annotations/b.xml").unlink(),
        r"train.txt:2: missing annotation: .*Annotations/b.xml does not exist",
    ),
    "outside": (
        _xml(">50<", ">104<"),
        r"b.xml:4: .*\[11.0, 11.5, 104.0, 40.0\] that lies outside the image of 100 x 80",
    ),
    "zero area": (_xml(">50<", ">11<"), r"b.xml:4: .* zero area"),
    "no number": (_xml(">50<", "><"), r"b.xml:4: .*must be numbers"),
    "unknown class": (
        _xml("hammer &amp; nail", "wrensh"),
        "b.xml:4: unknown class 'wrensh'; .*; did you mean 'wrench'",
    ),
    "no name": (_xml("hammer &amp; nail", ""), "b.xml:4: object without a name; add <name> with its class"),
    "broken": (_xml("</object>", ""), r"b.xml:8: not valid XML: mismatched tag"),
    "duplicate": (_split("b\na 1\nb 1\n"), r"train.txt:3: 'b' is listed twice; remove one line"),
    "empty split": (_split("\n"), "train.txt: no usable image"),
    "no split": (lambda r: (r / "ImageSets/Main/train.txt").unlink(), "ImageSets/Main/train.txt does not exist"),
}


@pytest.mark.parametrize("kind", VOC_PROBLEMS)
def test_voc_problems_are_named(voc, kind):
    change, message = VOC_PROBLEMS[kind]
    with pytest.raises(ValueError, match=message):
        register_custom(config(voc(change, classes=["hammer & nail", "wrench"]), base=VOC_C4))


def test_a_name_that_no_list_can_hold_is_refused(voc):
    for name in (" b", "b\nb"):
        entry = voc(split="")
        path = Path(entry["root"], "Annotations", f"{name}.xml")
        shutil.copy(path.with_name("b.xml"), path)
        with pytest.raises(ValueError, match=r"b\.xml': a name must have no line break.*; rename it"):
            register_custom(config(entry, base=VOC_C4))
        path.unlink()


def _bad_boxes(content):
    content["annotations"][1]["bbox"] = [10, 10, 0, 30]
    content["annotations"][2]["segmentation"] = [[10, 10, 50, 10]]


def test_bad_objects_are_refused_or_dropped_and_listed(coco, voc, tmp_path, caplog):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", 2, "OUTPUT_DIR", tmp_path / "run"]
    with pytest.raises(
        ValueError, match=r"annotations\[1\] .*zero area.*; to drop bad objects add bad_labels: drop to"
    ):
        register_custom(config(coco(_bad_boxes), opts=opts))
    first, second = custom_problems(config(coco(_bad_boxes), opts=opts))
    assert "bad_labels" in first and "annotations[2]" in second and "bad_labels" not in second
    caplog.set_level(logging.INFO, "moco_d2")
    register_custom(config(coco(_bad_boxes, bad_labels="drop"), opts=opts))
    assert [len(r["annotations"]) for r in DatasetCatalog.get("parts")] == [2, 0, 0, 1]
    path = tmp_path / "run/datasets/parts.dropped.txt"
    assert f"data set parts: 2 bad objects are dropped (bad_labels: drop); {path} lists them" in caplog.messages
    box, mask = path.read_text().splitlines()
    assert "annotations[1] (id 1) has a box [10, 10, 0, 30] that has zero area" in box and "three points" in mask
    assert len(json.loads((tmp_path / "run/datasets/parts.json").read_text())["annotations"]) == 3

    def flat_box(root):
        path = root / "Annotations/b.xml"
        path.write_text(path.read_text().replace("50</xmax>", "11</xmax>"))

    entry = voc(flat_box, bad_labels="drop")
    cfg = config(entry, base=VOC_C4, opts=opts)
    register_custom(cfg)
    assert [len(r["annotations"]) for r in DatasetCatalog.get("tools")] == [1, 0, 1, 1]
    assert "Annotations/b.xml:4: object 'hammer & nail' has a box" in path.with_name("tools.dropped.txt").read_text()
    assert "<object>" not in (tmp_path / "run/datasets/tools/Annotations/b.xml").read_text(), "not evaluated either"
    (tmp_path / "other/datasets").mkdir(parents=True)
    (tmp_path / "other/datasets/tools.dropped.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"contains tools\.dropped\.txt, which this command did not write"):
        datasets.check_copies(config(entry, base=VOC_C4, opts=["OUTPUT_DIR", tmp_path / "other"]))


def test_labels_of_another_form_are_one_problem_and_are_not_dropped(coco):
    def change(content, key, value):
        content["annotations"] = [
            {**content["annotations"][i % 4], "id": i, key: value} for i in range(40)
        ]  # fmt: skip

    runs = {"size": [80, 100], "counts": [4000, 4000]}
    for key, value, message in (
        ("segmentation", runs, "has a run-length mask; pass INPUT.MASK_FORMAT bitmask (and 39 more of 40 alike"),
        ("segmentation", [10, 10, 50, 10, 50, 40], "neither a list of polygons"),
        ("segmentation", [[10, 10], [50, 10], [50, 40]], "a list of polygons is [[x, y, x, y, ...], ...]"),
        ("bbox", [10, 10, 0, 5], "zero area"),
    ):
        for entry in (coco(lambda c, k=key, v=value: change(c, k, v), bad_labels=bad) for bad in ("refuse", "drop")):
            (fault,) = custom_problems(config(entry))
            assert message in fault and "(and 39 more of 40 alike: the whole set is in another form)" in fault
    entry = coco(lambda c: [image.update(file_name=f"no {image['id']}.png") for image in c["images"]])
    assert len(custom_problems(config(entry))) == 4 + 1, "a few are listed one by one"

    def half(content):
        change(content, "iscrowd", 0)
        for record in content["annotations"][:21]:
            record["bbox"] = [record["id"], 10, 0, 5]
            record["area"] = [-1, 5][record["id"] % 2]

    problems = custom_problems(config(coco(half, bad_labels="drop")))
    assert len(problems) == 21 and "bad_labels: drop is for single objects, and 21 of 40 are bad" in problems[0]


def test_the_folders_of_voc_labels_can_be_named(voc, tmp_path):
    def moved(root):
        (root / "Annotations").rename(root / "labels")
        (root / "JPEGImages").rename(root / "photos")
        (root / "lists").mkdir()
        (root / "ImageSets/Main/train.txt").rename(root / "lists/mine.txt")

    entry = voc(moved, annotations="labels", images="photos", split="lists/mine.txt")
    cfg = config(entry, base=VOC_C4, opts=["MODEL.ROI_HEADS.NUM_CLASSES", 2, "OUTPUT_DIR", tmp_path / "run"])
    assert custom_problems(cfg) == []
    assert len(DatasetCatalog.get("tools")) == 4
    assert (tmp_path / "run/datasets/tools/Annotations/b.xml").is_file(), "the evaluator reads Annotations only"
    (problem,) = custom_problems(config({**entry, "annotations": "label"}, base=VOC_C4))
    assert problem == f"data set 'tools': {tmp_path / 'voc/label'} does not exist"
    (problem,) = custom_problems(config({**entry, "bad_labels": "skip"}, base=VOC_C4))
    assert problem == "DATASETS.CUSTOM[0]: bad_labels is 'skip'; it must be refuse or drop"


def test_a_dry_run_names_all_problems_even_those_of_pixels(coco, voc, tmp_path):
    def change(content):
        _set("annotations", 1, bbox=[90, 10, 0, 20])(content)
        _set("images", 2, width=80, height=100)(content)

    entries = [coco(change), voc(_split("a 1\nnobody\n")), {"name": "x", "format": "yolo", "roots": ""}]
    cfg = config(*entries, opts=BOXES)
    picture(tmp_path / "voc/JPEGImages/a 1.png", size=(90, 80))
    found = custom_problems(cfg)
    expected = [
        "bad_labels, mirror; did you mean 'root'?", "format is 'yolo'; it must be voc or coco", "size 80 x 100, but",
        "zero area", "size 100 x 80, but", "train.txt:2: missing annotation", "no usable image",
    ]  # fmt: skip
    assert len(found) == len(expected)
    for problem, part in zip(found, expected, strict=True):
        assert part in problem


def count_in_every_process(entry):
    """Look for problems, then count the pictures; the main process takes its time to write."""
    write = datasets._write_coco

    def slow(*arguments):
        time.sleep(2)
        write(*arguments)

    datasets._write_coco = slow
    assert custom_problems(config(entry)) == []
    assert len(DatasetCatalog.get("parts")) == 4


def test_processes_of_a_dry_run_wait_for_the_plain_labels(coco):
    in_two_processes(count_in_every_process, coco())


def test_turned_photographs_are_measured_as_they_are_read(voc, tmp_path):
    cfg = config(voc(), base=VOC_C4)
    turn = Image.Exif()
    turn[274] = 6
    path = tmp_path / "voc/JPEGImages/b.JPG"
    Image.new("RGB", (80, 100)).save(path, exif=turn)  # lies on its side
    assert read_image(str(path)).shape[:2] == (80, 100)
    assert custom_problems(cfg) == []


def test_the_order_of_classes_may_be_given_and_must_agree(coco, voc):
    register_custom(config(coco(classes=["nut", "screw", "bolt"])))
    records = DatasetCatalog.get("parts")
    assert [record["annotations"][0]["category_id"] for record in records] == [1, 2, 1, 2]
    with pytest.raises(ValueError, match="unknown class 'bolt'; the classes are screw"):
        register_custom(config(coco(classes=["screw"])))
    cfg = config(coco(), voc(), opts=BOXES)
    register_custom(cfg)
    with pytest.raises(ValueError) as caught:
        check_run(cfg, world_size=1)
    assert "'parts' has 2 classes: pass MODEL.ROI_HEADS.NUM_CLASSES 2" in str(caught.value)
    assert "number their classes differently: class 0 is bolt in the first and hammer & nail" in str(caught.value)


def test_masks_that_are_not_wanted_do_not_cost_their_boxes(coco):
    register_custom(config(coco(_set("annotations", 0, segmentation=[[1, 2, 3, 4]])), opts=BOXES))
    assert sum(len(record["annotations"]) for record in DatasetCatalog.get("parts")) == 5


XML_ENCODINGS = {
    "gb2312": "\u87ba\u6bcd", "gbk": "\u87ba\u6bcd", "big5": "\u87ba\u6bcd", "shift_jis": "\u30ca\u30c3\u30c8",
    "euc-kr": "\ub108\ud2b8", "latin-1": "\u00e9crou", "windows-1251": "\u0433\u0430\u0439\u043a\u0430",
    "utf-16": "\u87ba\u6bcd", "utf-16-be": "\u87ba\u6bcd", "utf-8-sig": "\u87ba\u6bcd",
}  # fmt: skip


@pytest.mark.parametrize("encoding", XML_ENCODINGS)
def test_xml_in_any_encoding_is_read_and_evaluated(voc, encoding, tmp_path):
    name = XML_ENCODINGS[encoding]

    def change(root):
        for path in (root / "Annotations").iterdir():
            text = f'<?xml version="1.0" encoding="{encoding}"?>\n' + path.read_text().replace("wrench", name)
            path.write_bytes(text.encode(encoding))

    cfg = config(voc(change), base=VOC_C4, opts=["OUTPUT_DIR", tmp_path / "run"])
    register_custom(cfg)
    assert MetadataCatalog.get("tools").thing_classes == ["hammer & nail", name]
    assert perfect_score(cfg, "tools")["AP"] == pytest.approx(100)


OTHER_READERS = {
    "namespace": _xml("<annotation>", '<annotation xmlns="http://example.org/voc">'),
    "group": lambda r: _xml("<object>", "<objects><object>")(r) or _xml("</object>", "</object></objects>")(r),
    "upper case": lambda r: (r / "Annotations/b.xml").rename(r / "Annotations/b.XML"),
}


@pytest.mark.parametrize("kind", OTHER_READERS)
def test_what_the_evaluator_would_read_in_another_way_is_made_plain(voc, kind, tmp_path):
    def change(root):
        for path in (root / "Annotations").iterdir():  # plain but for one
            path.write_text(path.read_text().replace("hammer &amp; nail", "hammer"))
        _split("a 1\nb\nc.v2\nd\n")(root)
        OTHER_READERS[kind](root)

    cfg = config(voc(change), base=VOC_C4, opts=["OUTPUT_DIR", tmp_path / "run"])
    register_custom(cfg)
    assert perfect_score(cfg, "tools")["AP"] == pytest.approx(100)


@pytest.mark.parametrize("labels", [True, False])
def test_the_picture_is_the_one_that_the_annotation_names(voc, labels, tmp_path):
    def change(root):
        for path in (root / "JPEGImages").iterdir():
            Image.new("L", (100, 80)).save(path.with_suffix(".tif"))
        _xml("d.JPG", "C:\\photos\\d.jpg", "d")(root)  # written on Windows
        _xml("b.JPG", "d.JPG", "b")(root)  # copied; the picture of its own name counts, whose mask goes
        (root / "JPEGImages/b.tif").unlink()

    for split in ("train", ""):
        register_custom(config(voc(change, split=split), base=VOC_C4), labels=labels)
        files = [Path(record["file_name"]).name for record in DatasetCatalog.get("tools")]
        assert files == ["a 1.png", "b.JPG", "c.v2.png", "d.JPG"]


def test_hidden_copies_are_no_labels(voc, tmp_path, caplog):
    def change(root):
        for folder in ("Annotations", "JPEGImages"):
            shutil.copytree(root / folder, root / folder / ".ipynb_checkpoints")
            (root / folder / "__MACOSX").mkdir()
        (root / "JPEGImages/._b.JPG").touch()
        (root / "Annotations/again").symlink_to(root / "Annotations")  # leads to itself

    with caplog.at_level(logging.INFO):
        register_custom(config(voc(change, split=""), base=VOC_C4))
    assert [record["image_id"] for record in DatasetCatalog.get("tools")] == ["a 1", "b", "c.v2", "d"]
    assert "5 hidden files and folders are left out, for example ._b.JPG" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "gbk"])
def test_json_in_other_encodings(coco, encoding, tmp_path):
    entry = coco()
    path = tmp_path / "labels.json"
    path.write_bytes(path.read_text().replace("screw", "\u87ba\u4e1d").encode(encoding))
    cfg = config(entry, opts=["OUTPUT_DIR", tmp_path / "run"])
    for labels in (True, False):
        with (
            pytest.raises(ValueError, match=r"labels.json:\d+: the text is not in UTF-8; save")
            if encoding == "gbk"
            else does_not_raise()
        ):
            register_custom(cfg, labels=labels)
            assert len(DatasetCatalog.get("parts")) == 4


def test_a_folder_without_lists_is_taken_whole(voc, tmp_path):
    register_custom(config(voc(split=""), base=VOC_C4, opts=["OUTPUT_DIR", tmp_path / "run"]))
    assert len(DatasetCatalog.get("tools")) == 4
    assert "a 1\n" in (tmp_path / "run/datasets/tools/ImageSets/Main/all.txt").read_text()


def test_keypoints_carry_their_names_and_mirror_images(coco):
    def change(content):
        for category in content["categories"]:
            category.update(keypoints=["head", "left_end", "right_end"], skeleton=[[1, 2], [1, 3]])
        for item in content["annotations"][1:]:
            item["keypoints"] = [12, 12, 2, 20, 20, 1, 30, 30, 2]

    keys = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3]
    with pytest.raises(ValueError, match="KEYPOINT_OKS_SIGMAS has 0 values"):
        register_custom(config(coco(change), opts=[*keys, *BOXES]))
    sigmas = ["TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1, 0.1]]
    register_custom(config(coco(change), opts=[*keys, *BOXES, *sigmas]))
    assert MetadataCatalog.get("parts").keypoint_flip_map == [("left_end", "right_end")]
    plain = json.loads(Path(MetadataCatalog.get("parts").json_file).read_text())["annotations"]
    assert [item["num_keypoints"] for item in plain[:2]] == [0, 3]
    with pytest.raises(ValueError, match=r"a category of 3 keypoints; .*NUM_KEYPOINTS is 17"):
        register_custom(config(coco(change), opts=[*keys[:2], *BOXES]))


SIDES = [
    ("l_end", "r_end"), ("lEye", "rEye"), ("LEye", "REye"), ("eyeL", "eyeR"), ("eye.L", "eye.R"), ("eye_l", "eye_r"),
    ("Left Eye", "Right Eye"), ("LEFT_EYE", "RIGHT_EYE"), ("lefteye", "righteye"), ("LHip", "RHip"), ("lhip", "rhip"),
    ("L-Hip", "R-Hip"), ("eyeLeft2", "eyeRight2"), ("front_left_wheel", "front_right_wheel"), ("wheel_fl", "wheel_fr"),
    ("l", "r"), ("left_of_right", "right_of_left"),
]  # fmt: skip


@pytest.mark.parametrize("pair", SIDES)
def test_left_and_right_are_recognised_in_the_usual_spellings(pair):
    assert mirror_pairs(["cleft", pair[1], "bright", pair[0], "towel"]) == ([pair], [])


def test_cocos_own_pairs_are_as_they_were():
    assert mirror_pairs(COCO_PERSON_KEYPOINT_NAMES) == (list(COCO_PERSON_KEYPOINT_FLIP_MAP), [])


@pytest.mark.parametrize(("names", "entry", "flip", "message"), [
    (["head", "tail"], {}, "horizontal", r"\(head, tail\) do not tell which are left and right; add mirror"),
    (["head", "tail"], {}, "none", None),
    (["head", "tail"], {"mirror": []}, "horizontal", None),
    (["head", "tail"], {"mirror": [["head", "tail"]]}, "horizontal", None),
    (["head", "tail"], {"mirror": [["head", "nose"]]}, "none", "mirror names 'nose', which is not a keypoint"),
    (["head", "tail"], {"mirror": [["head", "head"]]}, "none", "mirror names 'head' twice"),
    (["head", "tail"], {"mirror": ["head"]}, "none", "it must be a list of pairs"),
    (["l_ear", "r_eye"], {}, "horizontal", "the keypoint 'l_ear' looks like one of a left and a right one"),
    (["l_ear", "r_ear"], {}, "vertical", "mirrors pictures without exchanging left and right"),
    (["l_ear", "l_ear"], {}, "none", "has two keypoints named 'l_ear'; rename"),
])  # fmt: skip
def test_keypoints_are_not_mirrored_on_a_guess(coco, names, entry, flip, message):
    def change(content):
        for category in content["categories"]:
            category["keypoints"] = names

    keys = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2, "INPUT.RANDOM_FLIP", flip]
    cfg = config(coco(change, **entry), opts=[*keys, *BOXES, "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1]])
    with pytest.raises(ValueError, match=message) if message else does_not_raise():
        register_custom(cfg)
        assert MetadataCatalog.get("parts").keypoint_flip_map == [tuple(pair) for pair in entry.get("mirror", [])]
    if message and "left" in message:
        register_custom(cfg, train=False)  # nothing is mirrored in evaluation


@pytest.mark.parametrize(("points", "message"), [
    ([5, 5, 3, 9, 9, 1], "has the keypoint 'l' with visibility 3"),
    ([5, 5, 2, 900, 9, 1], r"has the keypoint 'r' at \(900, 9\), outside the image of 100 x 80"),
    ([5, 5, 2], r"has keypoints \[5, 5, 2\]; it must be one list of x, y, visibility of 2 keypoints"),
    ([5, 5, float("nan"), 9, 9, 1], "it must be one list"),
    ([None, None, 0, "900", "9", "0"], None),
])  # fmt: skip
def test_keypoints_that_cannot_be_are_named(coco, points, message):
    def change(content):
        for category in content["categories"]:
            category["keypoints"] = ["l", "r"]
        content["annotations"][2] |= {"keypoints": points, "num_keypoints": 17}

    keys = ["MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 2]
    cfg = config(coco(change), opts=[*keys, *BOXES, "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.1]])
    with pytest.raises(ValueError, match=message) if message else does_not_raise():
        register_custom(cfg)
        plain = json.loads(Path(MetadataCatalog.get("parts").json_file).read_text())["annotations"][2]
        assert (plain["keypoints"], plain["num_keypoints"]) == ([0, 0, 0, 900, 9, 0], 0)


def test_pretraining_takes_pictures_without_labels(voc, coco, tmp_path):
    entries = [voc(), coco(), {"name": "folder", "format": "coco", "images": str(tmp_path / "pictures")}]
    for file in (tmp_path / "voc/Annotations").iterdir():
        file.unlink()
    names = ["tools", "parts", "folder"]
    cfg = load_cfg(opts=["DATASETS.CUSTOM", str(entries), "DATASETS.TRAIN", str(names)])
    register_custom(cfg, labels=False)
    assert [Path(file).stem for file in list_images(["tools"])] == ["a 1", "b", "c.v2", "d"]
    assert len(list_images(names)) == 8  # the last two are the same pictures


def test_pretraining_reads_coco_files_as_fine_tuning_does(coco, tmp_path):
    def windows(content):
        for image in content["images"]:
            image |= {"file_name": image["file_name"].replace("/", "\\"), "width": "x"}  # which nobody asks for

    register_custom(config(coco(windows)), labels=False)
    assert len(DatasetCatalog.get("parts")) == 4
    for change, message in (
        (_set("images", 2, file_name="x.png"), r"json:\d+: images\[2\] \(id 'p2'\) missing image: .*x.png"),
        (_set("images", 2, file_name=5), r"images\[2\] \(id 'p2'\) has file_name 5; it must be text"),
        (lambda c: c.update(images=[7]), r"images\[0\] is 7; it must be an object"),
    ):
        register_custom(config(coco(change)), labels=False)
        with pytest.raises(ValueError, match=message):
            DatasetCatalog.get("parts")
    for text, message in (
        ("[{", r"labels.json:1: not valid JSON"),
        ("[" * 10**5, "brackets are nested too deeply"),
        ("[]", "not COCO labels"),
    ):
        entry = coco()
        (tmp_path / "labels.json").write_text(text)
        for labels in (True, False):
            with pytest.raises(ValueError, match=message):
                pictures(config(entry), "parts", labels)


@pytest.mark.parametrize("labels", [True, False])
def test_files_in_place_of_folders_and_the_other_way_round(coco, voc, labels, tmp_path):
    (tmp_path / "file").write_text("{}")
    for entry, message in (
        (coco(json=str(tmp_path)), "cannot read .*: Is a directory"),
        (coco(images=str(tmp_path / "file")), "file is not a folder"),
        (coco(images=str(tmp_path / "nothing")), "nothing is not a folder"),
        (voc(root=str(tmp_path / "file")), "file (is not a folder|does not exist)"),
        (voc(images=str(tmp_path / "file")), "file is not a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            pictures(config(entry, opts=BOXES), entry["name"], labels)


def test_a_name_that_is_taken_is_refused(coco):
    with pytest.raises(ValueError, match="'coco_2017_train' is taken by a registered data set"):
        register_custom(config(coco(name="coco_2017_train")))


@pytest.mark.parametrize("indent", [None, 2])
def test_lines_of_json_records(indent):
    text = json.dumps({"info": {"images": [1]}, "images": [{"a": [{}, 1]}, {}, 3], "x": 1}, indent=indent)
    lines = record_lines(text, "images")
    assert len(lines) == 3
    if indent:
        rows = text.splitlines()
        assert [rows[line - 1].strip() for line in lines] == ["{", "{},", "3"]


def test_label_images_with_a_palette_are_indices(tmp_path):
    labels = np.array([[0, 1, 20], [255, 14, 2]], dtype=np.uint8)
    for mode in ("P", "L"):
        image = Image.fromarray(labels, mode) if mode == "L" else Image.fromarray(labels)
        if mode == "P":
            image = image.convert("L")
            image.putpalette(np.ravel(voc_colors(256)).tolist())
            assert image.mode == "P"
        (tmp_path / mode).mkdir()
        image.save(tmp_path / mode / "a.png")
        (tmp_path / "split.txt").write_text("a\n")
        (record,) = load_sem_seg("pictures", str(tmp_path / mode), str(tmp_path / "split.txt"))
        assert record["sem_seg_file_name"].startswith(LabelIndexHandler.PREFIX)
        # As the mapper and as the evaluator read it.
        assert (read_image(record["sem_seg_file_name"], "L")[:, :, 0] == labels).all()
        with PathManager.open(record["sem_seg_file_name"], "rb") as file, Image.open(file) as read:
            assert (np.array(read) == labels).all()
    assert voc_colors(256)[:3] + voc_colors(256)[15:16] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128]]


@pytest.mark.parametrize(("name", "parts"), [
    ("voc_2012_train_aug_sem_seg",
     ["VOC2012/ImageSets/Segmentation/train_aug.txt", "VOC2012/JPEGImages", "VOC2012/SegmentationClassAug"]),
    ("lvis_v1_val", ["lvis/lvis_v1_val.json", "coco/train2017", "coco/val2017"]),
    ("cityscapes_fine_sem_seg_train", ["cityscapes/leftImg8bit/train", "cityscapes/gtFine/train"]),
])  # fmt: skip
def test_missing_data_show_the_layout(name, parts):
    with pytest.raises(ValueError) as caught:
        check_run(load_cfg(opts=["DATASETS.TRAIN", f"('{name}',)"]), world_size=1)
    for part in parts:
        assert f"/{part}   <- missing" in str(caught.value)

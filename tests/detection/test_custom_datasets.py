"""Users' own labels: what tools write is read, what is wrong is named by file and line, and detectors train on it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.data.detection_utils import read_image
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from PIL import Image
from small_detector import COCO_FPN, SHORT, VOC_C4, small_cfg

from moco_d2.config import load_cfg
from moco_d2.data import list_images
from moco_d2.detection import datasets
from moco_d2.detection.datasets import LabelIndexHandler, custom_problems, load_sem_seg, register_custom, voc_colors
from moco_d2.detection.evaluators import build_evaluator
from moco_d2.detection.label_files import record_lines
from moco_d2.detection.preflight import check_run
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.engine.launch import launch

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def _catalogs():
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


def _set(key, index, **fields):
    return lambda content: content[key][index].update(fields)


COCO_PROBLEMS = {
    "missing image": (_set("images", 2, file_name="x.png"), r"json:15: images\[2\] \(id 'p2'\) missing image .*x.png"),
    "a flat folder": (_set("images", 0, file_name="0.png"), "missing image"),
    "outside": (_set("annotations", 1, bbox=[90, 10, 20, 20]), r"\[1\] \(id 1\).* outside the image of 100 x 80"),
    "zero area": (
        _set("annotations", 1, bbox=[9, 10, 0, 20]),
        r":\d+: annotations\[1\] \(id 1\) has a box .* zero area",
    ),
    "no numbers": (_set("annotations", 1, bbox=[1, 2, None, 4]), r"must be \[x, y, width, height\]"),
    "unknown class": (
        _set("annotations", 3, category_id=8),
        r"class category_id 8; categories holds 7 \(bolt\), 30 \(screw\)",
    ),
    "duplicate image": (_set("images", 1, id="p0"), "id of another image: duplicate id"),
    "duplicate box": (_set("annotations", 1, id=0), r"annotations\[1\] \(id 0\) has the id of another.*duplicate id"),
    "orphan": (_set("annotations", 1, image_id=1), "image_id 1, which is not among the images"),
    "empty split": (lambda c: c.update(images=[], annotations=[]), "empty split"),
    "nothing labelled": (lambda c: c.update(annotations=[]), "empty split: none of its 4 images has a usable object"),
    "no mask": (_set("annotations", 0, segmentation=[]), "has no segmentation, which MODEL.MASK_ON needs"),
    "run lengths": (
        _set("annotations", 0, segmentation={"size": [80, 100], "counts": [8000]}),
        "set INPUT.MASK_FORMAT bitmask",
    ),
    "a line": (_set("annotations", 0, segmentation=[[1, 2, 3, 4]]), "polygon without three"),
    "two of a name": (_set("categories", 1, name="screw"), r"categories\[1\].*duplicate"),
    "no object": (lambda c: c["images"].append(3), r"images\[4\] is 3 instead of an object"),
}


@pytest.mark.parametrize("kind", COCO_PROBLEMS)
def test_coco_problems_are_named(coco, kind):
    change, message = COCO_PROBLEMS[kind]
    with pytest.raises(ValueError, match=message):
        register_custom(config(coco(change)))


def _xml(old, new, name="b"):
    def change(root):
        path = root / f"Annotations/{name}.xml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def _split(text):
    return lambda root: (root / "ImageSets/Main/train.txt").write_text(text)


VOC_PROBLEMS = {
    "missing image": (lambda r: (r / "JPEGImages/b.JPG").unlink(), r"b.xml:1: missing image .*JPEGImages/b with any"),
    "missing xml": (
        lambda r: (r / "Annotations/b.xml").unlink(),
        r"train.txt:2: missing annotation .*Annotations/b.xml",
    ),
    "outside": (
        _xml(">50<", ">104<"),
        r"b.xml:4: .*\[11.0, 11.5, 104.0, 40.0\] that lies outside the image of 100 x 80",
    ),
    "zero area": (_xml(">50<", ">11<"), r"b.xml:4: .* zero area"),
    "no number": (_xml(">50<", "><"), r"b.xml:4: .*must be numbers"),
    "unknown class": (_xml("hammer &amp; nail", "wrensh"), "b.xml:4: unknown class 'wrensh'; did you mean 'wrench'"),
    "broken": (_xml("</object>", ""), r"b.xml:8: no valid XML: mismatched tag"),
    "duplicate": (_split("b\na 1\nb 1\n"), r"train.txt:3: 'b' is listed twice: duplicate id"),
    "empty split": (_split("\n"), "train.txt: empty split"),
    "no split": (lambda r: (r / "ImageSets/Main/train.txt").unlink(), "ImageSets/Main/train.txt is not there"),
}


@pytest.mark.parametrize("kind", VOC_PROBLEMS)
def test_voc_problems_are_named(voc, kind):
    change, message = VOC_PROBLEMS[kind]
    with pytest.raises(ValueError, match=message):
        register_custom(config(voc(change, classes=["hammer & nail", "wrench"]), base=VOC_C4))


def test_a_dry_run_names_all_problems_even_those_of_pixels(coco, voc, tmp_path):
    def change(content):
        _set("annotations", 1, bbox=[90, 10, 0, 20])(content)
        _set("images", 2, width=80, height=100)(content)

    entries = [coco(change), voc(_split("a 1\nnobody\n")), {"name": "x", "format": "yolo", "roots": ""}]
    cfg = config(*entries, opts=BOXES)
    picture(tmp_path / "voc/JPEGImages/a 1.png", size=(90, 80))
    found = custom_problems(cfg)
    expected = [
        "no key 'roots'; did you mean 'root'", "format is 'yolo'; it must be voc or coco", "80 x 100 pixels, but",
        "zero area", "100 x 80 pixels, but", "train.txt:2: missing annotation", "empty split",
    ]  # fmt: skip
    assert len(found) == len(expected)
    for problem, part in zip(found, expected, strict=True):
        assert part in problem


def count_in_every_process(entry):
    """Look for problems, then count the pictures; the main process takes its time to write."""
    write = datasets.atomic_write

    @contextlib.contextmanager
    def slow(path):
        with write(path) as file:
            yield file
            time.sleep(2)

    datasets.atomic_write = slow
    assert custom_problems(config(entry)) == []
    assert len(DatasetCatalog.get("parts")) == 4


def test_processes_of_a_dry_run_wait_for_the_plain_labels(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the output folder
    launch(count_in_every_process, 2, 1, 0, "auto", coco())


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
    with pytest.raises(ValueError, match="unknown class 'bolt': it is not in classes"):
        register_custom(config(coco(classes=["screw"])))
    cfg = config(coco(), voc(), opts=BOXES)
    register_custom(cfg)
    with pytest.raises(ValueError) as caught:
        check_run(cfg, world_size=1)
    assert "'parts' has 2 classes: pass MODEL.ROI_HEADS.NUM_CLASSES 2" in str(caught.value)
    assert "number their classes differently: 0 is bolt in one and hammer & nail" in str(caught.value)


def test_masks_that_are_not_wanted_do_not_cost_their_boxes(coco):
    register_custom(config(coco(_set("annotations", 0, segmentation=[[1, 2, 3, 4]])), opts=BOXES))
    assert sum(len(record["annotations"]) for record in DatasetCatalog.get("parts")) == 5


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
    with pytest.raises(ValueError, match=r"a category of 3 keypoints, but .*NUM_KEYPOINTS is 17"):
        register_custom(config(coco(change), opts=[*keys[:2], *BOXES]))


def test_pretraining_takes_pictures_without_labels(voc, coco, tmp_path):
    entries = [voc(), coco(), {"name": "folder", "format": "coco", "images": str(tmp_path / "pictures")}]
    for file in (tmp_path / "voc/Annotations").iterdir():
        file.unlink()
    names = ["tools", "parts", "folder"]
    cfg = load_cfg(opts=["DATASETS.CUSTOM", str(entries), "DATASETS.TRAIN", str(names)])
    register_custom(cfg, labels=False)
    assert [Path(file).stem for file in list_images(["tools"])] == ["a 1", "b", "c.v2", "d"]
    assert len(list_images(names)) == 8  # the last two are the same pictures


def test_a_name_that_is_taken_is_refused(coco):
    with pytest.raises(ValueError, match="'coco_2017_train' is taken"):
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
    ("cityscapes_fine_sem_seg_train", ["cityscapes/leftImg8bit/train/", "cityscapes/gtFine/train/"]),
])  # fmt: skip
def test_missing_data_show_the_layout(name, parts):
    with pytest.raises(ValueError) as caught:
        check_run(load_cfg(opts=["DATASETS.TRAIN", f"('{name}',)"]), world_size=1)
    for part in parts:
        assert f"/{part}   <- missing" in str(caught.value)

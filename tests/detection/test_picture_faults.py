"""A picture or annotation that cannot be used is named in one line: by loaders, dry run, training and evaluation."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from detectron2.structures import Boxes, Instances
from PIL import Image
from small_detector import COCO_FPN, SHORT, VOC_C4, small_cfg

from moco_d2.detection.dry_run import rehearse
from moco_d2.detection.loader import build_loader
from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.metrics.evaluators import build_evaluator
from moco_d2.detection.missing import missing_files
from moco_d2.detection.preflight import check_run
from moco_d2.detection.trainer import TransferTrainer, evaluate
from moco_d2.io.pictures import PictureError
from moco_d2.reports.visualize import detections_page, samples_page
from moco_d2.running.mistakes import pictures_in_one_line
from moco_d2.running.seeds import seeded

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning"),
]


@pytest.fixture
def root(dataset_root, tmp_path):
    """A copy of the data sets, to be damaged: ``voc``, ``voc_again`` and ``coco`` are registered."""
    root = shutil.copytree(dataset_root, tmp_path / "data")
    register_pascal_voc("voc", str(root / "VOC2007"), "trainval", 2007)
    register_pascal_voc("voc_again", str(root / "VOC2012"), "trainval", 2012)
    for name in ("voc", "voc_again"):
        MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    coco = root / "coco"
    register_coco_instances("coco", {}, str(coco / "annotations/instances_val2017.json"), str(coco / "val2017"))
    yield root
    for name in ("voc", "voc_again", "coco"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def voc_cfg(folder: Path, *opts: object):
    sets = [
        "DATASETS.TRAIN",
        "('voc',)",
        "DATASETS.TEST",
        "('voc',)",
        "MODEL.WEIGHTS",
        "",
        "OUTPUT_DIR",
        folder / "out",
    ]
    return small_cfg(VOC_C4, *SHORT, *sets, *opts)


def coco_cfg(folder: Path, *opts: object):
    sets = [
        "DATASETS.TRAIN",
        "('coco',)",
        "DATASETS.TEST",
        "('coco',)",
        "MODEL.WEIGHTS",
        "",
        "OUTPUT_DIR",
        folder / "out",
    ]
    return small_cfg(COCO_FPN, *SHORT, *sets, "INPUT.MASK_FORMAT", "bitmask", *opts)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.save(path, exif=exif)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = {
    "truncated": (cut, "truncated"),
    "empty": (lambda path: path.write_bytes(b""), "cannot identify"),
    "a page of the web": (lambda path: path.write_text("<html>404</html>"), "cannot identify"),
    "gone": (Path.unlink, "is not there"),
    "a folder": (folder, "is a folder"),
    "floats": (lambda path: Image.fromarray(np.zeros((90, 120), np.float32)).save(path, "TIFF"), "mode F.*save it"),
    "of another size": (turn, "labels give the size 120 x 90, but the picture has 90 x 120 pixels"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_mapper_of_training_and_that_of_tests_name_the_picture(fault: str, root: Path) -> None:
    damage, said = FAULTS[fault]
    record = DatasetCatalog.get("voc")[0]
    damage(Path(record["file_name"]))
    for training in (True, False):
        mapper = PictureMapper(voc_cfg(root), is_train=training)
        with pytest.raises(PictureError, match=f"^{record['file_name']}: .*{said}") as caught:
            mapper(record)
        assert "\n" not in str(caught.value)


def test_the_mapper_is_detectron2s_on_ordinary_pictures(root: Path) -> None:
    cfg = coco_cfg(root, "INPUT.CROP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", "(64,80,96)")
    for training in (True, False):
        for record in DatasetCatalog.get("coco"):
            with seeded(3):
                theirs = DatasetMapper(cfg, training)(record)
            with seeded(3):
                ours = PictureMapper(cfg, training)(record)
            assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
            if training:
                one, other = ours["instances"], theirs["instances"]
                assert torch.equal(one.gt_boxes.tensor, other.gt_boxes.tensor)
                assert torch.equal(one.gt_masks.tensor, other.gt_masks.tensor)


def test_an_annotation_that_cannot_be_used_is_named(root: Path) -> None:
    record = DatasetCatalog.get("coco")[1]
    bad = {**record["annotations"][0], "id": "a87", "segmentation": {"size": [128, 96], "counts": [1, 2]}}
    mapper = PictureMapper(coco_cfg(root), is_train=True)
    with pytest.raises(
        PictureError, match=r"000000000002\.jpg: its annotation with id 'a87' and bbox \[20, 20, 50, 40\]"
    ):
        mapper({**record, "annotations": [*record["annotations"], bad]})


def test_labels_of_pixels_of_another_size_are_named(root: Path, tmp_path: Path) -> None:
    record = DatasetCatalog.get("voc")[0]
    Image.new("L", (50, 40)).save(tmp_path / "labels.png")
    mapper = PictureMapper(voc_cfg(root), is_train=True)
    with pytest.raises(PictureError, match=r"labels\.png: the label image has 50 x 40 pixels, its picture 120 x 90"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "labels.png")})
    with pytest.raises(PictureError, match=r"none\.png: is not there"):
        mapper({**record, "sem_seg_file_name": str(tmp_path / "none.png")})


def test_the_loaders_of_both_kinds_read_16_bit_grey_as_pretraining_does(root: Path) -> None:
    path = Path(DatasetCatalog.get("voc")[0]["file_name"])
    levels = np.linspace(0, 65535, 90 * 120).astype(np.uint16).reshape(90, 120)
    for other in path.parent.iterdir():
        other.unlink()
    for name, size in zip("0123", [(90, 120), (128, 96), (80, 150), (100, 100)], strict=True):
        Image.fromarray(np.resize(levels, size)).save(path.parent / f"00000{name}.jpg", "PNG")
    cfg = voc_cfg(root)
    for sample in (next(iter(build_loader(cfg, 0)))[0], next(iter(TransferTrainer.build_test_loader(cfg, "voc")))[0]):
        assert (sample["image"].min(), sample["image"].max()) == (0, 255)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_in_one_line_and_no_traceback(workers: int, root: Path, caplog) -> None:
    for name in ("0", "1", "2", "3"):
        cut(root / f"VOC2007/JPEGImages/00000{name}.jpg")
    trainer = TransferTrainer(voc_cfg(root, "DATALOADER.NUM_WORKERS", workers, "TEST.PRECISE_BN.ENABLED", False))
    with caplog.at_level(logging.INFO), pytest.raises(PictureError) as caught:
        trainer.train()
    said = str(caught.value)
    assert said.startswith(f"{root}/VOC2007/JPEGImages/00000") and "repair the file" in said and "\n" not in said
    (record,) = (record for record in caplog.records if record.name == "detectron2.engine.train_loop" and record.args)
    assert record.getMessage() == f"training ends: {said}" and record.exc_info is None


@pytest.mark.parametrize("precise_bn", [False, True])
def test_a_run_whose_last_step_fails_is_not_evaluated(precise_bn: bool, root: Path) -> None:
    cfg = voc_cfg(root, "DATASETS.TEST", "('voc_again',)", "SOLVER.MAX_ITER", 1, "TEST.PRECISE_BN.ENABLED", precise_bn)
    trainer = TransferTrainer(cfg)
    step = trainer.run_step

    def run_step() -> None:
        if precise_bn:
            step()
        shutil.rmtree(root / "VOC2007/JPEGImages")
        if not precise_bn:
            step()

    trainer.run_step = run_step
    with pytest.raises(PictureError, match=r"VOC2007/JPEGImages/00000\d\.jpg: is not there"):
        trainer.train()
    assert not (root / "out/results.json").exists() and not (root / "out/inference").exists()


def test_a_process_that_is_left_alone_says_so_in_a_line(caplog) -> None:
    loop = logging.getLogger("detectron2.engine.train_loop")
    with pictures_in_one_line():
        try:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Read error [::1]:5: Connection reset by peer")
        except RuntimeError:
            loop.exception("Exception during training:")
    (record,) = caplog.records
    assert record.getMessage() == "training ends, because another process has ended" and record.exc_info is None


@pytest.mark.parametrize("opts", [(), ("DATASETS.FRACTION", 50.0)])
def test_a_training_set_without_objects_is_a_mistake_in_one_line(opts: tuple[object, ...], root: Path) -> None:
    labels = root / "coco/annotations/instances_val2017.json"
    content = json.loads(labels.read_text())
    for item in content["annotations"]:
        item["iscrowd"] = 1
    labels.write_text(json.dumps(content))
    said = "no picture of coco has an object to train on: it needs one that is not a crowd"
    with pytest.raises(ValueError, match=f"^{said}"):
        TransferTrainer.build_train_loader(coco_cfg(root, *opts))
    with pytest.raises(ValueError, match=said):
        list(rehearse(coco_cfg(root, *opts)))


def test_a_crowd_flag_that_would_drop_an_object_is_refused_in_any_registered_set(root: Path) -> None:
    labels = root / "coco/annotations/instances_val2017.json"
    content = json.loads(labels.read_text())
    content["annotations"][1]["iscrowd"] = None
    labels.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\.jpg: an annotation \(bbox \[.*\]\) has iscrowd None; it must be 0 or"):
        build_loader(coco_cfg(root), seed=0)


def test_results_are_kept_where_the_second_test_set_fails_and_where_a_writer_does(root: Path, monkeypatch) -> None:
    cfg = voc_cfg(root, "DATASETS.TEST", "('voc', 'voc_again')", "TEST.PRECISE_BN.ENABLED", False)
    trainer = TransferTrainer(cfg)
    cut(root / "VOC2012/JPEGImages/000002.jpg")
    with pytest.raises(PictureError) as caught:
        trainer.train()
    out = root / "out"
    kept = json.loads((out / "inference/voc/metrics.json").read_text())
    assert kept["dataset"] == "voc" and "AP50" in kept["metrics"]["bbox"]
    for said in (f"{root}/VOC2012/JPEGImages/000002.jpg: ", f"{out}/inference/voc/metrics.json", "--resume",
                 f"--eval-only MODEL.WEIGHTS {out}/model_final.pth"):  # fmt: skip
        assert said in str(caught.value)
    assert not (out / "results.json").exists()

    shutil.copy(root / "VOC2007/JPEGImages/000002.jpg", root / "VOC2012/JPEGImages/000002.jpg")
    evaluate(voc_cfg(root, "DATASETS.TEST", "('voc_again',)", "MODEL.WEIGHTS", out / "model_final.pth"))
    assert "voc_again" in json.loads((out / "results_eval_only.json").read_text())["metrics"]

    again = TransferTrainer(cfg)  # the other advice
    again.resume_or_load(resume=True)
    monkeypatch.setattr(again._hooks[-2], "after_train", lambda: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        again.train()
    assert set(json.loads((out / "results.json").read_text())["metrics"]) == {"voc", "voc_again"}


def test_the_dry_run_names_every_picture_and_annotation_at_once(root: Path) -> None:
    labels = root / "coco/annotations/instances_val2017.json"
    content = json.loads(labels.read_text())
    content["annotations"][3]["segmentation"] = {"size": [100, 100], "counts": [10, 20, 10**6]}
    labels.write_text(json.dumps(content))
    cut(root / "coco/val2017/000000000001.jpg")
    turn(root / "coco/val2017/000000000002.jpg")
    (root / "coco/val2017/000000000003.jpg").unlink()
    with pytest.raises(ValueError) as caught:
        list(rehearse(coco_cfg(root, "DATALOADER.NUM_WORKERS", 1)))
    lines = str(caught.value).splitlines()
    for line, said in zip(lines, [
        r"data set 'coco': 1 of the 4 files that its labels name do not exist: ",
        "000000000001.jpg: image file is truncated",
        "000000000002.jpg: the labels give the size 96 x 128, but the picture has 128 x 96",
        "000000000004.jpg: its annotation number 0, counted from 0, and bbox [20, 20, 50, 40] cannot be used",
    ], strict=True):  # fmt: skip
        assert said in line
    small = coco_cfg(root, "DATA.DRY_RUN_PICTURES", 1)
    with pytest.raises(ValueError) as caught:  # of those that are there, the first
        list(rehearse(small))
    assert len(str(caught.value).splitlines()) == 2


def test_numbers_of_pixels_and_pictures_are_checked(root: Path) -> None:
    for key, value, rule in (("MAX_PIXELS", 0, "positive"), ("DRY_RUN_PICTURES", -1, "a number of pictures, or 0")):
        with pytest.raises(ValueError, match=rf"^DATA.{key} is {value}; it must be {rule}"):
            check_run(voc_cfg(root, "MODEL.ROI_HEADS.NUM_CLASSES", 20, f"DATA.{key}", value), world_size=1)


def test_files_that_a_list_names_are_looked_for_before_any_work(root: Path) -> None:
    cfg = voc_cfg(root, "DATASETS.TEST", "('voc_again', 'coco')", "MODEL.ROI_HEADS.NUM_CLASSES", 20)
    (root / "VOC2007/Annotations/000001.xml").unlink()
    (root / "VOC2012/JPEGImages/000003.jpg").unlink()
    (root / "coco/val2017/000000000004.jpg").unlink()
    with pytest.raises(ValueError) as caught:
        check_run(cfg, world_size=1)
    for said in ("'voc': 1 of the 8 files that its labels name do not exist: ", "Annotations/000001.xml",
                 "'voc_again': 1 of", "JPEGImages/000003.jpg", "'coco': 1 of the 4",
                 "val2017/000000000004.jpg"):  # fmt: skip
        assert said in str(caught.value)
    with pytest.raises(ValueError, match=r"data set 'coco': 1 of the 4 .*000000000004\.jpg"):
        build_loader(coco_cfg(root), seed=0)  # a training set's, as soon as its labels are read


def test_labels_of_registered_sets_that_cannot_be_read_are_named_by_file_and_record(root: Path) -> None:
    (root / "VOC2012/Annotations/000002.xml").write_text("<annotation>\n<object>")
    cfg = voc_cfg(root, "MODEL.ROI_HEADS.NUM_CLASSES", 20, "DATASETS.TEST", "('voc_again',)")
    with pytest.raises(ValueError, match=r"'voc_again' cannot be read: .*Annotations/000002\.xml:2: not valid XML"):
        check_run(cfg, world_size=1)
    labels = root / "coco/annotations/instances_val2017.json"
    content = json.loads(labels.read_text())
    for changes, said in (
        ({"category_id": 999}, r":\d+: annotations\[1\] .* unknown category_id 999"),
        ({"id": content["annotations"][0]["id"]}, r":\d+: annotations\[1\] .* has the id of another annotation"),
    ):
        first, second, *others = content["annotations"]
        labels.write_text(json.dumps({**content, "annotations": [first, {**second, **changes}, *others]}))
        with pytest.raises(ValueError, match=rf"^data set 'coco' cannot be read: {labels}{said}"):
            build_loader(coco_cfg(root), seed=0)


def test_labels_that_no_library_can_evaluate_are_a_mistake_in_one_line(root: Path) -> None:
    labels = root / "coco/annotations/instances_val2017.json"
    content = json.loads(labels.read_text())
    content["annotations"][0]["area"] = None
    labels.write_text(json.dumps(content))
    evaluator = build_evaluator(coco_cfg(root, "MODEL.MASK_ON", False), "coco")
    evaluator.reset()
    found = Instances((90, 120), pred_boxes=Boxes(torch.tensor([[20.0, 20, 70, 60]])))
    found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.long)
    evaluator.process([DatasetCatalog.get("coco")[0]], [{"instances": found}])
    with pytest.raises(ValueError, match=rf"^{labels}: annotation 1 has a non-finite area or box, and pycoco"):
        evaluator.evaluate()


def test_a_long_list_of_missing_files_is_cut(tmp_path: Path) -> None:
    (tmp_path / "there.jpg").touch()
    assert missing_files("x", [str(tmp_path / "there.jpg")]) == ""
    said = missing_files("x", [str(tmp_path / f"{n}.jpg") for n in range(40)] + [str(tmp_path)])
    assert "41 of the 41 files" in said and said.count(".jpg") == 5 and "and 36 more" in said


def test_pages_of_pictures_name_a_picture_that_cannot_be_read(root: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("0", "1", "2", "3"):
        cut(root / f"VOC2007/JPEGImages/00000{name}.jpg")
    with pytest.raises(PictureError, match=r"JPEGImages/00000\d\.jpg: .*truncated"):
        samples_page(voc_cfg(root), tmp_path / "samples", count=1)
    predictor = SimpleNamespace(cfg=voc_cfg(root))
    monkeypatch.setattr("moco_d2.reports.visualize.load_predictor", lambda *_: predictor)
    with pytest.raises(PictureError, match=r"JPEGImages/000000\.jpg: .*truncated"):
        detections_page({"run": "x"}, tmp_path / "page")

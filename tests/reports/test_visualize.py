"""Pages of pictures: the ranking is right, and a page holds what it says, by itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image

from moco_d2.builtin_sets import voc_colors
from moco_d2.config import load_cfg
from moco_d2.detection.label_images import LabelIndexHandler
from moco_d2.reports.pictures import Scene, draw_scene
from moco_d2.reports.ranking import Outcome, Rating, best_threshold, f1, match, mean_iou, rank
from moco_d2.reports.visualize import detections_page, samples_page

# Detectron2's anchors call meshgrid in the old way, and its masks are handed to numpy in the old way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.REFERENCE_WORLD_SIZE", "0", "SEED", "3",
    "TEST.DETECTIONS_PER_IMAGE", "2", "MODEL.RPN.POST_NMS_TOPK_TEST", "8", "MODEL.RPN.PRE_NMS_TOPK_TEST", "50",
]  # fmt: skip
NO = np.zeros(0, bool)


def scene(*boxes, classes=None, scores=None):
    count = len(boxes)
    return Scene(np.reshape(boxes, (-1, 4)).astype(float), classes or [0] * count, scores or [0.9] * count)


def flags(*values):
    return np.array(values, bool)


A, B = (0, 0, 10, 10), (20, 0, 30, 10)


@pytest.mark.parametrize(("found", "kinds"), [
    (scene(A, B), [1, 1]),
    (scene(A, A, B), [1, 0, 1]),  # the second one comes too late
    (scene(A, B, classes=[1, 0]), [0, 1]),
    (scene((0, 0, 10, 4), B), [0, 1]),  # IoU .4
    (scene(), []),
])  # fmt: skip
def test_detections_take_objects_in_the_order_of_their_scores(found, kinds):
    outcome = match(found, np.array([A, B]), [0, 0], flags(0, 0), flags(0, 0))
    assert outcome.kinds.tolist() == kinds
    assert outcome.counts(0.5) == (kinds.count(1), kinds.count(0), 2 - kinds.count(1))


def test_difficult_objects_and_crowds_do_not_count():
    difficult = match(scene(A, B), np.array([A, B]), [0, 0], flags(1, 0), flags(0, 0))
    assert (difficult.kinds.tolist(), difficult.wanted) == ([-1, 1], 1)
    crowd = np.array([(0, 0, 40, 40)])
    inside = match(scene(A, B, (35, 0, 55, 10)), crowd, [0], flags(1), flags(1))
    assert (inside.kinds.tolist(), inside.counts(0.5)) == ([-1, -1, 0], (0, 1, 0))


def test_f1_and_the_score_that_suits_a_checkpoint():
    assert f1(0, 0, 0) == 1
    assert f1(2, 1, 1) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(30):
        kinds = rng.integers(-1, 2, 8)
        scores = np.sort(rng.integers(1, 10, 8) / 10)[::-1]
        outcomes.append(Outcome(scores, kinds, int((kinds == 1).sum()) + 2))

    def overall(threshold):
        return f1(*np.sum([outcome.counts(threshold) for outcome in outcomes], axis=0))

    assert overall(best_threshold(outcomes)) == max(overall(t / 10) for t in range(1, 11))


def test_mean_iou_of_a_picture():
    labels, found = np.array([[0, 0, 1, 255]]), np.array([[0, 1, 1, 7]])
    assert mean_iou(found, labels, 255) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert mean_iou(labels, labels, 255) == 1


def test_the_order_of_a_page():
    first = [Rating(q, e, f, "") for q, e, f in [(0.5, 1, 1), (0, 5, 0), (1, 0, 1), (0, 9, 0), (1, 0, 4)]]
    assert rank([first], ["a"], 2) == {"Worst": [3, 1], "Best": [4, 2]}
    assert rank([first], ["a"], 4) == {"Worst": [3, 1, 0, 2], "Best": [4]}  # nothing twice
    second = [Rating(q, e, 0, "") for q, e in [(0.5, 1), (0.5, 5), (0.8, 0), (0, 7), (1, 0)]]
    assert rank([first, second], ["a", "b"], 3) == {"b worse than a": [2], "b better than a": [1, 3]}


def test_what_is_drawn_has_its_colour():
    image = np.zeros((100, 500, 3), np.uint8)
    MetadataCatalog.get("drawn").thing_classes = ["thing"]
    square = [np.array([100.0, 20, 200, 20, 200, 80, 100, 80])]
    seen = Scene(np.array([[100.0, 20, 200, 80]]), [0], [0.5], masks=[square])
    drawing = draw_scene(image, MetadataCatalog.get("drawn"), seen, [(0, 1, 0)])
    assert drawing.shape == image.shape
    assert drawing[50, 150, 1] > 100 > drawing[50, 150, 0]
    assert drawing[50, 400].max() == 0
    MetadataCatalog.remove("drawn")


# Whole pages, from checkpoints.


@pytest.fixture
def parts(tmp_path):
    """A test set of six pictures with boxes, masks and keypoints; the odd ones hold no object."""
    records = []
    for number in range(6):
        path = tmp_path / f"photos/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (96, 64), (40 * number,) * 3).save(path)
        item = {
            "bbox": [10, 10, 50, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0,
            "segmentation": [[10, 10, 50, 10, 50, 50]], "keypoints": [20, 20, 2] * 17,
        }  # fmt: skip
        records.append({
            "file_name": str(path), "image_id": number, "height": 64, "width": 96,
            "annotations": [] if number % 2 else [item],
        })  # fmt: skip
    yield from _registered("parts_with_points", records, thing_classes=["<part>"], evaluator_type="coco")


@pytest.fixture
def segments(tmp_path):
    records = []
    for number in range(3):
        labels = Image.new("L", (96, 64), number)
        labels.putpalette(np.ravel(voc_colors(256)).tolist())
        labels.save(tmp_path / f"{number}.png")
        Image.new("RGB", (96, 64)).save(tmp_path / f"{number}.jpg")
        records.append({
            "file_name": str(tmp_path / f"{number}.jpg"), "height": 64, "width": 96,
            "sem_seg_file_name": f"{LabelIndexHandler.PREFIX}{tmp_path}/{number}.png",
        })  # fmt: skip
    classes = [f"class {number}" for number in range(21)]
    facts = {"stuff_classes": classes, "ignore_label": 255, "evaluator_type": "sem_seg"}
    yield from _registered("parts_by_pixel", records, **facts)


def _registered(name, records, **metadata):
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(**metadata)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def checkpoint(folder: Path, config: str, name: str, *opts: str) -> Path:
    """Save an untrained detector as a finished run."""
    sets = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)"]
    cfg = load_cfg(config, [*SMALL, *sets, *opts])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        DetectionCheckpointer(build_model(cfg), str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return folder / "model_final.pth"


def pictures_of(page: Path) -> list[str]:
    """Return the pictures that a page shows, having looked at each from a copy of the folder elsewhere."""
    copy = page.parent.with_name("copy")
    shutil.copytree(page.parent, copy)
    names = re.findall(r'src="([^"]+)"', (copy / "index.html").read_text())
    for name in names:
        with Image.open(copy / name) as image:
            image.load()
    shutil.rmtree(copy)
    assert len(set(names)) == len(names) == len(list(page.parent.glob("pictures/*")))
    return names


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_pages_of_boxes_masks_and_keypoints(folders, parts):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    masks = checkpoint(folders / "a", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", parts, *opts)
    points = checkpoint(folders / "b", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_2x", parts, *opts)
    page = detections_page({"masks": masks}, folders / "one", count=2)
    assert len(pictures_of(page)) == 2 * 2 * 2  # worst and best, labels and detections
    text = page.read_text()
    assert "6 images of parts_with_points" in text
    assert text.index("<h2>Worst</h2>") < text.index("<h2>Best</h2>")
    with pytest.raises(ValueError, match="one is not empty"):
        detections_page({"masks": masks}, folders / "one")

    page = detections_page({"masks": masks, "<points>": points}, folders / "two", count=2, pictures=4)
    assert "4 images" in page.read_text()
    assert "&lt;points&gt; better than masks" in page.read_text()
    pictures_of(page)


def test_pages_of_segments(folders, segments):
    path = checkpoint(folders / "a", "SemanticSegmentation/fcn16s_R_50_VOC_30k", segments)
    page = detections_page({"fcn": path}, folders / "one", count=1)
    assert len(pictures_of(page)) == 4
    assert "mean IoU" in page.read_text()
    cfg = load_cfg(folders / "a/config.yaml", ["INPUT.CROP.SIZE", "[65, 65]"])
    page = samples_page(cfg, folders / "samples", count=3)
    assert len(pictures_of(page)) == 3
    assert page.read_text().count(", 65 x 65</figcaption>") == 3  # the pictures are 64 high: scaled, cropped and filled


def test_the_tool_shows_samples_of_custom_data(tmp_path):
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (96, 64), (0, 80 * number, 0)).save(root / f"JPEGImages/{number}.jpg")
        (root / f"Annotations/{number}.xml").write_text(
            "<annotation><size><width>96</width><height>64</height></size><object><name>part</name><bndbox><xmin>5</xmin>"
            "<ymin>5</ymin><xmax>40</xmax><ymax>40</ymax></bndbox></object></annotation>"
        )
    custom = [{"name": "mine", "format": "voc", "root": str(root)}]
    opts = [*SMALL, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    config = "PascalVOC-Detection/faster_rcnn_R_50_C4_24k"
    with pytest.raises(ValueError, match="no data set 'mine' is registered"):
        samples_page(load_cfg(config, opts), tmp_path / "none")
    command = [
        sys.executable, str(Path(__file__).parents[2] / "tools/visualize.py"), "samples", "--output", "page",
        "--config-file", config, "--count", "5", *opts, "DATASETS.CUSTOM", str(custom), "OUTPUT_DIR", "unused",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "page/index.html"
    assert len(pictures_of(tmp_path / "page/index.html")) == 5
    assert not (tmp_path / "unused").exists()

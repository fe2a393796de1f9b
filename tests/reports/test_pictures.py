"""Pictures are drawn from what runs leave behind, and show what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from matplotlib.figure import Figure
from PIL import Image

from moco_d2.commands import visualize
from moco_d2.config import load_cfg
from moco_d2.reports import overview, pictures

# A detector that is built in a moment.
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "INPUT.MIN_SIZE_TEST", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
    "DATASETS.TEST", "('sample_pictures',)",
]  # fmt: skip


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    return saved


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four flat pictures, each of its own grey level."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (96, 64), (60 * number,) * 3).save(folder / f"{number}.png")
    return folder


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pretraining_curve(tmp_path: Path, figures: list[Figure]) -> None:
    records = [
        {"iteration": i, "total_loss": 5 - 0.1 * i, "contrast_acc1": i, "contrast_acc5": 2.0 * i, "feature_std": 0.09,
         "positive_similarity": 0.5, "negative_similarity": 0.1, "lr": 0.03}
        for i in range(4, 40, 5)
    ]  # fmt: skip
    records.append({"iteration": 39, "eta_seconds": 0})  # some lines hold only a part
    (tmp_path / "metrics.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.yaml").write_text(load_cfg(opts=["SSL.ARGS.queue_size", "1024"]).dump())
    pictures.draw_pretraining_curve(tmp_path, tmp_path / "curve.png")
    loss = figures[0].axes[0]
    assert list(loss.lines[0].get_xdata()) == list(range(5, 41, 5))  # iterations done
    assert loss.lines[1].get_ydata()[0] == pytest.approx(np.log(1025))  # chance
    assert len({axis.get_title() for axis in figures[0].axes}) == 4
    assert _pixels(tmp_path / "curve.png").std() > 1


def test_views_are_shown_in_their_own_colours(photos: Path, tmp_path: Path, figures: list[Figure]) -> None:
    cfg = load_cfg(opts=["DATASETS.TRAIN", f"('{photos}',)", "DATA.AUGMENTATION", "moco_v1", "DATA.CROP_SIZE", "32"])
    pictures.draw_view_pairs(cfg, tmp_path / "views.png", count=4)
    assert len(figures[0].axes) == 8
    black = figures[0].axes[0].images[0].get_array()
    assert black.shape == (32, 32, 3)
    assert black.max() <= 1  # normalisation is undone: black stays black whatever the augmentation


# Detectron2's anchors call meshgrid in the old way.
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_detections_of_each_run_beside_the_truth(
    photos: Path, tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = {"bbox": [10, 10, 50, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2}
    records = [
        {"file_name": str(path), "image_id": path.stem, "height": 64, "width": 96, "annotations": [box]}
        for path in sorted(photos.iterdir())
    ]
    DatasetCatalog.register("sample_pictures", lambda: records)
    MetadataCatalog.get("sample_pictures").thing_classes = [f"class {i}" for i in range(20)]
    cfg = load_cfg("PascalVOC-Detection/faster_rcnn_R_50_C4_24k_random", SMALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(cfg)
    folder = tmp_path / "run"
    folder.mkdir()
    DetectionCheckpointer(model, str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    pictures.draw_detections({"MoCo": folder, "random": folder}, tmp_path / "found.png", count=3)
    assert len(figures[0].axes) == 9  # three pictures; truth and two runs
    headings = {axis.get_title(loc="left") for axis in figures[0].axes} - {""}
    assert {heading.split(" (")[0] for heading in headings} == {"ground truth", "MoCo", "random"}
    assert _pixels(tmp_path / "found.png").std() > 1
    _the_overview_has_curves_ap_and_labels(folder, tmp_path, figures, monkeypatch)


def _the_overview_has_curves_ap_and_labels(
    detector: Path, tmp_path: Path, figures: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "save_figure", pictures.save_figure)
    metrics = {"sample_pictures": {"bbox": {"AP": 12.34}}}
    (detector / "results.json").write_text(json.dumps({"protocol": "any", "metrics": metrics}))
    words = ["overview", "--pretraining", str(tmp_path / "pretraining"), "--run", str(detector)]
    words += ["--output", str(tmp_path / "overview.png"), "--count", "2"]
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / "config.yaml").write_text(load_cfg().dump())
    with pytest.raises(ValueError, match=r"metrics\.json is missing"):
        visualize.main(words)
    lines = [{"iteration": 9, "total_loss": 5.0, "monitor/knn_top1": 20.0}, {"iteration": 19, "total_loss": 4.0}]
    (tmp_path / "pretraining" / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    visualize.main(words)
    knn, loss, first, *_ = axes = figures[-1].axes
    assert len(axes) == 2 + 2 * 2  # two curves; two pictures of the run, and their labels
    assert (list(knn.lines[0].get_ydata()), list(loss.lines[0].get_xdata())) == ([20], [10, 20])
    assert first.get_title(loc="left") == "run: AP 12.3"
    with pytest.raises(ValueError, match="this file exists"):
        visualize.main(words)

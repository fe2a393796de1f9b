"""Prediction from a run's folder, on the command line and from Python, and the code of docs/from_python.md."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from small_detector import COCO_FPN, SHORT, small_cfg

from moco_d2.commands import predict as command
from moco_d2.detection.datasets import register_custom
from moco_d2.detection.predictor import Predictor
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.facts import IMAGENET_RGB
from moco_d2.layers.resnet import describe

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),  # torch, of its own exporter
    pytest.mark.filterwarnings("ignore:.*ONNX:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
DOCS = Path(__file__).parents[2] / "docs/from_python.md"


@pytest.fixture(scope="module")
def run(dataset_root, tmp_path_factory):
    """The folder of a run of two steps on a data set of the user's own, which is gone; and its pictures."""
    root = tmp_path_factory.mktemp("predicted")
    data, folder = root / "data", root / "run"
    shutil.copytree(dataset_root / "coco", data)
    own = {"name": "mine", "format": "coco", "json": str(data / "annotations/instances_val2017.json"),
           "images": str(data / "val2017"), "classes": ["dog"]}  # fmt: skip
    content = json.loads((data / "annotations/instances_val2017.json").read_text())
    content["categories"] = [c for c in content["categories"] if c["name"] == "dog"]
    (data / "annotations/instances_val2017.json").write_text(json.dumps(content))
    cfg = small_cfg(
        COCO_FPN, *SHORT, "DATASETS.TRAIN", "mine", "DATASETS.TEST", "mine", "MODEL.ROI_HEADS.NUM_CLASSES", 1,
        "DATASETS.CUSTOM", [own], "OUTPUT_DIR", folder, "MODEL.WEIGHTS", "", "TEST.PRECISE_BN.ENABLED", False,
    )  # fmt: skip
    register_custom(cfg)
    # One picture lies on its side, with EXIF that says so.
    path = data / "val2017/000000000001.jpg"
    with Image.open(path) as picture:
        turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif, quality=95)
    TransferTrainer(cfg).train()
    (folder / "config.yaml").write_text(cfg.dump())  # as moco-d2 train leaves it
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("mine")
    pictures = root / "pictures"
    shutil.copytree(data / "val2017", pictures / "sub")
    shutil.rmtree(data)
    return folder, pictures


def test_predictions_are_those_of_the_evaluation(run, tmp_path, capsys):
    folder, pictures = run
    evaluated = json.loads((folder / "inference/mine/coco_instances_results.json").read_text())
    (pictures / "damaged.jpg").write_text("no picture")
    (pictures / ".hidden.jpg").write_text("")
    words = ["--run", str(folder), "--output", str(tmp_path / "found"), "--score", "0.9", str(pictures)]
    assert command.main([*words, "MODEL.DEVICE", "cpu"]) == 1, "one picture is damaged"
    screen = capsys.readouterr().out
    assert "left out: " in screen and "damaged.jpg" in screen and "on 4 pictures" in screen
    content = json.loads((tmp_path / "found/predictions.json").read_text())
    assert [one["file_name"] for one in content["images"]] == [f"sub/{i:012d}.jpg" for i in range(1, 5)]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (120, 90), "upright"
    assert content["categories"] == [{"id": 1, "name": "dog"}]
    found = content["annotations"]
    assert len(found) == len(evaluated) > 10 and [one["id"] for one in found] == list(range(1, len(found) + 1))
    for ours, theirs in zip(found, evaluated, strict=True):
        assert ours["image_id"] == theirs["image_id"]
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["segmentation"] == theirs["segmentation"]
    with Image.open(tmp_path / "found/pictures/sub/000000000001.jpg") as drawing:
        assert drawing.width > drawing.height >= 90
    with pytest.raises(ValueError, match="found is not empty; choose a new folder"):
        command.main(words)


def test_pictures_are_files_pil_or_rgb_arrays(run, tmp_path):
    folder, pictures = run
    predict = Predictor(folder, ["MODEL.DEVICE", "cpu"])
    path = pictures / "sub/000000000002.jpg"
    boxes = predict(path)["instances"].pred_boxes.tensor
    with Image.open(path) as picture:
        for same in (picture, np.asarray(picture)):
            assert torch.equal(predict(same)["instances"].pred_boxes.tensor, boxes)
    assert predict.classes == ["dog"] and predict.checkpoint.name == "model_final.pth"
    with pytest.raises(ValueError, match=r"float64 of shape \(4, 4\); they must be uint8 of shape \(H, W, 3\)"):
        predict(np.zeros((4, 4)))
    (tmp_path / "config.yaml").touch()
    for path, message in (
        (tmp_path, r"has no model_final\.pth: the training has not"),
        (tmp_path / "a.pth", "not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            Predictor(path)


def test_the_documented_code(run, tmp_path, monkeypatch, capsys):
    folder, pictures = run
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("fc.")}
    torch.save(
        {"state_dict": state, "facts": describe(network, IMAGENET_RGB, origin="a test").as_dict()},
        tmp_path / "backbone.pth",
    )
    shutil.copy(pictures / "sub/000000000002.jpg", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    replaced = {
        "output/voc_moco_v2": str(folder),
        "resnet50": "resnet18",
        "480, 640": "96, 128",
        "224": "64",
        "(pixels,))": "(pixels,), check_trace=False)",
    }  # the outputs are compared below
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        for old, new in replaced.items():
            block = block.replace(old, new)
        exec(block, names)
    assert names["cfg"].SOLVER.MAX_ITER == 100
    assert re.search(r"^dog \d+% at \[\d+, \d+, \d+, \d+\]$", capsys.readouterr().out, re.MULTILINE)
    network, same, traced = names["network"], names["same"].eval(), torch.jit.load("backbone.pt")
    x = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(same(x), network(x))
        torch.testing.assert_close(traced(x), network(x))
        y = torch.rand(3, 128, 96) * 255  # another size than that of the trace
        for ours, theirs in zip(torch.jit.load("detector.pt")(y), names["adapter"](y), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(names["found"]) > 0 and names["found"].has("pred_masks")
    with torch.no_grad():
        expected = [tensor.numpy() for tensor in names["bare"](names["pixels"])]
    for array, same in zip(names["arrays"], expected, strict=True):
        np.testing.assert_allclose(array, same, rtol=1e-3, atol=5e-3)
    boxes, _, masks, scores, size = names["arrays"]
    assert boxes.shape == (len(scores), 4) and masks.shape == (len(scores), 1, 28, 28) and list(size) == [96, 128]
    assert names["features"][0].shape == (2, 512)

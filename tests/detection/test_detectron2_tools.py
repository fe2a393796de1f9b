"""Detectron2's own programs with our configs and our runs: what README and docs/detectron2.md say works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import detectron2.config
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from small_detector import SHORT, VOC_C4, small_cfg

from moco_d2.config import add_config, get_cfg, list_configs
from moco_d2.detection.datasets import register_custom
from moco_d2.detection.trainer import TransferTrainer

ROOT = Path(__file__).parents[2]
QUICK = "configs/quick_schedules/faster_rcnn_R_50_C4_quick.yaml"


def documented():
    """Return the Python code in docs/detectron2.md: the line for Detectron2's scripts, and the prediction."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/detectron2.md").read_text(), re.DOTALL)


def test_keys_are_added_once_and_what_is_there_stays():
    cfg = detectron2.config.get_cfg()
    cfg.SOLVER.EPOCHS = 7
    cfg.SSL = CfgNode({"METHOD": "mine"})
    add_config(cfg)
    assert (cfg.SOLVER.EPOCHS, cfg.SSL.METHOD, cfg.SSL.ENCODER.NAME) == (7, "mine", "resnet50")
    cfg.SOLVER.EPOCHS, cfg.SSL.METHOD = get_cfg().SOLVER.EPOCHS, get_cfg().SSL.METHOD
    add_config(cfg)
    assert cfg == get_cfg()
    cfg.SOLVER.ACCUMULATE = 3
    assert get_cfg().SOLVER.ACCUMULATE == 1, "a copy's values are its own"


def test_detectron2s_scripts_read_every_config_and_train_with_the_documented_line(
    dataset_root, converted_file, tmp_path
):
    files = [str(ROOT / "configs" / f"{name}.yaml") for name in list_configs()]
    read = (
        "import sys, detectron2.config, moco_d2.config\n"
        "for path in sys.argv[1:]:\n cfg = detectron2.config.get_cfg()\n moco_d2.config.add_config(cfg)\n"
        " cfg.merge_from_file(path)\n assert cfg.PROTOCOL"
    )
    line, _ = documented()
    kept, removed = re.fullmatch(r"(from moco_d2.*\S) +# in place of: (from detectron2.*)\n", line).groups()
    script = Path(__file__).with_name("detectron2_script.py").read_text()
    assert script.count(f"{removed}\n") == 1 and "moco_d2" not in script
    mine = tmp_path / "train_net.py"
    mine.write_text(script.replace(removed, kept))
    opts = [*SHORT, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(converted_file), "OUTPUT_DIR", str(tmp_path / "out")]
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(dataset_root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for words in (["-c", read, *files], [str(mine), "--config-file", QUICK, *opts]):
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    log = (tmp_path / "out/log.txt").read_text()
    (missing,) = re.findall(r"not found in the checkpoint:\n(.*?)\n\[", log, re.DOTALL)
    assert "backbone" not in missing and "roi_heads.box_predictor" in missing, "pretraining filled the backbone"
    scalars = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in scalars) and (tmp_path / "out/model_final.pth").is_file()


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
def test_the_documented_prediction_from_a_runs_folder_names_its_classes(dataset_root, tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data", tmp_path / "output/voc_moco_v2"
    shutil.copytree(dataset_root / "VOC2007", data)
    cfg = small_cfg(
        VOC_C4, *SHORT, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", "MODEL.ROI_HEADS.NUM_CLASSES", 1,
        "DATASETS.CUSTOM", [{"name": "mine", "format": "voc", "root": str(data)}], "OUTPUT_DIR", run,
        "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", 1, "TEST.PRECISE_BN.ENABLED", False, "MODEL.RPN.POST_NMS_TOPK_TEST", 5,
    )  # fmt: skip
    register_custom(cfg)
    TransferTrainer(cfg).train()
    (run / "config.yaml").write_text(cfg.dump())  # as tools/train_net.py leaves it
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove("mine")
    shutil.rmtree(data)
    shutil.rmtree(run / "datasets", ignore_errors=True)

    _, code = documented()
    monkeypatch.chdir(tmp_path)
    shutil.copy(dataset_root / "VOC2007/JPEGImages/000000.jpg", "picture.jpg")
    try:
        exec(code, {})
    finally:
        for name in ("mine", "names of the run"):
            MetadataCatalog.pop(name, None)
    printed = capsys.readouterr().out.splitlines()
    assert printed and all(re.fullmatch(r"dog: \d+%", line) for line in printed)
    with Image.open("found.png") as drawing:
        assert drawing.size >= (120, 90)

"""``--dry-run``: the whole run in small, and every problem at once, a line each."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from small_detector import COCO_FPN, QUARTER, SHORT, VOC_C4, small_cfg

from moco_d2.detection import dry_run
from moco_d2.detection.dry_run import rehearse

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(dataset_root, tmp_path):
    """Run ``tools/train_net.py --dry-run`` with words added."""

    def run(*words):
        command = [sys.executable, str(ROOT / "tools/train_net.py"), "--dry-run", "--config-file", *map(str, words)]
        environment = os.environ | {
            "DETECTRON2_DATASETS": str(dataset_root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)

    return run


def test_a_run_that_will_work_is_told_what_to_expect(tool, converted_file, tmp_path):
    done = tool(VOC_C4, *QUARTER, *SHORT, "MODEL.WEIGHTS", converted_file, "SOLVER.MAX_ITER", 1000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [(line[:11].strip(), line[12:]) for line in done.stdout.splitlines()]
    said = dict(found)
    assert [subject for subject, _ in found] == [
        "protocol", "schedule", "pictures", "data", "data", "data", "evaluator", "weights", "model", "training",
        "evaluation", "checkpoint", "memory", "ETA", "dry run",
    ]  # fmt: skip
    assert said["protocol"].startswith("voc0712_faster_rcnn_R_50_C4_24k, modified: ")
    assert ("data", "voc_2012_trainval: 4 pictures; objects in a picture: at most 1") in found
    assert said["evaluator"].startswith("voc_2007_test: pascal_voc")
    assert "fills the whole backbone" in said["weights"]
    assert "extrapolated from 50% of a batch" in said["training"]
    assert said["checkpoint"].endswith("read back bit for bit")
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.fixture
def tiny_voc(dataset_root, tmp_path):
    """Registered pictures, and a short run on them."""
    register_pascal_voc("tiny_voc", str(dataset_root / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    sets = ["DATASETS.TRAIN", "('tiny_voc',)", "DATASETS.TEST", "('tiny_voc',)"]
    yield small_cfg(VOC_C4, *SHORT, *sets, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1000)
    DatasetCatalog.remove("tiny_voc")
    MetadataCatalog.remove("tiny_voc")


def test_the_time_of_a_whole_run_is_extrapolated_from_a_little_of_it(tiny_voc, monkeypatch):
    # A step, with half of the pictures, and the evaluation, of two of the four pictures, take 3 seconds by this clock.
    monkeypatch.setattr(dry_run, "IMAGES", 2)
    assert len(dry_run.Rehearsal.build_test_loader(tiny_voc, "tiny_voc").dataset) == 2
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=itertools.count(0, 3).__next__))
    said = dict(rehearse(tiny_voc))
    assert said["training"].endswith("6.00 s a step (extrapolated from 50% of a batch)")
    assert said["ETA"] == "training 1:40:00, each evaluation 0:00:06, at this speed"


def test_a_checkpoint_that_differs_from_the_detector_is_noticed(tiny_voc):
    trainer = dry_run.Rehearsal(tiny_voc)
    trainer.checkpointer.save("model_final")
    assert dry_run._reload(trainer).endswith("bit for bit")
    with torch.no_grad():
        trainer.model.backbone.stem.conv1.weight[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"differs from the detector: backbone\.stem\.conv1\.weight"):
        dry_run._reload(trainer)


def test_more_objects_than_count_are_told():
    MetadataCatalog.get("crowded").evaluator_type = "coco"
    objects = [[0] * 60 + [1] * 60, [1] * 130, [0]]
    detections, own = dry_run._limits(small_cfg(COCO_FPN), "crowded", objects)
    assert "than TEST.DETECTIONS_PER_IMAGE, 100: 2 of 3; at least 19.9% of the objects are missed" in detections
    assert detections.endswith("pass TEST.DETECTIONS_PER_IMAGE 130")
    assert own.startswith("pictures with more than 100 objects of a class: 1 of 3;") and "AP@130" in own
    assert len(list(dry_run._limits(small_cfg(COCO_FPN, "TEST.DETECTIONS_PER_IMAGE", 130), "crowded", objects))) == 1
    assert not list(dry_run._limits(small_cfg(COCO_FPN), "crowded", objects[2:]))
    MetadataCatalog.remove("crowded")


def test_two_processes_rehearse_together_and_speak_once(tool, tmp_path):
    done = tool(COCO_FPN + "_random", "--num-gpus", 2, *QUARTER, *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith(("training", "checkpoint"))] == [
        line for line in lines if " 2 steps, loss " in line or "bit for bit" in line
    ]
    assert sum("2 steps, loss" in line for line in lines) == sum("dry run     passed" in line for line in lines) == 1
    assert not list(tmp_path.iterdir())


def test_all_problems_are_told_at_once_a_line_each_with_its_remedy(tool, backbone_file):
    words = ["DATASETS.TRAIN", "('voc_2007_trainvall',)", "SOLVER.ACCUMULATE", 3, "TEST.COCO_BACKEND", "slow"]
    done = tool(VOC_C4, *QUARTER, *SHORT, *words, "DATASETS.TEST", "('coco_2017_val',)", "MODEL.WEIGHTS", backbone_file)
    assert done.returncode == 2
    error = done.stderr.partition("error: ")[2].strip().splitlines()
    assert "Traceback" not in done.stderr
    for line, said in zip(error, [
        "SOLVER.IMS_PER_BATCH is 2; it must be a multiple of 1 (the number of processes) times 3 (SOLVER.ACCUMULATE)",
        "did you mean 'voc_2007_trainval",
        "pass MODEL.ROI_HEADS.NUM_CLASSES 80",
        "TEST.COCO_BACKEND",
        "Convert it first: moco-d2 convert",
    ], strict=True):  # fmt: skip
        assert said in line


def test_the_schedule_for_one_process_is_shown_beside_the_protocols():
    findings = rehearse(small_cfg(VOC_C4))
    assert next(findings) == ("protocol", "voc0712_faster_rcnn_R_50_C4_24k, modified: " + " ".join([
        "MODEL.RESNETS.WIDTH_PER_GROUP=16", "MODEL.RESNETS.RES2_OUT_CHANNELS=64", "MODEL.RESNETS.STEM_OUT_CHANNELS=16",
    ]))  # fmt: skip
    assert next(findings)[1] == (
        "192000 iterations of 2 images, lr 0.0025, steps (144000, 176000) "
        "(written for 8 processes: 24000 of 16, lr 0.02)"
    )
    findings = dict(itertools.islice(rehearse(small_cfg(VOC_C4, "SOLVER.ACCUMULATE", 8)), 2))
    assert findings["schedule"] == "24000 iterations of 16 images in 8 batches, lr 0.02, steps (18000, 22000)"

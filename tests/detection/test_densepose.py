"""DensePose: config, trainer and evaluation on a stand-in for Detectron2's project, and what is said without it."""

from __future__ import annotations

import importlib.machinery
import os
import pickle
import sys
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.file_io import PathManager
from torch import nn

from moco_d2.config import config_files, flat, get_cfg, roles
from moco_d2.detection import densepose
from moco_d2.io import checkpoints
from moco_d2.io.checkpoints import CheckpointError

ARRAYS = {"Pdist_matrix": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Evaluator(DatasetEvaluator):
    """An evaluator that gets its pickle as the project's does: a download with a timeout, and the module ``pickle``."""

    address, module = "", None

    def evaluate(self):
        with open(PathManager.get_local_path(self.address, timeout_sec=120), "rb") as file:
            return self.module.pickle.load(file, encoding="latin1")


class Trainer:
    """What of the project's trainer is used, with a backbone of one layer."""

    def __init__(self, cfg):
        self.cfg, self.resumed = cfg, False
        model = nn.Sequential(OrderedDict(backbone=nn.Linear(1, 1)))
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None, embedder=None):
        evaluator = Evaluator()
        evaluator.evaluate = lambda: (dataset_name, embedder)
        return evaluator

    def resume_or_load(self, resume=True):
        self.resumed = resume


def add_densepose_config(cfg):
    cfg.MODEL.DENSEPOSE_ON = True
    cfg.MODEL.ROI_DENSEPOSE_HEAD = CfgNode({"NAME": "", "POOLER_TYPE": ""})


@pytest.fixture
def project(monkeypatch):
    """Return the stand-in for the module that opens the pickle, in a stand-in for the project."""
    content = {
        "densepose": {"add_densepose_config": add_densepose_config},
        "densepose.engine": {"Trainer": Trainer},
        "densepose.evaluation": {},
        "densepose.evaluation.densepose_coco_evaluation": {"pickle": pickle},
    }
    for name, values in content.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def evaluator(project, monkeypatch, tmp_path):
    """Return an evaluator whose download lies in the cache already."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = Evaluator()
    found.path, found.module = tmp_path / tmp_path.name / "Pdist_matrix.pkl", project
    found.address = f"https://example.org/{tmp_path.name}/Pdist_matrix.pkl"
    found.path.parent.mkdir()
    yield found
    PathManager.set_strict_kwargs_checking(True)


@pytest.mark.parametrize("call", [densepose.get_config, densepose.trainer_class])
def test_without_the_project_the_commands_that_install_it_are_told(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "densepose", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"is not installed: pip install .*--no-build-isolation .*projects/DensePose"):
        call()


# What the project's densepose_rcnn_R_50_FPN_s1x sets beyond Detectron2's faster_rcnn_R_50_FPN.
PROTOCOL = {
    "DATASETS.TRAIN": ("densepose_coco_2014_train", "densepose_coco_2014_valminusminival"),
    "DATASETS.TEST": ("densepose_coco_2014_minival",),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign",
    "MODEL.ROI_DENSEPOSE_HEAD.NAME": "DensePoseV1ConvXHead",
    "MODEL.ROI_DENSEPOSE_HEAD.POOLER_TYPE": "ROIAlign",
    "MODEL.ROI_HEADS.NAME": "DensePoseROIHeads",
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.MAX_ITER": 130000,
    "SOLVER.STEPS": (100000, 120000),
    "SOLVER.WARMUP_FACTOR": 0.1,
}
DIFFERENT = {
    "MODEL.WEIGHTS", "INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1",  # weights
    "MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "TEST.PRECISE_BN.ENABLED",  # all layers trained
    "MODEL.DEVICE", "SOLVER.REFERENCE_WORLD_SIZE",  # the machine
}  # fmt: skip


def test_the_config_differs_from_the_projects_in_weights_and_norms_alone(project):
    theirs = detectron2_get_cfg()
    add_densepose_config(theirs)
    theirs.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    theirs.merge_from_list([word for pair in PROTOCOL.items() for word in pair])
    ours, theirs = flat(densepose.get_config(["MODEL.WEIGHTS", "x.pth", "MODEL.DEVICE", "cpu"])), flat(theirs)
    assert {key for key, value in theirs.items() if roles.plain(ours[key]) != roles.plain(value)} == DIFFERENT
    assert ours["SOLVER.IMS_PER_BATCH"] == 2 * ours["SOLVER.REFERENCE_WORLD_SIZE"], "2 pictures a GPU, as the project"


def test_keys_that_its_trainer_would_ignore_are_refused(project):
    with pytest.raises(ValueError, match=r"does not read SOLVER.ACCUMULATE 8, ENGINE.COMPILE True: "):
        densepose.get_config(["ENGINE.COMPILE", "True", "SOLVER.ACCUMULATE", "8"])


def test_the_trainer_loads_weights_that_fill_the_backbone_or_resumes(project, monkeypatch, tmp_path):
    logged, path = [], str(tmp_path / "weights.pth")
    monkeypatch.setattr(densepose, "setup_logger", lambda *_, name: logged.append(name))
    cfg = densepose.get_config(["MODEL.WEIGHTS", path, "OUTPUT_DIR", str(tmp_path)])
    trainer = densepose.trainer_class()(cfg)
    assert logged == ["densepose", "moco_d2"]
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE
    layer = {"backbone.weight": torch.full((1, 1), 2.0), "backbone.bias": torch.full((1,), 3.0)}
    torch.save({"model": {"backbone.weight": layer["backbone.weight"]}}, path)
    with pytest.raises(ValueError, match="fills 1 of 2 tensors"):
        trainer.resume_or_load()
    torch.save({"model": layer}, path)
    trainer.resume_or_load()
    assert trainer.checkpointer.model.backbone.bias.item() == 3 and not trainer.resumed
    trainer.checkpointer.save("model_0000000")
    trainer.resume_or_load()
    assert trainer.resumed
    found = trainer.build_evaluator(cfg, "densepose_coco_2014_minival", embedder=2)
    assert type(found) is densepose.SafeEvaluator and found.evaluate() == ("densepose_coco_2014_minival", 2)


def test_keys_of_the_config_are_detectron2s_ours_and_the_projects():
    files = config_files(densepose.CONFIG)
    keys = set(flat(yaml.safe_load(files[0].read_text())))
    own = {key for key in keys if "DENSEPOSE" in key}
    assert len(own) == 3 and keys - own - {"_BASE_"} <= set(flat(get_cfg()))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_pickled_arrays_are_read_without_the_librarys_pickle(protocol, evaluator):
    evaluator.path.write_bytes(pickle.dumps({**ARRAYS, "about": "made up"}, protocol=protocol))
    found = densepose.SafeEvaluator(evaluator).evaluate()
    assert found.keys() == ARRAYS.keys() and type(found["Pdist_matrix"]) is np.ndarray
    np.testing.assert_array_equal(found["Pdist_matrix"], ARRAYS["Pdist_matrix"])
    assert evaluator.module.pickle is pickle, "put back"
    assert checkpoints._last is None, "its memory is freed"


@pytest.mark.parametrize(
    ("content", "said"), [({"a": Runs()}, "refused: opening it would run"), ({"a": 1}, "must hold named arrays")]
)
def test_a_pickle_that_asks_for_code_or_holds_no_array_is_refused(content, said, evaluator, tmp_path):
    evaluator.path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        densepose.SafeEvaluator(evaluator).evaluate()
    assert not (tmp_path / "ran").exists()

"""Files that would run code if they were opened as Detectron2 and torch open them: no stage runs it, and all say so."""

from __future__ import annotations

import importlib
import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.modeling import build_model
from small_detector import SHORT, VOC_C4, small_cfg

from moco_d2.config import load_cfg
from moco_d2.convert import convert_checkpoint
from moco_d2.convert.back import restore
from moco_d2.convert.catalog import get_entry, listing
from moco_d2.convert.convert import CONVERTER
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.preflight import check_weights
from moco_d2.detection.trainer import evaluate
from moco_d2.detection.weights import load_weights
from moco_d2.engine.checkpoint import PretrainCheckpointer, load_method
from moco_d2.reports import trials
from moco_d2.reports.pictures import load_predictor
from moco_d2.running.checkpoints import last_intact, recorded_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weights_only:FutureWarning"),
]


def touch(path: str) -> str:
    """Stand for any function on the machine that is on nobody's list."""
    Path(path).write_text("code of the file ran")
    return path


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Only what can be called may stand for a function in a pickle."""


def runstring(*arguments):
    return Attack(importlib.import_module("numpy.testing._private.utils").runstring, *arguments)


@pytest.fixture(scope="module")
def mark(tmp_path_factory):
    return tmp_path_factory.mktemp("mark") / "ran"


@pytest.fixture(scope="module")
def payloads(converted_file, mark, tmp_path_factory):
    """Files that Detectron2 would load into a detector, or this project's own reader, but for what else they name."""
    folder, content = tmp_path_factory.mktemp("payloads"), torch.load(converted_file)
    write = f"open({str(mark)!r}, 'w').close()"
    arrays = {**content, "model": {name: tensor.numpy() for name, tensor in content["model"].items()}}
    (folder / "unlisted.pkl").write_bytes(pickle.dumps({**arrays, "x": Attack(touch, str(mark))}))
    (folder / "runstring.pkl").write_bytes(pickle.dumps({**arrays, "x": runstring(write, {})}, protocol=2))
    torch.save({**content, "x": Attack(touch, str(mark))}, folder / "unlisted.pth")
    torch.save({**content, "x": runstring(write, {})}, folder / "runstring.pth")
    legacy = {**content, "x": Attack(os.system, f"touch {mark}")}
    torch.save(legacy, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    hidden = Attack(getattr, Attack(importlib.import_module, "os"), "system")
    (folder / "hidden.pkl").write_bytes(pickle.dumps({**arrays, "x": Attack(hidden, f"touch {mark}")}))
    # A name within what is loaded into the model, and in the place of the whole file.
    content["model"]["stem.conv1.weight"] = Attack(touch, str(mark))
    torch.save(content, folder / "inside.pth")
    (folder / "whole.pkl").write_bytes(pickle.dumps(Attack(exec, write)))
    return sorted(folder.iterdir())


def test_the_payloads_are_alive(payloads, mark):
    """Else this file would test nothing. What is opened here was written above."""
    for path in payloads:
        pickle.loads(path.read_bytes()) if path.suffix == ".pkl" else torch.load(path, weights_only=False)
        assert mark.exists(), path
        mark.unlink()


def fine_tuning(path, folder):
    check_weights(small_cfg(VOC_C4, "MODEL.WEIGHTS", path, "OUTPUT_DIR", folder))


def a_plain_checkpointer(path, folder):
    cfg = small_cfg(VOC_C4)
    load_weights(DetectionCheckpointer(build_model(cfg)), cfg, str(path))


def our_checkpointer(path, folder):
    TransferCheckpointer(build_model(small_cfg(VOC_C4)), str(folder)).load(str(path))


def evaluation(path, folder):
    sets = ["DATASETS.TRAIN", "('payload_voc',)", "DATASETS.TEST", "('payload_voc',)"]
    evaluate(small_cfg(VOC_C4, *SHORT, *sets, "MODEL.WEIGHTS", path, "OUTPUT_DIR", folder))


def as_last_checkpoint(path, folder):
    """Lay a payload where ``--resume`` looks."""
    (folder / "model_final.pth").write_bytes(path.read_bytes())
    (folder / "last_checkpoint").write_text("model_final.pth")


def resuming_fine_tuning(path, folder):
    as_last_checkpoint(path, folder)
    assert recorded_seed(folder) is None
    check_weights(small_cfg(VOC_C4, "MODEL.WEIGHTS", "", "OUTPUT_DIR", folder), resume=True)


def resuming_by_detectron2s_call(path, folder):
    as_last_checkpoint(path, folder)
    model = build_model(small_cfg(VOC_C4))
    TransferCheckpointer(model, str(folder)).resume_or_load("", resume=True)


def comparing(path, folder):
    trials.plan("quick_voc0712_faster_rcnn_R_50_C4", [f"x={path}"], [0], folder)


def showing(path, folder):
    (folder / "config.yaml").write_text(small_cfg(VOC_C4).dump())
    (folder / path.name).write_bytes(path.read_bytes())
    load_predictor(folder / path.name, 0.5)


def pretraining(path, folder):
    load_method(torch.nn.Linear(1, 1), str(path))


def resuming_pretraining(path, folder):
    as_last_checkpoint(path, folder)
    last_intact(folder)


def the_pretraining_checkpointer(path, folder):
    PretrainCheckpointer(torch.nn.Linear(1, 1), str(folder), dict).load(str(path))


def a_cache_of_a_catalogue(path, folder):
    """The payload lies in the cache, with a record that fits the list."""
    values = {"url": "http://127.0.0.1:9/x", "title": "t", "recipe": "r", "source": "", "checksum": ""}
    (folder / "own.yaml").write_text(json.dumps({"evil": values}))
    (folder / "cache").mkdir()
    (folder / "cache/evil.pth").write_bytes(path.read_bytes())
    (folder / "cache/evil.json").write_text(json.dumps({**values, "converter": CONVERTER}))
    os.environ |= {"MOCO_D2_CATALOG": str(folder / "own.yaml"), "MOCO_D2_CACHE": str(folder / "cache")}
    fine_tuning("moco-d2://evil", folder)


def back(path, folder):
    restore(path, folder / "back.pth", "torchvision")


RUNS = [resuming_fine_tuning, resuming_pretraining]
LIGHT = [comparing, pretraining, resuming_pretraining, the_pretraining_checkpointer, resuming_fine_tuning]
HEAVY = [  # each builds a detector for each file
    fine_tuning, a_plain_checkpointer, our_checkpointer, evaluation, resuming_by_detectron2s_call, showing,
    a_cache_of_a_catalogue,
]  # fmt: skip


@pytest.fixture
def payload_set(dataset_root, monkeypatch):
    for name in ("MOCO_D2_CATALOG", "MOCO_D2_CACHE"):
        monkeypatch.setenv(name, "")  # so that what a stage sets is undone
    register_pascal_voc("payload_voc", str(dataset_root / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("payload_voc").evaluator_type = "pascal_voc"
    yield
    DatasetCatalog.remove("payload_voc")
    MetadataCatalog.remove("payload_voc")


@pytest.mark.usefixtures("payload_set")
@pytest.mark.parametrize("stage", [*LIGHT, *HEAVY], ids=lambda stage: stage.__name__)
def test_no_stage_runs_code_of_a_file(stage, payloads, mark, tmp_path):
    chosen = [path for path in payloads if stage in LIGHT or path.name in ("unlisted.pkl", "runstring.pth")]
    assert len(chosen) >= 2
    for number, path in enumerate(chosen):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(ValueError) as refusal:
            stage(path, folder)
        message = str(refusal.value)
        assert not mark.exists(), f"{path.name} ran in {stage.__name__}"
        assert len(message.splitlines()) <= 2, message
        if path.stem == "unlisted" and (path.suffix == ".pth" or stage not in RUNS):  # a run's are never pickles
            assert "test_payloads.touch" in message, message


def test_conversion_reads_past_names_and_runs_nothing(payloads, mark, tmp_path):
    """A stranger's checkpoint stores what it likes beside its weights: the converter leaves it out."""
    for path in payloads:
        for use in (lambda p: convert_checkpoint(p, tmp_path / "out.pth", proof=False), lambda p: back(p, tmp_path)):
            with nullcontext() if path.stem == "unlisted" else pytest.raises(ValueError, match=r"^[^\n]+$"):
                use(path)
        assert not mark.exists()


def test_a_name_of_a_catalogue_runs_nothing(payloads, mark, tmp_path, monkeypatch):
    """The list that ``MOCO_D2_CATALOG`` names has the address of a payload, which is fetched and converted."""
    for number, path in enumerate(payloads):
        values = {"url": path.as_uri(), "title": "t", "recipe": "r"}
        (tmp_path / "own.yaml").write_text(json.dumps({"evil": values}))
        monkeypatch.setenv("MOCO_D2_CATALOG", str(tmp_path / "own.yaml"))
        monkeypatch.setenv("MOCO_D2_CACHE", str(tmp_path / f"cache{number}"))
        with nullcontext() if path.stem == "unlisted" else pytest.raises(ValueError, match="cannot be converted"):
            fine_tuning("moco-d2://evil", tmp_path / "run")
        assert not mark.exists()


def test_configs_and_lists_run_nothing(mark, tmp_path, monkeypatch):
    evil = f"MODEL: !!python/object/apply:os.system ['touch {mark}']\n"
    (tmp_path / "config.yaml").write_text(evil)
    (tmp_path / "model_final.pth").write_bytes(b"")
    with pytest.raises(ValueError):
        load_cfg(tmp_path / "config.yaml", [])
    with pytest.raises(ValueError):
        load_predictor(tmp_path / "model_final.pth", 0.5)
    monkeypatch.setenv("MOCO_D2_CATALOG", str(tmp_path / "config.yaml"))
    for use in (listing, lambda: get_entry("moco_v2_800ep")):
        with pytest.raises(ValueError, match=r"config\.yaml: not a list"):
            use()
    assert not mark.exists()

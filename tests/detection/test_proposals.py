"""Precomputed proposals: read as Detectron2 reads them, without running code of their file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.datasets import register_pascal_voc
from detectron2.structures import BoxMode
from small_detector import SHORT, VOC_C4, small_cfg

from moco_d2.detection.dry_run import Rehearsal
from moco_d2.detection.preflight import run_problems

NAME = "proposals_voc"
TAKEN = ["MODEL.LOAD_PROPOSALS", True, "MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"]
SETS = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,)]


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def ids(dataset_root):
    register_pascal_voc(NAME, str(dataset_root / "VOC2007"), "test", 2007)
    MetadataCatalog.get(NAME).evaluator_type = "pascal_voc"
    yield [record["image_id"] for record in DatasetCatalog.get(NAME)]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def content(ids, **more):
    boxes = np.array([[1, 1, 20, 20], [5, 5, 60, 70]], "f4")
    scores = np.array([1.0, 2.0], "f4")
    return {"ids": ids, "boxes": [boxes] * len(ids), "objectness_logits": [scores] * len(ids), **more}


def write(path: Path, what: Any) -> str:
    path.write_bytes(pickle.dumps(what))
    return str(path)


def cfg_of(path, *more):
    files = [word for kind in ("TRAIN", "TEST") for word in (f"DATASETS.PROPOSAL_FILES_{kind}", (path,))]
    return small_cfg(VOC_C4, *SHORT, *SETS, *TAKEN, *files, *more)


@pytest.mark.parametrize("mode", [{}, {"bbox_mode": 0}, {"bbox_mode": BoxMode.XYXY_ABS}])
def test_pictures_get_their_proposals_best_first(mode, ids, tmp_path):
    path = write(tmp_path / "proposals.pkl", content(ids, **mode))
    (record, *_) = get_detection_dataset_dicts((NAME,), proposal_files=(path,))
    assert record["proposal_objectness_logits"].tolist() == [2, 1]
    assert record["proposal_boxes"][0].tolist() == [5, 5, 60, 70] and record["proposal_bbox_mode"] is BoxMode.XYXY_ABS
    for loader in (Rehearsal.build_test_loader(cfg_of(path), NAME), build_detection_test_loader(cfg_of(path), NAME)):
        assert len(next(iter(loader))[0]["proposals"]) == 2


def test_names_of_detectrons_files_are_known(ids, tmp_path):
    old = {("indexes" if k == "ids" else "scores" if "logits" in k else k): v for k, v in content(ids).items()}
    path = write(tmp_path / "proposals.pkl", old)
    assert get_detection_dataset_dicts((NAME,), proposal_files=(path,))[0]["proposal_boxes"].shape == (2, 4)


def test_no_code_of_a_file_of_proposals_runs(ids, tmp_path):
    mark = tmp_path / "ran"
    path = write(tmp_path / "proposals.pkl", content(ids, x=Attack(mark)))
    pickle.loads(Path(path).read_bytes())
    assert mark.exists(), "the payload is alive"
    mark.unlink()
    uses = (
        lambda: get_detection_dataset_dicts((NAME,), proposal_files=(path,)),
        lambda: build_detection_test_loader(cfg_of(path), NAME),
        lambda: Rehearsal.build_test_loader(cfg_of(path), NAME),
    )
    for use in uses:
        with pytest.raises(ValueError, match=rf"^{path} refers to code \([^\n]*touch"):
            use()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("what", "more", "message"),
    [
        (lambda ids: content(ids, x=Attack(Path("never"))), (), "refers to code"),
        (lambda ids: {"ids": ids}, (), "is not a file of proposals"),
        (lambda ids: [1], (), "holds a list"),
        (lambda ids: content(ids) | {"ids": ids[1:]}, (), "differ in length"),
        (lambda ids: content(ids, bbox_mode="x"), (), "bbox_mode"),
        (
            content,
            ("DATASETS.PROPOSAL_FILES_TEST", ()),
            "PROPOSAL_FILES_TEST names 0 files; it must name one per",
        ),
        (content, ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"), "MODEL.PROPOSAL_GENERATOR.NAME is RPN"),
        (content, ("DATASETS.PROPOSAL_FILES_TEST", ("nowhere.pkl",)), "the file of proposals nowhere.pkl does not"),
    ],
)
def test_mistakes_are_told_before_the_training(what, more, message, ids, tmp_path):
    cfg = cfg_of(write(tmp_path / "proposals.pkl", what(ids)), *more)
    (problem,) = run_problems(cfg, world_size=1)
    assert message in problem and "\n" not in problem


def test_a_file_of_another_set_is_told(ids, tmp_path):
    path = write(tmp_path / "proposals.pkl", content(["another"]))
    with pytest.raises(ValueError, match=rf"^{path} has no proposals for {len(ids)} of {len(ids)} pictures"):
        get_detection_dataset_dicts((NAME,), proposal_files=(path,))

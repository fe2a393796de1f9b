"""The records of built-in data sets: Detectron2, the shipped configs and the README say the same."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from moco_d2.builtin_sets import DATASETS, VOC_CLASSES, Dataset
from moco_d2.commands import doctor
from moco_d2.detection import missing
from moco_d2.detection.datasets import ROOT, register_builtin

ROOT_FOLDER = Path(__file__).parents[2]


def test_every_record_is_registered_with_the_files_that_it_names() -> None:
    assert VOC_CLASSES == CLASS_NAMES
    for name, record in DATASETS.items():
        meta = MetadataCatalog.get(name)
        assert name in DatasetCatalog
        keys = ("split_file", "json_file", "image_root", "sem_seg_root", "image_dir", "gt_dir")
        paths = [Path(meta.get(key)) for key in keys if meta.get(key)]
        if record.kind == "voc":
            paths = [Path(meta.dirname, "ImageSets/Main", f"{meta.split}.txt")]
            paths += [Path(meta.dirname, part) for part in ("Annotations", "JPEGImages")]
        if record.kind == "lvis":  # Their pictures' folder is coco; the labels say in which of its folders each is.
            paths += [Path(path) for path in missing.needed_files(name)[1:]]
            paths.remove(Path(ROOT, "coco"))
        if record.kind == "folders":  # registered from the record
            continue
        assert {*paths} == {Path(path) for path in missing.needed_files(name)}, name


def test_every_set_of_a_shipped_config_has_a_record() -> None:
    used = set()
    for path in (ROOT_FOLDER / "configs").rglob("*.yaml"):
        sets = yaml.safe_load(path.read_text()).get("DATASETS", {})
        for names in (sets.get("TRAIN", []), sets.get("TEST", [])):
            used |= {*(ast.literal_eval(names) if isinstance(names, str) else names)}
    # Names with a slash are folders; Detectron2's DensePose project, which users install, registers its own sets.
    assert {name for name in used if "/" not in name and not name.startswith("densepose_")} == DATASETS.keys()


def test_the_readme_shows_every_record() -> None:
    text = (ROOT_FOLDER / "datasets" / "README.md").read_text()
    layout = re.sub(r"\(.*?\)", "", text.split("```")[1])
    words = {word for line in re.split(r",? +|\n", layout) if line for word in _expanded(line)}
    paths = {path for record in DATASETS.values() for path in (*record.pictures, *record.labels, *record.files)}
    assert words == paths | DATASETS.keys()
    assert all(record.get_from in text for record in DATASETS.values())


def _expanded(word: str) -> list[str]:
    """Return the words that one with {a,b} stands for, as in a shell."""
    parts = [part.split(",") for part in re.split(r"[{}]", word)]
    return ["".join(choice) for choice in itertools.product(*parts)]


NEW = (
    Dataset(
        "clinic_trainval", "voc", "Clinic", "https://clinic.example", ("VOC2007/JPEGImages/*.jpg",),
        ("VOC2007/Annotations/*.xml",), ("VOC2007/ImageSets/Main/trainval.txt",), CLASS_NAMES,
    ),
    Dataset(
        "clinic_val", "coco", "Clinic", "https://clinic.example", ("coco/val2017/*.jpg",),
        files=("coco/annotations/instances_val2017.json",),
    ),
    Dataset(
        "clinic_val_sem_seg", "sem_seg", "Clinic", "https://clinic.example", ("VOC2012/JPEGImages/*.jpg",),
        ("VOC2012/SegmentationClass/*.png",), ("VOC2012/ImageSets/Segmentation/val.txt",), ("ill", "well"),
    ),
)  # fmt: skip


@pytest.fixture
def new_sets(sample: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(missing, "ROOT", str(sample))
    for record in NEW:
        monkeypatch.setitem(DATASETS, record.name, record)
        register_builtin(record, str(sample))
    yield sample
    for record in NEW:
        DatasetCatalog.remove(record.name)
        MetadataCatalog.remove(record.name)


def test_a_record_is_all_that_a_set_of_a_known_kind_needs(new_sets: Path) -> None:
    voc, coco, sem_seg = NEW
    theirs = MetadataCatalog.get("voc_2007_trainval")
    ours = MetadataCatalog.get(voc.name)
    assert (ours.thing_classes, ours.evaluator_type) == (theirs.thing_classes, theirs.evaluator_type)
    for record in NEW:
        assert all(Path(path).exists() for path in missing.needed_files(record.name))
        files = list(missing.listed_files(record.name))
        assert files and missing.missing_files(record.name, files) == ""
        with pytest.MonkeyPatch.context() as patch:  # the name may stand for files elsewhere
            patch.setattr(missing, "ROOT", "elsewhere")
            assert {*map(Path, missing.needed_files(record.name))} == {new_sets / path for path in record.needed}
    counts = {record.name: len(DatasetCatalog.get(record.name)) for record in NEW}
    counts[coco.name] *= 2  # the pictures of the keypoint files are in the folder, too
    assert MetadataCatalog.get(coco.name).thing_classes[0] == "person"
    assert MetadataCatalog.get(sem_seg.name).stuff_classes == ["ill", "well"]
    found = {finding.text.partition(":")[0]: finding for finding in doctor.check_datasets(new_sets)}
    assert found["Clinic"].text == "Clinic: " + ", ".join(f"{name} ({n} images)" for name, n in counts.items())
    assert all(finding.level == doctor.OK for finding in found.values())

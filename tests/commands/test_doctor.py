"""The doctor's findings: good ones, and bad ones with their remedy."""

import itertools
import os
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hidden_modules import run_without

from moco_d2 import install_detectron2
from moco_d2.builtin_sets import DATASETS
from moco_d2.commands import doctor
from moco_d2.commands.doctor import FAIL, NOTE, OK


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    """A complete root with two pictures everywhere."""
    for record in DATASETS.values():
        for path in record.files:
            # Some editions of train_aug.txt list pairs of files, and some lists have further columns.
            touch(tmp_path / path, "/JPEGImages/1.jpg /SegmentationClassAug/1.png\n2 -1\n\n")
        for pattern, name in itertools.product((*record.pictures, *record.labels), "12"):
            path = pattern.replace("*", "ulm", pattern.count("*") - 1).replace("*", name)  # ulm: a city, a class
            touch(tmp_path / (path if Path(path).suffix else f"{path}.JPEG"))
    touch(tmp_path / "imagenet/train/ulm/readme.txt")
    return tmp_path


def test_complete_datasets_are_counted(datasets: Path) -> None:
    found = list(doctor.check_datasets(datasets))
    assert [finding.level for finding in found] == [OK] * 10
    assert [finding.text for finding in found[1:]] == [
        "ImageNet: imagenet_train (2 images)",
        "VOC 2007: voc_2007_trainval (2 images), voc_2007_test (2 images)",
        "VOC 2012: voc_2012_trainval (2 images)",
        "VOC 2012 semantic segmentation: voc_2012_train_aug_sem_seg (2 images), voc_2012_val_sem_seg (2 images)",
        "COCO: coco_2017_train (2 images), coco_2017_val (2 images)",
        "COCO keypoints: keypoints_coco_2017_train (2 images), keypoints_coco_2017_val (2 images)",
        "LVIS v0.5: lvis_v0.5_train (2 images), lvis_v0.5_val (2 images)",
        "LVIS v1: lvis_v1_train (2 images), lvis_v1_val (2 images)",
        "Cityscapes: cityscapes_fine_instance_seg_train (2 images), cityscapes_fine_instance_seg_val (2 images), "
        "cityscapes_fine_sem_seg_train (2 images), cityscapes_fine_sem_seg_val (2 images)",
    ]


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("VOC2007/ImageSets/Main/test.txt", "VOC 2007: missing VOC2007/ImageSets/Main/test.txt"),
        (
            "VOC2012/Annotations/2.xml",
            "VOC 2012: missing 1 of the 2 files VOC2012/Annotations/*.xml of voc_2012_trainval (2 ...)",
        ),
        ("coco/annotations/instances_val2017.json", "COCO: missing coco/annotations/instances_val2017.json"),
        ("lvis/lvis_v0.5_train.json", "LVIS v0.5: missing lvis/lvis_v0.5_train.json"),
        (
            "VOC2012/SegmentationClassAug/1.png",
            "VOC 2012 semantic segmentation: missing 1 of the 2 files VOC2012/SegmentationClassAug/*.png of "
            "voc_2012_train_aug_sem_seg (1 ...)",
        ),
        (
            "cityscapes/gtFine/val/ulm/1_gtFine_labelTrainIds.png",
            "Cityscapes: missing 1 of the 2 files cityscapes/gtFine/val/*/*_gtFine_labelTrainIds.png of "
            "cityscapes_fine_sem_seg_val (ulm/1 ...)",
        ),
        ("imagenet/train/ulm/1.JPEG", None),
    ],
)
def test_a_missing_part_is_named(datasets: Path, gone: str, message: str | None) -> None:
    (datasets / gone).unlink()
    notes = [finding for finding in doctor.check_datasets(datasets) if finding.level != OK]
    assert [finding.text for finding in notes] == ([message] if message else [])
    assert all(finding.level == NOTE and "datasets/README.md" in finding.remedy for finding in notes)


def test_folders_without_images_are_no_dataset(datasets: Path) -> None:
    for image in (datasets / "imagenet").rglob("*.JPEG"):
        image.unlink()
    (note,) = [finding for finding in doctor.check_datasets(datasets) if finding.level != OK]
    assert note.text == "ImageNet: missing imagenet/train/*/*"
    assert note.remedy.startswith("get it from https://image-net.org/download.php; datasets/README.md")


def test_no_dataset_folder_is_one_note(tmp_path: Path) -> None:
    (note,) = doctor.check_datasets(tmp_path / "nowhere")
    assert note.level == NOTE
    assert "nowhere" in note.text
    assert "$DETECTRON2_DATASETS" in note.text


def test_here_everything_runs(
    datasets: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    assert doctor.main() == 0
    report = capsys.readouterr().out
    assert FAIL not in report
    assert f"torch {torch.__version__.partition('+')[0]}" in report
    assert str(install_detectron2.find()) in report
    assert re.search(r"methods: .*\bMoCo\b", report)
    assert report.rstrip().endswith("ready: pretraining and detection can run here")


def test_without_detectron2_it_still_runs_and_fails(tmp_path: Path) -> None:
    done = run_without(("detectron2",), tmp_path, "-m", "moco_d2.commands.doctor")
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAIL +detectron2 is not installed\n +-> python -m moco_d2.install_detectron2\n", done.stdout)
    assert "1 problem(s)" in done.stdout
    assert done.stderr == ""


def test_without_anything_it_still_runs_and_fails(tmp_path: Path) -> None:
    hidden = ("detectron2", "torch", "torchvision", "numpy", "PIL", "cv2", "fvcore", "pycocotools")
    done = run_without(hidden, tmp_path, "-m", "moco_d2.commands.doctor")
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAIL +torch [\d.]+.*: ModuleNotFoundError: No module named 'torch'", done.stdout)
    assert "make install" in done.stdout
    assert f"{len(hidden)} problem(s)" in done.stdout


def _fail_to_import(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    real = doctor.importlib.import_module

    def import_module(wanted: str) -> ModuleType:
        if wanted == name:
            raise error
        return real(wanted)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("module", "error", "remedy"),
    [
        ("cv2", ImportError("libGL.so.1: cannot open shared object file"), "opencv-python-headless"),
        ("torchvision", RuntimeError("operator torchvision::nms does not exist"), "both be CUDA or both CPU builds"),
        ("numpy", OSError("broken"), "make install"),
    ],
)
def test_a_library_that_does_not_load_has_a_remedy(
    module: str, error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_to_import(monkeypatch, module, error)
    (failure,) = [finding for finding in doctor.check_packages() if finding.level == FAIL]
    assert str(error) in failure.text
    assert remedy in failure.remedy


def test_too_new_setuptools_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_to_import(monkeypatch, "detectron2.model_zoo", ModuleNotFoundError("No module named 'pkg_resources'"))
    (failure,) = doctor.check_detectron2()
    assert failure.level == FAIL
    assert "setuptools<81" in failure.remedy


def test_the_compiled_part_is_reported_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.import_module
    monkeypatch.setattr(
        doctor.importlib, "import_module", lambda name: ModuleType(name) if name == "detectron2._C" else real(name)
    )
    assert list(doctor.check_detectron2())[1].text == "detectron2's compiled part loads"
    monkeypatch.undo()
    _fail_to_import(monkeypatch, "detectron2._C", ImportError("undefined symbol"))
    note = list(doctor.check_detectron2())[1]
    assert note.level == NOTE
    assert "rotated boxes, deformable convolution" in note.text


def test_broken_code_of_our_own_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_to_import(monkeypatch, "moco_d2.detection", AttributeError("no such hook"))
    (failure,) = doctor.check_package()
    assert failure.text == "moco_d2.detection: AttributeError: no such hook"


def test_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="Some GPU", total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(doctor.resources, "loader_processes", lambda processes, gpu, batch: 6 if gpu else 0)
    texts = [finding.text for finding in doctor.check_devices()]
    assert texts[1:3] == ["GPU 0: Some GPU, 16 GiB", "GPU 1: Some GPU, 16 GiB"]
    assert texts[3] == "6 loader process(es) for each of 2 GPUs: pretraining's DATALOADER.NUM_WORKERS -1"
    assert texts[4] == "nn.SyncBatchNorm works on the GPU, and NCCL between GPUs"


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    touch(tmp_path / "nvidia-smi", "#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    notes = [finding.text for finding in doctor.check_devices() if finding.level == NOTE]
    assert "nvidia-smi is installed, but torch" in notes[0]
    assert "naiveSyncBN" in notes[1]


def test_a_list_in_another_encoding_is_a_note_and_the_others_are_looked_at(datasets: Path) -> None:
    (datasets / "VOC2007/ImageSets/Main/test.txt").write_bytes(b"\xff\xfe")
    found = {finding.text.partition(":")[0]: finding for finding in doctor.check_datasets(datasets)}
    assert found["VOC 2007"].level == NOTE and "cannot be read: 'utf-8' codec" in found["VOC 2007"].text
    assert found["VOC 2012"].level == OK

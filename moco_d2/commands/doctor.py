"""Tell what is installed, what works and what is missing.

Every problem comes with its remedy. The exit status is 1 if pretraining or detection cannot run here, else 0: a missing
dataset or GPU is worth knowing but is no fault. The module imports nothing outside the standard library by itself, so
that it works where it is needed most.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from moco_d2 import __version__, install_detectron2
from moco_d2.exits import ending, guard
from moco_d2.io.paths import expand_variable

OK, NOTE, FAIL = "ok", "note", "FAIL"

# Distribution and import name of what both stages need; scripts and plots need the others, and pip brings them along.
PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "pillow": "PIL",
    "opencv-python": "cv2",
    "fvcore": "fvcore",
    "pycocotools": "pycocotools",
}
INSTALL = "make install, or in this environment: python -m pip install -c constraints.txt -e ."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
DATASETS_HELP = "datasets/README.md shows the expected folders; moco-d2 samples OUT makes a small set of each"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``ok``, ``note`` (worth knowing) or ``FAIL`` (the main job cannot run).
        text: what was found.
        remedy: what to do about it; empty for ``ok``.
    """

    level: str
    text: str
    remedy: str = ""


def check_packages() -> Iterator[Finding]:
    """Import every library that both stages need."""
    yield Finding(OK, f"python {platform.python_version()} ({sys.executable})")
    for name, module_name in PACKAGES.items():
        label = _label(name)
        _, error = _try_import(module_name)
        yield Finding(FAIL, f"{label}: {error}", _package_remedy(name, error)) if error else Finding(OK, label)


def _label(name: str) -> str:
    # The headless build is the same library; some machines have only that one.
    for candidate in (name, f"{name}-headless"):
        try:
            return f"{candidate} {metadata.version(candidate)}"
        except metadata.PackageNotFoundError:
            continue
    return name


def _package_remedy(name: str, error: str) -> str:
    if name == "opencv-python" and ".so" in error:
        return (
            "a system library is missing: apt-get install libgl1 libglib2.0-0 libxcb1, or use the build without "
            "windows: python -m pip install --force-reinstall --no-deps opencv-python-headless"
        )
    if name == "torchvision" and "No module named" not in error:
        return (
            "torch and torchvision must belong together and both be CUDA or both CPU builds: "
            "python -m pip install -c constraints.txt --force-reinstall --no-deps torch torchvision"
        )
    return INSTALL


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """Import a module; return it, or why it cannot be imported, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    # A broken binary raises OSError, AttributeError or RuntimeError as easily as ImportError; all are findings.
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def check_detectron2() -> Iterator[Finding]:
    """Find which Detectron2 there is, whether it imports, and whether its compiled part loads."""
    folder = install_detectron2.find()
    if folder is None:
        yield Finding(FAIL, "detectron2 is not installed", install_detectron2.COMMAND)
        return
    distribution = install_detectron2.distribution(folder)
    build = "upstream's tree of August 2024, from PyPI" if "sal-detectron2" in distribution else "upstream build"
    for part in ("detectron2.engine", "detectron2.model_zoo"):
        _, error = _try_import(part)
        if error:
            remedy = INSTALL
            if "pkg_resources" in error:
                remedy = 'python -m pip install "setuptools<81" (later ones have no pkg_resources)'
            yield Finding(FAIL, f"detectron2 at {folder} ({distribution}): {part}: {error}", remedy)
            return
    yield Finding(OK, f"detectron2 at {folder}: {distribution}, {build}")
    _, error = _try_import("detectron2._C")
    if error:
        yield Finding(
            NOTE,
            "detectron2's compiled part is not available; only rotated boxes, deformable convolution and the fast COCO "
            "evaluation need it",
            f"the shipped configs do not; to build it from source set DETECTRON2={install_detectron2.OFFICIAL}",
        )
    else:
        yield Finding(OK, "detectron2's compiled part loads")


def check_package() -> Iterator[Finding]:
    """Import this package's own stages."""
    modules = {}
    for name in ("moco_d2.config", "moco_d2.methods", "moco_d2.engine", "moco_d2.detection"):
        modules[name], error = _try_import(name)
        if error:
            yield Finding(FAIL, f"{name}: {error}", INSTALL)
            return
    config: Any = modules["moco_d2.config"]
    methods: Any = modules["moco_d2.methods"]
    try:
        names = config.list_configs()
    except FileNotFoundError as error:
        yield Finding(FAIL, str(error), "reinstall the package, or run from a checkout")
        return
    yield Finding(OK, f"moco_d2 {__version__}: {len(names)} configs; methods: {', '.join(sorted(methods.METHODS))}")


def check_devices() -> Iterator[Finding]:
    """Report the processors and which synchronised BatchNorm works here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(OK, f"{cores} CPU cores")
    torch: Any
    torch, error = _try_import("torch")
    if error:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(OK, f"GPU {index}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if count:
        nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        several = "and NCCL between GPUs" if nccl else "but there is no NCCL: one GPU a run"
        yield Finding(OK if nccl else NOTE, f"nn.SyncBatchNorm works on the GPU, {several}")
        return
    why = str(caught[0].message).splitlines()[0] if caught else ""
    if not why and shutil.which("nvidia-smi"):
        why = f"nvidia-smi is here, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no device"
    yield Finding(NOTE, f"no GPU{f' ({why})' if why else ''}: the tools run on the CPU")
    yield Finding(NOTE, "SyncBN works in one CPU process; between several, the tools put naiveSyncBN in its place")


def check_datasets_root() -> Iterator[Finding]:
    """Look for the data sets in ``$DETECTRON2_DATASETS``."""
    try:
        root = expand_variable("DETECTRON2_DATASETS", "datasets")
    except ValueError as error:
        yield Finding(NOTE, str(error), DATASETS_HELP)
        return
    yield from check_datasets(Path(root))


def check_datasets(root: Path) -> Iterator[Finding]:
    """Look for the datasets that the shipped configs name and count their images.

    Args:
        root: what ``$DETECTRON2_DATASETS`` names.
    """
    if not root.is_dir():
        yield Finding(NOTE, f"no dataset folder {root.absolute()} ($DETECTRON2_DATASETS)", DATASETS_HELP)
        return
    yield Finding(OK, f"datasets are looked for in {root.absolute()}")
    for name, check in (
        ("VOC2007", lambda: _check_voc(root / "VOC2007", ("trainval", "test"))),
        ("VOC2012", lambda: _check_voc(root / "VOC2012", ("trainval",))),
        ("VOC2012 semantic segmentation", lambda: _check_voc_labels(root / "VOC2012")),
        ("coco", lambda: _check_coco(root / "coco", ("train2017", "val2017"))),
        ("coco keypoints", lambda: _check_keypoints(root / "coco" / "annotations", ("train2017", "val2017"))),
        ("LVIS v0.5", lambda: _check_lvis(root / "lvis", "v0.5")),
        ("LVIS v1", lambda: _check_lvis(root / "lvis", "v1")),
        ("cityscapes", lambda: _check_cityscapes(root / "cityscapes", ("train", "val"))),
        ("imagenet/train", lambda: _check_imagenet(root / "imagenet" / "train")),
    ):
        try:
            yield check()
        except (OSError, ValueError) as error:  # a folder that nobody may look into, a list in another encoding
            yield Finding(NOTE, f"{name}: cannot be read: {ending(error).line or error}", DATASETS_HELP)


def _images(folder: Path) -> set[str]:
    """Return the stems of the images directly in a folder (scandir: a million files take seconds, not minutes)."""
    with os.scandir(folder) as entries:
        return {entry.name.rpartition(".")[0] for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES)}


def _incomplete(name: str, missing: list[str]) -> Finding:
    return Finding(NOTE, f"{name}: missing {', '.join(missing)}", DATASETS_HELP)


def _check_voc(folder: Path, splits: tuple[str, ...]) -> Finding:
    if not folder.is_dir():
        return _incomplete(folder.name, ["the folder"])
    needed = ["JPEGImages", "Annotations", *(f"ImageSets/Main/{split}.txt" for split in splits)]
    missing = [path for path in needed if not (folder / path).exists()]
    if missing:
        return _incomplete(folder.name, missing)
    images = _images(folder / "JPEGImages")
    counts = []
    for split in splits:
        listed, absent = _listed(folder / f"ImageSets/Main/{split}.txt", images)
        if absent:
            missing.append(f"{len(absent)} of the {len(listed)} images of {split} ({absent[0]}.jpg ...)")
        counts.append(f"{split} {len(listed)}")
    if missing:
        return _incomplete(folder.name, missing)
    return Finding(OK, f"{folder.name}: {len(images)} images ({', '.join(counts)})")


def _listed(file: Path, present: set[str]) -> tuple[list[str], list[str]]:
    """Return the names in a list, and those of them that are not there. Some lists give paths instead of names."""
    listed = [Path(line.split()[0]).stem for line in file.read_text().splitlines() if line.strip()]
    return listed, [name for name in listed if name not in present]


def _check_voc_labels(folder: Path) -> Finding:
    name = f"{folder.name} semantic segmentation"
    splits = {"train_aug": "SegmentationClassAug", "val": "SegmentationClass"}
    needed = [path for split, labels in splits.items() for path in (f"ImageSets/Segmentation/{split}.txt", labels)]
    missing = [path for path in needed if not (folder / path).exists()]
    if missing:
        return _incomplete(name, missing)
    counts = []
    for split, labels in splits.items():
        listed, absent = _listed(folder / f"ImageSets/Segmentation/{split}.txt", _images(folder / labels))
        if absent:
            missing.append(f"{len(absent)} of the {len(listed)} label images of {split} ({labels}/{absent[0]}.png ...)")
        counts.append(f"{split} {len(listed)}")
    if missing:
        return _incomplete(name, missing)
    return Finding(OK, f"{name}: label images of {', '.join(counts)}")


def _check_coco(folder: Path, splits: tuple[str, ...]) -> Finding:
    if not folder.is_dir():
        return _incomplete(folder.name, ["the folder"])
    needed = [path for split in splits for path in (split, f"annotations/instances_{split}.json")]
    missing = [path for path in needed if not (folder / path).exists()]
    if missing:
        return _incomplete(folder.name, missing)
    counts = (f"{split} {len(_images(folder / split))}" for split in splits)
    return Finding(OK, f"{folder.name}: images in {', '.join(counts)}, with instance annotations")


def _check_keypoints(folder: Path, splits: tuple[str, ...]) -> Finding:
    needed = [f"person_keypoints_{split}.json" for split in splits]
    missing = [f"annotations/{name}" for name in needed if not (folder / name).is_file()]
    if missing:
        return _incomplete("coco keypoints", missing)
    return Finding(OK, f"coco keypoints: annotations of {', '.join(splits)}")


def _check_lvis(folder: Path, version: str) -> Finding:
    needed = [f"lvis_{version}_{split}.json" for split in ("train", "val")]
    missing = [f"lvis/{name}" for name in needed if not (folder / name).is_file()]
    if missing:
        return _incomplete(f"LVIS {version}", missing)
    return Finding(OK, f"LVIS {version}: annotations of train, val (images: coco)")


def _check_cityscapes(folder: Path, splits: tuple[str, ...]) -> Finding:
    if not folder.is_dir():
        return _incomplete(folder.name, ["the folder"])
    needed = [path for split in splits for path in (f"leftImg8bit/{split}", f"gtFine/{split}")]
    missing = [path for path in needed if not (folder / path).is_dir()]
    if missing:
        return _incomplete(folder.name, missing)
    counts = []
    for split in splits:
        pictures = {name.removesuffix("_leftImg8bit") for name in _images_in_folders(folder / "leftImg8bit" / split)}
        truth = _images_in_folders(folder / "gtFine" / split)
        for kind in ("instanceIds", "labelTrainIds"):
            absent = sorted(name for name in pictures if f"{name}_gtFine_{kind}" not in truth)
            if absent:
                missing.append(
                    f"{kind}.png of {len(absent)} of the {len(pictures)} images of {split} ({absent[0]} ...)"
                )
        counts.append(f"{split} {len(pictures)}")
    if missing:
        return _incomplete(folder.name, missing)
    return Finding(OK, f"{folder.name}: images in {', '.join(counts)}, with fine annotations")


def _images_in_folders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {image for entry in entries if entry.is_dir() for image in _images(Path(entry.path))}


def _check_imagenet(folder: Path) -> Finding:
    if not folder.is_dir():
        return _incomplete("imagenet/train", ["the folder"])
    with os.scandir(folder) as entries:
        classes = [Path(entry.path) for entry in entries if entry.is_dir()]
    images = sum(len(_images(path)) for path in classes)
    if not images:
        return _incomplete("imagenet/train", ["images in class folders (imagenet/train/n01440764/*.JPEG)"])
    return Finding(OK, f"imagenet/train: {images} images in {len(classes)} class folders")


def _report(title: str, findings: list[Finding]) -> None:
    print(f"\n{title}")
    for finding, following in zip(findings, [*findings[1:], None], strict=True):
        print(f"  {finding.level:<4}  {finding.text}")
        if finding.remedy and (following is None or following.remedy != finding.remedy):
            print(f"        -> {finding.remedy}")


def main(argv: Sequence[str] = ()) -> int:
    """Print the report; return the exit status."""
    parser = argparse.ArgumentParser("moco-d2 doctor", description=__doc__)
    parser.parse_args(argv)
    print(f"moco_d2 {__version__} on {platform.platform()}")
    sections = {"Libraries": list(check_packages()), "Detectron2": list(check_detectron2())}
    if not _failures(sections):
        sections["This package"] = list(check_package())
    sections["Devices"] = list(check_devices())
    sections["Datasets"] = list(check_datasets_root())
    for title, findings in sections.items():
        _report(title, findings)
    failures = _failures(sections)
    print(f"\n{failures} problem(s): see FAIL above" if failures else "\nready: pretraining and detection can run here")
    return 1 if failures else 0


def _failures(sections: dict[str, list[Finding]]) -> int:
    return sum(finding.level == FAIL for findings in sections.values() for finding in findings)


if __name__ == "__main__":
    guard(main)

"""Report of what is installed, what works and what is missing.

Every problem has a remedy. The exit status is 1 if pretraining or detection cannot run here, otherwise 0: a missing
dataset or GPU is only noted. The module itself imports the standard library only, so that it runs on a broken
installation.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from moco_d2 import __version__, install_detectron2, resources
from moco_d2.builtin_sets import DATASETS, Dataset
from moco_d2.exits import ending, guard
from moco_d2.io.paths import expand_variable

OK, NOTE, FAIL = "ok", "note", "FAIL"

# Distribution and import names of the libraries that both stages need. pip installs the others with them.
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
LAYOUT = "datasets/README.md shows the expected folders"
SAMPLE = "moco-d2 samples OUT makes a small set of each"
_BATCH = 256 * 2 * 3 * 224**2  # bytes of a batch of MoCo's recipe, with one GPU


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: ``ok``, ``note`` (worth knowing) or ``FAIL`` (pretraining or detection cannot run).
        text: what was found.
        remedy: what to do; empty for ``ok``.
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
    # The build without windows is the same library.
    for candidate in (name, f"{name}-headless"):
        try:
            return f"{candidate} {metadata.version(candidate)}"
        except metadata.PackageNotFoundError:
            continue
    return name


def _package_remedy(name: str, error: str) -> str:
    if name == "opencv-python" and ".so" in error:
        return (
            "a system library is missing: run apt-get install libgl1 libglib2.0-0 libxcb1, or use the build without "
            "windows: python -m pip install --force-reinstall --no-deps opencv-python-headless"
        )
    if name == "torchvision" and "No module named" not in error:
        return (
            "torch and torchvision must be matching versions, and both be CUDA or both CPU builds: "
            "python -m pip install -c constraints.txt --force-reinstall --no-deps torch torchvision"
        )
    return INSTALL


def _try_import(name: str) -> tuple[ModuleType | None, str]:
    """Import a module; return it, or the reason why it cannot be imported, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    # A broken binary may also raise OSError, AttributeError or RuntimeError.
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def check_detectron2() -> Iterator[Finding]:
    """Find which Detectron2 is installed, whether it can be imported, and whether its compiled part loads."""
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
                remedy = 'python -m pip install "setuptools<81" (later versions have no pkg_resources)'
            yield Finding(FAIL, f"detectron2 at {folder} ({distribution}): {part}: {error}", remedy)
            return
    yield Finding(OK, f"detectron2 at {folder}: {distribution}, {build}")
    _, error = _try_import("detectron2._C")
    if error:
        yield Finding(
            NOTE,
            "detectron2's compiled part is not available; only rotated boxes, deformable convolution and the fast COCO "
            "evaluation need it",
            f"the shipped configs do not need it; to build it from source set DETECTRON2={install_detectron2.OFFICIAL}",
        )
    else:
        yield Finding(OK, "detectron2's compiled part loads")


def check_package() -> Iterator[Finding]:
    """Import this package's stages and find its configs."""
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
    """Report CPU cores, GPUs and which synchronised BatchNorm works here."""
    yield Finding(OK, f"{resources.cores()} CPU cores")
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
    workers = resources.loader_processes(max(1, count), count > 0, _BATCH)
    place = f"each of {count} GPUs" if count > 1 else "one GPU" if count else "training on the CPU"
    yield Finding(OK, f"{workers} loader process(es) for {place}: pretraining's DATALOADER.NUM_WORKERS -1")
    if count:
        nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
        several = "and NCCL between GPUs" if nccl else "but NCCL is missing: a run can use one GPU only"
        yield Finding(OK if nccl else NOTE, f"nn.SyncBatchNorm works on the GPU, {several}")
        return
    why = str(caught[0].message).splitlines()[0] if caught else ""
    if not why and shutil.which("nvidia-smi"):
        why = f"nvidia-smi is installed, but torch {torch.__version__} (CUDA {torch.version.cuda}) finds no device"
    yield Finding(NOTE, f"no GPU{f' ({why})' if why else ''}: runs use the CPU")
    yield Finding(NOTE, "SyncBN works in one CPU process; several processes use naiveSyncBN instead")


def check_datasets_root() -> Iterator[Finding]:
    """Look for the data sets in ``$DETECTRON2_DATASETS``."""
    try:
        root = expand_variable("DETECTRON2_DATASETS", "datasets")
    except ValueError as error:
        yield Finding(NOTE, str(error), LAYOUT)
        return
    yield from check_datasets(Path(root))


def check_datasets(root: Path) -> Iterator[Finding]:
    """Look for the built-in data sets and count their pictures.

    Args:
        root: the folder that ``$DETECTRON2_DATASETS`` names.
    """
    if not root.is_dir():
        yield Finding(NOTE, f"no dataset folder {root.absolute()} ($DETECTRON2_DATASETS)", f"{LAYOUT}; {SAMPLE}")
        return
    yield Finding(OK, f"datasets are looked for in {root.absolute()}")
    names = functools.cache(lambda pattern: _names(root, pattern))
    for group, records in itertools.groupby(DATASETS.values(), key=lambda record: record.group):
        counts, missing, sources = [], list[str](), list[str]()
        for record in records:
            try:
                count, lacks = _look(root, record, names)
            except (OSError, ValueError) as error:  # no permission, or a list in another encoding
                yield Finding(NOTE, f"{group}: cannot be read: {ending(error).line or error}", LAYOUT)
                break
            counts.append(f"{record.name} ({count} images)")
            missing += lacks
            sources += [record.get_from] if lacks else []
        else:
            remedy = f"get it from {' and '.join(dict.fromkeys(sources))}; {LAYOUT}"
            lacking = Finding(NOTE, f"{group}: missing {', '.join(dict.fromkeys(missing))}", remedy)
            yield lacking if missing else Finding(OK, f"{group}: {', '.join(counts)}")


def _look(root: Path, record: Dataset, names: Callable[[str], set[str]]) -> tuple[int, list[str]]:
    """Return the number of a data set's pictures, and its missing files.

    Args:
        root: the folder of all data sets.
        record: the data set.
        names: returns the names in a pattern's files.
    """
    missing = [path for path in record.needed if not (root / path).exists()]
    if missing:
        return 0, missing
    pictures = set().union(*map(names, record.pictures))
    patterns = record.labels
    if record.listing:  # Some lists give paths, and some have further columns.
        lines = (root / record.listing).read_text().splitlines()
        pictures = {Path(line.split()[0]).stem for line in lines if line.strip()}
        patterns = (*record.pictures, *record.labels)
    if not pictures:
        return 0, [record.listing or pattern for pattern in record.pictures]
    for pattern in patterns:
        if absent := sorted(pictures - names(pattern)):
            missing.append(f"{len(absent)} of the {len(pictures)} files {pattern} of {record.name} ({absent[0]} ...)")
    return len(pictures), missing


def _names(root: Path, pattern: str) -> set[str]:
    """Return what a pattern's stars stand for: file names, with their folder's name if that is a star, too."""
    parent, _, ending = pattern.rpartition("*")
    below = parent.endswith("*/")
    found: set[str] = set()
    for folder in root.glob(parent) if below else [root / parent]:
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:  # a million files take seconds
            for entry in entries:
                if entry.name.endswith(ending) if ending else entry.name.lower().endswith(IMAGE_SUFFIXES):
                    found.add(f"{folder.name}/" * below + entry.name.removesuffix(ending))
    return found


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

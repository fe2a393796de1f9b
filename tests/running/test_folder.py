"""A run's folder: what may lie there, who may write there; and the user's data sets through ``moco-d2 train``."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.detection.datasets import check_copies, register_custom
from moco_d2.io import files, locks
from moco_d2.running import folder

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")


def tree(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _leave_no_lock() -> Iterator[None]:
    yield
    locks._forget_locks()


# What lies there.


def write(path: Path, text: str = "the user's") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    "left", ["last_checkpoint", "model_0000004.pth", "model_final.pth", "backbone.pth", "metrics.json", "results.json"]
)
def test_a_fresh_run_does_not_mix_with_another(left: str, tmp_path: Path) -> None:
    write(tmp_path / left)
    for ours in (False, True):
        if ours:
            files.claim(tmp_path, folder._TRAINING, "OUTPUT_DIR", trusted=True)
        before = tree(tmp_path)
        with pytest.raises(ValueError, match=r"contains a run already \(.*with --resume, or choose another OUTPUT_DIR"):
            folder.claim(str(tmp_path))
        with pytest.raises(ValueError, match="contains a run already"):
            folder.check(str(tmp_path))
        assert tree(tmp_path) == before
    folder.claim(str(tmp_path), resume=True)


@pytest.mark.parametrize(
    "theirs", ["config.yaml", "log.txt", "inference/a.json", "events.out.tfevents.1", "skipped.jsonl"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_the_user_s_own_files_are_not_taken_for_a_run_s(theirs: str, resume: bool, tmp_path: Path) -> None:
    write(tmp_path / theirs)
    for act in (folder.check, folder.claim):
        with pytest.raises(ValueError, match=f"contains {theirs.partition('/')[0]}, which this command did not write"):
            act(str(tmp_path), resume)
    assert {name: text for name, text in tree(tmp_path).items() if text} == {theirs: b"the user's"} | lock_text(
        tmp_path
    )


def lock_text(top: Path) -> dict[str, bytes]:
    """The lock, which a refused command leaves: to remove it would free it for two."""
    return {locks.LOCK: (top / locks.LOCK).read_bytes()}


def test_what_does_not_collide_is_left_alone_and_a_mistake_may_be_mended(tmp_path: Path) -> None:
    for name in ("datasets/parts/JPEGImages/a.jpg", "moco.pth", "model_zoo.pth", "notes/log.txt", "labels.json"):
        write(tmp_path / name)
    before = tree(tmp_path)
    folder.claim(str(tmp_path))
    write(tmp_path / "config.yaml", "ours")
    write(tmp_path / "log.txt", "ours")
    write(tmp_path / "metrics.json", "")  # opened, and no step was made
    locks._forget_locks()
    folder.claim(str(tmp_path))
    assert before.items() <= tree(tmp_path).items()


def test_an_evaluation_takes_its_own_names_only(tmp_path: Path) -> None:
    write(tmp_path / "config.yaml")
    folder.claim(str(tmp_path), evaluates=True)
    write(tmp_path / "inference/a.json", "ours")
    locks._forget_locks()
    folder.claim(str(tmp_path), evaluates=True)
    locks._forget_locks()
    with pytest.raises(ValueError, match=r"contains config\.yaml"):
        folder.claim(str(tmp_path))


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_nothing_is_written_through_a_link(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    write(tmp_path / "mine.yaml")
    (tmp_path / "run").mkdir()
    folder.claim(str(tmp_path / "run"))
    locks._forget_locks()
    link(tmp_path / "run/config.yaml", tmp_path / "mine.yaml")
    for act in (folder.check, folder.claim):
        with pytest.raises(ValueError, match=r"config\.yaml is a link"):
            act(str(tmp_path / "run"), resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {}}, "is not a checkpoint that a run can resume from: it has no trainer"),
        ({"trainer": {}, "model": 1}, "it has no model"),
        ({"model": {}, "trainer": {}, "x": argparse.Namespace()}, r"all 1 checkpoints .*argparse\.Namespace"),
    ],
)
def test_a_dry_run_looks_at_what_would_be_resumed(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model_final.pth")
    write(tmp_path / "last_checkpoint", "model_final.pth")
    write(tmp_path / ".model_0000002.pth.abc.partial", "what a run that lives is writing")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        folder.check(str(tmp_path), resume=True)
    assert tree(tmp_path) == before


def test_leftovers_go_when_the_folder_is_locked(tmp_path: Path) -> None:
    write(tmp_path / "last_checkpoint", "model_final.pth")
    write(tmp_path / ".model_0000002.pth.abc.partial")
    folder.claim(str(tmp_path), resume=True)
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("path", ["file/run", "/dev/null/x", "/proc/x", "file"])
def test_an_unusable_folder_is_told_in_one_line(path: str, tmp_path: Path) -> None:
    write(tmp_path / "file")
    for act in (folder.claim, folder.check):
        with pytest.raises(
            ValueError,
            match=r"^OUTPUT_DIR .*: cannot be written to \(.*\); free some space or .*choose another path$",
        ):
            act(str(tmp_path / path))


# Who writes there.

OTHER = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("locks", sys.argv[2])  # without the package: quick
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
print(locks.lock(Path(sys.argv[1], locks.LOCK)), flush=True)
time.sleep(60)
"""


def test_a_second_command_is_refused_while_the_first_one_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "RESUME_TIMEOUT", 0.2)
    command = [sys.executable, "-c", OTHER, str(tmp_path), locks.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() != "None\n"
        for use, options in (
            (folder.claim, {}), (folder.claim, {"resume": True}), (folder.claim, {"evaluates": True}),
            (folder.check, {}), (folder.check, {"resume": True}),
        ):  # fmt: skip
            with pytest.raises(
                ValueError, match=rf"^another command writes to .*process {other.pid}\).*another OUTPUT_DIR$"
            ):
                use(str(tmp_path), **options)
        other.kill()
    folder.check(str(tmp_path))
    folder.claim(str(tmp_path))
    folder.claim(str(tmp_path))  # this process has it already
    folder.check(str(tmp_path))


# The user's data sets.


@pytest.fixture
def train_net(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.chdir(tmp_path)
    from moco_d2.commands import train

    return train


VOC_XML = """<annotation><filename>{name}.jpg</filename><size><width>96</width><height>64</height></size>
<object><name>nut</name><bndbox><xmin>11</xmin><ymin>11</ymin><xmax>50</xmax><ymax>40</ymax></bndbox></object></annotation>"""


def make_voc(root: Path, flat: bool = False) -> dict[str, str]:
    """A set that the evaluator cannot read as it stands: no list, and no ``difficult``."""
    for number in range(4):
        picture = root / ("" if flat else "JPEGImages") / f"{number}.jpg"
        write(root / ("" if flat else "Annotations") / f"{number}.xml", VOC_XML.format(name=number))
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 64), (40 * number, 99, 0)).save(picture)
    return {"name": root.name, "format": "voc", "root": str(root)}


def make_coco(root: Path, name: str) -> dict[str, str]:
    """A set that pycocotools cannot read as it stands: an annotation has the id 0."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 96, "height": 64} for i in range(1, 3)]
    boxes = [{"id": i - 1, "image_id": i, "category_id": 1, "bbox": [10, 10, 40, 30]} for i in range(1, 3)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "nut"}]}
    for image in images:
        (root / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 64)).save(root / "images" / str(image["file_name"]))
    write(root / f"{name}.json", json.dumps(content))
    return {"name": name, "format": "coco", "json": str(root / f"{name}.json"), "images": str(root / "images")}


def words(entry: dict[str, str], output: str | Path, name: str = "") -> list[str]:
    sets = f"({name or entry['name']!r},)"
    return [
        "DATASETS.CUSTOM", repr([entry]), "DATASETS.TRAIN", sets, "DATASETS.TEST", sets, "OUTPUT_DIR", str(output),
        "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NUM_CLASSES", "1", "SOLVER.MAX_ITER", "1",
        "SOLVER.STEPS", "()", "TEST.PRECISE_BN.NUM_ITER", "1", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH",
        "1", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    ]  # fmt: skip


def arguments(opts: list[str], dry_run: bool = False) -> argparse.Namespace:
    config = "quick_schedules/faster_rcnn_R_50_C4_quick"
    return argparse.Namespace(config_file=config, opts=opts, dry_run=dry_run, eval_only=False, resume=False)


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    "case",
    [
        "named by its path",
        "at the copy",
        "root is datasets/",
        "labels are OUTPUT_DIR",
        "link",
        "json at the copy",
        "linked json",
    ],
)
def test_a_copy_never_comes_into_the_place_of_the_user_s_files(
    case: str, dry_run: bool, train_net: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moco_d2.commands import cli

    # Up to where data sets are looked at: the log is Detectron2's work.
    monkeypatch.setattr(cli, "setup", lambda args, check: load_cfg(args.config_file, args.opts))
    output: str | Path = "."
    if "json" in case:
        entry = make_coco(tmp_path / "datasets", "parts")
    else:
        entry = make_voc(tmp_path / ("datasets" if case == "root is datasets/" else "datasets/parts"))
    if case == "named by its path":
        entry["name"], output = entry["root"], "elsewhere"
    elif case == "root is datasets/":
        entry["name"] = "Annotations"
    elif case == "labels are OUTPUT_DIR":
        output = tmp_path / "datasets/parts/Annotations"
    elif case == "link":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/datasets").symlink_to(tmp_path / "datasets")
        output = "out"
    elif case == "linked json":
        (tmp_path / "labels.json").symlink_to(tmp_path / "datasets/parts.json")
        entry["json"] = "labels.json"
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"is a path, not a name|choose another OUTPUT_DIR") as caught:
        train_net.train(arguments(words(entry, output), dry_run))
    # A dry run tells all problems: DATASETS.TRAIN, too, names a set that there is not.
    assert len(str(caught.value).splitlines()) == 1 + (dry_run and case == "named by its path")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_only_copies_of_ours_are_written_anew(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = make_voc(tmp_path / "parts") if kind == "voc" else make_coco(tmp_path / "set", "parts")
    cfg = load_cfg("quick_schedules/faster_rcnn_R_50_C4_quick", words(entry, tmp_path / "out"))
    copy = tmp_path / "out/datasets" / ("parts" if kind == "voc" else "parts.json")
    theirs = copy / "Annotations/0.xml" if kind == "voc" else copy
    write(theirs)
    for act in (check_copies, register_custom):  # a dry run says it, too
        with pytest.raises(ValueError, match=r"parts\S* contains Annotations|contains parts\.json"):
            act(cfg)
    assert theirs.read_text() == "the user's"
    theirs.unlink()
    if kind == "voc":
        theirs.parent.rmdir()
    before = tree(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    cfg.OUTPUT_DIR = "../out"
    register_custom(cfg)
    labels = tmp_path / ("parts/Annotations/0.xml" if kind == "voc" else "set/parts.json")
    labels.write_text(labels.read_text().replace("nut", "bolt"))
    register_custom(cfg)
    assert "bolt" in theirs.read_text(), "a stale copy is written anew"
    labels.write_text(labels.read_text().replace("bolt", "nut"))
    assert before.items() <= tree(tmp_path).items()
    check_copies(cfg)
    DatasetCatalog.remove("parts")
    MetadataCatalog.remove("parts")


@pytest.fixture
def _loggers() -> Iterator[None]:
    """Undo what Detectron2's set-up does to loggers."""
    found = [logging.getLogger(name) for name in ("moco_d2", "fvcore", "detectron2")]
    before = [(logger.propagate, logger.level, list(logger.handlers)) for logger in found]
    yield
    for logger, (propagate, level, handlers) in zip(found, before, strict=True):
        logger.propagate, logger.level, logger.handlers = propagate, level, handlers


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Detectron2's reading of the config
@pytest.mark.usefixtures("_loggers")
def test_a_run_beside_its_data_leaves_them_as_they_are(train_net: ModuleType, tmp_path: Path) -> None:
    entry = make_voc(tmp_path / "datasets/parts") | {"name": "mine"}
    write(tmp_path / "model_zoo.pth")
    before = tree(tmp_path)
    opts = [*words(entry, "."), "MODEL.RPN.POST_NMS_TOPK_TEST", "10", "MODEL.RPN.PRE_NMS_TOPK_TEST", "20"]
    train_net.train(arguments(opts))
    assert before.items() <= tree(tmp_path).items()
    assert (tmp_path / "inference/mine").is_dir() and (tmp_path / "datasets/mine/Annotations/0.xml").is_file()
    for name in ("last_checkpoint", "model_final.pth", "results.json"):
        (tmp_path / name).unlink()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"contains a run already \(metrics\.json\)"):
        train_net.train(arguments(opts))
    assert tree(tmp_path) == before
    DatasetCatalog.remove("mine")
    MetadataCatalog.remove("mine")

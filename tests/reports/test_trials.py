"""Trials as a user runs them: killed, continued, refused, never repeated; and the nested parts of the labels."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.structures import BoxMode
from PIL import Image

from moco_d2.commands import trials as run_trials
from moco_d2.config import load_cfg
from moco_d2.config.keys import RENAMED
from moco_d2.detection.subsets import FILE, select, training_set
from moco_d2.facts import Pixels, ResNetFacts
from moco_d2.io.provenance import sha256
from moco_d2.reports import trials
from moco_d2.reports.summary import find_runs

# Detectron2's own, when a detector is built.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

TOOLS = Path(__file__).parents[2] / "tools"
PROTOCOL = "quick_voc0712_faster_rcnn_R_50_C4"
SHORT = [
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.MAX_ITER", "12", "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.PRECISE_BN.NUM_ITER", "1",
    "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip
OBJECT = (
    "<object><name>dog</name><pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
    "<bndbox><xmin>21</xmin><ymin>21</ymin><xmax>70</xmax><ymax>60</ymax></bndbox></object>"
)


@pytest.fixture(scope="module")
def voc_root(tmp_path_factory):
    """A $DETECTRON2_DATASETS folder of VOC2007 and VOC2012 with twelve pictures each, the last without a box."""
    root = tmp_path_factory.mktemp("datasets")
    for year in (2007, 2012):
        folder = root / f"VOC{year}"
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (folder / part).mkdir(parents=True)
        names = [f"{year}_{number:06d}" for number in range(12)]
        for number, name in enumerate(names):
            noise = np.random.default_rng(number).integers(0, 255, (90, 100, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"JPEGImages/{name}.jpg")
            (folder / f"Annotations/{name}.xml").write_text(
                f"<annotation><filename>{name}.jpg</filename><size><width>100</width><height>90</height>"
                f"<depth>3</depth></size>{OBJECT * (number < 11)}</annotation>"
            )
        for split in ("trainval", "test"):
            (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names) + "\n")
    return root


def arguments(output, seeds, *more):
    return ["--protocol", PROTOCOL, "--weights", "random", "--seeds", seeds, "--output", str(output), *more]


@pytest.fixture
def start(voc_root):
    """Start the tool in a process group of its own: ``start(arguments) -> Popen``."""
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(voc_root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TOOLS.parent),
    }  # fmt: skip
    started = []

    def run(words):
        process = subprocess.Popen(
            [sys.executable, str(TOOLS / "run_trials.py"), *words], env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def test_a_killed_comparison_goes_on_and_repeats_nothing(start, tmp_path, monkeypatch, capsys):
    words = arguments(tmp_path, "1", *SHORT)
    base = tmp_path / PROTOCOL / "random"
    process = start(words)
    deadline = time.monotonic() + 120
    while not (base / "seed1/last_checkpoint").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # the training with it, as when the power fails
    process.communicate()
    assert not (base / "seed1/results.json").exists()

    (base / "seed0/log.txt").mkdir(parents=True)  # where the training of seed 0 cannot write its log
    process = start(arguments(tmp_path, "0-1", *SHORT))
    screen = process.communicate(timeout=300)[0]
    assert process.returncode == 1, screen
    assert "\n1 failed, 1 done\n" in screen
    assert f"failed: random seed 0, {base / 'seed0'}" in screen
    assert "resuming at iteration" in (base / "seed1/trial.log").read_text()

    (run,) = find_runs([tmp_path])
    assert (run.result["seed"], run.result["iterations"], run.label, run.percent) == (1, 12, "random", 100)
    assert "SOLVER.MAX_ITER=12" in run.changes
    assert json.loads((base / "seed1/trial.json").read_text())["seed"] == 1
    assert "PyTorch" in (base / "seed1/environment.txt").read_text()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run_trials.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 done before"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.fixture
def plan(voc_root, monkeypatch, tmp_path):
    """Plan trials of tiny data sets: ``plan(weights, *opts, percents=...)``."""
    sets = ["DATASETS.TRAIN", "('tiny_voc',)", "DATASETS.TEST", "('tiny_voc',)"]
    register_pascal_voc("tiny_voc", str(voc_root / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"

    def planned(weights, *opts, seeds=(0,), percents=(100.0,), protocol=PROTOCOL, processes=1):
        words = [*sets, *SHORT, *opts]
        return trials.plan(protocol, weights, seeds, tmp_path / "out", percents, words, processes)

    yield planned
    DatasetCatalog.remove("tiny_voc")
    MetadataCatalog.remove("tiny_voc")


def finish(trial, **weights):
    """Leave what a finished trial leaves."""
    trials.prepare(trial)
    (trial.folder / "results.json").write_text(
        json.dumps({"protocol": trial.protocol, "weights": weights, "metrics": {}})
    )


@pytest.mark.parametrize("name", ["environment.txt", "trial.log"])
def test_a_trial_overwrites_nothing_of_the_user_s(name, plan):
    (trial,) = plan(["random"])
    trial.folder.mkdir(parents=True)
    (trial.folder / name).write_text("the user's")
    with pytest.raises(ValueError, match=f"contains {name}, which this command did not write"):
        trials.prepare(trial)
    assert (trial.folder / name).read_text() == "the user's"
    (trial.folder / name).unlink()
    for _ in range(2):  # an attempt that is repeated
        trials.prepare(trial)
        (trial.folder / name).write_text("ours")


def test_what_differs_is_refused_and_nothing_is_mixed(plan, tmp_path):
    (trial,) = plan(["random"])
    finish(trial, path="", sha256=None)
    assert trials.state(plan(["random"])[0]) == "done"
    for words in (["DATALOADER.NUM_WORKERS", "3"], ["TEST.COCO_BACKEND", "pycocotools"], ["DATA.MAX_PIXELS", "99999"]):
        assert trials.state(plan(["random"], *words)[0]) == "done", "no part of the experiment"
    with pytest.raises(ValueError, match=r"another run.*\n +SOLVER\.BASE_LR: 0\.02 in the folder, 0\.01 requested"):
        plan(["random"], "SOLVER.BASE_LR", "0.01")
    finish(trial, path="x.pth", sha256="f" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 ffffffffffff in results\.json, none requested"):
        plan(["random"])
    for content, message in (
        ("{", "is damaged"),
        ('{"init": {"kind": 3}}', "wrong init"),
        ('{"seed": 1}', "lacks config"),
    ):
        (trial.folder / "trial.json").write_text(content)
        with pytest.raises(ValueError, match=rf"trial\.json .*{message}"):
            trials.state(trial)
    (trial.folder / "trial.json").unlink()
    with pytest.raises(ValueError, match=r"contains a run that moco-d2 trials did not start"):
        plan(["random"])


def test_a_record_with_earlier_names_of_keys_is_compared_under_the_present_ones(
    plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trial,) = plan(["random"])
    finish(trial, path="", sha256=None)
    record = json.loads((trial.folder / "trial.json").read_text())
    record["config"]["SOLVER.DECAY"] = record["config"].pop("SOLVER.WEIGHT_DECAY")
    (trial.folder / "trial.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"SOLVER\.DECAY: 0\.0001 in the folder, None requested"):
        trials.state(trial)
    monkeypatch.setitem(RENAMED, "SOLVER.DECAY", "SOLVER.WEIGHT_DECAY")
    assert trials.state(trial) == "done"


def test_other_weights_of_the_same_name_are_refused(plan, tmp_path):
    # Written as a detector's checkpoint is, so that the check of the weights is the real one.
    from detectron2.modeling import build_model

    path = tmp_path / "mine.pth"
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_model(load_cfg("quick_schedules/faster_rcnn_R_50_C4_quick", ["MODEL.DEVICE", "cpu"]))
        torch.save({"model": model.state_dict(), "__author__": "a test", "matching_heuristics": True}, path)
        if seed == 0:
            (trial,) = plan([str(path)])
            finish(trial)
            assert (trial.init.label, trial.init.sha256) == ("mine", sha256(path))
            assert trials.state(plan([str(path)])[0]) == "done"
    with pytest.raises(ValueError, match=r"weights: \S+mine\.pth \(SHA-256 \w{12}\) in the folder"):
        plan([str(path)])
    both = plan([f"other={path}", "random"], seeds=(0, 1))
    assert [t.name for t in both] == ["other seed 0", "random seed 0", "other seed 1", "random seed 1"]
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="Convert it first"):
        plan([str(tmp_path / "raw.pth"), "random"])


def test_weights_are_fed_as_in_pretraining_beside_others_that_need_other_pixels(plan, tmp_path):
    from detectron2.modeling import build_model

    model = build_model(load_cfg("quick_schedules/faster_rcnn_R_50_C4_quick", ["MODEL.DEVICE", "cpu"]))
    shape = {"stem_channels": 16, "res2_channels": 64, "width_per_group": 16, "stride_in_1x1": True}
    facts = ResNetFacts(pixels=Pixels("BGR", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)), **shape)
    path = tmp_path / "simclr.pth"
    content = {"model": model.state_dict(), "__author__": "a test", "matching_heuristics": True}
    torch.save({**content, "facts": facts.as_dict()}, path)
    own, other = plan([str(path), "random"])
    for trial, order, std, stride in ((own, "BGR", [255.0] * 3, True), (other, "RGB", [58.395, 57.12, 57.375], False)):
        cfg = load_cfg(trial.config, trial.opts)  # as the training reads them
        assert (cfg.INPUT.FORMAT, list(cfg.MODEL.PIXEL_STD), cfg.MODEL.RESNETS.STRIDE_IN_1X1) == (order, std, stride)
    assert trials.state(own) == "new" and own.record()["config"]["MODEL.PIXEL_STD"] == [255.0] * 3
    with pytest.raises(ValueError, match=r"INPUT.FORMAT is RGB in the config, but the weights need BGR"):
        plan([str(path)], "INPUT.FORMAT", "RGB")


@pytest.mark.parametrize(("weights", "more", "message"), [
    (["random", "random"], {}, r"2 --weights have the name 'random'.*LABEL=PATH"),
    (["randm"], {}, "MODEL.WEIGHTS randm does not exist"),
    (["random=x.pth"], {}, "'random' means no file"),
    (["a/b=x.pth"], {}, "the label 'a/b' cannot be a folder's name"),
    (["random"], {"protocol": "quick_voc_faster_rcnn"}, f"nearest: .*{PROTOCOL}"),
    (["random"], {"percents": (0.0, 1.0)}, r"DATASETS\.FRACTION is 0\.0"),
    (["random"], {"seeds": ()}, "--seeds must name at least one"),
])  # fmt: skip
def test_mistakes_are_named_before_the_first_run(plan, weights, more, message):
    with pytest.raises(ValueError, match=message):
        plan(weights, **more)


def test_missing_data_and_keys_with_an_option_of_their_own(plan):
    with pytest.raises(ValueError, match="no data set 'tiny_vo' is registered; did you mean 'tiny_voc"):
        plan(["random"], "DATASETS.TRAIN", "('tiny_vo',)")
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is empty"):
        plan(["random"], "DATASETS.TEST", "()")
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE is 'mps'"):
        plan(["random"], "MODEL.DEVICE", "mps")
    with pytest.raises(ValueError, match="--num-gpus is 0; it must be at least 1"):
        plan(["random"], processes=0)
    with pytest.raises(ValueError, match="SEED is set by --seeds"):
        plan(["random"], "SEED", "3")


def test_a_trial_is_run_by_one_process_at_a_time(plan):
    (trial,) = plan(["random"])
    with trials.locked(trial.folder) as mine:
        assert mine is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[mine])
        with trials.locked(trial.folder) as other:
            assert other is None
    with trials.locked(trial.folder) as other:
        assert other is None, "the training still lives"
    child.communicate(b"\n")
    with trials.locked(trial.folder) as other:
        assert other is not None


def test_fractions_are_trials_of_their_own_and_all_labels_are_the_plain_one(plan, tmp_path):
    planned = plan(["random"], seeds=(0, 1), percents=(100.0, 1.0, 12.5))
    base = tmp_path / "out" / PROTOCOL / "random"
    assert [trial.folder for trial in planned[:3]] == [
        base / "seed0/fraction1", base / "seed0/fraction12.5", base / "seed0",
    ]  # fmt: skip
    assert [trial.cfg.DATASETS.FRACTION for trial in planned[:3]] == [1.0, 12.5, 100.0]
    assert {trial.cfg.SOLVER.MAX_ITER for trial in planned} == {12}, "the protocol's iterations"


def test_subsets_are_nested_and_follow_from_ids_and_seed_alone():
    ids = [f"image {number}" for number in range(1000)]
    sizes = {0.01: 1, 0.1: 1, 1: 10, 2: 20, 5: 50, 10: 100, 50: 500, 100: 1000}
    chosen = [set(select(ids, percent)) for percent in sizes]
    assert [len(subset) for subset in chosen] == list(sizes.values())
    assert all(small <= large for small, large in pairwise(chosen))
    backwards = select(ids[::-1], 5)
    assert {ids[::-1][index] for index in backwards} == {ids[index] for index in select(ids, 5)}
    assert set(select(ids, 5, seed=1)) != set(select(ids, 5))
    assert select(ids, 2)[:3] == [120, 184, 187], "the draw must not change between versions"
    # Uniform: of 200 seeds' 10%, each tenth of the ids holds about a tenth.
    counts = np.histogram(np.concatenate([select(ids, 10, seed) for seed in range(200)]), bins=10)[0]
    assert np.abs(counts / counts.sum() - 0.1).max() < 0.01
    with pytest.raises(ValueError, match="at most 100"):
        select(ids, 101)


def test_persons_without_keypoints_are_no_labels(tmp_path):
    item = {"bbox": [1, 1, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    records = [
        {"file_name": f"{i}.jpg", "image_id": i, "annotations": [{**item, "keypoints": [5, 5, 2 * (i > 0)] * 17}]}
        for i in range(4)
    ]
    DatasetCatalog.register("few_points", lambda: records)
    MetadataCatalog.get("few_points").thing_classes = ["person"]
    words = ["DATASETS.TRAIN", "('few_points',)", "DATASETS.FRACTION", "99.9", "OUTPUT_DIR", str(tmp_path)]
    try:
        chosen = training_set(load_cfg("COCO-Keypoints/keypoint_rcnn_R_50_FPN_2x", words))
    finally:
        DatasetCatalog.remove("few_points")
        MetadataCatalog.remove("few_points")
    assert [record["image_id"] for record in chosen] == [1, 2, 3]


def test_the_training_set_is_a_part_of_the_labelled_images_and_is_written_down(plan, tmp_path):
    def chosen(percent):
        words = ["DATASETS.TRAIN", "('tiny_voc',)", "DATASETS.FRACTION", percent, "OUTPUT_DIR", str(tmp_path)]
        return training_set(load_cfg("quick_schedules/faster_rcnn_R_50_C4_quick", words))

    assert chosen("100.0") is None
    assert not (tmp_path / FILE).exists()
    (one,), half, nearly = chosen("1.0"), chosen("50.0"), chosen("99.9")
    assert (len(half), len(nearly)) == (6, 11), "the picture without a box is no label"
    ids = [{record["image_id"] for record in part} for part in ([one], half, nearly)]
    assert ids[0] < ids[1] < ids[2]
    written = json.loads((tmp_path / FILE).read_text())
    assert (set(written["image_ids"]), written["images_in_all"], written["percent"]) == (ids[2], 11, 99.9)


@pytest.mark.parametrize("text", ["", "3-1", "-1", "0,,2", "a"])
def test_ranges_of_seeds_that_cannot_be_read_are_shown(text: str) -> None:
    with pytest.raises(ValueError, match=rf"--seeds {text}: write a range or a list"):
        run_trials.read_seeds(text)

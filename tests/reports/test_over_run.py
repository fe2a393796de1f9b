"""Detection over a pretraining: which checkpoints are taken, what is trained, repeated and refused, and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from matplotlib.figure import Figure

from moco_d2.commands import probe
from moco_d2.commands import trials as command
from moco_d2.config import load_cfg
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.io.provenance import sha256
from moco_d2.reports import over_run_page, trials
from moco_d2.reports.over_run import Checkpoint, CheckpointedRun
from tests.detection.conftest import dataset_root  # noqa: F401, a fixture

# Detectron2's own, when a detector is built.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

ROOT = Path(__file__).parents[2]
PROTOCOL = "quick_voc0712_faster_rcnn_R_50_C4"
SHORT = [
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()", "TEST.PRECISE_BN.NUM_ITER", "1", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, dataset_root: Path) -> Path:  # noqa: F811
    """A pretraining of two epochs of two steps, with a checkpoint of each epoch."""
    folder = tmp_path_factory.mktemp("pretraining")
    words = [
        "DATASETS.TRAIN", tuple(f"{dataset_root}/VOC{year}/JPEGImages" for year in (2007, 2012)),
        "OUTPUT_DIR", folder, "SOLVER.EPOCHS", 2,
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATA.CROP_SIZE", 32, "SSL.ARGS.queue_size", 8,
        "SSL.ARGS.dim", 16, "SSL.ENCODER.ARGS.width", 0.25, "SSL.ARGS.bn_groups", 2, "DATALOADER.NUM_WORKERS", 0,
        "MODEL.DEVICE", "cpu", "SEED", 7,
    ]  # fmt: skip
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", list(map(str, words)), stage="pretraining")
    (folder / "config.yaml").write_text(cfg.dump())
    PretrainTrainer(cfg).train()
    assert {path.name for path in folder.glob("model_*")} == {
        "model_0000001.pth", "model_0000003.pth", "model_final.pth",
    }  # fmt: skip
    return folder


@pytest.fixture
def run(pretrained: Path, tmp_path: Path) -> Path:
    """A copy of it; checkpoints are links to the same files."""
    shutil.copytree(pretrained, tmp_path / "run", copy_function=os.link)
    return tmp_path / "run"


@pytest.fixture
def data_set(dataset_root: Path) -> Iterator[list[str]]:  # noqa: F811
    """The KEY VALUE pairs of a data set that this process knows."""
    register_pascal_voc("tiny_voc", str(dataset_root / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    yield ["DATASETS.TRAIN", "('tiny_voc',)", "DATASETS.TEST", "('tiny_voc',)", *SHORT]
    DatasetCatalog.remove("tiny_voc")
    MetadataCatalog.remove("tiny_voc")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings that end at once: AP is the number of those before; the list names them."""
    names: list[str] = []

    def finish(trial: Any, num_gpus: int) -> str:
        trials.prepare(trial)
        result = {
            "protocol": trial.protocol, "metrics": {"tiny_voc": {"bbox": {"AP": 10.0 + len(names), "AP50": 20.0}}},
            "weights": {"path": trial.init.path, "sha256": trial.init.sha256, "facts": trial.init.facts},
            "seed": trial.seed, "config_changes": [], "iterations": 2,
        }  # fmt: skip
        names.append(trial.name)
        (trial.folder / "results.json").write_text(json.dumps(result))
        return "done"

    monkeypatch.setattr(command, "run_trial", finish)
    return names


def words(run: Path, output: Path, *more: str) -> list[str]:
    return ["detection", str(run), "--protocol", PROTOCOL, "--output", str(output), *more]


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_real_training_from_the_command_to_the_page(run: Path, dataset_root: Path, tmp_path: Path) -> None:  # noqa: F811
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(dataset_root), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    line = words(run, tmp_path / "out", "--checkpoints", "2", "epochs", *SHORT)
    done = subprocess.run(
        [sys.executable, "-m", "moco_d2", "probe", *line], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MoCo, checkpoints of epochs 1, 2\nprobed: epoch 2\nepoch_0002: converted\n" in done.stdout
    content = json.loads((tmp_path / "out/detection_over_run.json").read_text())
    (point,), (result,) = content["checkpoints"], content["results"]
    assert (point["label"], point["iteration"], point["epoch"]) == ("epoch_0002", 4, 2)
    assert point["total_loss"] > 0 and point["monitor/knn_top1"] is None
    measured = json.loads((tmp_path / f"out/{PROTOCOL}/epoch_0002/seed0/results.json").read_text())
    assert measured["weights"]["sha256"] == sha256(tmp_path / "out/weights/epoch_0002.pth")
    assert result["rows"]["epoch_0002"]["bbox/AP"]["mean"] == measured["metrics"]["voc_2007_test"]["bbox"]["AP"]
    made = json.loads((tmp_path / "out/weights/epoch_0002.json").read_text())
    assert made["proof"]["made"] and made["input"]["sha256"] == sha256(run / "model_0000003.pth")


def test_a_second_call_adds_nothing_and_a_third_the_new_checkpoint(
    run: Path, data_set: list[str], trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, later = tmp_path / "out", run / "model_0000003.pth"
    hidden = [later.rename(tmp_path / later.name), (run / "model_final.pth").rename(tmp_path / "model_final.pth")]
    line = words(run, output, "--checkpoints", "every", "1", "epochs", "--weights", "random", *data_set)
    assert probe.main(line) == 0
    assert trained == ["random seed 0", "epoch_0001 seed 0"]
    before = files(output / "weights") | files(output / PROTOCOL)
    assert probe.main(line) == 0
    assert "epoch_0001: converted before" in capsys.readouterr().out
    assert len(trained) == 2 and files(output / "weights") | files(output / PROTOCOL) == before

    for path in hidden:  # the pretraining goes on, and keeps its last checkpoints only
        path.rename(run / path.name)
    (run / "model_0000001.pth").unlink()
    assert probe.main(line) == 0
    assert trained[2:] == ["epoch_0002 seed 0"]
    content = json.loads((output / "detection_over_run.json").read_text())
    assert [(one["label"], one["epoch"]) for one in content["checkpoints"]] == [("epoch_0001", 1), ("epoch_0002", 2)]
    (result,) = content["results"]
    assert {label: row["bbox/AP"]["mean"] for label, row in result["rows"].items()} == {
        "random": 10, "epoch_0001": 11, "epoch_0002": 12,
    }  # fmt: skip
    assert re.search(r"\| 2 +\| 12\.00 \(1\) +\| 20\.00 \(1\) +\| \+1\.00 ", capsys.readouterr().out)
    # Other seeds and checkpoints stand in the same picture, so they are compared, too.
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR: 0\.02 in the folder, 0\.01 requested"):
        probe.main([*words(run, output, "--checkpoints", "2", "epochs", "--seeds", "5", *data_set),
                    "SOLVER.BASE_LR", "0.01"])  # fmt: skip
    with pytest.raises(ValueError, match=r"is of another pretraining or protocol: it has protocol quick_voc"):
        probe.main(words(run, output, "--protocol", "quick_coco_mask_rcnn_R_50_FPN"))
    (run / "model_0000003.pth").unlink()
    torch.save({**torch.load(run / "model_final.pth"), "note": 1}, run / "model_0000003.pth")
    with pytest.raises(ValueError, match=r"epoch_0002\.pth was converted from another file than .*model_0000003\.pth"):
        probe.main(line)
    assert len(trained) == 3


def change(run: Path, **entries: Any) -> None:
    content = torch.load(run / "model_final.pth")
    (run / "model_final.pth").unlink()
    torch.save(content | entries, run / "model_final.pth")


def without_checkpoints(run: Path) -> None:
    for path in run.glob("model_*"):
        path.unlink()


def a_detector(run: Path) -> None:
    (run / "results.json").write_text("{}")
    change(run, trainer={"iteration": 3, "run": {"number of images": 4}})


def a_cifar_stem(run: Path) -> None:
    for path in run.glob("model_0*"):
        path.unlink()
    model = torch.load(run / "model_final.pth")["model"]
    change(run, model=model | {"encoder_q.conv1.weight": torch.ones(16, 3, 3, 3)})


@pytest.mark.parametrize(("spoil", "more", "message"), [
    (lambda run: (run / "config.yaml").unlink(), [], "has no config.yaml: give the OUTPUT_DIR of a moco-d2 pretrain"),
    (without_checkpoints, [], r"no checkpoints \(model_\*\.pth\): SOLVER\.CHECKPOINT_PERIOD.*CHECKPOINT_KEEP_EVERY"),
    (a_detector, [], r"is not the folder of a pretraining: model_final\.pth is a checkpoint of a detector"),
    (a_cifar_stem, [], "a CIFAR stem .* pretrain with the imagenet stem"),
    (lambda run: None, ["--checkpoints", "sometimes"], "--checkpoints sometimes: write all, every 20 epochs"),
    (lambda run: None, ["--checkpoints", "2", "7", "epochs"],
     r"no checkpoint of epoch 7; it has those of epochs 1, 2\. SOLVER\.CHECKPOINT_KEEP_EVERY .* \(an epoch has 2\)"),
    (lambda run: None, ["--protocol", "quick_voc"], "nearest"),
    (lambda run: None, ["--weights", "random", "mine=none.pth"], r"none\.pth does not exist"),
], ids=["config", "checkpoints", "detector", "cifar", "words", "missing", "protocol", "weights"])  # fmt: skip
def test_mistakes_are_named_before_anything_is_written(
    spoil: Callable[[Path], None], more: list[str], message: str, run: Path, data_set: list[str], trained: list[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    spoil(run)
    with pytest.raises(ValueError, match=message):
        probe.main(words(run, tmp_path / "out", *more, *data_set))
    assert not trained and not (tmp_path / "out").exists()


def pretraining(folder: Path, iterations: list[int], steps: int = 100) -> CheckpointedRun:
    checkpoints = tuple(Checkpoint(done, f"epoch_{done / steps:04g}", None) for done in iterations)
    return CheckpointedRun(
        folder, load_cfg(opts=["SSL.ARGS.queue_size", "1024", "SOLVER.EPOCHS", "200"]), steps, checkpoints
    )


@pytest.mark.parametrize(("request_", "chosen", "missing"), [
    ("all", [1000, 2000, 2990, 3100, 4400], ""),
    ("every 10 epochs", [1000, 2000, 2990], "epoch 40;"),  # 4400 is more than a quarter of the interval away
    ("every 2000 iterations", [2000, 4400], ""),
    ("10 31 epochs", [1000, 3100], ""),
    ("2990 iterations", [2990], ""),
])  # fmt: skip
def test_the_nearest_checkpoint_is_taken(request_: str, chosen: list[int], missing: str, tmp_path: Path) -> None:
    run = pretraining(tmp_path, [1000, 2000, 2990, 3100, 4400])
    found, note = run.choose(request_)
    assert [one.iteration for one in found] == chosen
    assert missing in note and bool(missing) == bool(note)


def test_the_page_shows_what_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[dict[str, float]] = [{"iteration": 0, "monitor/knn_top1": 20.0}]
    lines += [{"iteration": i - 1, "total_loss": 7 - i / 1000} for i in range(1, 3001)]
    lines += [{"iteration": i - 1, "monitor/knn_top1": 20 + i / 100} for i in (1000, 2000, 3000)]
    run = pretraining(tmp_path, [])
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    for label, values in {"random": [3.0, 4.0], "epoch_0010": [9.0, 11.0], "epoch_0029.50": [10.0, 13.0]}.items():
        done = {"epoch_0010": 1000, "epoch_0029.50": 2950}.get(label)
        (output / "weights").mkdir(parents=True, exist_ok=True)
        if done:
            (output / f"weights/{label}.json").write_text(json.dumps({"iteration": done}))
            (output / f"weights/{label}.pth").touch()
        for seed, value in enumerate(values):
            folder = output / PROTOCOL / label / f"seed{seed}"
            folder.mkdir(parents=True)
            result = {
                "protocol": PROTOCOL, "seed": seed, "config_changes": [], "weights": {"path": label * bool(done)},
                "metrics": {"voc_2007_test": {"bbox": {"AP": value, "AP50": 2 * value, "AP-dog": 1.0}}},
            }  # fmt: skip
            (folder / "results.json").write_text(json.dumps(result))
            record = {"init": {"label": label, "kind": "moco"}}
            (folder / "trial.json").write_text(json.dumps(record))
    figures: list[Figure] = []
    save = over_run_page.save_panels

    def keep(painters: Any, path: Path) -> None:
        figures.append(Figure())
        for axis, paint in zip(figures[0].subplots(len(painters), 1), painters, strict=True):
            paint(axis)
        save(painters, path)

    monkeypatch.setattr(over_run_page, "save_panels", keep)
    shown = over_run_page.write_page(run, PROTOCOL, output)
    assert "box AP is highest at epoch 29.5: 11.50 ± 2.12 (2)." in shown[2]
    assert shown[2].endswith("The first checkpoint within one standard deviation of it is that of epoch 10.")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[1].splitlines()]
    assert cells[0] == ["epoch", "box AP", "box AP50", "change", "loss", "kNN, %"]
    assert cells[2] == ["random", "3.50 ± 0.71 (2)", "7.00 ± 1.41 (2)", "", "", ""]
    assert cells[4] == ["29.5", "11.50 ± 2.12 (2)", "23.00 ± 4.24 (2)", "+1.50", "4.050", "40.0"]
    top, knn, loss = figures[0].axes
    curve = top.containers[0].lines[0]
    assert (list(curve.get_xdata()), list(curve.get_ydata())) == ([10, 29.5], [10, 11.5])
    assert next(line for line in top.lines if line.get_label() == "random").get_ydata()[0] == 3.5
    drawn = next(line for line in knn.lines if line.get_label() == "kNN")
    assert list(zip(*drawn.get_data(), strict=True)) == [(0, 20), (10, 30), (20, 40), (30, 50)]
    drawn = next(line for line in loss.lines if line.get_label() == "loss")
    assert len(drawn.get_xdata()) == 375 and drawn.get_ydata()[0] == pytest.approx(7 - 0.0045), "means of 8 steps"
    chance = next(line for line in loss.lines if line.get_label() == "chance, log(1 + K)")
    assert chance.get_ydata()[0] == pytest.approx(np.log(1025)) and loss.get_xlabel() == "epoch of pretraining"
    page = (output / "detection_over_run.html").read_text()
    assert page.count("<svg") == 1 and "11.50 ± 2.12 (2)" in page and not re.search("<(link|script|img)", page)
    assert (output / "detection_over_run.png").stat().st_size > 10_000

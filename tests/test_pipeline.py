"""The demo of an installed wheel, with three iterations a training: every stage's command, from pictures to a table."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from moco_d2.convert import read_facts
from moco_d2.io.provenance import sha256

ROOT = Path(__file__).parents[1]


def test_the_demo_of_a_wheel_in_an_empty_folder(
    unpacked_wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One test, because each worker of a parallel run would make the demo again for its own.
    done = run(["-m", "moco_d2", "demo", "--steps", "3"], unpacked_wheel, cwd=tmp_path)
    output = tmp_path / "output" / "demo"
    the_table_compares_both_inits_on_both_tasks(output, done.stdout)
    the_detectors_started_from_what_was_pretrained(output)
    the_wheel_holds_what_a_report_is_made_of(output, unpacked_wheel, tmp_path)
    for name in ("pretraining", "views", "overview", "detections_VOC", "detections_COCO"):
        the_picture_is_there(output / f"{name}.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(output / "datasets"))
    a_detector_is_evaluated_again_in_its_runs_folder_and_the_run_stays_as_it_was(output)


def run(command: list[str], package: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package)}
    words = [sys.executable, *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=1800, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def the_table_compares_both_inits_on_both_tasks(output: Path, screen: str) -> None:
    table = (output / "table.md").read_text()
    assert table.strip() in screen
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head[:4] == ["pre-train", "kNN %", "VOC C4 AP", "VOC C4 AP50"] and head[-1] == "COCO FPN mask AP"
    assert [row[0] for row in rows] == ["MoCo", "random"]
    measured = [json.loads(line) for line in (output / "pretrain" / "metrics.json").read_text().splitlines()]
    knn = [f"{record['monitor/knn_top1']:.2f}" for record in measured if "monitor/knn_top1" in record]
    assert [row[1] for row in rows] == [knn[-1], knn[0]], "after and before pretraining"
    for row, init in zip(rows, ("MoCo", "random"), strict=True):
        coco = json.loads((output / f"COCO_FPN_{init}" / "results.json").read_text())["metrics"]["coco_2017_val"]
        assert row[-1] == f"{coco['segm']['AP']:.2f}"


def the_detectors_started_from_what_was_pretrained(output: Path) -> None:
    backbone = torch.load(output / "pretrain" / "backbone.pth")["state_dict"]
    converted = torch.load(output / "moco.pth")["model"]
    assert len(converted) == 100
    assert torch.equal(converted["res5.1.conv2.weight"], backbone["layer4.1.conv2.weight"])
    facts = read_facts(output / "moco.pth")
    assert facts is not None and (facts.recipe, facts.stem_channels) == ("quick_moco_v2_R18 (modified)", 16)
    for name in ("VOC_C4", "COCO_FPN"):
        results = {
            init: json.loads((output / f"{name}_{init}" / "results.json").read_text()) for init in ("MoCo", "random")
        }
        moco = output / "moco.pth"
        assert results["MoCo"]["weights"] == {
            "path": str(moco), "sha256": sha256(moco), "source_sha256": sha256(output / "pretrain/backbone.pth"),
            "facts": facts.as_dict(),
        }  # fmt: skip
        assert results["random"]["weights"]["path"] == results["random"]["weights"]["sha256"] == ""
        assert results["MoCo"]["schedule"] == results["random"]["schedule"], "the same budget"
    assert "res5" in (output / "logs" / "convert_and_prove.log").read_text(), "the proof was made"


def a_detector_is_evaluated_again_in_its_runs_folder_and_the_run_stays_as_it_was(output: Path) -> None:
    folder = output / "VOC_C4_random"
    config = (folder / "config.yaml").read_bytes()
    weights = str(folder / "model_final.pth")
    command = [
        "tools/train_net.py",
        "--config-file",
        str(folder / "config.yaml"),
        "--eval-only",
        "MODEL.WEIGHTS",
        weights,
    ]
    run(command, ROOT, cwd=ROOT)
    trained, evaluated = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("results", "results_eval_only")
    )
    assert evaluated["metrics"] == trained["metrics"]
    assert (folder / "config.yaml").read_bytes() == config
    assert weights in (folder / "eval_only" / "config.yaml").read_text()


def the_wheel_holds_what_a_report_is_made_of(output: Path, unpacked_wheel: Path, tmp_path: Path) -> None:
    run(["-m", "moco_d2", "report", str(output), "-o", "report"], unpacked_wheel, cwd=tmp_path)
    assert "quick_voc0712_faster_rcnn_R_18_C4" in (tmp_path / "report" / "report.html").read_text()


def the_picture_is_there(path: Path) -> None:
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(2**24)
    assert colours is not None and len(colours) > 100, "not an empty canvas"

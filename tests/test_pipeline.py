"""The demo, with three iterations a training: every stage's real command, from drawn pictures to the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from moco_d2.convert import read_facts
from moco_d2.io.provenance import sha256

DEMO = Path(__file__).parents[1] / "tools" / "demo.py"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(DEMO), "--output", str(folder), "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "screen.txt").write_text(done.stdout)
    return folder


def test_the_table_compares_both_inits_on_both_tasks(output: Path) -> None:
    table = (output / "table.md").read_text()
    assert table.strip() in (output / "screen.txt").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [(row[0], row[2]) for row in cells] == [
        ("MoCo", "voc_2007_test"), ("random", "voc_2007_test"), ("MoCo", "coco_2017_val"), ("random", "coco_2017_val"),
    ]  # fmt: skip
    assert all(row[1].startswith("quick_") and row[-1] == "3" for row in cells)


def test_the_detectors_started_from_what_was_pretrained(output: Path) -> None:
    backbone = torch.load(output / "pretrain" / "backbone.pth")["state_dict"]
    converted = torch.load(output / "moco.pth")["model"]
    assert len(converted) == 265
    assert torch.equal(converted["res5.2.conv3.weight"], backbone["layer4.2.conv3.weight"])
    facts = read_facts(output / "moco.pth")
    assert facts is not None and (facts.recipe, facts.stem_channels) == ("quick_moco_v2_R50 (modified)", 16)
    for name in ("VOC_R50-C4", "COCO_R50-FPN"):
        results = {
            init: json.loads((output / f"{name}_{init}" / "results.json").read_text()) for init in ("MoCo", "random")
        }
        moco = output / "moco.pth"
        assert results["MoCo"]["weights"] == {"path": str(moco), "sha256": sha256(moco), "facts": facts.as_dict()}
        assert results["random"]["weights"]["path"] == results["random"]["weights"]["sha256"] == ""
        assert results["MoCo"]["schedule"] == results["random"]["schedule"], "the same budget"
    assert "res5" in (output / "logs" / "convert_and_prove.log").read_text(), "the proof was made"


def test_a_detector_is_evaluated_again_in_its_runs_folder_and_the_run_stays_as_it_was(output: Path) -> None:
    run = output / "VOC_R50-C4_random"
    config = (run / "config.yaml").read_bytes()
    command = [sys.executable, str(DEMO.with_name("train_net.py")), "--config-file", str(run / "config.yaml")]
    subprocess.run(
        [*command, "--eval-only", "MODEL.WEIGHTS", str(run / "model_final.pth")],
        env={**os.environ, "DETECTRON2_DATASETS": str(output / "datasets")}, check=True, capture_output=True,
    )  # fmt: skip
    trained, evaluated = (json.loads((run / f"{name}.json").read_text()) for name in ("results", "results_eval_only"))
    assert evaluated["metrics"] == trained["metrics"]
    assert (run / "config.yaml").read_bytes() == config
    assert str(run / "model_final.pth") in (run / "eval_only" / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["pretraining", "views", "detections_VOC", "detections_COCO"])
def test_the_pictures_are_there(output: Path, name: str) -> None:
    with Image.open(output / f"{name}.png") as picture:
        colours = picture.convert("RGB").getcolors(2**24)
    assert colours is not None and len(colours) > 100, "not an empty canvas"

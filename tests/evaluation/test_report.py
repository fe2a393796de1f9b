"""The table of results."""

import json
from pathlib import Path

import pytest

from moco_d2.evaluation import report


def _run(folder: Path, **metrics: dict[str, dict[str, float | None]]) -> Path:
    folder.mkdir()
    result = {"protocol": "voc0712_faster_rcnn_R_50_C4_24k", "iterations": 24000, "metrics": metrics}
    (folder / "results.json").write_text(json.dumps(result))
    return folder


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_for_each_run_and_test_set(tmp_path: Path) -> None:
    voc = {"bbox": {"AP": 57.0, "AP50": 82.4, "AP75": 63.604}}
    coco = {"bbox": {"AP": 38.5, "AP50": 58.9, "AP75": 42.0}, "segm": {"AP": 35.1}}
    runs = [
        ("MoCo v2", _run(tmp_path / "moco", voc_2007_test=voc, coco_2017_val=coco)),
        ("random", _run(tmp_path / "random", voc_2007_test=voc)),
    ]
    lines = report.table(runs).splitlines()
    assert _cells(lines[0]) == list(report.COLUMNS)
    protocol = "voc0712_faster_rcnn_R_50_C4_24k"
    assert [_cells(line) for line in lines[2:]] == [
        ["MoCo v2", protocol, "voc_2007_test", "57.00", "82.40", "63.60", "-", "24000"],
        ["MoCo v2", protocol, "coco_2017_val", "38.50", "58.90", "42.00", "35.10", "24000"],
        ["random", protocol, "voc_2007_test", "57.00", "82.40", "63.60", "-", "24000"],
    ]


def test_a_metric_without_a_value_is_a_dash(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", coco_2017_val={"bbox": {"AP": 0.0, "AP75": None}})
    (row,) = report.rows("random", report.read_result(run))
    assert row[3:7] == ("0.00", "-", "-", "-")


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json is missing: the run has not finished"):
        report.table([("MoCo", tmp_path)])

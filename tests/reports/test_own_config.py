"""A config of the user's own: its name in trials and reports, its init, and what a report says about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import VOC_C4, record

from moco_d2.config import load_cfg
from moco_d2.reports import report, summary, trials
from moco_d2.reports.content import read
from moco_d2.reports.summary import Cell, beyond_noise

BASE = "PascalVOC-Detection/faster_rcnn_R_50_C4_24k"


@pytest.fixture
def own(tmp_path: Path):
    """Write a config on top of a shipped one, in a folder of its own: ``own("mine", "SOLVER: {MAX_ITER: 9}")``."""

    def write(name: str, text: str = "") -> str:
        path = tmp_path / "cells" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"_BASE_: {BASE}\n{text}")
        return str(path)

    return write


def test_an_own_file_takes_shipped_bases_inits_and_single_names(own, tmp_path: Path) -> None:
    mine = own("mine", "DATASETS: {TRAIN: cells_train, TEST: cells_val}\n")
    cfg = load_cfg(mine)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("cells_train",), ("cells_val",))
    assert (cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT) == ("REQUIRED", "RGB")
    random, supervised = (load_cfg(mine.replace(".yaml", end)) for end in ("_random.yaml", "_supervised"))
    assert (random.MODEL.WEIGHTS, random.INPUT.FORMAT) == ("", "RGB")
    assert (supervised.MODEL.WEIGHTS[-8:], supervised.INPUT.FORMAT) == ("R-50.pkl", "BGR")
    assert random.DATASETS.TRAIN == supervised.DATASETS.TRAIN == ("cells_train",)
    (tmp_path / "cells/next.yaml").write_text("_BASE_: mine_random.yaml\n")
    assert load_cfg(tmp_path / "cells/next.yaml").MODEL.WEIGHTS == ""
    for word in ("photos", "'photos'", "('photos',)", "['photos']"):
        assert tuple(load_cfg("", ["DATASETS.TRAIN", word]).DATASETS.TRAIN) == ("photos",)
    assert load_cfg("", ["DATASETS.TRAIN", "2007"]).DATASETS.TRAIN == ("2007",)
    with pytest.raises(ValueError, match="no config file"):
        load_cfg(tmp_path / "cells/absent_random.yaml")
    (tmp_path / "wrong.yaml").write_text("_BASE_: PascalVOC-Detection/faster_rcnn_R_50_C4_24kk\n")
    with pytest.raises(ValueError, match="did you mean 'PascalVOC-Detection/faster_rcnn_R_50_C4_24k'"):
        load_cfg(tmp_path / "wrong.yaml")


def test_the_name_of_an_own_config_in_trials(own) -> None:
    assert trials.protocol_of(BASE) == VOC_C4
    assert trials.protocol_of(own("same")) == VOC_C4, "nothing but the file differs"
    assert trials.protocol_of(own("mine", "SOLVER: {MAX_ITER: 9}\n")) == "mine", "a shipped name means one thing"
    assert trials.protocol_of(own("mine", "PROTOCOL: cells\nSOLVER: {MAX_ITER: 9}\n")) == "cells"
    for name, text, message in (
        (VOC_C4, "SOLVER: {MAX_ITER: 9}\n", f"departs from the shipped protocol {VOC_C4}"),
        ("mine", "PROTOCOL: a/b\n", "it names a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            trials.protocol_of(own(name, text))
    with pytest.raises(ValueError, match="leave out the suffix"):
        trials.protocol_of(own("mine").replace(".yaml", "_random.yaml"))


def test_a_file_with_the_name_of_an_init_must_be_the_same_protocol(own, monkeypatch, tmp_path: Path) -> None:
    mine = own("mine", "SOLVER: {MAX_ITER: 9}\n")
    own("mine_random", "SOLVER: {MAX_ITER: 10}\nMODEL: {WEIGHTS: ''}\n")
    monkeypatch.setattr(
        trials, "_inits", lambda *_: [trials.Init("a", "moco", "a.pth"), trials.Init("random", "random")]
    )
    with pytest.raises(
        ValueError, match=r"mine_random\.yaml is another protocol than .*: they differ in SOLVER\.MAX_ITER"
    ):
        trials.plan("", ["a.pth", "random"], [0], tmp_path / "out", config_file=mine)


def test_a_report_of_an_own_config(own, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    facts = {"recipe": "mine", "origin": "moco_d2 MoCo on cells, 100 of 100 iterations"}
    weights = {"path": "/w/mine.pth", "sha256": "ab" * 32, "facts": facts}
    for number, (init, more, seed, ap) in enumerate([
        ("mine", {}, 0, 40.0), ("mine", {}, 1, 41.0), ("random", {}, 0, 20.0), ("random", {}, 1, 21.0),
        ("random", {"DATASETS.FRACTION": 10.0}, 0, 5.0), ("random", {"SOLVER.MAX_ITER": 8}, 0, 19.0),
    ]):  # fmt: skip
        folder = record(
            runs / str(number), "random", seed, {"AP": ap, "AP-red": ap}, protocol="cells", test_set="cells_val",
            config_changes=None, pictures={"train": 30 if 10.0 in more.values() else 300, "test": {"cells_val": 60}},
            **({"weights": weights} if init == "mine" else {}),
        )  # fmt: skip
        opts = [str(word) for pair in more.items() for word in pair]
        cfg = load_cfg(own("mine", "PROTOCOL: cells\nSOLVER: {MAX_ITER: 9}\n"), opts)
        (folder / "config.yaml").write_text(cfg.dump())
        (folder / "trial.json").write_text(json.dumps({"config_file": "mine.yaml"}))
    content = read([runs])
    tables = {table.variant: table for table in content.tables}
    assert set(tables) == {"SOLVER.MAX_ITER=9", "SOLVER.MAX_ITER=8"}, "other configs of one name are not averaged"
    table = tables["SOLVER.MAX_ITER=9"]
    assert [(row.label, row.percent, len(row.runs)) for row in table.rows] == [
        ("mine", 100, 2), ("random", 100, 2), ("random", 10, 1),
    ]  # fmt: skip
    assert table.config["SOLVER.MAX_ITER"] == 9 and "DATASETS.FRACTION" not in table.config
    said = report.about(table)
    assert said[:3] == [
        "a protocol of your own, config mine.yaml",
        "pictures: 300 for training (100% of the labels), 30 for training (10% of the labels), 60 for testing",
        "mine: moco_d2 MoCo on cells, 100 of 100 iterations",
    ]
    page = report.html(content)
    assert "paper row" not in page.lower() and "published" not in page.split("</style>")[1]
    assert "not recorded" not in page and "not the protocol as shipped" not in page
    assert "<dt>SOLVER.MAX_ITER</dt><dd><code>9</code></dd>" in page
    assert page.count('<span class="up">+20.00</span>') == 2, "AP, and AP of the class: 20 points, std .7"


def test_a_difference_within_noise_has_no_colour(tmp_path: Path) -> None:
    for seed, (ours, other) in enumerate(((57.0, 56.0), (55.0, 54.5), (56.0, 55.2))):
        record(tmp_path / f"moco{seed}", "moco_v2", seed, {"AP": ours})
        record(tmp_path / f"random{seed}", "random", seed, {"AP": other})
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    (found,) = (item for item in table.differences if item.against == "random, run here")
    assert found.deltas["bbox/AP"] > 0.5 and not found.clear
    report.write_report([tmp_path], tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    assert f'<span class="soft">{report.signed(found.deltas["bbox/AP"])}</span>' in page


def test_noise_is_told_from_differences_by_welchs_test() -> None:
    assert not beyond_noise(Cell.of([50.0]), Cell.of([10.0, 10.0])), "one run tells nothing"
    assert beyond_noise(Cell.of([1.0, 1.0]), Cell.of([2.0, 2.0])) and not beyond_noise(Cell(1, 0, 2), Cell(1, 0, 2))
    # Equal variances and numbers: Student's test with 2 n - 2 degrees of freedom; n 3: 2.78 standard errors.
    for gap, beyond in ((2.77, False), (2.79, True)):
        assert beyond_noise(Cell(gap * (2 / 3) ** 0.5, 1.0, 3), Cell(0, 1.0, 3)) == beyond
    generator = np.random.default_rng(0)
    wrong = sum(
        beyond_noise(Cell.of(generator.normal(0, 1, 3)), Cell.of(generator.normal(0, 2, 5))) for _ in range(2000)
    )
    assert 0.01 < wrong / 2000 < 0.07, "one in twenty of differences that are noise"

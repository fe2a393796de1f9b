"""The table of results, and the report of many runs."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from recorded_runs import WEIGHTS, record

from moco_d2.config import load_cfg
from moco_d2.model_zoo import get_protocol
from moco_d2.reports import report, summary
from moco_d2.reports.run import read_run


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
    (row,) = report.rows("random", read_run(run).result)
    assert row[3:7] == ("0.00", "-", "-", "-")


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"results\.json is missing: the run has not finished"):
        report.table([("MoCo", tmp_path)])


def _voc(ap: float, **more: float) -> dict[str, float]:
    return {"AP": ap, "AP50": ap + 25, "AP75": ap + 6, **more}


def test_means_and_std_are_numpys(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(57, 1, 5)
    for seed, value in enumerate(values):
        record(tmp_path / f"seed{seed}", "moco_v2", seed, _voc(value))
    record(tmp_path / "random", "random", 0, _voc(33.0))
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    ours, random = table.rows
    assert ours.cells["bbox/AP"].mean == pytest.approx(np.mean(values))
    assert ours.cells["bbox/AP"].std == pytest.approx(np.std(values, ddof=1))
    assert str(ours.cells["bbox/AP"]) == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} (5)"
    assert str(random.cells["bbox/AP"]) == "33.00 (1)", "one run has no std"


def test_flags_are_beyond_two_published_std_of_the_matching_row(tmp_path: Path) -> None:
    # Published for MoCo v2, 200 epochs: AP 57.0, AP50 82.4, AP75 63.6; std .2, .2, .4.
    record(tmp_path / "moco", "moco_v2", 0, {"AP": 57.4, "AP50": 81.9, "AP75": 64.4})
    record(tmp_path / "supervised", "supervised", 0, {"AP": 53.5, "AP50": 81.3, "AP75": 58.8})
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    found = {(item.row.label, item.against): item for item in table.differences}
    assert set(found) == {
        ("moco_v2", "MoCo v2, 200 epochs, published"), ("moco_v2", "supervised, run here"),
        ("supervised", "supervised, published"),
    }  # fmt: skip
    published = found["moco_v2", "MoCo v2, 200 epochs, published"]
    assert published.deltas == pytest.approx({"bbox/AP": 0.4, "bbox/AP50": -0.5, "bbox/AP75": 0.8})
    assert published.flags == {"bbox/AP50"}, "0.4 and 0.8 are two std, not more"
    assert not found["supervised", "supervised, published"].flags
    assert found["moco_v2", "supervised, run here"].deltas["bbox/AP"] == pytest.approx(3.9)


def test_other_experiments_have_tables_of_their_own_and_no_published_row(tmp_path: Path) -> None:
    record(tmp_path / "plain", "moco_v2", 0, _voc(57.0))
    record(tmp_path / "short", "moco_v2", 0, _voc(40.0), changes=["SOLVER.MAX_ITER=9000"])
    record(tmp_path / "coco", "moco_v2", 0, _voc(39.0), protocol="coco_mask_rcnn_R_50_C4_1x", test_set="coco_2017_val")
    record(tmp_path / "mine", "moco_v2", 0, _voc(20.0), protocol="my_own")
    more = {"path": "/w/soco.pth", "sha256": "12" * 32, "facts": {"recipe": "", "parts": ["fpn", "box_head"]}}
    record(tmp_path / "more", "moco_v2", 0, _voc(58.0), weights=more)
    older = record(tmp_path / "older", "moco_v2", 0, _voc(50.0))
    result = json.loads((older / "results.json").read_text())
    result["weights"]["facts"] = {"protocol": result["weights"]["facts"]["recipe"]}  # the field's name in those days
    (older / "results.json").write_text(json.dumps({key: result[key] for key in ("protocol", "weights", "metrics")}))
    tables = summary.build_tables(summary.find_runs([tmp_path]))
    said = {(table.name, table.variant): table for table in tables}
    assert len(tables) == len(said) == 6 and all(len(table.rows) == 1 for table in tables)
    voc = "voc0712_faster_rcnn_R_50_C4_24k"
    assert said[voc, ""].comparable and said[voc, ""].differences
    beyond = "pretrained in addition to the backbone: fpn, box_head"
    for variant in ("modified: SOLVER.MAX_ITER=9000", "config not recorded", beyond):
        assert not (said[voc, variant].comparable or said[voc, variant].differences or said[voc, variant].published)
    assert said["my_own", ""].protocol is None
    # A run of before config_changes were written is compared through its config.yaml.
    (older / "config.yaml").write_text(load_cfg(get_protocol(voc).config, ["SOLVER.MAX_ITER", "9000"]).dump())
    read = read_run(older)
    assert read.changes == ("SOLVER.MAX_ITER=9000",) and read.init == "moco_v2_R50_200ep"


def test_a_result_of_no_shipped_protocol_is_read_and_compared_with_nothing(tmp_path: Path) -> None:
    folder = record(tmp_path / "own", "moco_v2", 0, _voc(50.0), protocol="mine")
    result = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(result | {"config_changes": None}))  # as the trainer writes it
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    assert (table.protocol, table.comparable, len(table.rows)) == (None, False, 1)


def test_a_trial_of_a_supervised_file_is_the_supervised_baseline(tmp_path: Path) -> None:
    weights = {"path": "/w/R-50.pkl", "sha256": "ef" * 32, "facts": {"recipe": "", "origin": "unknown"}}
    folder = record(tmp_path / "a", "supervised", 0, _voc(53.0), weights=weights)
    assert read_run(folder).init == ""
    (folder / "trial.json").write_text(json.dumps({"init": {"label": "supervised", "kind": "supervised"}}))
    assert read_run(folder).init == "supervised"


def test_weights_of_one_name_but_other_content_are_not_averaged(tmp_path: Path) -> None:
    record(tmp_path / "a", "moco_v2", 0, _voc(57.0))
    record(tmp_path / "b", "moco_v2", 1, _voc(50.0), weights=WEIGHTS["moco_v2"] | {"sha256": "0123456789" * 6})
    record(tmp_path / "c", "moco_v2", 0, _voc(57.5))
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    assert [(row.label, len(row.runs)) for row in table.rows] == [("moco_v2 [01234567]", 1), ("moco_v2 [abababab]", 2)]
    assert any("several runs have seed 0" in note for note in table.notes)


def test_a_curve_of_a_resumed_run(tmp_path: Path) -> None:
    lines = [(i, {"total_loss": 1.0}) for i in (0, 20, 40)] + [(i, {"total_loss": 2.0}) for i in (20, 40, 60)]
    run = record(tmp_path / "run", "moco_v2", 0, _voc(57.0), curve=lines)
    with (run / "metrics.json").open("a") as file:
        file.write('{"iteration": 80, "tot')  # killed while writing
    assert read_run(run).curve("total_loss") == [(0, 1.0), (20, 2.0), (40, 2.0), (60, 2.0)]


def test_two_baselines_of_one_name_in_a_later_table(tmp_path: Path) -> None:
    record(tmp_path / "first", "moco_v2", 0, _voc(39.0), protocol="coco_mask_rcnn_R_50_C4_1x")
    record(tmp_path / "moco", "moco_v2", 0, _voc(57.0))
    record(tmp_path / "a", "supervised", 0, _voc(53.0))
    record(tmp_path / "b", "supervised", 0, _voc(54.0), weights=WEIGHTS["supervised"] | {"sha256": "ef" * 32})
    report.write_report([tmp_path], tmp_path / "report")
    with (tmp_path / "report/report.csv").open(newline="") as file:
        cells = {(row["protocol"], row["pre-train"]): row for row in csv.DictReader(file) if row["metric"] == "bbox/AP"}
    moco = cells["voc0712_faster_rcnn_R_50_C4_24k", "moco_v2"]
    assert [moco[f"minus supervised [{digest}]"] for digest in ("cdcdcdcd", "efefefef")] == ["+4.0000", "+3.0000"]


def test_accumulation_is_told_and_compared_and_switches_are_noted(tmp_path: Path) -> None:
    for seed, autocast in ((0, ""), (1, "bfloat16")):
        record(
            tmp_path / f"seed{seed}", "moco_v2", seed, _voc(57.0), processes=1,
            scaled={"TEST.PRECISE_BN.NUM_ITER": [200, 1600]},
            engine={"AUTOCAST": autocast, "CHANNELS_LAST": False, "ACCUMULATE": 8},
        )  # fmt: skip
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    assert table.variant == "scaled to 1 process(es) with 8 batches per step: NUM_ITER 200 -> 1600" and table.comparable
    assert table.notes == ("moco_v2: its runs differ in their performance options: AUTOCAST bfloat16; none",)


def test_an_evaluation_alone_has_a_table_of_its_own(tmp_path: Path) -> None:
    curve = [(9, {"total_loss": 1.0}), (19, {"total_loss": 0.5})]
    run = record(tmp_path / "runs/a", "random", 0, _voc(33.0), curve=curve)
    detector = {"path": f"{run}/model_0000009.pth", "sha256": "56" * 32, "facts": WEIGHTS["random"]["facts"]}
    evaluated = record(tmp_path / "elsewhere", "random", 0, _voc(31.0), weights=detector)
    result = json.loads((evaluated / "results.json").read_text())
    kept = {key: value for key, value in result.items() if key not in ("iterations", "scaled", "config_changes")}
    (run / "results_eval_only.json").write_text(json.dumps(kept))
    tables = {table.variant: table for table in summary.build_tables(summary.find_runs([tmp_path / "runs"]))}
    assert set(tables) == {"", "evaluation alone (--eval-only); config not recorded"}
    (run / "eval_only").mkdir()
    (run / "eval_only/config.yaml").write_text(load_cfg(get_protocol(result["protocol"]).config).dump())
    tables = {table.variant: table for table in summary.build_tables(summary.find_runs([tmp_path / "runs"]))}
    table = tables["evaluation alone (--eval-only)"]
    assert not (table.comparable or table.published or table.differences)
    assert [(row.label, str(row.cells["bbox/AP"])) for row in table.rows] == [("a/model_0000009", "31.00 (1)")]
    report.write_report([tmp_path / "runs"], tmp_path / "report")
    page = _Page((tmp_path / "report/report.html").read_text())
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    assert sum(name.startswith("run-") for name in page.ids) == 2


def test_what_makes_a_mean_doubtful_is_noted(tmp_path: Path) -> None:
    record(tmp_path / "a", "moco_v2", 0, _voc(57.0))
    record(tmp_path / "b", "moco_v2", 1, {"AP": 57.5, "AP50": 82.5, "AP75": None}, commit="decaf")
    (table,) = summary.build_tables(summary.find_runs([tmp_path]))
    assert table.rows[0].cells["bbox/AP75"].n == 1
    assert table.notes == (
        "moco_v2: some of its 2 runs lack a metric; n is in parentheses", "the runs come from 2 different commits",
    )  # fmt: skip


class _Page(HTMLParser):
    """Collects ids, local links, addresses that would be fetched, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name == "id" and tag in ("div", "section"):
                self.ids.append(str(value))
            elif name == "href" and tag == "a":
                self.links.append(str(value))
            elif name in ("src", "srcset") or (name == "href" and tag == "link"):
                self.fetched.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _comparison(root: Path) -> Path:
    """Three inits, two seeds, two parts of the labels, per-class figures and curves."""
    for init, ap in (("moco_v2", 57.0), ("supervised", 53.0), ("random", 33.0)):
        for seed in (0, 1):
            for percent, part in ((100, 1.0), (10, 0.5)):
                bbox = _voc(ap * part + seed, **{"AP-cat": ap + 3, "AP-<dog>": 60 - ap / 10})
                record(
                    root / f"{init}/seed{seed}/{percent}", init, seed, bbox,
                    changes=[f"DATASETS.FRACTION={percent}.0"] * (percent != 100),
                    curve=[(i, {"total_loss": 2 - i / 100, "bbox/AP": ap * i / 100}) for i in range(0, 100, 10)],
                )  # fmt: skip
    return root


def test_the_report_in_all_its_forms(tmp_path: Path) -> None:
    runs = _comparison(tmp_path / "runs")
    names = [path.name for path in report.write_report([runs], tmp_path / "report")]
    assert names == ["report.md", "report.html", "report.tex", "report.csv", "runs.csv"]
    page = (tmp_path / "report/report.html").read_text()
    parsed = _Page(page)
    assert not parsed.open and not parsed.fetched and "@import" not in page and "url(" not in page.split("<svg")[0]
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    assert sum(name.startswith("run-") for name in parsed.ids) == 12
    assert page.count("<svg") == 3, "over labels, AP and loss over iterations"
    assert "&lt;dog&gt;" in page and "<dog>" not in page

    text = (tmp_path / "report/report.md").read_text()
    for line in (
        ["moco_v2", "100%", "57.50 ± 0.71 (2)", "82.50 ± 0.71 (2)", "63.50 ± 0.71 (2)"],
        ["MoCo v2, 200 epochs, published", "100%", "57.0 ± 0.2 (5)", "82.4 ± 0.2 (5)", "63.6 ± 0.4 (5)"],
        ["moco_v2, 100%", "MoCo v2, 200 epochs, published", f"+0.50 {report.FLAG}", "+0.10", "-0.10"],
        ["moco_v2, 10%", "supervised, run here", "+2.00", "+2.00", "+2.00"],
        ["cat", "60.00 ± 0.00 (2)", "56.00 ± 0.00 (2)", "+4.00"],
    ):
        assert line in [_cells(found) for found in text.splitlines()], line
    assert text.index("| cat ") < text.index("| <dog> "), "from the largest gain to the largest loss"

    with (tmp_path / "report/report.csv").open(newline="") as file:
        cells = {(row["pre-train"], row["labels percent"], row["metric"]): row for row in csv.DictReader(file)}
    moco = cells["moco_v2", "100", "bbox/AP"]
    assert (float(moco["mean"]), float(moco["minus published"]), moco["flag"]) == (57.5, 0.5, report.FLAG)
    assert (float(moco["minus supervised"]), float(moco["minus random"]), moco["n"]) == (4.0, 24.0, "2")
    assert moco["folders"].split() == [str(runs / f"moco_v2/seed{seed}/100") for seed in (0, 1)]
    assert not cells["moco_v2", "10", "bbox/AP"]["minus published"], "a part of the labels is not the paper's row"
    with (tmp_path / "report/runs.csv").open(newline="") as file:
        run = next(csv.DictReader(file))
    assert (run["commit"], run["weights SHA-256"], run["hardware"]) == ("c0ffee", "ab" * 32, "8 x NVIDIA V100")

    for block in (tmp_path / "report/report.tex").read_text().split("\\begin{tabular}{")[1:]:
        columns = len(block.split("}")[0])
        assert {line.count(" & ") + 1 for line in block.splitlines() if line.endswith("\\\\")} == {columns}


def test_the_rows_compared_by_class_can_be_chosen(tmp_path: Path) -> None:
    runs = _comparison(tmp_path / "runs")
    report.write_report([runs], tmp_path / "report", ["supervised", "random"])
    assert "supervised minus random" in (tmp_path / "report/report.html").read_text()
    with pytest.raises(ValueError, match="no run was initialised from 'imagenet'; the runs are moco_v2, random"):
        report.write_report([runs], tmp_path / "report", ["imagenet", "random"])


def test_folders_without_a_finished_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no finished run"):
        report.write_report([tmp_path], tmp_path / "report")


FOREIGN = {
    "torchvision": '{"accuracy": 0.76, "epoch": 90}',
    "no test set": '{"protocol": "x", "metrics": {"bbox": {"AP": 1.0}}}',
    "words": '{"protocol": "x", "metrics": {"val": {"bbox": {"AP": "57.0"}}}}',
    "truth": '{"protocol": "x", "metrics": {"val": {"bbox": {"AP": true}}}}',
    "list of sets": '{"protocol": "x", "metrics": [{"bbox": {"AP": 1.0}}]}',
    "weights": '{"protocol": "x", "metrics": {}, "weights": "w.pth"}',
    "facts": '{"protocol": "x", "metrics": {}, "weights": {"facts": {"origin": 3}}}',
    "changes": '{"protocol": "x", "metrics": {}, "config_changes": "SEED=1"}',
    "part": '{"protocol": "x", "metrics": {}, "config_changes": ["DATASETS.FRACTION=all"]}',
    "scaled": '{"protocol": "x", "metrics": {}, "scaled": {"SOLVER.MAX_ITER": 4}}',
    "seed": '{"protocol": "x", "metrics": {}, "seed": "one"}',
    "protocol": '{"protocol": ["x"], "metrics": {}}',
    "list": "[1, 2]",
    "number": "3",
    "null": "null",
    "cut": '{"protocol": "x", "metr',
    "empty": "",
    "bytes": "\udcff\udcfe",
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_result_of_another_program_is_left_out_by_name(text: str, tmp_path: Path) -> None:
    other = tmp_path / "runs/other/results.json"
    other.parent.mkdir(parents=True)
    other.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"runs contains no finished run that can be read:\n{other} (is|was|cannot)"):
        report.write_report([tmp_path / "runs"], tmp_path / "report")
    record(tmp_path / "runs/ours", "random", 0, _voc(33.8))
    left_out: list[str] = []
    (run,) = summary.find_runs([tmp_path / "runs"], left_out.append)
    assert run.label == "random" and len(left_out) == 1 and left_out[0].startswith(str(other))


def test_what_was_left_out_is_in_the_report_and_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(tmp_path / "runs/ours", "random", 0, _voc(33.8), curve=[(9, {"total_loss": 1.0}), (19, {"total_loss": 0.5})])
    with (tmp_path / "runs/ours/metrics.json").open("ab") as file:
        file.write(
            b'5\n[1]\nnull\n{"iteration": "x"}\n{"total_loss": 1}\n{"iteration": 29, "total_loss": NaN}\n\xff\n{"iter'
        )
    for name in ("a", "b"):
        record(tmp_path / f"runs/{name}", "random", 1, _voc(40.0))
    (tmp_path / "runs/a/trial.json").write_text('{"init": "random"}')
    (tmp_path / "runs/b/results.json").unlink()
    (tmp_path / "runs/b/results.json").mkdir()
    report.write_report([tmp_path / "runs"], tmp_path / "report")
    assert [record.message.split()[2] for record in caplog.records] == [
        str(tmp_path / "runs/a/trial.json"), str(tmp_path / "runs/b/results.json"),
    ]  # fmt: skip
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "2 left out" in text and "runs/a/trial.json was not written by moco-d2 trials: wrong init" in text
    (run,) = summary.find_runs([tmp_path / "runs"], print)
    assert run.curve("total_loss") == [(9, 1.0), (19, 0.5)]

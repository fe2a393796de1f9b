"""Pretraining runs and probes in a report: joined by the content of files, and drawn together."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from recorded_runs import VOC_C4, record

from moco_d2.commands.report import main
from moco_d2.config import load_cfg
from moco_d2.facts import ResNetFacts
from moco_d2.io.provenance import sha256
from moco_d2.reports import pictures, report
from moco_d2.reports.curves import plot_lines

RECIPE = "moco_v2_R50_200ep"


def pretrain(folder: Path, recipe: str = RECIPE, done: int = 40, queue: int = 64, fall: float = 0.1) -> dict[str, Any]:
    """Write what a pretraining of 40 iterations in 4 epochs leaves after ``done``; return its backbone's weights."""
    folder.mkdir(parents=True)
    words = ["SSL.ARGS.queue_size", str(queue), "SOLVER.EPOCHS", "4"]
    (folder / "config.yaml").write_text(load_cfg("Pretrain/moco_v2_R50_200ep", words).dump())
    lines: list[dict[str, float]] = [{"iteration": 0, "monitor/knn_top1": 30.0}]
    for step in range(4, done, 5):
        lines.append({
            "iteration": step, "epoch": (step + 1) / 10, "total_loss": 4 - fall * step, "feature_std": 0.05,
            "contrast_acc1": 0.2, "contrast_acc5": 0.5, "monitor/knn_top1": 30 + step / 2, "unreadable_images": 0,
        })  # fmt: skip
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"iterat')
    facts = ResNetFacts(origin=f"moco_d2 MoCo on photos, {done} of 40 iterations", recipe=recipe).as_dict()
    weights = torch.tensor([fall, done])
    torch.save({"model": {"encoder_q.x": weights}, "facts": facts}, folder / f"model_{done - 1:07d}.pth")
    torch.save({"state_dict": {"x": weights}, "facts": facts}, folder / "backbone.pth")
    return {"path": str(folder / "backbone.pth"), "sha256": sha256(folder / "backbone.pth"), "facts": facts}


def converted(source: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the weights entry of a detector that started from a converted file, which may be gone."""
    root = sha256(source)
    return {"path": "/gone/c.pth", "sha256": root[::-1], "source_sha256": root, "facts": facts}


def probe(file: Path, weights: dict[str, Any], top1: float, of: str = "imagenet", **more: Any) -> None:
    """Write the result of a linear probe, or with ``probe="knn"`` of another."""
    sets = {half: {"name": f"{of}_{half}", "pictures": 100} for half in ("train", "val")}
    results = [{"of": "last epoch", "top1": top1}, {"of": "best epoch", "top1": top1 + 1}]
    content = {"probe": "linear", "protocol": "moco", "results": results, "size": 224, "seed": 0, "command": "probe"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**content, "weights": weights, **sets, **more}))


def table_of(folder: Path) -> dict[str, dict[str, str]]:
    """Return ``{row: {column: cell}}`` of the table of backbones in report.md."""
    text = (folder / "report.md").read_text().split("## Pretraining")[1].split("\n## ")[0]
    head, _, *body = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {line[0]: dict(zip(head, line, strict=True)) for line in body}


def test_a_run_its_probes_and_its_detectors_are_one_row(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    full = pretrain(runs / "full/pretrain")
    other = pretrain(runs / "other/pretrain", f"{RECIPE} (modified)", fall=0.05)
    source = runs / "full/pretrain/model_0000039.pth"
    for seed, ap in enumerate((56.0, 58.0)):
        record(runs / f"d{seed}", "moco_v2", seed, {"AP": ap}, weights=converted(source, full["facts"]))
    record(
        runs / "d2", "moco_v2", 0, {"AP": 50.0}, weights=converted(runs / "other/pretrain/backbone.pth", other["facts"])
    )
    record(runs / "d3", "random", 0, {"AP": 33.0})
    probe(runs / "full/linear/probe.json", {**full, "path": "/moved/backbone.pth"}, 67.0)
    shutil.copy(runs / "full/linear/probe.json", runs / "full/probe_again.json")  # --output, too
    probe(runs / "other/probe.json", other, 60.0)
    knn = [{"k": k, "temperature": 0.07, "top1": 40.0 + k, "top5": 90.0} for k in (1, 20)]
    probe(runs / "other/probe_knn.json", other, 0, probe="knn", protocol=None, results=knn)
    probe(
        tmp_path / "named.json", {"path": "x/theirs.pth", "sha256": "f" * 64}, 1.0, "mine", protocol="moco (modified)"
    )
    # The run goes on: an earlier checkpoint keeps a row of its own.
    early = {
        **full["facts"],
        "origin": "moco_d2 MoCo on photos, 20 of 40 iterations",
        "recipe": f"{RECIPE} (unfinished)",
    }
    torch.save({"model": {}, "facts": early}, runs / "full/pretrain/model_0000019.pth")
    at = {"path": "m.pth", "sha256": sha256(runs / "full/pretrain/model_0000019.pth"), "facts": early}
    probe(runs / "probe_early.json", at, 50.0)
    report.write_report([runs, tmp_path / "named.json"], tmp_path / "report")
    rows = table_of(tmp_path / "report")
    ap, linear = f"box AP, {VOC_C4}", "linear moco, imagenet_val"
    knn20 = "kNN (k 20, T 0.07), imagenet_val"
    names = [
        "full/pretrain", "full/pretrain, 20 iterations", "MoCo v2, 200 epochs, published", "other/pretrain", "x/theirs",
        "random, encoder unknown", "random, published",
    ]  # fmt: skip
    assert sorted(rows) == sorted(names)
    row = rows["full/pretrain"]
    assert (row["recipe"], row["epochs"], row["loss"], row["monitor kNN"]) == (RECIPE, "4 of 4", "0.1", "30.0 -> 49.5")
    assert (row[ap], row[linear], row[knn20]) == ("57.00 ± 1.41 (2)", "67.00 (1)", "-")
    row = rows["other/pretrain"]
    assert (row["recipe"], row[ap], row[linear], row[knn20]) == (
        f"{RECIPE} (modified)", "50.00 (1)", "60.00 (1)", "60.00 (1)",
    )  # fmt: skip
    row = rows["full/pretrain, 20 iterations"]
    assert (row["epochs"], row["loss"], row[linear], row[ap]) == ("2 of 4", "2.1", "50.00 (1)", "-")
    row = rows["MoCo v2, 200 epochs, published"]
    assert (row[ap], row[linear], row[knn20]) == ("57.0 ± 0.2 (5)", "67.7 (1)", "-")
    assert rows["x/theirs"]["linear moco (modified), mine_val"] == "1.00 (1)"
    assert rows["random, published"][ap] == "33.8 ± 0.2 (5)"
    lines = list(rows)
    assert lines.index("MoCo v2, 200 epochs, published") > lines.index("full/pretrain")
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<svg") == 5 and "By epoch, a line per run" in page
    with (tmp_path / "report/report.csv").open(newline="") as file:
        means = {(line["pre-train"], line["protocol"].split(",")[0]): line["mean"] for line in csv.DictReader(file)}
    assert means["full/pretrain", "linear moco"] == "67.0000"
    with (tmp_path / "report/runs.csv").open(newline="") as file:
        assert [line["epochs"] for line in csv.DictReader(file) if line["protocol"] == "pretraining"] == ["4 of 4"] * 2


def test_probes_that_differ_have_columns_of_their_own(tmp_path: Path) -> None:
    weights = {"path": "a.pth", "sha256": "a" * 64}
    probe(tmp_path / "probe_1.json", weights, 60.0)
    probe(tmp_path / "probe_2.json", weights, 62.0, seed=1)
    probe(tmp_path / "probe_3.json", weights, 10.0, size=112)
    report.write_report([tmp_path], tmp_path / "report")
    cells = [cell for name, cell in table_of(tmp_path / "report")["a"].items() if name.startswith("linear moco")]
    assert cells == ["61.00 ± 1.41 (2)", "10.00 (1)"]


def test_curves_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Figure] = []
    save = pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    pretrain(tmp_path / "a")
    pretrain(tmp_path / "b", done=20, queue=128)
    for _ in range(2):  # it replaces its own picture
        main([str(tmp_path / "a"), str(tmp_path / "b"), "--curves", str(tmp_path / "c.png")])
    assert pictures.is_picture(tmp_path / "c.png")
    panels = {axis.get_title(): axis for axis in saved[0].axes if axis.get_visible()}
    assert list(panels) == [
        "loss", "contrast accuracy: acc@1", "contrast accuracy: acc@5", "feature std",
        "kNN top-1 of held-out pictures, %",
    ]  # fmt: skip
    first, second = panels["loss"].lines[:2]
    assert [line.get_label() for line in (first, second)] == ["a", "b"]
    assert list(first.get_xdata())[-1] == 4 and list(second.get_xdata()) == [0.5, 1, 1.5, 2]
    assert len(panels["loss"].lines) == 4 and len(panels["feature std"].lines) == 3, "chance of each queue; one sphere"


def test_no_two_of_many_curves_look_alike() -> None:
    axis = Figure().subplots()
    plot_lines(axis, "loss", {str(number): [[(0, 1.0), (1, number)]] for number in range(20)})
    assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 20


@pytest.mark.parametrize("end", [0.5, 1000, 192_000, 1_234_567, 256_000_000])
def test_numbers_below_a_small_plot_do_not_touch(end: float) -> None:
    figure = Figure(figsize=(11, 3.4 * 3), layout="constrained")  # as a sweep draws six
    axis = figure.subplots(3, 2)[0, 0]
    plot_lines(axis, "loss", {"a": [[(0, 1.0), (end, 2.0)]]}, x="pictures shown")
    figure.draw_without_rendering()
    assert all(a.get_window_extent().x1 < b.get_window_extent().x0 for a, b in pairwise(axis.get_xticklabels()))
    signs = str.maketrans({"k": "e3", "M": "e6", "\N{MINUS SIGN}": "-"})
    numbers = [float(label.get_text().translate(signs)) for label in axis.get_xticklabels()]
    assert numbers == pytest.approx(axis.get_xticks())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    pretrain(tmp_path / "runs/good")
    pretrain(tmp_path / "runs/bad")
    (tmp_path / "runs/bad/metrics.json").write_text("not JSON\n")
    (tmp_path / "runs/probe_theirs.json").write_text('{"accuracy": 1}')
    content = report.read([tmp_path / "runs"])
    assert [run.folder.name for run in content.pretrainings] == ["good"]
    assert [problem.split()[0] for problem in content.left_out] == [
        str(tmp_path / "runs/bad/metrics.json"), str(tmp_path / "runs/probe_theirs.json"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"bad/metrics.json is missing or damaged"):
        report.read([tmp_path / "runs/bad"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing contains no finished run, no pretraining run and no probe"):
        report.read([tmp_path / "runs", tmp_path / "nothing"])
    (tmp_path / "mine.png").write_bytes(b"mine")
    for name, message in (("mine.png", "did not write it"), ("c.jpg", "ends in .png")):
        with pytest.raises(ValueError, match=message):
            main([str(tmp_path / "runs/good"), "--curves", str(tmp_path / name)])
    record(tmp_path / "d", "random", 0, {"AP": 1.0})
    with pytest.raises(ValueError, match="there is none in"):
        main([str(tmp_path / "d"), "--curves", str(tmp_path / "c.png")])

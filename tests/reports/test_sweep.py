"""Sweeps: what is run at which length, cut off, continued, repeated and refused, and what is collected."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from moco_d2.commands import cli, sweep
from moco_d2.commands import trials as trials_command
from moco_d2.facts import IMAGENET_RGB
from moco_d2.layers.resnet import build_resnet, describe
from moco_d2.reports import sweep_page, trials
from moco_d2.reports.sweep import Line, Sweep, SweepRun, find_config, of_methods, plan, read_sweep
from tests.probes.labelled_pictures import grow

ROOT = Path(__file__).parents[2]
SMALL = [
    "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", "0.125", "DATA.CROP_SIZE", "32", "SOLVER.IMS_PER_BATCH",
    "8", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu", "SSL.MONITOR.K", "5",
]  # fmt: skip
FILE = """
title: Two queues and two scripts
axis: queue
paper: made up
lines:
  MoCo:
    config: moco_v2
    set: {SSL.ARGS.dim: 16, SSL.ARGS.bn_groups: 2}
    keys: [SSL.ARGS.queue_size]
    values: {16: 50.0, 32: fails}
  broken: {config: moco_v2, script: broken.py}
  Toy: {config: toy.yaml, script: toy.py}
"""
TOY = """
from moco_d2.commands import cli, pretrain
from tests import toy_method
if __name__ == "__main__":
    toy_method.register()
    cli.guard(pretrain.main)
"""


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a sweep in the working directory, with a picture set of three classes."""
    grow(tmp_path / "pictures", train=8)
    monkeypatch.chdir(tmp_path)
    for name, value in {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, str(value))
    Path("sweep.yaml").write_text(FILE)
    Path("toy.py").write_text(TOY)
    Path("broken.py").write_text("raise SystemExit('broken')\n")
    Path("toy.yaml").write_text("SSL: {METHOD: Toy}\nDATA: {AUGMENTATION: toy}\nSOLVER: {EPOCHS: 1}\n")
    options = ["--views", "320", "--data", "pictures", "--output", "out"]
    return ["sweep.yaml", *options, "DATASETS.TRAIN", '("pictures/train",)', *SMALL]


def with_options(line: list[str], *options: str) -> list[str]:
    return [line[0], *options, *line[1:]]


@pytest.mark.slow
def test_a_sweep_is_cut_off_continued_and_collected_and_another_one_is_refused(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen([sys.executable, "-m", "moco_d2", "sweep", *line], stdout=subprocess.DEVNULL)
    pointer, deadline = Path("out/MoCo_16/last_checkpoint"), time.monotonic() + 300
    while not pointer.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75

    assert sweep.main(line) == 1
    out = capsys.readouterr().out
    assert "[1/4] MoCo_16: begun, 40 iterations, batch 8" in out and "3 done, 1 failed" in out
    assert "failed; its log is" in out and "broken" in Path("out/broken/sweep.log").read_text()
    assert "resuming at iteration" in Path("out/MoCo_16/log.txt").read_text()
    content = json.loads(Path("out/sweep.json").read_text())
    rows = {row["run"]: row for row in content["runs"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "MoCo_16": "done", "MoCo_32": "done", "broken": "new", "Toy": "done",
    }  # fmt: skip
    for row in (rows["MoCo_16"], rows["MoCo_32"], rows["Toy"]):
        assert row["pictures"] == 320 and 0 <= row["knn"] <= 100 and row["peak_memory_gib"] > 0.1
        assert row["loss"] > 0 and row["images_per_second"] > 0
    assert (rows["MoCo_16"]["paper"], rows["MoCo_32"]["paper"], rows["Toy"].get("paper")) == (50.0, "fails", None)
    assert "\n* broken: failed; its log is" in Path("out/sweep.md").read_text()
    assert Path("out/sweep.png").stat().st_size > 10_000

    written = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.pth")}
    assert sweep.main(with_options(line, "--only", "MoCo_*", "Toy")) == 0
    assert "3 done before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.pth")} == written
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR: 0\.03 in the folder, 0\.5 requested\n.*another --output"):
        sweep.main([*line, "SOLVER.BASE_LR", "0.5"])
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER: 40 in the folder, 10 requested"):
        sweep.main([word.replace("320", "80") for word in line])
    Path("out/MoCo_16/request.json").unlink()
    with pytest.raises(ValueError, match="MoCo_16 contains a run that moco-d2 sweep did not start"):
        sweep.main(line)


def pretrained(words: dict[str, str]) -> None:
    """Leave what a pretraining of two log lines would."""
    folder, steps = Path(words["OUTPUT_DIR"]), int(words["SOLVER.MAX_ITER"])
    network = build_resnet("resnet18", width=0.125, stem=words["SSL.ENCODER.ARGS.stem"])
    origin = f"moco_d2 MoCo on x, {steps} of {steps} iterations"
    facts = describe(network, IMAGENET_RGB, origin=origin, recipe="mine").as_dict()
    state = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    torch.save({"state_dict": state, "facts": facts}, folder / "backbone.pth")
    lines: list[dict[str, float]] = [{"iteration": 0, "monitor/knn_top1": 20.0}]
    lines += [{"iteration": 19, "total_loss": 4.0, "images_per_second": 10, "peak_memory_gib": 2.0}]
    lines += [{"iteration": steps - 1, "total_loss": 3.0, "images_per_second": 30, "peak_memory_gib": 1.0}]
    lines += [{"iteration": steps - 1, "monitor/knn_top1": 40.0}]
    (folder / "metrics.json").write_text("".join(json.dumps(one) + "\n" for one in lines))


def test_linear_accuracy_and_detectors_stand_in_the_table_and_the_picture(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def follow(command: Sequence[str], log: Path, *_: Any, **__: Any) -> int:
        first = next(place for place, word in enumerate(command) if trials_command.KEY.fullmatch(word))
        words = dict(zip(command[first::2], command[first + 1 :: 2], strict=True))
        if "linear" in command:
            assert command[command.index("--size") + 1] == "32" and command[command.index("--val") + 1] == "pictures"
            sets = {half: {"name": "pictures", "pictures": 9} for half in ("train", "val")}
            probe = {"probe": "linear", "weights": {}, "results": [{"top1": 55.5}], **sets}
            Path(words["OUTPUT_DIR"], "probe.json").write_text(json.dumps(probe))
        else:
            pretrained(words)
        return 0

    def planned(protocol: str, weights: Sequence[str], seeds: Any, output: Path, **_: Any) -> list[Any]:
        for number, label in enumerate(word.partition("=")[0] for word in weights):
            folder = output / protocol / label / "seed0"
            folder.mkdir(parents=True, exist_ok=True)
            metrics = {"voc": {"bbox": {"AP50": 50.0, "AP": 30.0 + number}}}
            (folder / "results.json").write_text(json.dumps({"protocol": protocol, "metrics": metrics}))
        return list(weights)

    figures: list[Figure] = []
    monkeypatch.setattr(cli, "follow", follow)
    monkeypatch.setattr(trials, "plan", planned)
    monkeypatch.setattr(trials_command, "run_all", lambda planned, gpus: 0)
    monkeypatch.setattr(sweep_page, "save_figure", lambda figure, path: figures.append(figure))
    Path("sweep.yaml").write_text(
        "lines:\n  a: {config: moco_v2, set: {SSL.ENCODER.ARGS.stem: imagenet}}\n"
        "  b: {config: moco_v2, set: {SSL.ENCODER.ARGS.stem: cifar}}\n"
    )
    more = ["SSL.ARGS.queue_size", "16", "SSL.ARGS.bn_groups", "2"]
    assert sweep.main([*with_options(line, "--linear", "--detect", "quick"), *more]) == 0
    rows = {row["run"]: row for row in json.loads(Path("out/sweep.json").read_text())["runs"]}
    ap = "box AP, quick on voc"
    assert rows["a"] | {
        "loss": 3.0, "knn_before": 20.0, "knn": 40.0, "linear": 55.5, "images_per_second": 20, "peak_memory_gib": 2.0,
        "pictures": 320, "detection": {ap: 31.0},
    } == rows["a"]  # fmt: skip
    assert "detection" not in rows["b"] and "CIFAR stem" in rows["b"]["note"]
    lines = Path("out/sweep.md").read_text().splitlines()
    table = [[cell.strip() for cell in one.split("|")[1:-1]] for one in lines]
    head = ["run", "pictures", "loss", "kNN before, %", "kNN, %", "linear, %", "images/s", "peak memory, GiB", ap]
    assert head in table
    assert ["a", "320", "3", "20.0", "40.0", "55.5", "20", "2.00", "31.0"] in table
    assert ["random", "", "-", "-", "-", "-", "-", "-", "30.0"] in table
    drawn = {axis.get_title(): axis for axis in figures[-1].axes if axis.get_visible()}
    assert {"kNN, %", "linear, %", "images/s", "peak memory, GiB", ap} < drawn.keys()
    assert [bar.get_width() for bar in drawn["linear, %"].patches] == [55.5, 55.5]
    knn = drawn["kNN top-1 of held-out pictures, %"].lines[0]
    assert (list(knn.get_xdata()), list(knn.get_ydata())) == ([0, 320], [20, 40])
    assert "conversion" not in capsys.readouterr().err


def runs_of(line: Line, tmp_path: Path, *opts: str, views: int = 500_000) -> list[SweepRun]:
    folder = grow(tmp_path / "many", train=1) if not (tmp_path / "many").exists() else tmp_path / "many"
    words = ["DATASETS.TRAIN", f"('{folder}/train',)", *opts]
    return plan(Sweep("", (line,)), tmp_path / "out", words, views)


def test_runs_with_other_batches_see_as_many_pictures_and_keep_their_schedule(tmp_path: Path) -> None:
    line = Line("a", "Pretrain/moco_v1_R50_200ep", {}, ("SOLVER.IMS_PER_BATCH",), {256: None, 1024: None})
    small, large = (run.cfg.SOLVER for run in runs_of(line, tmp_path, "SOLVER.WARMUP", "10"))
    assert (small.IMS_PER_BATCH, small.MAX_ITER) == (256, 1953) and (large.IMS_PER_BATCH, large.MAX_ITER) == (1024, 488)
    assert (small.EPOCHS, small.STEPS, small.CHECKPOINT_PERIOD) == (0, (1172, 1562), 195), "120 and 160 of 200 epochs"
    assert float(small.WARMUP) == pytest.approx(1953 / 20)
    (own,) = runs_of(Line("b", "Pretrain/moco_v2_R50_200ep"), tmp_path, "SOLVER.CHECKPOINT_PERIOD", "7", "SEED", "3")
    assert (own.cfg.SOLVER.CHECKPOINT_PERIOD, own.cfg.SEED, small.SCHEDULE) == (7, 3, "step")
    (whole,) = plan(Sweep("", (Line("c", "Pretrain/moco_v2_R50_200ep"),)), tmp_path / "out", own.opts[4:6])
    assert whole.cfg.SOLVER.EPOCHS == 200 and whole.cfg.SEED == 0 and whole.length == "200 epochs, batch 256"


FIGURE_3 = {
    "end_to_end": {256: 54.9, 512: 56.3, 1024: 57.3},
    "memory_bank": {256: 50.0, 512: 52.0, 1024: 54.1, 4096: 56.5, 16384: 57.8, 65536: 58.0},
    "MoCo": {256: 54.7, 512: 56.4, 1024: 57.5, 4096: 59.0, 16384: 60.4, 65536: 60.6},
}
MOMENTUM = {"MoCo": {0: "fails", 0.9: 55.2, 0.99: 57.8, 0.999: 59.0, 0.9999: 58.9}}


@pytest.mark.parametrize(("name", "figures"), [("figure3", FIGURE_3), ("momentum", MOMENTUM)])
def test_the_shipped_sweeps_are_the_papers_and_every_run_can_start(
    name: str, figures: dict[str, dict[Any, Any]], tmp_path: Path
) -> None:
    shipped = read_sweep(name, "R50")
    assert {line.name: dict(line.values) for line in shipped.lines} == figures
    folder = grow(tmp_path / "pictures", train=1)
    runs = plan(shipped, tmp_path / "out", ["DATASETS.TRAIN", f"('{folder}/train',)"], 500_000)
    assert len(runs) == sum(map(len, figures.values()))
    for run in runs:
        assert all(run.cfg.SSL.ARGS.get(key.removeprefix("SSL.ARGS."), run.value) == run.value for key in run.line.keys)
        assert run.line.name != "end_to_end" or run.value == run.cfg.SOLVER.IMS_PER_BATCH
        assert name != "momentum" or run.cfg.SSL.ARGS.queue_size == 4096


def test_a_method_is_its_shortest_recipe_of_the_kind() -> None:
    assert find_config("moco_v2", "R50") == "Pretrain/moco_v2_R50_200ep"
    assert find_config("moco", "cifar10_R18") == "Pretrain/moco_cifar10_R18_200ep"
    own = of_methods(["moco_v1", "Pretrain/moco_v2_R50_800ep"], "R50").lines
    assert [line.name for line in own] == ["moco_v1", "moco_v2_R50_800ep"]


@pytest.mark.parametrize(("text", "said"), [
    ("lines: {}", "is not a sweep: it must have `lines`"),
    ("lines: {a: {set: {}}}", "the line a has no config"),
    ("lines: {a: {config: moco_v2, keyes: [X]}}", "no entry 'keyes': it takes .*; did you mean 'keys'"),
    ("lines: {a: {config: moco_v2, keys: [SEED]}}", "`keys` and `values` belong together"),
    ("lines: {a: {config: moco_v2, script: none.py}}", "there is no script none.py"),
    ("lines: {a: {config: moko_v2}}", "the line a: there is no recipe Pretrain/moko_v2_R50_.*; did you mean 'moco_v2'"),
    ("lines: {a/b: {config: moco_v2}}", "'a/b' cannot be a folder's name: it is a path"),
    ("lines: {a: {config: moco_v2, keys: [SSL.ARGS.queue], values: [1]}}", r"a_1: .*no config key SSL\.ARGS\.queue;"),
    ("lines: {a: {config: moco_v2, set: {SSL.ARGS.bn_groups: 3}}}", r"a: .*cannot be split into 3 BN groups"),
    ("lines: [", "cannot be read"),
])  # fmt: skip
def test_a_wrong_file_is_refused_before_anything_is_written(text: str, said: str, line: list[str]) -> None:
    Path("sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        sweep.main(line)
    assert not Path("out").exists()


@pytest.mark.parametrize(("more", "said"), [
    (["--only", "x*"], r"--only x\*: the runs are MoCo_16, MoCo_32, broken, Toy"),
    (["OUTPUT_DIR", "x"], "OUTPUT_DIR is set by --output"),
    (["SOLVER.MAX_ITER", "5"], r"SOLVER\.MAX_ITER is set by --views"),
])  # fmt: skip
def test_a_wrong_command_line_is_refused(more: list[str], said: str, line: list[str]) -> None:
    words = with_options(line, *more) if more[0].startswith("-") else [*line, *more]
    with pytest.raises(ValueError, match=said):
        sweep.main(words)
    for wrong in ([], ["momentum", "--methods", "moco_v2"]):
        with pytest.raises(SystemExit):
            sweep.main(wrong)
    with pytest.raises(ValueError, match="--methods names moco_v2 twice"):
        sweep.main(["--methods", "moco_v2", "moco_v2"])
    with pytest.raises(ValueError, match="--views is 0; it must be at least 1"):
        sweep.main(["--methods", "moco_v2", "--views", "0"])
    assert not Path("out").exists()

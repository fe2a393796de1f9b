"""The CIFAR-10 demo, end to end on drawn pictures, and the picture of a run that is under way."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as benchmark
from benchmarks import proof
from moco_d2.config import load_cfg

TINY = (
    "SSL.ARGS.queue_size", 16, "SSL.ARGS.bn_groups", 1, "SSL.ARGS.dim", 8,
    "SOLVER.IMS_PER_BATCH", 8, "SOLVER.REFERENCE_BATCH", 8, "DATALOADER.NUM_WORKERS", 0, "SEED", 0,
)  # fmt: skip


def archive(path: Path, classes: int = 10) -> Path:
    """Write an .npz of two training pictures and one test picture a class."""
    rng, found = np.random.default_rng(0), {"classes": np.array([f"kind{n}" for n in range(classes)])}
    for half, count in (("train", 2 * classes), ("test", classes)):
        found[f"{half}_data"] = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        found[f"{half}_label"] = np.arange(count) % classes
    np.savez(path, **found)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run ``python -m benchmarks proof`` in this process; return its folder."""

    def run(*words: object) -> Path:
        output = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["benchmarks", "proof", "-o", str(output), *map(str, words)])
        benchmark.main()
        return output

    return run


def test_from_an_archive_to_the_curve_and_again(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--pictures", archive(tmp_path / "cifar.npz"), "--epochs", 2, "--width", 0.0625, *TINY)
    output = run(*words)
    assert "| authors' kNN, % |" in " ".join(capsys.readouterr().out.split())
    content = json.loads((output / "proof.json").read_text())
    assert [(row["epoch"], row["authors' kNN, %"]) for row in content["rows"]] == [(0, None), (2, 33.52)]
    assert all(0 <= row["kNN, %"] <= 100 for row in content["rows"]) and content["rows"][1]["loss"] > 0
    assert content["machine"] and "--resume" in content["pretraining"] and content["minutes"]["training"] > 0
    with Image.open(output / "proof.png") as image:
        assert image.width > 1000 and "![curves]" in (output / "proof.md").read_text()
    written = sorted((output / "pictures").rglob("*.png"))
    assert len(written) == 30 and len({path.parent for path in written}) == 20
    with np.load(tmp_path / "cifar.npz") as data, Image.open(output / "pictures/train/kind1/00011.png") as image:
        assert np.array_equal(image, data["train_data"][11])

    # Again: the pictures stay, the run is resumed, and a run that fails is named with its log.
    called: list[Sequence[str]] = []
    times = [path.stat().st_mtime_ns for path in written]
    monkeypatch.setattr(proof.cli, "follow", lambda words, *_: called.append(words) or 3)
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 3 and "pretrain.log" in capsys.readouterr().err
    assert "--resume" in called[0] and [path.stat().st_mtime_ns for path in written] == times
    with pytest.raises(ValueError, match=r"has other pictures than those of .*other\.npz; choose another --output"):
        run("--pictures", archive(tmp_path / "other.npz"), *TINY)


def test_a_run_under_way_is_drawn_with_the_later_of_two_values(run: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="has no figures yet"):
        run("--draw")
    cfg = load_cfg(proof.CONFIG, proof.settings(12, 0.25, "train", str(tmp_path)))
    assert (cfg.SSL.MONITOR.PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (2, 194)
    (folder / "config.yaml").write_text(cfg.dump())
    lines: list[dict[str, Any]] = [
        {"iteration": 0, "monitor/knn_top1": 30.0, "monitor/seconds": 60},
        *({"iteration": i, "epoch": (i + 1) / 97, "total_loss": 8.0 - i / 100, "time": 6} for i in (96, 145, 193)),
        {"iteration": 193, "monitor/knn_top1": 35.0}, {"iteration": 193, "monitor/knn_top1": 36.0},
    ]  # fmt: skip
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = json.loads((run("--draw") / "proof.json").read_text())
    first, second = content["rows"]
    assert (first["epoch"], first["kNN, %"], first["loss"]) == (0, 30, None)
    assert (second["epoch"], second["kNN, %"], second["authors' loss"]) == (2, 36, 7.2502)
    assert second["loss"] == pytest.approx(8 - (1.45 + 1.93) / 2)
    assert content["minutes"] == {"training": pytest.approx(19.4), "probes": 1}


def test_bad_pictures_are_refused_in_a_line(run: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such file or folder; leave it out"):
        run("--pictures", tmp_path / "nothing.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="cannot be read"):
        run("--pictures", tmp_path / "damaged.npz")
    with pytest.raises(ValueError, match="it has 3 classes; the authors' curve is of CIFAR-10"):
        run("--pictures", archive(tmp_path / "three.npz", 3))
    with pytest.raises(ValueError, match=r"--width is 0\.0"):
        run("--width", 0)
    assert not (tmp_path / "out" / "run").exists()


def test_the_published_curve_is_that_of_the_recipe() -> None:
    rows = list(proof._published())
    assert [row["epoch"] for row in rows] == list(range(1, 201)) and rows[-1]["knn_acc1"] == 82.58
    assert (rows[9]["knn_acc1"], rows[9]["train_loss"]) == (48.03, 5.991)


def test_folders_of_classes_are_used_as_they_are(tmp_path: Path) -> None:
    for half in ("train", "test"):
        for number in range(10):
            (tmp_path / half / f"kind{number}").mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / half / f"kind{number}" / "a.png")
    assert proof.pictures(str(tmp_path), tmp_path / "own") == (str(tmp_path / "train"), str(tmp_path))
    assert not (tmp_path / "own").exists()

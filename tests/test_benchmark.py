"""The benchmarks run, at a size that takes no time, and find equal numbers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_eval_compares_every_backend_and_both_voc_metrics(tmp_path: Path) -> None:
    command = [str(ROOT / "tools/benchmark.py"), "eval", "--images", "6", "--detections", "9"]
    done = subprocess.run(
        [sys.executable, *command, "-o", str(tmp_path / "rows.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert (content["images"], content["detections"]) == (6, 9)
    problems = {"COCO boxes, 6 x 9": 0, "VOC 2007, 6 x 9": 0, "VOC 2012, 6 x 9": 0}
    for row in content["rows"]:
        assert (row["ratio"] == 1) == (problems[row["problem"]] == 0)  # the reference comes first
        assert row["difference"] < 1e-12
        assert row["by"] in done.stdout
        problems[row["problem"]] += 1
    assert problems["COCO boxes, 6 x 9"] >= 3
    assert problems["VOC 2007, 6 x 9"] == problems["VOC 2012, 6 x 9"] == 2


def test_a_size_of_nothing_is_refused() -> None:
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), "eval", "--images", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--images is 0; it must be at least 1" in done.stderr


def test_convert_compares_with_torch_load(tmp_path: Path) -> None:
    command = [str(ROOT / "tools/benchmark.py"), "convert", "--width", "0.25", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, *command, "-o", str(tmp_path / "rows.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "rows.json").read_text())
    assert (content["width"], content["repeats"]) == (0.25, 1)
    works = ("torch.load", "conversion", "conversion, both SHA-256, report", "proof alone")
    assert tuple(row["work"] for row in content["rows"]) == 2 * works
    for row in content["rows"]:
        assert row["seconds"] > 0 and (row["ratio"] == 1) == (row["work"] == "torch.load")
        assert row["work"] in done.stdout and row["problem"] in done.stdout
        # What is dropped is never read, in either format.
        assert row["work"] != "conversion" or row["private"] < 0.5


def test_data_compares_every_backend_with_the_authors_loader(tmp_path: Path) -> None:
    words = ["--images", "4", "--repeats", "3", "-o", str(tmp_path / "data.json")]
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), "data", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "data.json").read_text())
    rows = {row["what"]: row["times as fast"] for row in content["loader"]}
    whole = "device: all on the CPU"
    assert list(rows) == ["the authors' loader", "pil", "cv2", "device: a worker's part", whole]
    assert rows["the authors' loader"] == 1 and all(ratio > 0 for ratio in rows.values())
    parts = [row["what"] for row in content["parts, ms"]]
    assert parts == ["decode", "crop", "brightness", "contrast", "saturation", "hue", "grey", "blur", "flip"]
    assert all(row[backend] > 0 for row in content["parts, ms"] for backend in ("pil", "cv2", "device"))
    apart = {row.pop("what"): row for row in content["difference to PIL, levels of 255"]}
    assert list(apart) == ["crop", "crop of a JPEG decoded at a half", *parts[2:], "solarise", "the whole recipe"]
    assert max(apart["crop"].values()) <= 1 < max(apart["hue"].values()) < 9, "of the same crop and step"
    assert "bottleneck: pil: " in done.stdout


def test_step_compares_with_its_encoders_the_authors_form_and_plain_ddp(tmp_path: Path) -> None:
    small = ["--batch", "16", "--size", "32", "--encoder", "resnet18", "--repeats", "2"]
    words = [*small, "-o", str(tmp_path / "step.json"), "SSL.ENCODER.WIDTH", "0.125", "SSL.ARGS.queue_size", "20000"]
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), "step", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "step.json").read_text())
    names = {title: [row["what"] for row in content[title]] for title in ("step", "two processes")}
    assert names["step"] == ["its encoders alone", "ours", "the authors' form"]
    assert names["two processes"] == ["encoders, plain DDP", "ours"]
    textbook, ours = (row["copies"] for row in content["memory"])
    assert textbook > 2.5 > ours
    assert "bottleneck: the encoders" in done.stdout and content["machine"]


def test_scale_finds_every_shard_read_and_the_same_batches(tmp_path: Path) -> None:
    words = ["--files", "3000", "--folders", "30", "--shards", "100", "--samples", "1100", "--images", "40"]
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), "scale", *words, "--repeats", "3"]
    done = subprocess.run([*command, "-o", str(tmp_path / "scale.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "scale.json").read_text())
    assert (content["shards"], content["samples"]) == (100, 1100)
    listing = {row["what"]: row["ratio"] for row in content["listing 3000 files in 30 folders"]}
    assert listing["os.walk, sorted"] == 1 > listing["remembered listing"]
    opened = content["reading the first image of a shard of 40"]
    assert [row["what"] for row in opened] == ["opened in an earlier run", "never opened"] and opened[1]["ratio"] > 1
    epoch = content["shards of an epoch, and batches 500000 to 500004"]
    assert [row["processes"] for row in epoch] == [1, 8, 32, 64]
    for row in epoch:
        assert row["batches as of one process"] and row["read by none"] == 0
        mean = 100 / row["processes"]
        assert row["each reads at least"] <= mean + 1 and mean <= row["at most"] <= mean + 2
    assert "| at step 1000003 |" in done.stdout and content["machine"]

"""The dry run of pretraining, as a user runs it."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moco_d2.engine.dry_run import _loading_speed

TOOL = Path(__file__).parents[2] / "tools" / "pretrain_net.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return str(folder)


def dry_run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    small = [
        "SOLVER.IMS_PER_BATCH", 64, "DATA.CROP_SIZE", 32, "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width",
        0.125, "SSL.ARGS.queue_size", 128, "DATALOADER.NUM_WORKERS", 1, "MODEL.DEVICE", "cpu",
    ]  # fmt: skip
    command = [sys.executable, TOOL, "--config-file", "Pretrain/moco_v2_R50_200ep", "--dry-run", *words, *small]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[1])},
    )  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_says_what_the_run_will_be(images: str, tmp_path: Path, processes: int) -> None:
    lanes = 32  # the smaller batch has to suit them
    done = dry_run(
        tmp_path, "--num-gpus", processes, "DATASETS.TRAIN", f'("{images}",)', "SSL.ARGS.bn_groups", 4,
        "DATA.LANES", lanes, "SOLVER.CHECKPOINT_KEEP", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(re.findall(r"^(\w+(?: run)?) +(.+)$", done.stdout, flags=re.MULTILINE))
    assert list(lines) == [
        "recipe", "data", "pictures", "schedule", "advice", "weights", "model", "training", "checkpoint", "memory",
        "bottleneck", "ETA", "dry run",
    ]  # fmt: skip
    assert lines["recipe"].startswith("moco_v2_R50_200ep, modified: ")
    assert "SSL.ENCODER.ARGS.width=0.125" in lines["recipe"] and lines["data"] == f"{images}: 70 images"
    assert lines["schedule"] == "200 epochs, 200 iterations of 64 images, lr 0.0075"
    assert "advice      the queue (SSL.ARGS.queue_size 128) holds the keys of 1.8 epochs of your 70" in done.stdout
    assert lines["advice"].startswith("after all 200 steps, 82% of the key encoder is still its initial weights")
    assert f"(extrapolated from {lanes} of 64 images)" in lines["training"]
    assert lines["checkpoint"].endswith("saved and resumed to the same weights, bit for bit")
    speeds = re.search(r"network ([\d.]+) images/s, loader ([\d.]+) images/s", lines["bottleneck"])
    eta = re.search(r"at ([\d.]+) images/s", lines["ETA"])
    assert speeds and eta and float(eta[1]) == min(float(speeds[1]), float(speeds[2]))
    assert lines["dry run"] == "passed"
    assert not list(tmp_path.iterdir()), "nothing is left behind"


class Simulated:
    """A loader whose workers each take 0.2 s for a batch and make two ahead, on a clock that only they move."""

    workers = 6

    def __init__(self) -> None:
        self.now = 0.0

    def __iter__(self) -> Iterator[None]:
        self.now += 5.0  # the network was busy while the workers began
        ready: list[float] = []
        taken: list[float] = []
        for number in itertools.count():
            free = taken[number - 2 * self.workers] if number >= 2 * self.workers else 0.0
            ready.append(max(free, ready[number - self.workers] if number >= self.workers else 0.0) + 0.2)
            self.now = max(self.now, ready[number])
            taken.append(self.now)
            yield


def test_the_loaders_speed_is_not_that_of_what_was_loaded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Simulated()
    monkeypatch.setattr("moco_d2.engine.dry_run.time", SimpleNamespace(perf_counter=lambda: loader.now))
    assert _loading_speed(loader, 2) == pytest.approx(6 * 2 / 0.2)  # type: ignore[arg-type]
    monkeypatch.setattr("moco_d2.engine.dry_run.AHEAD", 0)
    assert _loading_speed(loader, 2) > 1.2 * 6 * 2 / 0.2, "the simulation shows what is left out"  # type: ignore[arg-type]


def test_mistakes_end_in_lines_and_exit_code_2(images: str, tmp_path: Path) -> None:
    words = ("SOLVER.SCHEDULE", "cosin", "SSL.ARGS.momentum", 7, "SOLVER.BASE_LRR", 3, "SOLVER.GAMMA", "x")
    done = dry_run(tmp_path, "DATASETS.TRAIN", f'("{images}",)', *words)
    assert done.returncode == 2 and not done.stdout
    for said in ("did you mean 'cosine'?", "SSL.ARGS.momentum is 7", "no config key SOLVER.BASE_LRR", "GAMMA is 'x'"):
        assert said in done.stderr, "unknown keys, types and ranges, all at once"
    assert done.stderr.count("\n") == 4, done.stderr
    gone = dry_run(tmp_path, "DATASETS.TRAIN", '("no/such/folder",)')
    assert gone.returncode == 2 and "'no/such/folder', which is neither a folder" in gone.stderr


def test_pictures_that_cannot_be_decoded_are_named_and_too_many_are_refused(images: str, tmp_path: Path) -> None:
    import shutil

    from moco_d2.config import load_cfg
    from moco_d2.engine.dry_run import _check_pictures
    from moco_d2.engine.loader import build_loader

    folder = Path(shutil.copytree(images, tmp_path / "images"))
    for name in ("3.jpg", "44.jpg"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    def check(*words: object) -> list[tuple[str, str]]:
        opts = ["DATASETS.TRAIN", f"('{folder}',)", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "out", "SEED", 1]
        opts += ["SOLVER.IMS_PER_BATCH", 16, "DATALOADER.NUM_WORKERS", 1, *words]
        cfg = load_cfg("Pretrain/moco_v2_R50_200ep", [str(word) for word in opts])
        return list(_check_pictures(build_loader(cfg).dataset, cfg))

    ((subject, said),) = check()
    assert subject == "pictures" and said.startswith("68 of 70 can be decoded; left out: ")
    assert f"{folder}/3.jpg: image file is truncated" in said and f"{folder}/44.jpg: " in said
    with pytest.raises(
        ValueError,
        match=r"^68 of 70 can be decoded, but DATA.MAX_SKIPPED allows a fraction of 0.01 .*\n.*/3.jpg.*\n.*/44.jpg",
    ):
        check("DATA.MAX_SKIPPED", 0.01)
    assert check("DATA.DRY_RUN_PICTURES", 2) == [("pictures", "2 of 2 can be decoded")]

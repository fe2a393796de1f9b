"""The rehearsal of pretraining, as a user runs it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.data import EpochSampler, FileSource, ViewDataset, ViewLoader, build_recipe, list_images
from moco_d2.data.augment import Plan
from moco_d2.data.backends import DeviceBackend
from moco_d2.data.decode import Picture
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
        "SOLVER.IMS_PER_BATCH", 64, "DATA.CROP_SIZE", 32, "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.WIDTH", 0.125,
        "SSL.ARGS.queue_size", 128, "DATALOADER.NUM_WORKERS", 1, "MODEL.DEVICE", "cpu",
    ]  # fmt: skip
    command = [sys.executable, TOOL, "--config-file", "Pretrain/moco_v2_R50_200ep", "--dry-run", *words, *small]
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOOL.parents[1])},
    )  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rehearsal_says_what_the_run_will_be(images: str, tmp_path: Path, processes: int) -> None:
    lanes = 32  # the smaller batch has to suit them
    done = dry_run(
        tmp_path, "--num-gpus", processes, "DATASETS.TRAIN", f'("{images}",)', "SSL.ARGS.bn_groups", 4,
        "DATA.LANES", lanes, "SOLVER.CHECKPOINT_KEEP", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = dict(re.findall(r"^(\w+(?: run)?) +(.+)$", done.stdout, flags=re.MULTILINE))
    assert list(lines) == [
        "recipe", "data", "schedule", "weights", "model", "training", "checkpoint", "memory", "bottleneck", "ETA",
        "dry run",
    ]  # fmt: skip
    assert lines["recipe"].startswith("moco_v2_R50_200ep, modified: ")
    assert "SSL.ENCODER.WIDTH=0.125" in lines["recipe"] and lines["data"] == f"{images}: 70 images"
    assert lines["schedule"] == "200 epochs, 200 iterations of 64 images, lr 0.0075"
    assert f"(reckoned from {lanes} images of 64)" in lines["training"]
    assert lines["checkpoint"].endswith("saved and resumed to the same weights, bit for bit")
    speeds = re.search(r"network ([\d.]+) images/s, loader ([\d.]+) images/s", lines["bottleneck"])
    eta = re.search(r"at ([\d.]+) images/s", lines["ETA"])
    assert speeds and eta and float(eta[1]) == min(float(speeds[1]), float(speeds[2]))
    assert lines["dry run"] == "passed"
    assert not list(tmp_path.iterdir()), "nothing is left behind"


class Sleepy(DeviceBackend):
    """Takes 0.1 s an image, whatever the machine."""

    def prepare(self, picture: Picture, plans: Sequence[Plan]) -> list[np.ndarray]:
        time.sleep(0.1)
        return super().prepare(picture, plans)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # they sleep, whatever the number of cores
def test_the_loaders_speed_is_not_that_of_what_was_loaded_ahead(images: str) -> None:
    dataset = ViewDataset(FileSource(list_images([images])), build_recipe("moco_v2", 8), 0, Sleepy())
    loader = ViewLoader(dataset, EpochSampler(70, 2, 0), 6, torch.device("cpu"))
    speed, true = _loading_speed(loader, 2), 6 / 0.1
    assert 0.2 * true < speed < 1.5 * true


def test_mistakes_end_in_lines_and_exit_code_2(images: str, tmp_path: Path) -> None:
    words = ("SOLVER.SCHEDULE", "cosin", "SSL.ARGS.momentum", 7, "SOLVER.BASE_LRR", 3, "SOLVER.GAMMA", "x")
    done = dry_run(tmp_path, "DATASETS.TRAIN", f'("{images}",)', *words)
    assert done.returncode == 2 and not done.stdout
    for said in ("did you mean 'cosine'?", "SSL.ARGS.momentum is 7", "no config key SOLVER.BASE_LRR", "GAMMA is 'x'"):
        assert said in done.stderr, "unknown keys, types and ranges, all at once"
    assert done.stderr.count("\n") == 4, done.stderr
    gone = dry_run(tmp_path, "DATASETS.TRAIN", '("no/such/folder",)')
    assert gone.returncode == 2 and "'no/such/folder', which is neither a folder" in gone.stderr

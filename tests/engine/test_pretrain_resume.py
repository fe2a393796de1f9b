"""Pretraining killed at random moments, and while it writes, ends with the uninterrupted run's weights, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CONFIG = "Pretrain/moco_v2_R50_200ep"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return str(folder)


def options(images: str, processes: int, iterations: int) -> list[Any]:
    return [
        "DATASETS.TRAIN", f'("{images}",)', "SOLVER.IMS_PER_BATCH", 8, "DATA.CROP_SIZE", 32, "SSL.ENCODER.NAME",
        "resnet18", "SSL.ENCODER.ARGS.width", 0.5, "SSL.ARGS.queue_size", 4096, "SSL.ARGS.bn_groups", 2 // processes,
        "SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 3,
        "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 7,
    ]  # fmt: skip


def test_two_kills_and_a_request_to_stop(kill_and_resume, images: str, tmp_path: Path) -> None:
    found = kill_and_resume("pretrain", CONFIG, options(images, 1, 9), cuts=3)  # 3 steps an epoch
    assert found["killed while writing"] >= 1
    left = sorted(path.name for path in (tmp_path / "cut").glob("*model*"))
    assert left == ["model_0000006.pth", "model_0000007.pth", "model_0000008.pth", "model_final.pth"], "no leftovers"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_and_ten_requests(kill_and_resume, images: str, processes: int) -> None:
    found = kill_and_resume("pretrain", CONFIG, options(images, processes, 90), cuts=30, processes=processes)
    assert found["killed while writing"] >= 5

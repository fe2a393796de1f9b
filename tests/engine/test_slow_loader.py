"""A run says when it waits for its loader, what helps, and when it no longer waits."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.data.augment import Plan
from moco_d2.data.backends import PilBackend
from moco_d2.data.decode import Picture
from moco_d2.engine.pretrain import PretrainTrainer


class SlowBackend(PilBackend):
    """Takes its time over every image."""

    def prepare(self, picture: Picture, plans: Sequence[Plan]) -> list[np.ndarray]:
        time.sleep(0.003)
        return super().prepare(picture, plans)


class Relief(HookBase):
    """Gives a faster backend after 40 steps, and steps so long that waiting no longer counts."""

    def before_step(self) -> None:
        if self.trainer.iter == 40:
            self.trainer.data_loader.dataset.backend = PilBackend()
        if self.trainer.iter > 40:
            time.sleep(20 * get_event_storage().history("data_time").latest())


def test_waiting_for_the_loader_is_said_once_with_its_remedies(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    words = [
        "DATASETS.TRAIN", f'("{tmp_path}",)', "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu", "SEED", 7,
        "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.WIDTH", 0.125, "SSL.ARGS.queue_size", 24, "SSL.ARGS.dim", 16,
        "SSL.ARGS.bn_groups", 2, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.EPOCHS", 60, "DATALOADER.NUM_WORKERS", 0,
        "DATA.CROP_SIZE", 32, "DATA.BACKEND", "pil",
    ]  # fmt: skip
    trainer = PretrainTrainer(load_cfg("Pretrain/moco_v2_R50_200ep", [str(word) for word in words]))
    trainer.data_loader.dataset.backend = SlowBackend()
    trainer.register_hooks([Relief()])
    with caplog.at_level(logging.INFO, logger="moco_d2.engine.hooks"):
        trainer.train()
    said = [record.getMessage() for record in caplog.records if "the loader" in record.getMessage()]
    assert len(said) == 2
    assert said[0].startswith("the loader is the bottleneck: ")
    assert said[0].endswith("Remedies: more worker processes (DATALOADER.NUM_WORKERS is 0), DATA.BACKEND cv2")
    assert said[1].startswith("the loader keeps up again: ")

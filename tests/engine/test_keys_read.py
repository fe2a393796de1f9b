"""The table of roles is true: a pretraining reads the keys that it calls read, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode
from PIL import Image
from recorded_cfg import RecordedCfg

from moco_d2.config import flat, load_cfg, roles
from moco_d2.config.roles import PRETRAINING
from moco_d2.engine.trainer import PretrainTrainer

# Read only where there is more than a test has.
ELSEWHERE = {
    "VERSION": "by files that are merged",
    "CUDNN_BENCHMARK": "by default_setup, which the commands call",
    "DATASETS.CUSTOM": "by register_custom, which the commands call",
    "SSL.MONITOR.VAL": "with SSL.MONITOR.DATASET",
    "SOLVER.STEPS": "with SOLVER.SCHEDULE step",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "with SOLVER.CLIP_GRADIENTS.ENABLED",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "with SOLVER.CLIP_GRADIENTS.ENABLED",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "with SOLVER.CLIP_GRADIENTS.ENABLED",
}
# Detectron2's loop looks for results to compare with; there are none.
LOOKED_AT = {"TEST.EXPECTED_RESULTS"}


def keys_read(cfg: CfgNode) -> set[str]:
    RecordedCfg.read.clear()
    trainer = PretrainTrainer(RecordedCfg(cfg))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return set(RecordedCfg.read)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
def test_the_table_of_roles_says_what_pretraining_reads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.jpg")
    words = [
        "DATASETS.TRAIN", f'("{tmp_path}",)', "OUTPUT_DIR", tmp_path / "out", "SOLVER.IMS_PER_BATCH", 4,
        "DATA.CROP_SIZE", 32, "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size", 8,
        "SSL.ARGS.bn_groups", 2, "SOLVER.EPOCHS", 1, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 7,
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", [str(word) for word in words])
    read = keys_read(cfg)
    undeclared = {key for key in read if roles.role(key, PRETRAINING) == roles.UNREAD} - LOOKED_AT
    assert not undeclared, "read, and in the table not read by pretraining"
    declared = {key for key in flat(cfg) if roles.role(key, PRETRAINING) != roles.UNREAD}
    # A method and an encoder get their arguments as a whole.
    arguments = ("SSL.ARGS.", "SSL.ENCODER.ARGS.")
    assert {key for key in declared - read if not key.startswith(arguments)} == set(ELSEWHERE)

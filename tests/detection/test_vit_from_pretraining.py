"""A ViT from pretraining, in either method, through the proved conversion into a detector."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from moco_d2.commands import convert
from moco_d2.config import load_cfg
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.weights import load_weights, pretrained_names
from moco_d2.engine.trainer import PretrainTrainer

DETECTOR = "quick_schedules/mask_rcnn_ViT_SFP_quick"
METHODS = {
    "dino": ["SSL.ARGS.outputs", 32, "SSL.ARGS.hidden", 16, "SSL.ARGS.bottleneck", 8],
    "moco_v3": ["SSL.ARGS.dim", 8, "SSL.ARGS.hidden_dim", 16],
}
NET = "backbone.net."


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_pretrained_converted_and_loaded(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(tmp_path / f"images/{i}.png")
    sizes = {"dim": 24, "heads": 2, "depth": 2, "patch": 8, "image": 32}
    opts = [
        *(word for key, value in sizes.items() for word in (f"SSL.ENCODER.ARGS.{key}", value)), *METHODS[method],
        "DATASETS.TRAIN", tmp_path / "images", "SOLVER.IMS_PER_BATCH", 4, "SOLVER.EPOCHS", 1, "SOLVER.WARMUP", 0.0,
        "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 0, "OUTPUT_DIR", tmp_path,
    ]  # fmt: skip
    PretrainTrainer(load_cfg(f"Pretrain/{method}_cifar10_ViT_200ep", [str(word) for word in opts])).train()
    assert convert.main([str(tmp_path / "backbone.pth"), str(tmp_path / "vit.pth")]) == 0
    assert "proof" in capsys.readouterr().out

    cfg = load_cfg(DETECTOR, ["MODEL.DEVICE", "cpu"])
    cfg.merge_from_file(str(tmp_path / "vit.yaml"))
    cfg.MODEL.VIT.GLOBAL_BLOCKS = (1,)
    model = build_model(cfg)
    record = load_weights(TransferCheckpointer(model), cfg, str(tmp_path / "vit.pth"))
    pretrained = torch.load(tmp_path / "backbone.pth")
    loaded = model.state_dict()
    for name in pretrained_names(model):
        assert torch.equal(loaded[name], pretrained["state_dict"][name.removeprefix(NET)]), name
    assert record.facts.recipe.startswith(f"{method}_cifar10_ViT_200ep") and record.source_sha256

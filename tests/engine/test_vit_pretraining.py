"""Pretraining of ViTs: the published optimisation, the gradient of the first layer, and exact resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.engine.build import outline
from moco_d2.engine.optim import build_clipper, parameter_groups, scaled_lr
from moco_d2.engine.schedules import lr_factor, weight_decay
from moco_d2.engine.step import first_layer
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.facts import BackboneFacts, ViTFacts
from moco_d2.methods import SSLMethod
from moco_d2.reports.panels import panels_of_run
from moco_d2.reports.pretraining import read_pretraining

SMALL = ["SSL.ENCODER.ARGS.dim", 24, "SSL.ENCODER.ARGS.heads", 2, "SSL.ENCODER.ARGS.depth", 2]
DINO, MOCO = "Pretrain/dino_cifar10_ViT_200ep", "Pretrain/moco_v3_cifar10_ViT_200ep"
HEADS = {
    DINO: ["SSL.ARGS.outputs", 32, "SSL.ARGS.hidden", 16, "SSL.ARGS.bottleneck", 8, "SSL.ARGS.freeze", 0.5],
    MOCO: ["SSL.ARGS.dim", 8, "SSL.ARGS.hidden_dim", 16],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for half in ("train", "val"):
        for i in range(16):
            path = folder / half / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
    return folder


def options(config: str, images: Path, *more: Any) -> list[str]:
    words = [
        *SMALL, *HEADS[config], "DATASETS.TRAIN", f'("{images / "train"}",)', "SOLVER.IMS_PER_BATCH", 8,
        "DATALOADER.NUM_WORKERS", 0, "SOLVER.EPOCHS", 2, "SOLVER.WARMUP", 0.5, "MODEL.DEVICE", "cpu", "SEED", 5, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def decays_of(recipe: str, method: SSLMethod) -> dict[str, float]:
    """Return the weight decay of each trainable parameter by name."""
    names = {id(p): key for key, p in method.named_parameters()}
    return {
        names[id(p)]: group["weight_decay"]
        for group in parameter_groups(load_cfg(recipe), method)
        for p in group["params"]
    }


def test_dino_decays_clips_and_schedules_as_published() -> None:
    recipe = "Pretrain/dino_ViT_S_16_100ep"
    cfg = load_cfg(recipe)
    method = outline(cfg)
    decays, parameters = decays_of(recipe, method), dict(method.named_parameters())
    assert {name for name, decay in decays.items() if decay == 0} == {n for n in decays if parameters[n].ndim == 1}
    assert decays["student.backbone.pos_embed"] == decays["student.backbone.cls_token"] == 0.04
    assert parameters["student.head.last_layer.weight_v"].shape == (65536, 256)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in method.modules())
    assert scaled_lr(cfg) == pytest.approx(1e-3) and lr_factor(cfg, 100_000, 1000) * 1e-3 == pytest.approx(1e-6)
    assert (weight_decay(cfg, 0.0), weight_decay(cfg, 1.0)) == pytest.approx((0.04, 0.4))
    one = torch.nn.Parameter(torch.zeros(2))
    one.grad = torch.tensor([30.0, 40.0])
    build_clipper(cfg)(one)
    torch.testing.assert_close(one.grad, torch.tensor([1.8, 2.4]))


@pytest.mark.parametrize(("size", "million"), [("S", 21.7), ("B", 85.8)])
def test_moco_v3_decays_everything_that_it_trains(size: str, million: float) -> None:
    recipe = f"Pretrain/moco_v3_ViT_{size}_300ep"
    cfg = load_cfg(recipe)
    method = outline(cfg)
    decays, backbone = decays_of(recipe, method), method.backbone()
    assert set(decays.values()) == {0.1} and not any("momentum" in key for key in decays)
    assert not {f"base_encoder.{key}" for key in ("pos_embed", "patch_embed.proj.weight")} & set(decays)
    assert backbone.blocks[0].attn.num_heads == 12
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(million, abs=0.1)
    assert scaled_lr(cfg) == pytest.approx(2.4e-3) and lr_factor(cfg, 400, 10) == 1 and build_clipper(cfg) is None


def test_the_largest_gradient_of_the_first_trainable_layer_is_recorded_and_drawn(images: Path, tmp_path: Path) -> None:
    opts = options(
        MOCO, images, "OUTPUT_DIR", tmp_path, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        1e-4, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm",
    )  # fmt: skip
    cfg = load_cfg(MOCO, opts)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    trainer = PretrainTrainer(cfg)
    encoder = trainer.method.base_encoder
    layer = encoder.blocks[0].attn.qkv.weight
    assert first_layer(trainer.method) is layer, "the patch projection is frozen"
    before = {key: value.clone() for key, value in encoder.patch_embed.state_dict().items()}
    norms: list[float] = []
    layer.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm().item()))
    trainer.train()
    (record,) = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert len(norms) == 4 and max(norms) > norms[-1], "not the last step's"
    assert record["first_layer_gradient"] == pytest.approx(max(norms)), "before it is clipped"
    assert all(torch.equal(value, before[key]) for key, value in encoder.patch_embed.state_dict().items())
    assert "gradient of the first layer" in [panel.title for panel in panels_of_run(read_pretraining(tmp_path))]
    facts = BackboneFacts.from_dict(torch.load(tmp_path / "backbone.pth")["facts"])
    assert isinstance(facts, ViTFacts) and (facts.patch, facts.heads, facts.image) == (4, 2, 32)
    thawed = outline(load_cfg(MOCO, [*opts, "SSL.ENCODER.ARGS.freeze_patches", "False"]))
    assert first_layer(thawed) is thawed.base_encoder.patch_embed.proj.weight
    resnet = outline(load_cfg("Pretrain/moco_v2_R50_200ep"))
    assert first_layer(resnet) is resnet.encoder_q.conv1.weight


@pytest.mark.slow  # the contract tests resume the same method inside an epoch
def test_dino_with_stochastic_depth_and_a_monitor_is_killed_and_continues_exactly(kill_and_resume, images) -> None:
    more = ["SOLVER.CHECKPOINT_PERIOD", 1, "SSL.MONITOR.DATASET", images, "SSL.MONITOR.K", 3]
    found = kill_and_resume("pretrain", DINO, options(DINO, images, *more), cuts=1)
    assert found["killed"] == 1

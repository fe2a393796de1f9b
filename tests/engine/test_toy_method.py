"""A method that needs all that the contract offers goes through training, resuming, pictures and conversion."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase
from PIL import Image
from toy_method import Toy, toy_augmentation

from moco_d2.config import load_cfg
from moco_d2.convert import convert_checkpoint, read_facts
from moco_d2.data import AUGMENTATIONS
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.methods import METHODS
from moco_d2.reports.pictures import draw_pretraining_curve, draw_view_pairs

IMAGES, BATCH, EPOCHS = 20, 8, 2  # two steps an epoch


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Register the method and its augmentation for these tests only: others walk the registries."""
    METHODS["Toy"], AUGMENTATIONS["toy"] = Toy, toy_augmentation
    yield
    del METHODS["Toy"], AUGMENTATIONS["toy"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def config(images: str, output: Path, *more: object) -> Any:
    output.mkdir(parents=True, exist_ok=True)
    words = [
        "SSL.METHOD", "Toy", "DATASETS.TRAIN", f'("{images}",)', "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", BATCH,
        "DATA.CROP_SIZE", 32, "DATA.AUGMENTATION", "toy", "SSL.ENCODER.NAME", "resnet50", "SSL.ENCODER.WIDTH", 0.125,
        "SOLVER.EPOCHS", EPOCHS, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 0, "SOLVER.OPTIMIZER", "lars",
        "SOLVER.EXCLUDE_1D", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "DATALOADER.NUM_WORKERS", 0,
        "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", [str(word) for word in words], stage="pretraining")
    (output / "config.yaml").write_text(cfg.dump())
    return cfg


class Watch(HookBase):
    """Notes the method's state and the optimizer's rates behind each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.rates: list[list[float]] = []

    def after_step(self) -> None:
        self.states.append(copy.deepcopy(self.trainer.method.state_dict()))
        self.rates.append([group["lr"] for group in self.trainer._trainer.optimizer.param_groups])


def train(cfg: Any, resume: bool = False) -> tuple[PretrainTrainer, Watch]:
    trainer, watch = PretrainTrainer(cfg), Watch()
    trainer.resume_or_load(resume)
    trainer.register_hooks([watch])
    trainer.train()
    return trainer, watch


@pytest.fixture(scope="module")
def run(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PretrainTrainer, Watch]:
    folder = tmp_path_factory.mktemp("toy") / "run"
    return folder, *train(config(images, folder))


def test_the_command_line_may_name_another_method_than_the_file(images: str, tmp_path: Path) -> None:
    cfg = config(images, tmp_path / "run")
    assert dict(cfg.SSL.ARGS) == {"dim": 8, "start": 0.9}, "its own defaults, and none of MoCo's arguments"


def test_every_part_of_the_contract_is_used(run: tuple[Path, PretrainTrainer, Watch]) -> None:
    folder, trainer, watch = run
    method = trainer.method
    assert isinstance(method, Toy) and len(method.bank.features) == IMAGES
    assert method.ahead.sum() == 2 * BATCH and torch.equal(method.ahead, method.seen), "replay shows what training does"
    first, second, _, last = watch.states
    assert torch.equal(first["predictor.weight"], second["predictor.weight"]), "frozen behind the backward pass"
    assert not torch.equal(second["predictor.weight"], last["predictor.weight"])
    assert not torch.equal(first["target.conv1.weight"], last["target.conv1.weight"]), "moved behind the step"
    predictor = {rates[-1] for rates in watch.rates}
    assert len(predictor) == 1 and len({rates[0] for rates in watch.rates}) > 1, "a constant lr beside a cosine"
    written = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()][-1]
    assert {"toy_similarity", "loss_target", "loss_bank", "total_loss"} <= set(written)
    backbone = torch.load(folder / "backbone.pth")["state_dict"]
    assert torch.equal(backbone["conv1.weight"], last["target.conv1.weight"]), "the target is what is transferred"


def test_it_resumes_to_the_same_weights(run: tuple[Path, PretrainTrainer, Watch], images: str, tmp_path: Path) -> None:
    folder, trainer, _ = run
    cut = tmp_path / "cut"
    cfg = config(images, cut)
    for name in ("model_0000000.pth", "backbone.pth"):
        (cut / name).write_bytes((folder / name).read_bytes())
    (cut / "last_checkpoint").write_text("model_0000000.pth")
    again, watch = train(cfg, resume=True)
    assert len(watch.states) == 3
    for name, value in trainer.method.state_dict().items():
        assert torch.equal(again.method.state_dict()[name], value), name


def test_pictures_and_conversion_take_it(run: tuple[Path, PretrainTrainer, Watch], tmp_path: Path) -> None:
    folder, trainer, _ = run
    draw_pretraining_curve(folder, tmp_path / "curve.png")
    draw_view_pairs(trainer.cfg, tmp_path / "views.png", count=3)
    for name in ("curve.png", "views.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 50
    convert_checkpoint(folder / "backbone.pth", tmp_path / "toy.pth", proof=False)
    facts = read_facts(tmp_path / "toy.pth")
    assert facts is not None and "Toy" in facts.origin and facts.protocol.endswith("(modified)")

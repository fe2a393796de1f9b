"""A method that needs all that the contract offers goes through every stage, from the dry run to the report."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.engine import HookBase
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.convert import convert_checkpoint, read_facts
from moco_d2.convert.back import restore
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.engine.checkpoint import backbone_prefix
from moco_d2.engine.dry_run import rehearse
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.layers.heads import without_head
from moco_d2.reports.pictures import draw_pretraining_curve, draw_view_pairs
from moco_d2.reports.report import write_report
from tests import toy_method
from tests.detection.conftest import dataset_root  # noqa: F401, a fixture
from tests.detection.small_detector import SHORT, VOC_C4, small_cfg
from tests.toy_method import Toy

CONFIG = "Pretrain/moco_v2_R50_200ep"
IMAGES, BATCH, EPOCHS = 20, 8, 2  # two steps an epoch


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    toy_method.register()
    yield
    toy_method.unregister()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(folder)


def options(images: str, *more: object) -> list[str]:
    words = [
        "SSL.METHOD", "Toy", "DATASETS.TRAIN", f'("{images}",)', "SOLVER.IMS_PER_BATCH", BATCH,
        "DATA.CROP_SIZE", 32, "DATA.AUGMENTATION", "toy", "SSL.ENCODER.NAME", "resnet50",
        "SSL.ENCODER.ARGS.width", 0.125,
        "SOLVER.EPOCHS", EPOCHS, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINT_KEEP", 0, "SOLVER.OPTIMIZER", "lars",
        "SOLVER.EXCLUDE_1D", True, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "DATALOADER.NUM_WORKERS", 0,
        "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def config(images: str, output: Path) -> Any:
    output.mkdir(parents=True, exist_ok=True)
    cfg = load_cfg(CONFIG, options(images, "OUTPUT_DIR", output), stage="pretraining")
    (output / "config.yaml").write_text(cfg.dump())
    return cfg


class Watch(HookBase):
    """Records the method's state and the optimizer's rates after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.rates: list[list[float]] = []

    def after_step(self) -> None:
        self.states.append(copy.deepcopy(self.trainer.method.state_dict()))
        self.rates.append([group["lr"] for group in self.trainer._trainer.optimizer.param_groups])


@pytest.fixture(scope="module")
def run(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PretrainTrainer, Watch]:
    folder = tmp_path_factory.mktemp("toy") / "run"
    trainer, watch = PretrainTrainer(config(images, folder)), Watch()
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([watch])
    trainer.train()
    return folder, trainer, watch


def test_the_command_line_may_name_another_method_than_the_file(images: str, tmp_path: Path) -> None:
    cfg = config(images, tmp_path / "run")
    assert dict(cfg.SSL.ARGS) == {"dim": 8, "start": 0.9}, "its own defaults, and none of MoCo's arguments"


def test_a_leaf_on_the_common_base_inherits_nothing_of_moco(tmp_path: Path) -> None:
    leaf = tmp_path / "toy.yaml"
    leaf.write_text("_BASE_: Base/pretrain.yaml\nSSL:\n  METHOD: Toy\n")
    cfg = load_cfg(str(leaf))
    assert dict(cfg.SSL.ARGS) == {"dim": 8, "start": 0.9}
    assert (cfg.SOLVER.EPOCHS, cfg.DATASETS.TRAIN) == (200, ("imagenet_train",)), "what is common"


def test_its_dry_run_passes(images: str, tmp_path: Path) -> None:
    found = dict(rehearse(config(images, tmp_path / "run")))
    assert found["model"].startswith("Toy, resnet50: ") and "bit for bit" in found["checkpoint"]


def test_every_part_of_the_contract_is_used(run: tuple[Path, PretrainTrainer, Watch]) -> None:
    folder, trainer, watch = run
    method = trainer.method
    assert isinstance(method, Toy) and len(method.bank.features) == IMAGES
    assert method.ahead.sum() == 2 * BATCH and torch.equal(method.ahead, method.seen), "replay shows what training does"
    first, second, _, last = watch.states
    assert torch.equal(first["predictor.weight"], second["predictor.weight"]), "frozen after the backward pass"
    assert not torch.equal(second["predictor.weight"], last["predictor.weight"])
    assert not torch.equal(first["target.conv1.weight"], last["target.conv1.weight"]), "moved after the step"
    predictor = {rates[-1] for rates in watch.rates}
    assert len(predictor) == 1 and len({rates[0] for rates in watch.rates}) > 1, "a constant lr beside a cosine"
    written = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()][-1]
    assert {"toy_similarity", "loss_target", "loss_bank", "total_loss"} <= set(written)
    backbone = torch.load(folder / "backbone.pth")["state_dict"]
    assert torch.equal(backbone["conv1.weight"], last["target.conv1.weight"]), "the target is what is transferred"


def test_two_processes_killed_and_resumed_end_with_the_same_weights(
    kill_and_resume: Callable[..., dict[str, Any]], images: str
) -> None:
    found = kill_and_resume("pretrain", CONFIG, options(images, "SOLVER.EPOCHS", 4), cuts=2, processes=2)
    assert found["killed"] == 2


def test_its_checkpoint_names_method_and_place_and_starts_no_other_method(
    run: tuple[Path, PretrainTrainer, Watch], images: str, tmp_path: Path
) -> None:
    folder, _, _ = run
    checkpoint = folder / "model_final.pth"
    assert torch.load(checkpoint)["backbone"] == {"method": "Toy", "prefix": "target."}
    moco = ["SSL.METHOD", "MoCo", "DATA.AUGMENTATION", "moco_v2", "SSL.ARGS.queue_size", 16, "SSL.ARGS.dim", 8]
    words = options(images, "OUTPUT_DIR", tmp_path, *moco, "MODEL.WEIGHTS", checkpoint)
    trainer = PretrainTrainer(load_cfg(CONFIG, words))
    with pytest.raises(ValueError, match=rf"{checkpoint}: the checkpoint is of a Toy run, but SSL\.METHOD is MoCo"):
        trainer.resume_or_load(resume=False)
    shutil.copytree(folder, tmp_path / "run")
    trainer = PretrainTrainer(load_cfg(CONFIG, options(images, "OUTPUT_DIR", tmp_path / "run", *moco)))
    with pytest.raises(ValueError, match=r"of a Toy run, but SSL\.METHOD is MoCo"):
        trainer.resume_or_load(resume=True)


def test_a_backbone_that_is_computed_has_no_place(run: tuple[Path, PretrainTrainer, Watch]) -> None:
    method = run[1].method

    class Folded(Toy):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.target = method.target

        def backbone(self) -> torch.nn.Module:
            return copy.deepcopy(without_head(self.target))

    assert backbone_prefix(method) == "target." and backbone_prefix(Folded()) is None


def test_pictures_take_it(run: tuple[Path, PretrainTrainer, Watch], tmp_path: Path) -> None:
    folder, trainer, _ = run
    draw_pretraining_curve(folder, tmp_path / "curve.png")
    draw_view_pairs(trainer.cfg, tmp_path / "views.png", count=3)
    for name in ("curve.png", "views.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or ()) > 50


@pytest.mark.parametrize("name", ["backbone.pth", "model_final.pth"])
def test_both_its_files_convert_and_go_back(
    run: tuple[Path, PretrainTrainer, Watch], tmp_path: Path, name: str
) -> None:
    source, back = run[0] / name, tmp_path / "back.pth"
    original = torch.load(run[0] / "backbone.pth")["state_dict"]
    convert_checkpoint(source, tmp_path / "converted.pth", proof=False)
    facts = read_facts(tmp_path / "converted.pth")
    assert facts is not None and "Toy" in facts.origin and facts.recipe.endswith("(modified)")
    converted = torch.load(tmp_path / "converted.pth")["model"]
    assert len(converted) == 265
    assert np.array_equal(converted["res5.2.conv3.weight"], original["layer4.2.conv3.weight"])
    for path in (source, tmp_path / "converted.pth"):
        restore(path, back, "torchvision")
        found = torch.load(back)["state_dict"]
        assert all(torch.equal(found[key], value) for key, value in original.items() if "batches" not in key)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")  # Detectron2's
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # VOC classes without a box
def test_a_detector_is_fine_tuned_from_it_and_reported(
    run: tuple[Path, PretrainTrainer, Watch],
    dataset_root: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    weights, output = tmp_path / "toy.pth", tmp_path / "detector"
    convert_checkpoint(run[0] / "backbone.pth", weights, proof=False)
    width = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32,
             "MODEL.RESNETS.WIDTH_PER_GROUP", 8]  # fmt: skip
    sets = ["DATASETS.TRAIN", "('toy_voc',)", "DATASETS.TEST", "('toy_voc',)"]
    register_pascal_voc("toy_voc", str(dataset_root / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("toy_voc").evaluator_type = "pascal_voc"
    try:
        cfg = small_cfg(VOC_C4, *SHORT, *width, *sets, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", output)
        trainer = TransferTrainer(cfg)
        trainer.resume_or_load(resume=False)
        stem = trainer.model.backbone.stem.conv1.weight
        assert torch.equal(stem, torch.as_tensor(torch.load(weights)["model"]["stem.conv1.weight"]))
        trainer.train()
        write_report([output], tmp_path / "report")
    finally:
        DatasetCatalog.remove("toy_voc")
        MetadataCatalog.remove("toy_voc")
    row = next(line for line in (tmp_path / "report/report.md").read_text().splitlines() if line.startswith("| toy "))
    score = json.loads((output / "results.json").read_text())["metrics"]["toy_voc"]["bbox"]["AP"]
    assert f" {score:.2f} " in row

"""The monitor: what it measures, what it leaves alone, in one process and in two, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.data.view_pairs import view_pairs
from moco_d2.engine.dry_run import rehearse
from moco_d2.engine.monitor import Monitor, labelled_sets, probe_count
from moco_d2.engine.preflight import config_problems
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.layers.spread import effective_rank
from moco_d2.model_zoo import pretraining_changes
from moco_d2.reports import pictures

CONFIG = "Pretrain/moco_v2_R50_200ep"
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
KNOWN, HELD_OUT = 6, 3  # pictures of each class


def draw(folder: Path, count: int, seed: int) -> None:
    """Draw a folder of noisy pictures for each colour."""
    rng = np.random.default_rng(seed)
    for number, colour in enumerate(COLOURS):
        (folder / f"c{number}").mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-40, 40, (40, 50, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(folder / f"c{number}" / f"{i}.png")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    draw(folder / "train", KNOWN, 0)
    draw(folder / "val", HELD_OUT, 1)
    return folder


def options(labelled: Path, output: Path, *more: object) -> list[str]:
    words = [
        "DATASETS.TRAIN", f"('{labelled}/train',)", "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 8,
        "DATA.CROP_SIZE", 32, "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size",
        24, "SSL.ARGS.dim", 16, "SSL.ARGS.bn_groups", 2, "SOLVER.EPOCHS", 3, "SOLVER.CHECKPOINT_PERIOD", 2,
        "SOLVER.CHECKPOINT_KEEP", 0, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def config(labelled: Path, output: Path, *more: object) -> CfgNode:
    output.mkdir(exist_ok=True, parents=True)
    return load_cfg(CONFIG, options(labelled, output, *more), stage="pretraining")


def monitored(labelled: Path, *more: object) -> list[object]:
    return ["SSL.MONITOR.DATASET", labelled, "SSL.MONITOR.PERIOD", 1, "SSL.MONITOR.K", 5, *more]


class Watch(HookBase):
    """Keeps each step's view of the generators, the images and the buffers; ends the run after a step."""

    def __init__(self, stop: int = -1) -> None:
        self.stop = stop
        self.seen: list[list[torch.Tensor]] = []

    def after_step(self) -> None:
        numpy = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
        buffers = [buffer.clone() for buffer in self.trainer.method.buffers()]
        self.seen.append([torch.random.get_rng_state(), numpy, *buffers])
        if self.trainer.iter == self.stop:
            raise KeyboardInterrupt


def train(cfg: CfgNode, watch: Watch, resume: bool = False) -> PretrainTrainer:
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks([watch])
    trainer.train()
    return trainer


def final(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "model_final.pth")
    return content


def same(first: Any, second: Any) -> bool:
    """Compare nested containers, tensors to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def measured(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line["monitor/knn_top1"] for line in lines if "monitor/knn_top1" in line}


def test_training_is_the_same_to_the_bit_with_a_resume_in_between(labelled: Path, tmp_path: Path) -> None:
    without, watched, cut = Watch(), Watch(), Watch(stop=4)
    train(config(labelled, tmp_path / "without"), without)
    extra = monitored(labelled, "DATALOADER.NUM_WORKERS", 1)
    trainer = train(config(labelled, tmp_path / "with", *extra), watched)
    assert all(same(a, b) for a, b in zip(without.seen, watched.seen, strict=True)), "generators, buffers, queue"
    assert trainer.method.training and trainer.method.encoder_q.layer1[0].bn1.training
    with pytest.raises(KeyboardInterrupt):
        train(config(labelled, tmp_path / "cut", *extra), cut)
    train(config(labelled, tmp_path / "cut", "SSL.MONITOR.DATASET", labelled, "SSL.MONITOR.PERIOD", 2), Watch(), True)
    assert same(final(tmp_path / "without"), final(tmp_path / "with")), "optimizer, facts and all"
    assert same(final(tmp_path / "without"), final(tmp_path / "cut")), "MONITOR's keys are not compared on resume"
    # Two steps an epoch: before the first, and after each epoch, though other scalars are written every 20 steps.
    assert list(measured(tmp_path / "with")) == [0, 1, 3, 5]
    assert list(measured(tmp_path / "cut")) == [0, 1, 3, 5]
    assert probe_count(trainer.cfg, 2, 6) == 4
    assert list((tmp_path / "with").glob("events.out.*"))
    draw_and_look(tmp_path / "with", trainer.cfg)


def draw_and_look(run: Path, cfg: CfgNode) -> None:
    (run / "config.yaml").write_text(cfg.dump())
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "plot_lines", lambda axis, title, lines, references: titles.append(title))
        pictures.draw_pretraining_curve(run, run / "curve.png")
    assert titles[-3:] == ["kNN top-1 of held-out pictures, %", "effective rank of the features", "alignment, uniformity"]


def test_a_probe_is_what_plain_code_finds(labelled: Path, tmp_path: Path) -> None:
    cfg = config(labelled, tmp_path, *monitored(labelled))
    method = PretrainTrainer.build_model(cfg)
    monitor = Monitor(cfg, method)
    values = monitor.probe()
    network = method.backbone().eval()

    def features(half: str) -> torch.Tensor:
        found = []
        for file in sorted((labelled / half).rglob("*.png")):
            image = Image.open(file).resize((46, 37), Image.Resampling.BILINEAR)  # the shorter side to 32 * 256 / 224
            array = np.asarray(image.crop((7, 2, 39, 34)), np.float32)
            x = (array - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
            with torch.no_grad():
                found.append(network(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0])
        return torch.stack(found)

    bank, queries = features("train"), features("val")
    right = 0
    for number, q in enumerate(queries):
        votes = [0.0] * len(COLOURS)
        similar = torch.cosine_similarity(q[None], bank)
        for place in similar.argsort(descending=True)[:5].tolist():
            votes[place // KNOWN] += float((similar[place] / 0.07).exp())
        right += int(np.argmax(votes)) == number // HELD_OUT
    assert values["monitor/knn_top1"] == pytest.approx(100 * right / len(queries))
    assert values["monitor/effective_rank"] == pytest.approx(effective_rank(queries), rel=1e-4)
    assert monitor.describe(values).startswith(f"kNN {100 * right / 9:.1f} % (k 5, 18 known pictures, 9 held-out ones)")
    part = Monitor(config(labelled, tmp_path, *monitored(labelled, "SSL.MONITOR.PICTURES", 6)), method)
    assert (len(part.bank), part.bank.labels.tolist(), len(part.held_out)) == (6, [0, 0, 1, 1, 2, 2], 6)


def test_a_pictures_views_depend_on_its_number_only(labelled: Path, tmp_path: Path) -> None:
    monitor = Monitor(config(labelled, tmp_path, *monitored(labelled)), PretrainTrainer.build_model(
        config(labelled, tmp_path)))  # fmt: skip
    (views,) = view_pairs(monitor.held_out, [2, 5, 7], monitor.augmentation)
    (again,) = view_pairs(monitor.held_out, [7, 5], monitor.augmentation)
    assert views.shape == (6, 3, 32, 32) and torch.equal(views[[4, 5, 2, 3]], again)
    assert not torch.equal(views[0], views[1])


TWO = """
import json, sys
import torch
from detectron2.utils import comm
from moco_d2.engine.monitor import Monitor
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.running.launch import run_distributed
from moco_d2.config import load_cfg

def work(words):
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", words)
    method = PretrainTrainer.build_model(cfg)
    for buffer in method.encoder_q.buffers():  # each process's own statistics
        if comm.get_rank() and buffer.is_floating_point():
            buffer.mul_(3)
    before = [buffer.clone() for buffer in method.buffers()]
    monitor = Monitor(cfg, method)
    values = monitor.probe()
    assert all(map(torch.equal, before, method.buffers())), "its own again"
    if comm.get_rank():
        monitor.held_out.arrays  # only process 1 cannot read
        monitor._batches = lambda pictures: (_ for _ in ()).throw(OSError("gone"))
    try:
        monitor.probe()
    except ValueError as error:
        values["error"] = str(error)
    if not comm.get_rank():
        print(json.dumps(values))

if __name__ == "__main__":
    LAUNCH
"""
